"""`qnext bench run --url`: the options of its own, and the trip that measures a server."""

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

_PANEL = "A server (--url)"

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        metavar="URL",
        help="Measure the OpenAI-compatible server there: http://127.0.0.1:8080/v1.",
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
        help="Environment variable that holds the server's key.",
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
_MOST_CLIENTS = 256


def bench_endpoint(
    url: str,
    model: str | None,
    flags: PlanFlags,
    *,
    prompts: str,
    generates: str,
    depths: str,
    repetitions: int,
    concurrency: str,
    api_key_env: str | None,
    deadline: float,
    json_output: bool,
) -> int:
    """Measure the server and print what was found; 1 when a request failed. Raises QnextError."""
    from qnext.bench.endpoint_result import result_to_dict
    from qnext.bench.names import parse_counts
    from qnext.pipeline.endpoint import EndpointTask, EndpointWatch, measure_endpoint
    from qnext.report.endpoint_view import endpoint_view, level_line

    _refuse_plan_flags(flags, depths)
    clients = parse_counts(concurrency, "--concurrency")
    if min(clients) < 1 or max(clients) > _MOST_CLIENTS:
        raise UsageError(
            f"--concurrency {concurrency}: between 1 and {_MOST_CLIENTS} clients",
            hint=f"The usual: --concurrency {DEFAULT_CONCURRENCY}.",
        )
    task = EndpointTask(
        url=url,
        model=model,
        concurrency=clients,
        prompt=_one_count(prompts, "-p"),
        generate=_one_count(generates, "-n"),
        repetitions=repetitions,
        api_key_env=api_key_env,
        deadline_s=deadline,
    )
    ended: list[Level] = []
    try:
        with progress_bar(f"measuring {url}") as show:

            def on_level(level: Level) -> None:
                ended.append(level)
                note(level_line(level))

            result = measure_endpoint(task, EndpointWatch(on_progress=show, on_level=on_level))
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        note(f"{len(ended)} of {len(clients)} levels had ended; what is above is not stored")
        raise
    if json_output:
        print_json(result_to_dict(result))
    else:
        print_table(endpoint_view(result))
    return 1 if result.status in ("failed", "incomplete") else 0


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
