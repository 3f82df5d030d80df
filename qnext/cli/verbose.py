"""`-v`, which every command takes, before or after the command's name: the engine's log on stderr."""

from __future__ import annotations

from typing import Annotated

import typer


def _show_log(wanted: bool) -> bool:
    if wanted:
        import logging

        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log = logging.getLogger("qnext")
        if not log.handlers:
            log.addHandler(handler)
        log.setLevel(logging.DEBUG)
    return wanted


Verbose = Annotated[
    bool,
    typer.Option(
        "-v", "--verbose", metavar="", callback=_show_log, help="Show the engine's log as it comes."
    ),
]
"""Type of a command's `verbose` parameter. Its work is done when the command line is read."""
