"""`qnext bench compare | export | import`: what is in the store, judged, taken out and brought in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qnext.cli.output import note, print_json, print_table, write_file


class ExportFormat(StrEnum):
    """The formats of `bench export`, llama-bench's own."""

    csv = "csv"
    json = "json"
    jsonl = "jsonl"
    sql = "sql"
    markdown = "markdown"


def register(app: typer.Typer) -> None:
    """Add the commands to the `bench` group."""
    app.command("compare")(compare)
    app.command("export")(export)
    app.command("import")(import_)


def compare(
    records: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[BASELINE] [CANDIDATE]",
            show_default=False,
            help="Ids of records or their first characters. With --against the candidate alone; the newest.",
        ),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="last|tuned|BUILD|ID",
            help="Baseline: the last record of the same model and machine, what a sweep found for it (or a "
            "tuned profile by name), the last one with an engine build (start of a llama.cpp commit, or a "
            "version), or a record.",
        ),
    ] = None,
    knobs: Annotated[
        list[str] | None,
        typer.Option(
            "--knob",
            metavar="NAME",
            show_default=False,
            help="What is meant to differ: ubatch, threads, experts, engine, model…; may be repeated.",
        ),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the comparison as JSON.")
    ] = False,
) -> None:
    """Tell which of two records is faster, if a test shows it.

    Says what differs between them beside their speeds, and CONFOUNDED when that is more than the one knob.

    Example: qnext bench compare 3f2a 91bc --knob ubatch

    Example: qnext bench compare --against last
    """
    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.pipeline.comparing_records import compare_stored, find_baseline
    from qnext.pipeline.tuned import tuned_records
    from qnext.report.compare_view import compare_to_dict, compare_view
    from qnext.store.results import ResultStore

    paths = find_paths()
    store, ids = ResultStore(paths.results_db), records or []
    if len(ids) != 2 and (against is None or len(ids) > 1):
        raise UsageError(
            "two records are needed, or one and --against",
            hint="qnext bench compare BASELINE CANDIDATE, or qnext bench compare --against last; "
            "ids are in qnext bench history.",
        )
    if len(ids) == 2:
        if against is not None:
            raise UsageError(
                "two records and --against: which is the baseline?", hint="Leave one of them out."
            )
        baseline, candidate = store.get(ids[0]), store.get(ids[1])
    else:
        assert against is not None
        newest = store.history(1, kind="bench") if not ids else []
        if not ids and not newest:
            raise UsageError("nothing was measured yet", hint="qnext bench run demo")
        candidate = store.get(ids[0]) if ids else newest[0]
        profiles = {} if against == "last" else tuned_records(paths)
        baseline = find_baseline(store, candidate, against, profiles)
    found = compare_stored(store, baseline, candidate, knobs or [])
    if json_output:
        print_json(compare_to_dict(found))
    else:
        print_table(compare_view(found))


def export(
    ids: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ID]…", show_default=False, help="Records by id or its first characters; all benchmarks."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="TEXT", help="Only models whose name contains this.")
    ] = None,
    format_: Annotated[
        ExportFormat, typer.Option("--format", metavar="FORMAT", help="csv, json, jsonl, sql or markdown.")
    ] = ExportFormat.jsonl,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write there instead of to stdout.")
    ] = None,
) -> None:
    """Write records in llama-bench's own formats and fields.

    Its compare script reads them (SQL after sqlite3 results.sqlite < FILE), and bench import takes them in.

    Example: qnext bench export --model Coder --format csv -o coder.csv
    """
    import sys

    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.pipeline.exchanging import export_text
    from qnext.store.results import ResultStore

    if ids and model is not None:
        raise UsageError("ids and --model: give one of them", hint="Leave out --model.")
    text, count = export_text(ResultStore(find_paths().results_db), ids or [], model, format_.value)
    if output is None:
        sys.stdout.write(text)
        return
    write_file(output, text)
    note(f"wrote {count} test{'' if count == 1 else 's'} to {output}")


def import_(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="JSON, JSONL, CSV or SQL of llama-bench.")],
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the records as JSON.")
    ] = False,
) -> None:
    """Take in results of llama-bench, or of another qnext.

    Nothing is stored twice. llama-bench's csv and sql hold no samples: take its jsonl to compare speeds.

    Example: llama-bench -m model.gguf -o jsonl > a.jsonl; qnext bench import a.jsonl
    """
    from qnext.config import find_paths
    from qnext.pipeline.exchanging import import_file
    from qnext.report.record_view import history_view
    from qnext.store.record import record_to_dict
    from qnext.store.results import ResultStore

    found = import_file(ResultStore(find_paths().results_db), file)
    if found.known:
        note(f"here already: {', '.join(record.id[:8] for record in found.known)}")
    if json_output:
        print_json(
            {
                "schema": "qnext.import/1",
                "records": [record_to_dict(record) for record in found.new],
                "known": [record.id for record in found.known],
            }
        )
    elif found.new:
        print_table(history_view(found.new))
    for record in found.new:
        if record.warnings:
            note(f"{record.id[:8]}: {'; '.join(record.warnings)}")
