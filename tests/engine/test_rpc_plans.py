"""Plans on real second and third devices: loopback RPC workers stand in for GPUs, with budgets of the test.

What the plan says each device holds is compared with what the engine's log says it allocated, and what the
model then writes with what it writes on the CPU alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from qnext.config import find_paths
from qnext.engine.build import require_build
from qnext.engine.dry_run import DryRunner
from qnext.engine.log_reader import PRINT_RESOLUTION_BYTES, allocated_devices, read_buffer_sizes
from qnext.engine.rpc import RpcWorker
from qnext.engine.session import EngineSession
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.shape import read_shape
from qnext.models.synth import DEMO_SENTENCE, synthesise
from qnext.pipeline.planning import settle_placement
from qnext.plan.options import PlanOptions
from qnext.plan.placement import Placed, Problem, check_placement
from qnext.plan.traits import device_traits, host_traits
from qnext.plan.values import HOST, Budget
from qnext.units import GIB, MIB

pytestmark = pytest.mark.engine

PROMPT = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[str, str]]:
    """Endpoints of two workers. A worker serves one client at a time, the next one waits."""
    with RpcWorker() as one, RpcWorker() as two:
        yield one.endpoint, two.endpoint


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> ModelHeader:
    """A tiny qwen3next of all zeros: a hole in the file system is read as such."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    synthesise("tiny-qwen3next", path, quant="Q4_K_M", header_only=True)
    return read_header(path)


Settled = dict[str, tuple[Problem, Placed]]


@pytest.fixture(scope="module")
def settled(mixture: ModelHeader, demo_model: Path, workers: tuple[str, str]) -> Settled:
    """Every case placed with the compute buffers of dry runs, before a session keeps the workers busy."""
    demo = read_header(demo_model)
    found: Settled = {}
    with (
        closing(DryRunner(mixture, require_build(), find_paths().headers_dir)) as on_mixture,
        closing(DryRunner(demo, require_build(), find_paths().headers_dir)) as on_demo,
    ):
        for case, (sizes, wishes) in CASES.items():
            problem = ask(mixture, workers, sizes, **wishes)
            found[case] = problem, settle(problem, on_mixture)
        on_mixture.close()
        whole = settle(ask(demo, workers, (GIB,)), on_demo).memory.devices[1]
        for budget, sizes in {
            "all": (whole.total_bytes,),
            "some": (whole.total_bytes - whole.weights_bytes // 4,),
            "few": (whole.total_bytes // 2, whole.total_bytes // 3),
        }.items():
            problem = ask(demo, workers, sizes)
            found[f"demo {budget}"] = problem, settle(problem, on_demo)
    return found


@pytest.fixture(scope="module")
def session(settled: Settled) -> Iterator[EngineSession]:
    """One engine child for all loads."""
    with EngineSession(silence_limit_s=30) as child:
        yield child


def ask(header: ModelHeader, workers: tuple[str, ...], sizes: tuple[int, ...], **wishes: object) -> Problem:
    servers = workers[: len(sizes)]
    budgets = [Budget(HOST, "host", 8 * GIB, HOST)]
    budgets += [
        Budget(f"RPC{i}", "rpc", size, f"RPC0[{server}]")
        for i, (size, server) in enumerate(zip(sizes, servers, strict=True))
    ]
    traits = {HOST: host_traits(())}
    traits |= {one.name: device_traits(one, free_bytes=one.budget_bytes) for one in budgets[1:]}
    options = PlanOptions(**{"context": 2048, "ubatch": 256, "repack": "off", **wishes})  # type: ignore[arg-type]
    return Problem(header, read_shape(header), tuple(budgets), traits, options, None, servers)


def settle(problem: Problem, runner: DryRunner) -> Placed:
    placement, measured = settle_placement(problem, runner)
    return check_placement(measured, placement)


def assert_allocated_as_planned(problem: Problem, placed: Placed, log: tuple[str, ...]) -> None:
    sizes = read_buffer_sizes(log)
    lines = Counter(size.part for size in sizes)
    budgets = {
        budget.name: budget for budget in problem.budgets if budget.name in (HOST, *placed.placement.devices)
    }
    allocated = allocated_devices(sizes, budgets)
    for planned, real in zip(placed.memory.devices, allocated, strict=True):
        for part, name in (("model", "weights"), ("KV", "kv"), ("RS", "recurrent"), ("output", "other")):
            off = abs(getattr(planned, f"{name}_bytes") - getattr(real, f"{name}_bytes"))
            assert off <= PRINT_RESOLUTION_BYTES * max(1, lines[part]), (planned, real)
        assert abs(planned.compute_bytes - real.compute_bytes) <= PRINT_RESOLUTION_BYTES, (planned, real)
        assert real.total_bytes <= (real.budget_bytes or 0) + 4 * PRINT_RESOLUTION_BYTES


CASES: dict[str, tuple[tuple[int, ...], dict[str, object]]] = {
    "everything on one": ((64 * MIB,), {}),
    "tail experts on the CPU": ((20 * MIB,), {}),
    "attention of some layers only": ((8 * MIB,), {}),
    "no room for a layer": ((MIB // 4,), {}),
    "two of different size": ((24 * MIB, 22 * MIB), {}),
    "two, the tail on the CPU": ((11 * MIB, 10 * MIB), {}),
    "n-cpu-moe 3": ((64 * MIB,), {"cpu_experts": 3}),
    "cpu-moe": ((64 * MIB,), {"cpu_experts": 10_000}),
    "ngl 5, experts as they fit": ((16 * MIB,), {"n_gpu_layers": 5}),
    "ngl 8 leaves the first layer": ((64 * MIB,), {"n_gpu_layers": 8}),
    "split 1:3": ((64 * MIB, 64 * MIB), {"tensor_split": (1.0, 3.0)}),
    "eight-bit cache, four slots": ((24 * MIB,), {"kv_type_k": "q8_0", "kv_type_v": "q8_0", "parallel": 4}),
    "mapped": ((20 * MIB,), {"load_mode": "mmap"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_device_allocates_what_was_planned(
    case: str, settled: Settled, mixture: ModelHeader, session: EngineSession
) -> None:
    problem, placed = settled[case]
    assert placed.fits
    session.open(str(mixture.paths[0]), placed.placement)
    assert_allocated_as_planned(problem, placed, session.log)


def test_cases_are_as_different_as_their_names_say(settled: Settled) -> None:
    placements = {case: placed.placement for case, (_, placed) in settled.items()}
    moved = {case: len(placement.cpu_expert_layers) for case, placement in placements.items()}
    assert moved["everything on one"] == 0
    assert 0 < moved["tail experts on the CPU"] < 8
    assert placements["attention of some layers only"].n_gpu_layers in range(1, 9)
    assert placements["no room for a layer"].devices == ()
    assert (moved["two of different size"], moved["n-cpu-moe 3"], moved["cpu-moe"]) == (0, 3, 8)
    assert 0 < moved["two, the tail on the CPU"] < 8
    assert placements["two, the tail on the CPU"].devices == ("RPC0", "RPC1")
    assert 0 < moved["demo some"] < moved["demo few"]


@pytest.mark.parametrize("budget", ["all", "some", "few"])
def test_generation_is_that_of_the_cpu_alone(
    budget: str, settled: Settled, demo_model: Path, session: EngineSession
) -> None:
    _, placed = settled[f"demo {budget}"]
    assert placed.placement.devices
    session.open(str(demo_model), placed.placement)
    events = list(session.generate(PROMPT, max_tokens=64, sampling={}))
    assert "".join(str(event["text"]) for event in events if event["event"] == "token") == DEMO_SENTENCE
    assert events[-1]["stop_reason"] == "eos"
