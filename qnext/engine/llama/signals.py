"""What passes between a running operation and the parent: events out, cancels and time limits in.

Native code cannot be told to stop, it has to ask. llama.cpp asks once per graph node, through a callback
that here enters no Python: libc's strlen over a one-byte flag answers "is the flag set?".
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from qnext.engine.llama import binding

SIGN_OF_LIFE_S = 5.0
"""A long operation that has nothing to say says so about this often, or the parent would take it for hung.

One llama_decode cannot be interrupted for it; the parent waits longer for large batches."""

Stream = Callable[..., None]


class Cancelled(Exception):
    """The parent asked for the running operation to stop."""


class OutOfTime(Exception):
    """The limit of `Signals.time_limit` has passed."""


class Signals:
    """One per child. `stream(event, **fields)` sends an event to the parent."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream
        self.cancel_requested = threading.Event()
        self._out_of_time = threading.Event()
        self._flag = ctypes.create_string_buffer(2)
        self._last_sign = time.monotonic()

    def abort(self) -> None:
        """Make a running decode return at the next graph node (called from the reading thread)."""
        self.cancel_requested.set()
        self._flag[0] = b"\1"

    def arm(self) -> None:
        """Forget an earlier abort: a new request has come."""
        self.cancel_requested.clear()
        self._flag[0] = b"\0"

    def watch(self, context: Any) -> None:
        """Let decodes of a llama_context be stopped by `abort` and by a time limit."""
        lib = binding.llama()
        strlen = ctypes.cast(_libc().strlen, lib.ggml_abort_callback)
        lib.llama_set_abort_callback(context, strlen, ctypes.cast(self._flag, ctypes.c_void_p))

    def check(self) -> None:
        """Raises Cancelled or OutOfTime when the operation is to stop."""
        if self.cancel_requested.is_set():
            raise Cancelled
        if self._out_of_time.is_set():
            raise OutOfTime

    @contextlib.contextmanager
    def time_limit(self, seconds: float | None) -> Iterator[None]:
        """Within this, decodes stop and `check` raises OutOfTime once `seconds` have passed; None: never.

        The CPU stops at the next graph node, a device after the batch it works on.
        """
        if seconds is None:
            yield
            return
        timer = threading.Timer(min(seconds, threading.TIMEOUT_MAX), self._run_out)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            self._out_of_time.clear()
            if not self.cancel_requested.is_set():
                self._flag[0] = b"\0"

    def _run_out(self) -> None:
        self._out_of_time.set()
        self._flag[0] = b"\1"

    def begin(self) -> None:
        """An operation starts: the parent has just been spoken to."""
        self._last_sign = time.monotonic()

    def sign_of_life(self) -> None:
        """Tell the parent that work goes on, if it has heard nothing for a while."""
        if time.monotonic() - self._last_sign > SIGN_OF_LIFE_S:
            self._last_sign = time.monotonic()
            self.stream("alive")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None if os.name == "posix" else "msvcrt")
