"""The exported line, pasted into a shell, starts the real llama-server with the planned split.

Uses a llama-server that is here already (PATH, or built by scripts/peers); without one these tests skip.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.config import find_paths
from qnext.engine.fit import find_fit_program
from qnext.engine.log_reader import PRINT_RESOLUTION_BYTES, allocated_devices, read_buffer_sizes
from qnext.engine.rpc import RpcWorker, free_port
from qnext.errors import EngineError
from qnext.hardware.machine import Machine
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.shape import read_shape
from qnext.models.synth import synthesise
from qnext.plan.export import export_plan
from qnext.plan.machine_speeds import machine_speeds
from qnext.plan.options import PlanOptions
from qnext.plan.placement import Problem
from qnext.plan.plan import Plan, make_plan
from qnext.plan.traits import device_traits, host_traits
from qnext.plan.values import HOST, Budget
from qnext.units import GIB, MIB

pytestmark = pytest.mark.engine

START_LIMIT_S = 60


@pytest.fixture(scope="module")
def server() -> str:
    try:
        found = find_fit_program(find_paths({}).cache_dir).with_name("llama-server")
    except EngineError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    if not found.is_file():
        pytest.skip(f"there is no {found}: run scripts/peers")
    return str(found)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ModelHeader:
    path = tmp_path_factory.mktemp("it's a $HOME, 100%") / "tiny Ü.gguf"
    synthesise("tiny-qwen3next", path, quant="Q4_K_M", header_only=True)
    return read_header(path)


@pytest.fixture
def workers() -> Iterator[tuple[str, str]]:
    with RpcWorker() as one, RpcWorker() as two:
        yield one.endpoint, two.endpoint


def plan_on(header: ModelHeader, servers: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[Plan, Problem]:
    budgets = [Budget(HOST, "host", 8 * GIB, HOST)]
    budgets += [
        Budget(f"RPC{number}", "rpc", size, f"RPC0[{endpoint}]")
        for number, (size, endpoint) in enumerate(zip(sizes, servers, strict=True))
    ]
    traits = {HOST: host_traits(())}
    traits |= {one.name: device_traits(one, free_bytes=one.budget_bytes) for one in budgets[1:]}
    options = PlanOptions(context=2048, ubatch=256, repack="off")
    problem = Problem(header, read_shape(header), tuple(budgets), traits, options, None, servers)
    return make_plan("tiny", problem, machine_speeds(Machine())), problem


def log_of(argv: list[str], port: int, log: Path) -> list[str]:
    """What the server logs until it answers, or ends."""
    with log.open("w") as out:
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            deadline = time.monotonic() + START_LIMIT_S
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                    break
                except (urllib.error.URLError, OSError):
                    time.sleep(0.1)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return log.read_text(errors="replace").splitlines()


CASES = {"tail experts on the CPU": (20 * MIB,), "two devices": (14 * MIB, 12 * MIB)}


@pytest.mark.parametrize("case", CASES)
def test_server_splits_the_model_as_planned(
    case: str, server: str, mixture: ModelHeader, workers: tuple[str, str], tmp_path: Path
) -> None:
    sizes = CASES[case]
    plan, problem = plan_on(mixture, workers[: len(sizes)], sizes)
    assert plan.fits and plan.placement.cpu_expert_layers
    port = free_port()
    extra = ["--host", "127.0.0.1", "--port", str(port), "--no-warmup", "--log-verbosity", "4"]
    line = export_plan(plan, "llama-server", model=str(mixture.paths[0])).text.rstrip("\n")
    pasted = shlex.quote(server) + line.removeprefix("llama-server")
    argv = ["sh", "-c", f"{pasted} {shlex.join(extra)}"]
    log = log_of(argv, port, tmp_path / "server.log")
    budgets = {one.name: one for one in problem.budgets if one.name in (HOST, *plan.placement.devices)}
    allocated = allocated_devices(read_buffer_sizes(log), budgets)
    assert any(device.weights_bytes for device in allocated), log[-5:]
    for planned, real in zip(plan.devices, allocated, strict=True):
        for part in ("weights_bytes", "kv_bytes", "recurrent_bytes"):
            assert abs(getattr(planned, part) - getattr(real, part)) <= 3 * PRINT_RESOLUTION_BYTES, (
                planned.name
            )
