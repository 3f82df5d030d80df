"""The one place that writes to the terminal: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from qnext.errors import QnextError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType


def stderr_console() -> Console:
    """A Rich console on stderr; NO_COLOR and a redirected stream are respected by Rich itself."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def stdout_console() -> Console:
    """A Rich console on stdout, for tables that are the command's data."""
    from rich.console import Console

    return Console(highlight=False)


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    json.dump(document, sys.stdout, indent=2, ensure_ascii=False)
    sys.stdout.write("\n")


def print_table(table: RenderableType) -> None:
    """A table or other renderable on stdout."""
    stdout_console().print(table)


def note(text: str) -> None:
    """One line on stderr about what is going on."""
    sys.stderr.write(f"qnext: {text}\n")
    sys.stderr.flush()


def print_error(error: QnextError) -> None:
    """Two lines on stderr, after the engine's own last words when it had any."""
    for line in getattr(error, "log_tail", ()):
        sys.stderr.write(f"  | {line}\n")
    sys.stderr.write(f"error: {error.message}\n")
    if error.hint:
        sys.stderr.write(f"  try: {error.hint}\n")


@contextmanager
def load_progress(label: str) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr for a share from 0 to 1; it shows itself only if the work takes a while."""
    import time

    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = stderr_console()
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    task = progress.add_task(label, total=1.0)
    began = time.monotonic()
    shown = False

    def update(share: float) -> None:
        nonlocal shown
        if not shown and console.is_terminal and share < 1 and time.monotonic() - began > 0.5:
            shown = True
            progress.start()
        progress.update(task, completed=share)

    try:
        yield update
    finally:
        if shown:
            progress.stop()
