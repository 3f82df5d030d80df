"""`qnext bench run --url`: the options of its own, and the trips that measure a server or compare two."""

from __future__ import annotations

import sys
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags import PlanFlags
from qnext.cli.output import note, print_json, print_table, progress_bar
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.bench.endpoint import Level
    from qnext.bench.endpoint_pair import PairLevel
    from qnext.pipeline.endpoint_load import EndpointTask

_PANEL = "A server (--url)"

Url = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Measure the OpenAI-compatible server there: http://127.0.0.1:8080/v1. "
        "Given twice: compare the second with the first.",
        rich_help_panel=_PANEL,
    ),
]
Concurrency = Annotated[
    str,
    typer.Option("--concurrency", metavar="N,…", help="Clients at the same time.", rich_help_panel=_PANEL),
]
ApiKeyEnv = Annotated[
    str | None,
    typer.Option(
        "--api-key-env",
        metavar="NAME",
        help="Environment variable that holds the server's key; of two servers both get it.",
        rich_help_panel=_PANEL,
    ),
]
Deadline = Annotated[
    float,
    typer.Option(
        "--deadline", min=1, metavar="SECONDS", help="The longest for one request.", rich_help_panel=_PANEL
    ),
]
DEFAULT_CONCURRENCY = "1,2,4,8"
DEFAULT_DEADLINE = 600.0
DEFAULT_REPETITIONS = 5
DEFAULT_ROUNDS = 8
"""Of two servers: the fewest with which a difference can be shown (`bench.endpoint_pair.FEWEST_PAIRS`)."""
_MOST_CLIENTS = 256


def bench_endpoint(
    urls: list[str],
    model: str | None,
    flags: PlanFlags,
    *,
    prompts: str,
    generates: str,
    depths: str,
    repetitions: int | None,
    concurrency: str,
    api_key_env: str | None,
    deadline: float,
    json_output: bool,
) -> int:
    """Measure one server or compare two, and print what was found; 1 when a request failed.

    `repetitions` None is the usual number for so many servers. Raises QnextError.
    """
    from qnext.bench.names import parse_counts
    from qnext.pipeline.endpoint_load import EndpointTask

    if len(urls) > 2:
        raise UsageError(
            f"--url is given {len(urls)} times: one server is measured, or two are compared",
            hint="Compare them two by two, with the same baseline first.",
        )
    _refuse_plan_flags(flags, depths)
    clients = parse_counts(concurrency, "--concurrency")
    if min(clients) < 1 or max(clients) > _MOST_CLIENTS:
        raise UsageError(
            f"--concurrency {concurrency}: between 1 and {_MOST_CLIENTS} clients",
            hint=f"The usual: --concurrency {DEFAULT_CONCURRENCY}.",
        )
    task = EndpointTask(
        url=urls[0],
        model=model,
        concurrency=clients,
        prompt=_one_count(prompts, "-p"),
        generate=_one_count(generates, "-n"),
        repetitions=repetitions or (DEFAULT_REPETITIONS if len(urls) == 1 else DEFAULT_ROUNDS),
        api_key_env=api_key_env,
        deadline_s=deadline,
    )
    return _measure_one(task, json_output) if len(urls) == 1 else _compare_two(task, urls[1], json_output)


def _measure_one(task: EndpointTask, json_output: bool) -> int:
    from qnext.bench.endpoint_result import result_to_dict
    from qnext.pipeline.endpoint import EndpointWatch, measure_endpoint
    from qnext.report.endpoint_view import endpoint_view, level_line

    ended: list[Level] = []
    try:
        with progress_bar(f"measuring {task.url}") as show:

            def on_level(level: Level) -> None:
                ended.append(level)
                note(level_line(level))

            result = measure_endpoint(task, EndpointWatch(on_progress=show, on_level=on_level))
    except KeyboardInterrupt:
        _note_interrupted(len(ended), task)
        raise
    if json_output:
        print_json(result_to_dict(result))
    else:
        print_table(endpoint_view(result))
    return 1 if result.status in ("failed", "incomplete") else 0


def _compare_two(task: EndpointTask, second: str, json_output: bool) -> int:
    from qnext.bench.endpoint_pair_result import few_pairs_words, pair_to_dict
    from qnext.pipeline.endpoint_pair import PairTask, PairWatch, measure_pair
    from qnext.report.endpoint_pair_view import pair_level_line, pair_view

    few = few_pairs_words(task.repetitions)
    if few:
        note(few)
    ended: list[PairLevel] = []
    try:
        with progress_bar(f"comparing {second} with {task.url}") as show:

            def on_level(level: PairLevel) -> None:
                ended.append(level)
                note(pair_level_line(level))

            result = measure_pair(PairTask(task, second), PairWatch(on_progress=show, on_level=on_level))
    except KeyboardInterrupt:
        _note_interrupted(len(ended), task)
        raise
    if json_output:
        print_json(pair_to_dict(result))
    else:
        print_table(pair_view(result))
    return 1 if result.status in ("failed", "stopped", "incomplete") else 0


def _note_interrupted(ended: int, task: EndpointTask) -> None:
    sys.stderr.write("\n")
    note(f"{ended} of {len(task.concurrency)} levels had ended; what is above is not stored")


def refuse_endpoint_flags(concurrency: str, api_key_env: str | None, deadline: float) -> None:
    """Raises UsageError when an option of --url is given without it."""
    given = [
        name
        for name, is_given in (
            ("--concurrency", concurrency != DEFAULT_CONCURRENCY),
            ("--api-key-env", api_key_env is not None),
            ("--deadline", deadline != DEFAULT_DEADLINE),
        )
        if is_given
    ]
    if given:
        raise UsageError(
            f"{' and '.join(given)} only says something about a server",
            hint="Name the server: --url http://127.0.0.1:8080/v1.",
        )


def _refuse_plan_flags(flags: PlanFlags, depths: str) -> None:
    usual = PlanFlags()
    given = [
        field.name.replace("_", "-")
        for field in fields(PlanFlags)
        if field.name != "verbose" and getattr(flags, field.name) != getattr(usual, field.name)
    ]
    if depths != "0":
        given.append("n-depth")
    if given:
        raise UsageError(
            f"--url measures a server as it runs; these are for models that qnext loads: {', '.join(given)}",
            hint="Leave them out, and give such settings to the server when it is started.",
        )


def _one_count(text: str, option: str) -> int:
    from qnext.bench.names import parse_counts

    counts = parse_counts(text, option)
    if len(counts) != 1 or counts[0] < 1:
        raise UsageError(f"{option} {text}: --url takes one number of tokens", hint=f"Write {option} 128.")
    return counts[0]
