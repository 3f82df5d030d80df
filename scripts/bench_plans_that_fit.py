#!/usr/bin/env python3
"""Loads random plans that say they fit: none may run out of memory, on any device.

    scripts/bench_plans_that_fit.py [--plans N] [--limited N] [--seed N]

Plans are drawn over the families, contexts, cache types, slots, ubatches, layouts and budgets, for the CPU
alone and for one and two RPC workers on loopback, and made as `qnext plan` makes them, dry runs included.
Each that says it fits is loaded and decodes a prompt of up to a ubatch and a few tokens; what the log says
every device holds is compared with its budget. The files are headers with a hole: the weights are zeros, but
they are allocated and read.

Then larger models (up to 2.4 GiB), each in an engine child of its own inside a memory group (cgroup v1,
needs root). The limit is the plan's host budget, which is what the plan needs or up to 2 % more; the child's
own base, measured as what it holds beyond its buffers when the same placement is loaded with a context of 256
tokens, a ubatch of 32 and one slot; and 4 MiB, since the base varies by 1 to 2 from run to run. A kill by the
kernel is a failure. Prints JSON; takes five minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qnext.engine.build import require_build  # noqa: E402
from qnext.engine.dry_run import DryRunner  # noqa: E402
from qnext.engine.log_reader import (  # noqa: E402
    PRINT_RESOLUTION_BYTES,
    allocated_devices,
    read_buffer_sizes,
)
from qnext.engine.protocol import Message  # noqa: E402
from qnext.engine.rpc import RpcWorker  # noqa: E402
from qnext.engine.session import EngineSession  # noqa: E402
from qnext.errors import EngineError  # noqa: E402
from qnext.hardware import detect_machine  # noqa: E402
from qnext.models.gguf_reader import read_header  # noqa: E402
from qnext.models.header import ModelHeader  # noqa: E402
from qnext.models.shape import read_shape  # noqa: E402
from qnext.models.synth.synthesise import synthesise  # noqa: E402
from qnext.pipeline.planning import settle_placement  # noqa: E402
from qnext.plan.choice import choose_placement  # noqa: E402
from qnext.plan.options import PlanOptions, RepackPolicy  # noqa: E402
from qnext.plan.placement import ALL_LAYERS, Placed, Problem, check_placement  # noqa: E402
from qnext.plan.problem import untried_layout  # noqa: E402
from qnext.plan.traits import device_traits, host_traits  # noqa: E402
from qnext.plan.values import HOST, Budget, Placement  # noqa: E402
from qnext.units import GIB, MIB  # noqa: E402
from scripts.tiny_families import FAMILIES, write_family  # noqa: E402

SMALL = (
    ("tiny-qwen3next", None),
    ("tiny-qwen3next-ssm-in", None),
    ("tiny-qwen3next-fused", None),
    ("tiny-qwen3next-mtp", None),
    ("tiny-qwen3moe", None),
    ("tiny-gpt-oss", None),
    ("tiny-qwen3", None),
    *((family, None) for family in FAMILIES),
)
LARGE = (
    ("tiny-qwen3next", 64),
    ("tiny-qwen3moe", 64),
    ("tiny-gpt-oss", 48),
    ("tiny-qwen3", 96),
    ("qwen3-30b-a3b", 1),
)
QUANTS = ("Q4_K_M", "Q8_0", "BF16", "MXFP4_MOE")
BASE_VARIES = 4 * MIB
POLL_S = 0.005
GROUPS = Path("/sys/fs/cgroup/memory")
PLENTY = 1024 * GIB
PROMPT = "a tensor is loaded where the plan says that it has room "


@dataclass(frozen=True, slots=True)
class Fitting:
    """A plan that says it fits."""

    problem: Problem
    placed: Placed

    @property
    def path(self) -> str:
        """The model's file."""
        return str(self.problem.header.paths[0])

    def say(self) -> str:
        """What of it is out of the ordinary, for the list of failures."""
        placement = self.placed.placement
        sizes = {budget.name: budget.budget_bytes for budget in self.problem.budgets}
        return f"{Path(self.path).stem} {placement} in {sizes}"


@dataclass
class Tally:
    """What was found so far; `asked` counts the draws, most of whose budgets are too small."""

    asked: int = 0
    plans: int = 0
    loaded: int = 0
    failures: list[str] = field(default_factory=list)
    worst_over: int = -PLENTY
    devices: Counter[int] = field(default_factory=Counter)
    split: int = 0


class Planner:
    """Draws plans; the engine children of the dry runs end before anything is loaded.

    `workers` are the numbers of RPC workers to choose from. `most` is the most memory that these get
    together, in parts of what the whole model takes on one device.
    """

    def __init__(
        self,
        folder: Path,
        servers: tuple[str, ...],
        seed: int,
        *,
        workers: tuple[int, ...] = (0, 1, 2),
        most: float = 1.15,
    ) -> None:
        self._folder = folder
        self._workers, self._most = workers, most
        self._servers = servers
        self._random = random.Random(seed)
        machine = detect_machine(folder)
        self._host = host_traits(machine.cpu.instruction_sets or ())
        risky = untried_layout(machine) == "experts"
        self._layouts: tuple[RepackPolicy, ...] = ("experts", "off") if risky else ("full", "experts", "off")
        self._headers: dict[tuple[str, int | None, str], ModelHeader] = {}

    def draw(self, models: tuple[tuple[str, int | None], ...], count: int, tally: Tally) -> list[Fitting]:
        """`count` plans that fit, spread evenly over `models`."""
        found = []
        for index, (shape, layers) in enumerate(models):
            share = count // len(models) + (index < count % len(models))
            quants = self._random.sample(QUANTS, 2)
            for half, quant in enumerate(quants):
                header = self.header(shape, layers, quant)
                with closing(DryRunner(header, require_build(), self._folder / "cache")) as runner:
                    mine: list[Fitting] = []
                    while len(mine) < (share + half) // 2:
                        tally.asked += 1
                        if one := self._draw_one(header, runner):
                            mine.append(one)
                found += mine
        return found

    def header(self, shape: str, layers: int | None, quant: str) -> ModelHeader:
        """The header of a model whose weights are all zero."""
        key = shape, layers, quant
        if key not in self._headers:
            path = self._folder / f"{shape}-{layers or 0}-{quant}.gguf"
            if shape in FAMILIES:
                write_family(shape, path, quant)
            else:
                synthesise(shape, path, quant=quant, layers=layers, header_only=True)
            self._headers[key] = read_header(path)
        return self._headers[key]

    def _draw_one(self, header: ModelHeader, runner: DryRunner) -> Fitting | None:
        """One plan, or None where it does not fit the budgets drawn for it."""
        draw = self._random
        options = self._options()
        if read_shape(header).latent_attention:  # llama.cpp refuses two types for what is one row
            options = replace(options, kv_type_v=options.kv_type_k)
        workers = draw.choice(self._workers)
        all_of_it = choose_placement(self._problem(header, options, PLENTY, (PLENTY,) * min(workers, 1)))
        whole = all_of_it.memory.devices[-1].total_bytes
        sizes = tuple(int(whole * draw.uniform(0.15, self._most) / workers) for _ in range(workers))
        # The host gets what it needs for this split, or a little less or more.
        roomy = _settle(self._problem(header, options, PLENTY, sizes), runner)
        host = int(roomy.memory.devices[0].total_bytes * draw.uniform(0.995, 1.02))
        problem = self._problem(header, options, host, sizes)
        placed = _settle(problem, runner)
        return Fitting(problem, placed) if placed.fits else None

    def _options(self) -> PlanOptions:
        draw = self._random
        flash = draw.choice(("on", "on", "auto", "off"))
        kinds = ("f16", "f32", "bf16") if flash == "off" else ("f16", "q8_0", "q4_0", "q5_1", "bf16")
        parallel = draw.choice((1, 1, 2, 4))
        ubatch = draw.choice((32, 64, 128, 256, 512))
        chosen: dict[str, Any] = {
            "context": draw.randint(256, 16384),
            "parallel": parallel,
            "batch": draw.choice((ubatch, 2048)),
            "ubatch": ubatch,
            "kv_type_k": draw.choice(kinds),
            "kv_type_v": draw.choice(kinds),
            "flash_attention": flash,
            "load_mode": draw.choice(("none", "none", "mmap")),
            "repack": draw.choice(self._layouts),
        }
        if flash == "auto":  # llama.cpp decides on its own and takes no quantised V where it decides against
            chosen |= {"kv_type_k": "f16", "kv_type_v": "f16"}
        return PlanOptions(**chosen)

    def _problem(
        self, header: ModelHeader, options: PlanOptions, host: int, sizes: tuple[int, ...]
    ) -> Problem:
        servers = self._servers[: len(sizes)]
        remote = [
            Budget(f"RPC{i}", "rpc", size, f"RPC0[{server}]")
            for i, (size, server) in enumerate(zip(sizes, servers, strict=True))
        ]
        traits = {HOST: self._host} | {one.name: device_traits(one, one.budget_bytes) for one in remote}
        budgets = (Budget(HOST, "host", host, HOST), *remote)
        return Problem(header, read_shape(header), budgets, traits, options, None, servers)


def _settle(problem: Problem, runner: DryRunner) -> Placed:
    placement, measured = settle_placement(problem, runner)
    return check_placement(measured, placement)


def load(session: EngineSession, one: Fitting, tally: Tally) -> None:
    """Load and decode; every device's allocation against its budget."""
    placement = one.placed.placement
    tally.plans += 1
    tally.devices[len(placement.devices)] += 1
    tally.split += bool(placement.cpu_expert_layers) or 0 < placement.n_gpu_layers < ALL_LAYERS
    try:
        events = _decode(session, one.path, placement)
    except EngineError as error:
        tally.failures.append(f"{one.say()}: {error.message}")
        return
    if events[-1]["event"] != "done":
        tally.failures.append(f"{one.say()}: ended with {events[-1]}")
        return
    tally.loaded += 1
    sizes = read_buffer_sizes(session.size_lines)
    budgets = {
        budget.name: budget for budget in one.problem.budgets if budget.name in (HOST, *placement.devices)
    }
    for device in allocated_devices(sizes, budgets):
        over = device.total_bytes - budgets[device.name].budget_bytes
        tally.worst_over = max(tally.worst_over, over)
        # Every line is rounded to 0.01 MiB.
        if over > PRINT_RESOLUTION_BYTES * len(sizes) // 2:
            tally.failures.append(f"{one.say()}: {device.name} holds {over} bytes over its budget")


def _decode(session: EngineSession, path: str, placement: Placement) -> list[Message]:
    """Load the model, evaluate a prompt of about a ubatch, write three tokens."""
    session.open(path, placement)
    room = placement.context // placement.parallel - 16
    times = max(1, min(placement.ubatch, room) // len(session.tokenize(PROMPT)))
    return list(session.generate(PROMPT * times, max_tokens=3, sampling={}))


class MemoryGroup:
    """A cgroup of version 1 for one engine child; `rest` is what it holds that is no page cache."""

    def __init__(self, limit_bytes: int | None) -> None:
        self._folder = GROUPS / f"qnext-plans-{os.getpid()}"
        self._folder.mkdir()
        if limit_bytes is not None:
            (self._folder / "memory.limit_in_bytes").write_text(str(limit_bytes))

    def add(self, pid: int) -> None:
        """Put a process in; what it holds already stays charged where it was."""
        (self._folder / "cgroup.procs").write_text(str(pid))

    def rest(self) -> int:
        """Bytes in use that the kernel cannot take back."""
        stat = re.search(r"^total_rss (\d+)", (self._folder / "memory.stat").read_text(), re.MULTILINE)
        kernel = int((self._folder / "memory.kmem.usage_in_bytes").read_text())
        return int(stat.group(1) if stat else 0) + kernel

    def kills(self) -> int:
        """Processes the kernel has killed for lack of memory in the group."""
        found = re.search(r"^oom_kill (\d+)", (self._folder / "memory.oom_control").read_text(), re.MULTILINE)
        return int(found.group(1)) if found else 0

    def remove(self) -> None:
        """Take the group away, once its processes have ended."""
        for _ in range(100):
            with suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.05)
        self._folder.rmdir()


@contextmanager
def grouped(limit_bytes: int | None) -> Iterator[tuple[EngineSession, MemoryGroup]]:
    """An engine child inside a memory group of its own."""
    group = MemoryGroup(limit_bytes)
    try:
        with EngineSession() as session:
            group.add(session.pid)
            yield session, group
    finally:
        group.remove()


def load_limited(plans: list[Fitting]) -> dict[str, Any]:
    """Each plan in a child that may hold its host budget and its own base."""
    tally, kills = Tally(), 0
    bases, budgets = [], []
    for one in plans:
        bases.append(_base(one))
        budgets.append(one.problem.budgets[0].budget_bytes)
        with grouped(budgets[-1] + bases[-1] + BASE_VARIES) as (session, group):
            load(session, one, tally)
            kills += group.kills()
    return {
        "plans": tally.plans,
        "loaded": tally.loaded,
        "oom_kills": kills,
        "failures": tally.failures,
        "by_offload_devices": dict(sorted(tally.devices.items())),
        "bases_mib": [round(size / MIB) for size in sorted(bases)],
        "host_budgets_mib": [round(size / MIB) for size in sorted(budgets)],
    }


def _base(one: Fitting) -> int:
    """The most a child holds beyond its buffers, with the smallest context of the same placement."""
    placement = replace(
        one.placed.placement,
        context=256,
        batch=32,
        ubatch=32,
        parallel=1,
        outputs_max=1,
        load_mode="none",
    )
    with grouped(None) as (session, group), ThreadPoolExecutor(1) as aside:
        decoding = aside.submit(_decode, session, one.path, placement)
        peak = 0
        while not decoding.done():
            peak = max(peak, group.rest())
            time.sleep(POLL_S)
        decoding.result()
        budgets = {budget.name: budget for budget in one.problem.budgets}
        host = allocated_devices(read_buffer_sizes(session.size_lines), budgets)[0]
        return max(peak, group.rest()) - host.total_bytes


def run(plans: int, limited: int, seed: int) -> dict[str, Any]:
    """All loads. `worst_over_budget_bytes` is negative where every device stayed below its budget."""
    began, tally = time.monotonic(), Tally()
    with tempfile.TemporaryDirectory() as name, RpcWorker() as first, RpcWorker() as second:
        planner = Planner(Path(name), (first.endpoint, second.endpoint), seed)
        fitting = planner.draw(SMALL, plans, tally)
        with EngineSession() as session:
            for one in fitting:
                load(session, one, tally)
        result: dict[str, Any] = {
            "plans": tally.plans,
            "loaded": tally.loaded,
            "failures": tally.failures,
            "worst_over_budget_bytes": tally.worst_over,
            "drawn": tally.asked,
            "split_between_host_and_devices": tally.split,
            "by_offload_devices": dict(sorted(tally.devices.items())),
        }
        if os.access(GROUPS / "cgroup.procs", os.W_OK):
            result["under_cgroup"] = load_limited(planner.draw(LARGE, limited, Tally()))
        else:
            result["under_cgroup"] = None
    result["seconds"] = round(time.monotonic() - began)
    return result


def main() -> int:
    """Print the result as JSON; status 1 when a plan that fits did not."""
    parser = argparse.ArgumentParser(description="Load random plans that say they fit.")
    parser.add_argument("--plans", type=int, default=210, help="plans to load (210)")
    parser.add_argument("--limited", type=int, default=30, help="plans to load under a memory limit (30)")
    parser.add_argument("--seed", type=int, default=4)
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that memory groups and files are taken away
    result = run(asked.plans, asked.limited, asked.seed)
    print(json.dumps(result, indent=1))
    under = result["under_cgroup"]
    return 1 if result["failures"] or (under and under["failures"]) else 0


if __name__ == "__main__":
    sys.exit(main())
