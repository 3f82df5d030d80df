"""`qnext serve`: an endpoint for the programs that people have, until Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from qnext.cli.fetch import Yes, with_model_here
from qnext.cli.flags import PlanFlags, Tuned, takes_plan_flags
from qnext.cli.making_request import make_request, workload_named
from qnext.cli.output import note, progress_bar
from qnext.cli.propose import ModelOrBest, propose_model, require_someone
from qnext.errors import UsageError

if TYPE_CHECKING:
    import socket

    from qnext.config import Paths
    from qnext.pipeline.request import Request
    from qnext.pipeline.serving import Supervisor
    from qnext.plan.plan import Plan
    from qnext.serve.listening import HttpServer
    from qnext.serve.settings import ServeSettings

KEY_VARIABLE = "QNEXT_API_KEY"
_WATCH_S = 0.05
_WHO, _LOAD, _SIZE = "Who may call", "How much it takes on", "Context and threads"


@takes_plan_flags
def serve(
    flags: PlanFlags,
    model: ModelOrBest = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.", rich_help_panel=_WHO)
    ] = "127.0.0.1",
    port: Annotated[
        int,
        typer.Option(
            "--port",
            min=0,
            max=65535,
            metavar="N",
            help="TCP port to listen on; 0 takes a free one.",
            rich_help_panel=_WHO,
        ),
    ] = 8080,
    api_key_env: Annotated[
        list[str] | None,
        typer.Option(
            "--api-key-env",
            metavar="NAME",
            help=f"Environment variable with a key that callers must give; several may be named. "
            f"{KEY_VARIABLE} counts unasked.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    cors: Annotated[
        list[str] | None,
        typer.Option(
            "--cors",
            metavar="ORIGIN",
            help="Web pages that may call: https://chat.example; several may be named.",
            rich_help_panel=_WHO,
        ),
    ] = None,
    parallel: Annotated[
        str,
        typer.Option(
            "-np",
            "--parallel",
            metavar="N|auto",
            help="Slots: answers at the same time; auto: as many as cost a single one nothing.",
            rich_help_panel=_LOAD,
        ),
    ] = "auto",
    queue: Annotated[
        int,
        typer.Option(
            "--queue",
            min=0,
            metavar="N",
            help="Requests that may wait for a slot; the next is told to come again.",
            rich_help_panel=_LOAD,
        ),
    ] = 64,
    deadline: Annotated[
        float | None,
        typer.Option(
            "--deadline",
            min=0.001,
            metavar="SECONDS",
            help="Longest time for one answer, waiting included.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    grace: Annotated[
        float,
        typer.Option(
            "--grace",
            min=0,
            max=3600,
            metavar="SECONDS",
            help="How long running answers may go on when the server is stopped.",
            rich_help_panel=_LOAD,
        ),
    ] = 30.0,
    workload: Annotated[
        str,
        typer.Option(
            "--workload", metavar="NAME", help="Typical turn to plan for: chat, code, documents or agent."
        ),
    ] = "chat",
    prompt: Annotated[
        int | None, typer.Option("--n-prompt", min=0, metavar="TOKENS", help="Prompt to plan for.")
    ] = None,
    generate: Annotated[
        int | None, typer.Option("--n-gen", min=0, metavar="TOKENS", help="Answer to plan for.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option("--n-depth", min=0, metavar="TOKENS", help="Conversation that went before it."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="auto|python|llama-server",
            help="What runs the model; auto takes llama-server only for a GPU that python cannot use.",
        ),
    ] = "auto",
    llama_server: Annotated[
        str | None,
        typer.Option("--llama-server", metavar="PATH", help="The llama-server to run; else that on PATH."),
    ] = None,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one line of JSON when it is ready.")
    ] = False,
    yes: Yes = False,
    tuned: Tuned = True,
) -> int:
    """Serve a model to OpenAI-compatible programs, as planned for this machine, until Ctrl-C.

    Example: qnext serve demo --port 8080
    """
    from qnext.config import find_paths
    from qnext.serve.port import bind

    signal.signal(signal.SIGTERM, _end_quietly)
    keys = _read_keys(api_key_env or ())
    if model is None:
        require_someone()
    turn = workload_named(workload, prompt=prompt, generate=generate, depth=depth)
    request = make_request(model or "", replace(flags, parallel=parallel), turn)
    request = replace(request, tuned=tuned)
    paths = find_paths()
    with bind(host, port, has_key=bool(keys)) as bound:
        from qnext.pipeline.serving_engines import choose_engine

        taken = choose_engine(engine, llama_server)
        if model is None:
            request = propose_model(request, paths, yes=yes)
        request = with_model_here(request, paths, yes=yes, silent=json_output)
        if taken.said:
            note(f"engine: {taken.said}")
        if taken.program is not None:
            if deadline is not None or cors:
                note("llama-server knows no --deadline and no --cors, and queues without a limit")
            from qnext.cli.serve_llama import serve_with_llama_server

            return serve_with_llama_server(
                taken, request, paths, bound, keys=keys, grace_s=grace, json_output=json_output
            )
        from qnext.serve.settings import ServeSettings

        settings = ServeSettings(
            host=host,
            port=bound.getsockname()[1],
            api_keys=keys,
            queue_limit=queue,
            deadline_s=deadline,
            cors_origins=tuple(cors or ()),
        )
        return _serve_here(request, paths, bound, settings, grace_s=grace, json_output=json_output)


def _end_quietly(number: int, frame: object) -> NoReturn:
    """SIGTERM before anything is served."""
    sys.exit(0)


def _read_keys(names: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The keys of these environment variables. Raises UsageError for one that is not set or unusable."""
    asked = list(dict.fromkeys(names))
    if KEY_VARIABLE in os.environ and KEY_VARIABLE not in asked:
        asked.append(KEY_VARIABLE)
    keys = []
    for name in asked:
        key = os.environ.get(name, "").strip()
        if not key or not (key.isascii() and key.isprintable()):
            raise UsageError(
                f"the environment variable {name} {'holds no usable key' if key else 'is not set or empty'}",
                hint=f"Set it to a key of plain characters: export {name}=…",
            )
        keys.append(key)
    return tuple(keys)


def _serve_here(
    request: Request,
    paths: Paths,
    bound: socket.socket,
    settings: ServeSettings,
    *,
    grace_s: float,
    json_output: bool,
) -> int:
    """Serve with the engine of this Python. Returns the exit code."""
    import asyncio

    from qnext.cli.main import INTERRUPTED
    from qnext.pipeline.serving import Supervisor
    from qnext.serve.app import make_app
    from qnext.serve.listening import HttpServer
    from qnext.serve.port import address_of

    async def drain(grace_s: float) -> None:
        if supervisor.running:
            note(f"stopping; running answers get up to {grace_s:g} s, Ctrl-C again ends them")
        await supervisor.drain(grace_s)

    async def run() -> int | None:
        server = HttpServer(make_app(supervisor, settings), bound, grace_s)
        watching = asyncio.create_task(
            _watch(supervisor, server, lambda: _say_ready(supervisor, url, json_output))
        )
        supervisor.start()
        await server.run(drain)
        if watching.done():
            watching.result()
        watching.cancel()
        return server.signal

    supervisor, url = Supervisor(request, paths, note), address_of(bound)
    try:
        ended_by = asyncio.run(run())
    finally:
        supervisor.close()
    if supervisor.model is None and ended_by is None:
        if supervisor.error is not None:
            raise supervisor.error
        return 1  # a fault of ours, which has said so itself
    return INTERRUPTED if ended_by == signal.SIGINT else 0


async def _watch(supervisor: Supervisor, server: HttpServer, on_ready: Callable[[], None]) -> None:
    """Show how the model loads, then call `on_ready`; stop the server when it cannot be loaded."""
    import asyncio

    with progress_bar("planning") as show:
        while (status := supervisor.status).state == "loading":
            show(status.progress, status.why)
            await asyncio.sleep(_WATCH_S)
    if supervisor.model is None:
        server.stop()
    else:
        on_ready()


def _say_ready(supervisor: Supervisor, url: str, json_output: bool) -> None:
    """What is served where, the plan in two lines, and how to stop; one line of JSON where that is asked."""
    model, planned = supervisor.model, supervisor.planned
    assert model is not None and planned is not None
    note(f"serving {model.name} on {url}/v1; a page to chat on: {url}/")
    say_plan(planned.plan, model.context)
    note("stop it with Ctrl-C")
    if json_output:
        print_line(
            {
                "schema": "qnext.serve/1",
                "url": url,
                "model": model.name,
                "slots": model.slots,
                "context": model.context,
                "pid": os.getpid(),
                "engine": "python",
            }
        )


def say_plan(plan: Plan, context: int) -> None:
    """A plan in two lines; `context` tokens are one slot's."""
    from qnext.pipeline.serving import prompt_cache_bytes
    from qnext.report.plan_view import plan_line
    from qnext.report.words import forecast, plural
    from qnext.units import format_bytes

    note(plan_line(plan))
    note(
        f"{plural(plan.placement.parallel, 'slot')} of {context:,} tokens, "
        f"{format_bytes(prompt_cache_bytes(plan))} for earlier prompts; "
        f"forecast: decode {forecast(plan.prediction.decode_tps)}, "
        f"prefill {forecast(plan.prediction.prefill_tps)}"
    )


def print_line(document: dict[str, object]) -> None:
    """One line of JSON on stdout, at once."""
    sys.stdout.write(json.dumps(document) + "\n")
    sys.stdout.flush()
