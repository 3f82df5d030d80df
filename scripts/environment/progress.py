"""Saying what happens on stderr, and running the long programs: their output goes to a log file, ours is one
updating line on a terminal and an occasional line elsewhere.

The child writes to the log itself, not through a pipe: it goes on if this process dies, and the lock that it
inherits then keeps a second set-up waiting until it is done.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_COUNT = re.compile(rb"^\s*\[(\d+)/(\d+)\]", re.MULTILINE)
_PLAIN_EVERY_S = 30.0
# Compile jobs differ in length, so the first few say nothing about the rest.
_COUNTS_BEFORE_ESTIMATE = 15


def say(text: str) -> None:
    print(f"qnext: {text}", file=sys.stderr, flush=True)


def spell_duration(seconds: float) -> str:
    """`14 s`, `6 min 12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def run_logged(
    argv: Sequence[str],
    *,
    label: str,
    log: Path,
    env: Mapping[str, str],
    cwd: Path | None = None,
    keep_open: Sequence[int] = (),
) -> bool:
    """Run a program with its output appended to `log`; True when it ended with status 0.

    On Ctrl-C or any other end of this process the whole process group of the program ends too.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with log.open("ab") as sink, log.open("rb") as source:
        source.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=cwd,
            start_new_session=True,
            pass_fds=tuple(keep_open),
        )
        line = _Line(label, began)
        try:
            while True:
                try:
                    process.wait(timeout=0.25)
                    break
                except subprocess.TimeoutExpired:
                    line.update(source.read())
        except BaseException:
            _end_group(process)
            line.finish("stopped")
            raise
    line.finish("done" if process.returncode == 0 else "failed")
    return process.returncode == 0


def _end_group(process: subprocess.Popen[bytes]) -> None:
    for sign, patience_s in ((signal.SIGINT, 3.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience_s)
        except subprocess.TimeoutExpired:
            continue


class _Line:
    """The progress of one program: label, ninja's [n/m] where there is one, and the time."""

    def __init__(self, label: str, began: float) -> None:
        self._label = label
        self._began = began
        self._terminal = sys.stderr.isatty()
        self._counts: tuple[int, int] | None = None
        self._first_count_at = began
        self._said_at = began
        if not self._terminal:
            say(f"{label} …")

    def update(self, new_output: bytes) -> None:
        counts = _COUNT.findall(new_output)
        now = time.monotonic()
        if counts:
            if self._counts is None:
                self._first_count_at = now
            self._counts = (int(counts[-1][0]), int(counts[-1][1]))
        if self._terminal:
            print(f"\r\033[Kqnext: {self._describe(now)}", end="", file=sys.stderr, flush=True)
        elif now - self._said_at >= _PLAIN_EVERY_S:
            self._said_at = now
            say(self._describe(now))

    def _describe(self, now: float) -> str:
        parts = [self._label]
        if self._counts is not None:
            done, total = self._counts
            parts.append(f"{done} of {total} files")
            if _COUNTS_BEFORE_ESTIMATE <= done < total:
                left = (now - self._first_count_at) / done * (total - done)
                parts.append(f"about {spell_duration(left)} left")
        parts.append(spell_duration(now - self._began))
        return ", ".join(parts)

    def finish(self, how: str) -> None:
        start = "\r\033[K" if self._terminal else ""
        took = spell_duration(time.monotonic() - self._began)
        print(f"{start}qnext: {self._label}: {how} ({took})", file=sys.stderr, flush=True)
