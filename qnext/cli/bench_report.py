"""`qnext bench report`: a sweep as one HTML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.output import note, write_file

if TYPE_CHECKING:
    from qnext.store.record import Record
    from qnext.store.results import ResultStore
    from qnext.store.sweeps import StoredSweep


def register(app: typer.Typer) -> None:
    """Add the command to the `bench` group."""
    app.command("report")(report)


def report(
    sweep: Annotated[
        str | None,
        typer.Argument(metavar="[SWEEP]", help="Id of a sweep or its first characters; the newest."),
    ] = None,
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FILE", help="Where to write it; - is stdout.")
    ] = Path("report.html"),
) -> None:
    """Write a sweep as one HTML page: verdict, commands, charts, every cell.

    The file needs no network, and works for sweeps that were cut short.

    Example: qnext bench report -o report.html
    """
    import sys

    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.report.html_report import html_report
    from qnext.store.results import ResultStore
    from qnext.store.sweeps import SweepStore

    path = find_paths().results_db
    sweeps, results = SweepStore(path), ResultStore(path)
    stored = sweeps.newest() if sweep is None else sweeps.get(sweep)
    if stored is None:
        raise UsageError("no sweep was made yet", hint="Start one: qnext bench sweep demo")
    page = html_report(stored, _record_of(stored, results))
    if str(output) == "-":
        sys.stdout.write(page)
        return
    write_file(output, page)
    note(f"wrote sweep {stored.id} to {output}")


def _record_of(sweep: StoredSweep, results: ResultStore) -> Record | None:
    """The winner's record, or any other that the sweep left."""
    winner = (sweep.result or {}).get("winner")
    kept = sorted((cell.name != winner, cell.record_id) for cell in sweep.cells if cell.record_id)
    return results.find(kept[0][1]) if kept else None
