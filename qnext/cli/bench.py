"""`qnext bench run | history | show`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from qnext.cli.flags import PlanFlags, make_request, takes_plan_flags
from qnext.cli.output import load_progress, note, print_json, print_table, stderr_console

app = typer.Typer(
    name="bench",
    help="Measure speeds and look at what was measured.\n\nExample: qnext bench run demo -p 512 -n 128 -r 5",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command("run")
@takes_plan_flags
def run(
    model: Annotated[str, typer.Argument(help="demo, or the path of a GGUF (any shard).")],
    flags: PlanFlags,
    prompts: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt tokens, e.g. 512,2048.")] = "512",
    generates: Annotated[str, typer.Option("-n", "--n-gen", help="Tokens generated, e.g. 128.")] = "128",
    depths: Annotated[str, typer.Option("-d", "--n-depth", help="Tokens already in context.")] = "0",
    repetitions: Annotated[int, typer.Option("-r", "--repetitions", min=1, max=1000, help="Samples.")] = 5,
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Time prefill and decode with llama-bench's semantics; every sample is kept.

    Example: qnext bench run model.gguf -p 512,2048 -n 128 -d 0,4096 -r 5
    """
    from qnext.bench.names import Scenario, parse_counts, scenarios
    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.pipeline.benching import BenchWatch, run_bench
    from qnext.report.record_view import record_view, test_line
    from qnext.store.record import TestResult, record_to_dict

    tests = scenarios(parse_counts(prompts, "-p"), parse_counts(generates, "-n"), parse_counts(depths, "-d"))
    if not tests:
        raise UsageError("there is nothing to measure", hint="Give -p or -n a number above 0.")
    request = make_request(model, flags)
    status = stderr_console().status("loading")

    def on_sample(test: Scenario, done: int, total: int) -> None:
        status.update(f"{test.name}: {done} of {total}")

    def on_test(result: TestResult) -> None:
        note(test_line(result))

    with load_progress("loading") as progress, status:
        watch = BenchWatch(on_load=progress, on_sample=on_sample, on_test=on_test)
        record = run_bench(request, tests, repetitions, find_paths(), note, sys.argv[1:], watch)
    if json_output:
        print_json(record_to_dict(record))
    else:
        print_table(record_view(record))


@app.command("history")
def history(
    model: Annotated[str | None, typer.Argument(help="Only models whose name contains this.")] = None,
    limit: Annotated[int, typer.Option("--limit", min=1, help="How many records.")] = 20,
    json_output: Annotated[bool, typer.Option("--json", help="Print the records as JSON.")] = False,
) -> None:
    """List what was measured, newest first.

    Example: qnext bench history Coder --limit 5
    """
    from qnext.config import find_paths
    from qnext.report.record_view import history_view
    from qnext.store.record import record_to_dict
    from qnext.store.results import ResultStore

    records = ResultStore(find_paths().results_db).history(limit, model=model)
    if json_output:
        print_json({"schema": "qnext.history/1", "records": [record_to_dict(record) for record in records]})
    elif records:
        print_table(history_view(records))
    else:
        note("nothing measured yet; start with: qnext bench run demo")


@app.command("show")
def show(
    record_id: Annotated[str, typer.Argument(help="Id of a record, or its beginning.")],
    json_output: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Show one record with every sample.

    Example: qnext bench show 3f2a
    """
    from qnext.config import find_paths
    from qnext.report.record_view import record_view
    from qnext.store.record import record_to_dict
    from qnext.store.results import ResultStore

    record = ResultStore(find_paths().results_db).get(record_id)
    if json_output:
        print_json(record_to_dict(record))
    else:
        print_table(record_view(record, samples=True))
