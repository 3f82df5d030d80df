"""`qnext serve --engine llama-server`: the same command in front of llama.cpp's own server."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import TYPE_CHECKING

from qnext.cli.output import note

if TYPE_CHECKING:
    import socket

    from qnext.config import Paths
    from qnext.pipeline.request import Request
    from qnext.pipeline.serving_engines import EngineChoice


def serve_with_llama_server(
    taken: EngineChoice,
    request: Request,
    paths: Paths,
    bound: socket.socket,
    *,
    keys: tuple[str, ...],
    grace_s: float,
    json_output: bool,
) -> int:
    """Plan, run llama-server on the address of `bound`, and wait for a signal. Returns the exit code."""
    from qnext.cli.main import INTERRUPTED
    from qnext.cli.serve import print_line, say_plan
    from qnext.pipeline.serving import served_name
    from qnext.pipeline.serving_engines import plan_for_server
    from qnext.pipeline.serving_llama import LlamaServer
    from qnext.serve.port import address_of

    planned = plan_for_server(request, taken, paths, note)
    plan, url = planned.plan, address_of(bound)
    for warning in plan.warnings:
        note(warning)
    host, port = bound.getsockname()[:2]
    bound.close()  # it was kept while nothing else could take it; llama-server opens it itself
    program = taken.program
    assert program is not None
    name = served_name(planned)
    server = LlamaServer(program, plan, name=name, host=host, port=port, keys=keys, notice=note)
    ended_by: list[int] = []

    def end(number: int, _: FrameType | None) -> None:
        ended_by.append(number)
        server.stop()

    context = plan.placement.context // plan.placement.parallel

    def ready() -> None:
        note(f"serving {name} on {url}/v1 with llama-server; its own page: {url}/")
        say_plan(plan, context)
        note("stop it with Ctrl-C")
        if json_output:
            print_line(
                {
                    "schema": "qnext.serve/1",
                    "url": url,
                    "model": name,
                    "slots": plan.placement.parallel,
                    "context": context,
                    "pid": os.getpid(),
                    "engine": "llama-server",
                }
            )

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, end)
    try:
        server.keep_running(ready)
    finally:
        server.close(grace_s)
    return INTERRUPTED if ended_by and ended_by[0] == signal.SIGINT else 0
