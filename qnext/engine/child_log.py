"""What an engine child logs: the last lines, those that state sizes, and marks that line it up with answers.

Native code logs by itself on the child's standard error, answers come through another pipe. Before each
answer the child writes a numbered mark into its log: who waits for that mark has all that was logged before.
"""

from __future__ import annotations

import logging
import re
import threading
from collections import deque
from typing import BinaryIO

from qnext.engine.log_reader import SIZE_LINE
from qnext.engine.protocol import LOG_MARK

logger = logging.getLogger(__name__)

LINES_KEPT = 2000
LINE_BYTES = 4096
"""Longer lines are cut in pieces, so that a child that floods its log cannot fill our memory."""


class ChildLog:
    """The log of one child, read by a thread that runs `read`."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._size_lines: list[str] = []
        self._flash_attention: str | None = None
        self._changed = threading.Condition()
        self._ended = False
        self._mark_seen = 0
        self.amx_in_use = False

    @property
    def lines(self) -> tuple[str, ...]:
        """The last lines."""
        with self._changed:
            return tuple(self._lines)

    @property
    def size_lines(self) -> tuple[str, ...]:
        """Lines since `forget` that state sizes: of the model's weights, and of the context made last."""
        with self._changed:
            return tuple(self._size_lines)

    @property
    def flash_attention(self) -> str | None:
        """`on` or `off` in the latest context, None before llama.cpp has said so."""
        with self._changed:
            return self._flash_attention

    def read(self, stream: BinaryIO) -> None:
        """Take in `stream` to its end."""
        while raw := stream.readline(LINE_BYTES):
            # A mark stands alone on its line unless native code left a line unfinished before it.
            text, mark, number = raw.decode(errors="replace").rstrip("\r\n").partition(LOG_MARK)
            with self._changed:
                self._take(text, bare_mark=bool(mark and not text))
                if mark and number.isdigit():
                    self._mark_seen = int(number)
                    self._changed.notify_all()
            logger.debug("engine: %s", text)
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _take(self, text: str, *, bare_mark: bool) -> None:
        if _NEW_CONTEXT in text:
            self._size_lines = [line for line in self._size_lines if f" model {SIZE_LINE}" in line]
            self._flash_attention = None
        if SIZE_LINE in text and len(self._size_lines) < LINES_KEPT:
            self._size_lines.append(text)
        if not text.startswith(_NOISE) and not bare_mark:
            self._lines.append(text)
        if _AMX_BUFFER.search(text):
            self.amx_in_use = True
        if found := _FLASH_ATTENTION.search(text):
            self._flash_attention = _FLASH_ATTENTION_WORDS.get(found[1] or found[2])

    def wait_for(self, mark: int, timeout_s: float) -> None:
        """Wait until everything logged before `mark` is here; past the time, what is here has to do."""
        with self._changed:
            self._changed.wait_for(lambda: self._mark_seen >= mark or self._ended, timeout=timeout_s)

    def forget(self) -> None:
        """A model is opened: what was logged before is not about it."""
        with self._changed:
            self._lines.clear()
            self._size_lines.clear()
            self._flash_attention = None
            self.amx_in_use = False


_NOISE = ("llama_graph_n_input_tensors:", "create_tensor: loading tensor", "set_abort_callback: call")
"""Debug lines by the thousand that would push out of the ring what is read from it, and one that only sounds
like a failure."""

_AMX_BUFFER = re.compile(r"\bAMX model buffer size")

_NEW_CONTEXT = "constructing llama_context"
"""The first line of each; the context before it, if there was one, is gone."""

_FLASH_ATTENTION = re.compile(
    r"llama_context: flash_attn\s+= (\w+)|: Flash Attention (enabled|not supported)"
)
"""What the context's constructor is asked for, then, where that is `auto`, what it settles on."""

_FLASH_ATTENTION_WORDS = {"enabled": "on", "disabled": "off", "not supported": "off"}
