"""`qnext serve` and llama-server side by side: the same file, the planned flags, the very same libraries."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from claims import ROOT, CannotMeasure
from claims._slice import peer, run_qnext, wheel_libraries

_START_LIMIT_S = 180.0


@contextlib.contextmanager
def both_servers(model: Path, home: Path, *, slots: int, context: int) -> Iterator[tuple[str, str]]:
    """(address of llama-server, address of qnext) with `slots` of `context` tokens each.

    llama-server is started with the line that `qnext plan` prints. Raises CannotMeasure when one fails.
    """
    from qnext.engine.rpc import free_port

    wishes = _wishes(model, slots, context)
    plan = json.loads(run_qnext(("plan", *wishes, "--json"), home))
    port = free_port()
    theirs = [str(peer("llama-server")), *plan["llama_server_argv"][1:], "--port", str(port)]
    with (
        _running([*theirs, "--host", "127.0.0.1"], wheel_libraries(), home / "llama-server.log"),
        our_server(model, home, slots=slots, context=context) as (ours, _),
    ):
        _await(f"http://127.0.0.1:{port}/health", home / "llama-server.log")
        yield f"http://127.0.0.1:{port}/v1", f"{ours}/v1"


@contextlib.contextmanager
def our_server(
    model: Path, home: Path, *, slots: int, context: int, flags: tuple[str, ...] = ()
) -> Iterator[tuple[str, int]]:
    """(address, process id) of `qnext serve`, ready. Raises CannotMeasure when it does not start."""
    wishes = (*_wishes(model, slots, context), *flags)
    argv = [sys.executable, "-P", "-m", "qnext", "serve", *wishes, "--port", "0", "--json"]
    with _running(argv, {"QNEXT_HOME": str(home)}, home / "qnext.log") as started:
        assert started.stdout is not None
        line = started.stdout.readline()
        if not line:
            raise CannotMeasure(f"qnext serve did not start: {(home / 'qnext.log').read_text()[-300:]}")
        yield str(json.loads(line)["url"]).rstrip("/").removesuffix("/v1"), started.pid


def _wishes(model: Path, slots: int, context: int) -> tuple[str, ...]:
    return (str(model), "-np", str(slots), "-c", str(slots * context))


@contextlib.contextmanager
def _running(argv: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[str]]:
    with log.open("w") as file:
        process = subprocess.Popen(
            argv,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if "--json" in argv else file,
            stderr=file,
            text=True,
        )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _await(url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_LIMIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=1):
            return
        time.sleep(0.2)
    raise CannotMeasure(f"llama-server did not start: {log.read_text(errors='replace')[-300:]}")
