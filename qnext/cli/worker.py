"""`qnext worker`."""

from __future__ import annotations

from typing import Annotated

import typer

from qnext.cli.output import note
from qnext.cli.verbose import Verbose


def worker(
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=1, max=65535, metavar="N", help="TCP port to listen on.")
    ] = 50052,
    threads: Annotated[
        int, typer.Option("-t", "--threads", min=1, max=512, metavar="N", help="CPU threads to compute with.")
    ] = 4,
    allow_network: Annotated[
        bool,
        typer.Option("--allow-network", metavar="", help="Let other machines in; there is no password."),
    ] = False,
    verbose: Verbose = False,
) -> None:
    """Lend this machine's memory to qnext on another one, as a llama.cpp RPC device, until Ctrl-C.

    Example: qnext worker --port 50052
    """
    from qnext.engine.build import require_build
    from qnext.engine.rpc import RpcWorker

    require_build()
    with RpcWorker(host=host, port=port, threads=threads, allow_network=allow_network) as running:
        note(f"worker listens on {running.endpoint}; use it with --rpc {running.endpoint}")
        running.wait()
