"""The one place that writes to the terminal: data on stdout, everything else on stderr.

Notes and errors are wrapped to the terminal's width, between words; where stderr is a file or a pipe each
stays one line, so that `grep` finds it whole.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from qnext.errors import QnextError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console, RenderableType

PROGRESS_DELAY_S = 0.5
"""Work that takes less shows no bar: one that flashes up is worse than none."""


class Progress(Protocol):
    """Moves a progress bar to a share from 0 to 1; a label given replaces the bar's text."""

    def __call__(self, share: float, label: str | None = None) -> None: ...


def stderr_console() -> Console:
    """A Rich console on stderr; NO_COLOR and a redirected stream are respected by Rich itself."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout; where stdout cannot hold Unicode, characters are escaped, never lost."""
    ascii_only = not (sys.stdout.encoding or "").lower().startswith("utf")
    json.dump(document, sys.stdout, indent=2, ensure_ascii=ascii_only)
    sys.stdout.write("\n")


def print_table(table: RenderableType) -> None:
    """A table or other renderable on stdout."""
    from rich.console import Console

    # Uncropped: a path in a command may be longer than the line, and has to stay whole.
    Console(highlight=False).print(table, crop=False)


def write_file(path: Path, text: str) -> None:
    """Write what was asked for with `-o`, as UTF-8 with plain line ends. Raises UsageError."""
    try:
        path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}", hint="Give -o another place."
        ) from error


def note(text: str) -> None:
    """One remark on stderr about what is going on. A line quoted from a log (`  | …`) stays as it is."""
    if text.startswith("  | "):
        sys.stderr.write(f"{text}\n")
    else:
        _write_stderr("qnext: ", text)


def print_error(error: QnextError) -> None:
    """What is wrong and what to try, on stderr, after the engine's own last words when it had any."""
    for line in getattr(error, "log_tail", ()):
        sys.stderr.write(f"  | {line}\n")
    _write_stderr("error: ", error.message)
    if error.hint:
        _write_stderr("  try: ", error.hint)


def _write_stderr(label: str, text: str) -> None:
    if sys.stderr.isatty():
        import textwrap

        lines = textwrap.wrap(
            text,
            width=max(_stderr_width(), 30),
            initial_indent=label,
            subsequent_indent=" " * len(label),
            break_long_words=False,
            break_on_hyphens=False,
        )
        sys.stderr.write("\n".join(lines or [label]) + "\n")
    else:
        sys.stderr.write(f"{label}{' '.join(text.split())}\n")
    sys.stderr.flush()


def _stderr_width() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


@contextmanager
def progress_bar(label: str) -> Iterator[Progress]:
    """A bar on stderr that shows itself once the work has taken half a second, and only in a terminal.

    It turns up by a timer and not by the first update: the first sign of life of a slow machine can be a
    minute away.
    """
    if not sys.stderr.isatty():
        yield lambda share, label=None: None
        return
    import threading

    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    # stdout is not Rich's to redirect: what is written there meanwhile is data.
    bar = Bar(
        *columns, TimeRemainingColumn(), console=stderr_console(), transient=True, redirect_stdout=False
    )
    task = bar.add_task(label, total=None)

    def move(share: float, label: str | None = None) -> None:
        if share < bar.tasks[task].completed:  # another part of the work: its time left is reckoned anew
            bar.reset(task, total=1.0)
        bar.update(task, completed=share, total=1.0, description=label)

    timer = threading.Timer(PROGRESS_DELAY_S, bar.start)
    timer.daemon = True
    timer.start()
    try:
        yield move
    finally:
        timer.cancel()
        timer.join()
        bar.stop()
