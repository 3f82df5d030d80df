"""A terminal for the tests: the real command on a pseudo-terminal of a given width."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)

import fcntl
import struct
import termios

CTRL_C, CTRL_D = "\x03", "\x04"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[=>]|\r")


class Terminal:
    """One running command on a terminal of its own; `text` is all that it wrote, without escape sequences."""

    def __init__(self, *arguments: str, columns: int = 80) -> None:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
        self._terminal = ours
        self._seen = 0
        self.raw = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "qnext", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm-256color", "LANG": "C.UTF-8"},
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(theirs)
        os.set_blocking(ours, False)

    @property
    def text(self) -> str:
        self._read()
        return _ESCAPES.sub("", self.raw)

    def wait_for(self, words: str, timeout: float = 30) -> str:
        """Wait for `words` after what the last wait returned; returns all up to them, on one line."""
        pattern = re.compile(r"\s+".join(map(re.escape, words.split(" "))))
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            new = self.text[self._seen :]
            if found := pattern.search(new):
                self._seen += found.end()
                return " ".join(new[: found.end()].split())
            time.sleep(0.02)
        raise AssertionError(f"no {words!r} in:\n{self.text[self._seen :][-2000:]}")

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait(self, timeout: float = 20) -> int:
        """Wait for the end, reading on so that the command never blocks; returns the exit status."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None and time.monotonic() < deadline:
            self._read()
            time.sleep(0.02)
        self._read()
        return self.process.wait(timeout=1)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._terminal)

    def _read(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):
            while chunk := os.read(self._terminal, 65536):
                self.raw += chunk.decode(errors="replace")


@pytest.fixture
def terminal(qnext_home: object) -> Iterator[Callable[..., Terminal]]:
    """Starts commands on terminals: `terminal("run", "demo", columns=80)`; ends them after the test."""
    opened: list[Terminal] = []

    def start(*arguments: str, columns: int = 80) -> Terminal:
        opened.append(Terminal(*arguments, columns=columns))
        return opened[-1]

    yield start
    for one in opened:
        one.close()
