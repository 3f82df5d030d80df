"""`qnext bench run | history | show`; the other commands of the group register themselves here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli import bench_report, bench_sweep
from qnext.cli.bench_endpoint import (
    DEFAULT_CONCURRENCY,
    DEFAULT_DEADLINE,
    DEFAULT_REPETITIONS,
    DEFAULT_ROUNDS,
    ApiKeyEnv,
    Concurrency,
    Deadline,
    Url,
    bench_endpoint,
    refuse_endpoint_flags,
)
from qnext.cli.bench_records import register
from qnext.cli.fetch import Yes, with_model_here
from qnext.cli.flags import MODEL_HELP, PlanFlags, Tuned, takes_plan_flags
from qnext.cli.making_request import make_request
from qnext.cli.output import note, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from qnext.store.record import Record

app = typer.Typer(
    name="bench",
    help="Measure speeds, and look at what was measured.\n\nStart with: qnext bench run demo",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("run")
@takes_plan_flags
def run(
    flags: PlanFlags,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} With --url: the name of a model it serves."),
    ] = None,
    prompts: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N,…", help="Prefill tests: prompt tokens, or 0.")
    ] = "512",
    generates: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="N,…", help="Decode tests: tokens generated, or 0.")
    ] = "128",
    depths: Annotated[
        str,
        typer.Option("-d", "--n-depth", metavar="N,…", help="Each with so many tokens already in context."),
    ] = "0",
    repetitions: Annotated[
        int | None,
        typer.Option(
            "-r",
            "--repetitions",
            min=1,
            max=1000,
            metavar="N",
            help="Samples per test; of two servers rounds.",
            show_default=f"{DEFAULT_REPETITIONS}, with two servers {DEFAULT_ROUNDS}",
        ),
    ] = None,
    yes: Yes = False,
    url: Url = None,
    concurrency: Concurrency = DEFAULT_CONCURRENCY,
    api_key_env: ApiKeyEnv = None,
    deadline: Deadline = DEFAULT_DEADLINE,
    tuned: Tuned = True,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the record as JSON.")
    ] = False,
) -> int:
    """Time prefill and decode as llama-bench does; every sample is kept.

    Examples: qnext bench run model.gguf -p 512,2048 -n 128 -d 0,4096 -r 5

    qnext bench run --url http://127.0.0.1:8080/v1 --concurrency 1,2,4,8

    qnext bench run --url http://127.0.0.1:8080/v1 --url http://127.0.0.1:8081/v1
    """
    from qnext.bench.names import Scenario, parse_counts, scenarios
    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.pipeline.benching import BenchWatch, run_bench
    from qnext.report.record_view import record_view, result_line
    from qnext.store.record import TestResult, record_to_dict

    if url:
        return bench_endpoint(
            url,
            model,
            flags,
            prompts=prompts,
            generates=generates,
            depths=depths,
            repetitions=repetitions,
            concurrency=concurrency,
            api_key_env=api_key_env,
            deadline=deadline,
            json_output=json_output,
        )
    refuse_endpoint_flags(concurrency, api_key_env, deadline)
    if model is None:
        raise UsageError("Missing argument 'MODEL'", hint="qnext bench run demo")
    tests = scenarios(parse_counts(prompts, "-p"), parse_counts(generates, "-n"), parse_counts(depths, "-d"))
    if not tests:
        raise UsageError("there is nothing to measure", hint="Give -p or -n a number above 0.")
    request = replace(make_request(model, flags), tuned=tuned)
    request = with_model_here(request, find_paths(), yes=yes, silent=json_output)
    finished: list[TestResult] = []
    record_ids: list[str] = []
    try:
        with progress_bar(f"loading {Path(model).name}") as show:

            def on_sample(test: Scenario, samples: Sequence[int], total: int) -> None:
                share = (len(finished) + len(samples) / total) / len(tests)
                speed = test.tokens * 1e9 / samples[-1]
                show(share, f"{test.name}: {len(samples)} of {total} samples, {speed:.1f} t/s")

            def on_start(record_id: str) -> None:
                record_ids.append(record_id)
                show(0.0, f"{tests[0].name}: warming up")

            def on_test(result: TestResult) -> None:
                finished.append(result)
                note(result_line(result))

            watch = BenchWatch(on_load=show, on_start=on_start, on_sample=on_sample, on_test=on_test)
            samples_each = repetitions or DEFAULT_REPETITIONS
            record = run_bench(request, tests, samples_each, find_paths(), note, sys.argv[1:], watch)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        note(_what_is_kept(record_ids, len(finished), len(tests)))
        raise
    if json_output:
        print_json(record_to_dict(record))
    else:
        print_table(record_view(record))
    return 0


def _what_is_kept(record_ids: list[str], finished: int, wanted: int) -> str:
    if not record_ids:
        return "the model was not loaded, so nothing was measured or stored"
    kept = f"{finished} of {wanted} tests are kept" if finished else "no test had ended"
    see = f"show {record_ids[0]}" if len(record_ids) == 1 else "history"
    return f"{kept}; see: qnext bench {see}"


@app.command("history")
def history(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Only models whose name contains this.")
    ] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, metavar="N", help="How many records.")] = 20,
    accuracy: Annotated[
        bool,
        typer.Option("--accuracy", metavar="", help="How far off the forecasts of these records were."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the records as JSON.")
    ] = False,
) -> None:
    """List what was measured, newest first.

    Example: qnext bench history Coder --limit 5
    """
    from qnext.config import find_paths
    from qnext.report.record_view import history_view
    from qnext.store.record import record_to_dict
    from qnext.store.results import ResultStore

    records = ResultStore(find_paths().results_db).history(limit, model=model)
    if accuracy:
        _tell_accuracy(records, json_output=json_output)
    elif json_output:
        print_json({"schema": "qnext.history/1", "records": [record_to_dict(record) for record in records]})
    elif records:
        print_table(history_view(records))
    elif model is None:
        note("nothing measured yet; start with: qnext bench run demo")
    else:
        note(f"nothing measured for a model called '{model}'; see all: qnext bench history")


def _tell_accuracy(records: Sequence[Record], *, json_output: bool) -> None:
    from qnext.bench.accuracy import accuracy
    from qnext.report.record_view import accuracy_view

    found = {
        kind: accuracy(
            [
                (test.predicted_tps, test.median_tps)
                for record in records
                for test in record.tests
                if test.predicted_tps is not None and bool(test.prompt) is (kind == "prefill")
            ]
        )
        for kind in ("decode", "prefill")
    }
    if json_output:
        told = {kind: None if one is None else asdict(one) for kind, one in found.items()}
        print_json({"schema": "qnext.accuracy/1", "records": len(records), **told})
    elif any(found.values()):
        print_table(accuracy_view(found))
    else:
        note("no record has a forecast beside its figures yet; start with: qnext bench run demo")


@app.command("show")
def show(
    record_id: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Id of a record or its first characters; the newest.")
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the record as JSON.")
    ] = False,
) -> None:
    """Show one record with every sample.

    Example: qnext bench show 3f2a
    """
    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.report.record_view import record_view
    from qnext.store.record import record_to_dict
    from qnext.store.results import ResultStore

    store = ResultStore(find_paths().results_db)
    newest = store.history(1) if record_id is None else []
    if record_id is None and not newest:
        raise UsageError("nothing was measured yet", hint="qnext bench run demo")
    record = newest[0] if record_id is None else store.get(record_id)
    if json_output:
        print_json(record_to_dict(record))
    else:
        print_table(record_view(record, samples=True))


register(app)
bench_sweep.register(app)
bench_report.register(app)
