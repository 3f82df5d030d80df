"""The trips of `qnext bench export` and `bench import`: records out to other tools, and in from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qnext.bench.llama_bench import Format, record_rows, write_rows
from qnext.bench.llama_bench_reading import MOST_BYTES, read_rows
from qnext.bench.llama_bench_records import imported_records
from qnext.errors import StoreError, UsageError
from qnext.store.record import Record
from qnext.store.results import ResultStore


@dataclass(frozen=True, slots=True)
class Imported:
    """Records that a file held: those stored now, and those that were here already."""

    new: tuple[Record, ...]
    known: tuple[Record, ...]


def export_text(
    store: ResultStore, ids: Sequence[str], model: str | None, format_: Format
) -> tuple[str, int]:
    """(what to write, how many tests) of the records named, else of every benchmark, the oldest first.

    `model` narrows to models whose name contains it. Raises UsageError for an unknown id and where nothing is
    left to write.
    """
    if ids:
        records = list({record.id: record for record in map(store.get, ids)}.values())
    else:
        records = [record for record in reversed(store.history(None, model=model)) if record.kind != "run"]
    rows = [row for record in records for row in record_rows(record)]
    if not rows:
        what = f" of a model called '{model}'" if model else ""
        raise UsageError(f"there is no measured test{what} to export", hint="See: qnext bench history")
    return write_rows(rows, format_), len(rows)


def import_file(store: ResultStore, path: Path) -> Imported:
    """Store what llama-bench, or another qnext, wrote; what is here already stays as it is.

    All of the file is read and checked before anything is stored. Raises UsageError with the line at fault,
    and StoreError where the file gives other samples for a record that is here.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}", hint="Check the path.") from error
    try:
        records = imported_records(read_rows(content))
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", hint=error.hint) from error
    for record in records:
        stored = store.find(record.id)
        if stored is not None:
            _require_same(record, stored)
    known = store.keep(records)
    return Imported(
        new=tuple(record for record in records if record.id not in known),
        known=tuple(record for record in records if record.id in known),
    )


def _require_same(told: Record, stored: Record) -> None:
    """A record is known by its id; a file that gives it other samples was edited, or is of an older state."""
    here = {(test.prompt, test.generate, test.depth): test.samples_ns for test in stored.tests}
    for test in told.tests:
        if here.get((test.prompt, test.generate, test.depth)) != test.samples_ns:
            raise StoreError(
                f"record {told.id} is here with other samples of {test.name} than the file has",
                hint=f"See qnext bench show {told.id}; without its qnext_ fields the file is another record.",
            )
