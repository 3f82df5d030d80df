"""Measures one cell: the engine brought to its state, a turn of text that no cache has seen, what came of it.

A child lives as long as its weights are wanted, beside another where both have room: a cell with other
threads, ubatch, cache or flash attention gets a new context on the loaded model. Two cells with weights in
memory can be measured at once, each stopped while the other computes. Whatever the engine does, dying
included, becomes a status with a reason; only what no other cell could survive (an RPC worker that went away,
a missing model) is raised.
"""

from __future__ import annotations

import logging
import re
import statistics
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Literal, Self, cast

import psutil

from qnext.bench.prompts import PromptMaker
from qnext.bench.race_values import Status as RaceStatus
from qnext.engine.crash import EngineCrashError
from qnext.engine.log_reader import BufferSize, allocated_devices, read_buffer_sizes
from qnext.engine.protocol import Message
from qnext.engine.session import EngineSession
from qnext.engine.turns import Span, in_turns, running_ns
from qnext.hardware.nvml import read_nvml
from qnext.pipeline.sweep_children import SweepChildren
from qnext.pipeline.sweep_values import Cell, Objective, RungSize, objective_seconds
from qnext.plan.placement import Problem
from qnext.plan.values import HOST, DeviceMemory, Workload

logger = logging.getLogger(__name__)

Status = Literal["ok", "out-of-memory", "crashed", "hung", "too-slow", "noisy", "confounded"]

KV_TOLERANCE = 0.02
NOISY_SPREAD = 2.0
"""Quartiles of the decode steps further apart than this share of the median tell nothing."""
FEWEST_FOR_SPREAD = 12
CROWDED = 0.5
"""A child that took less than this part of the host's budget was not killed for lack of memory."""
_MEMORY = re.compile(r"alloc|out of memory|not enough|cudaMalloc|exceeds", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Taken:
    """What one measurement gave. `turn_ns` is the objective's time, of `ok` ones; `facts` see the store."""

    status: Status
    because: str = ""
    prompt: int | None = None
    depth: int | None = None
    prefill_ns: int | None = None
    token_ns: tuple[int, ...] = ()
    turn_ns: int | None = None
    rss_bytes: int | None = None
    major_faults: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def race_status(status: str) -> RaceStatus:
    """The race's word: it knows no confounded arm, and takes one as lost without the engine being lost."""
    return "too-slow" if status == "confounded" else cast(RaceStatus, status)


class SweepEngine:
    """The engine of a sweep, on one model. Use as a context manager."""

    def __init__(
        self,
        model: str,
        problem: Problem,
        *,
        objective: Objective,
        workload: Workload,
        seed: int,
        silence_limit_s: float,
        depth_limit_s: float,
        on_load: Callable[[float], None] | None = None,
    ) -> None:
        self._problem, self._depth_limit_s = problem, depth_limit_s
        self._objective, self._workload, self._seed = objective, workload, seed
        self._children = SweepChildren(model, silence_limit_s, on_load)
        self._checked: set[str] = set()
        self._depths: dict[int, list[int]] = {}

    def ready(self, cell: Cell) -> bool:
        """Whether the cell's weights are loaded."""
        return self._children.ready(cell)

    def measure(
        self,
        cell: Cell,
        size: RungSize,
        number: int,
        limit_s: float | None,
        keep: Collection[str] = (),
        also: Cell | None = None,
    ) -> Taken:
        """One turn of `size` with text salted by `number`; `limit_s` bounds prefill and decode together.

        Where weights must be loaded for it, only those of the groups in `keep` stay in memory beside, and
        those of `also` are loaded at the same time. Raises EngineCrashError when an RPC worker or the model
        is gone.
        """
        try:
            facts, wrong = self._prepare(cell, keep, also)
            if wrong:
                return Taken("confounded", wrong, facts=facts)
            return self._read(self._turn(cell, size, number, limit_s), size, limit_s, facts)
        except EngineCrashError as error:
            return self._lost(cell, error)

    def measure_both(
        self, cells: Sequence[Cell], size: RungSize, number: int, limit_s: float
    ) -> tuple[Taken, Taken]:
        """The same of two cells with weights of their own, at once: each computes while the other is stopped.

        What slows the machine then strikes both. Times are those that each had the processor. Where processes
        cannot be bound to this one (all but Linux) the two are measured one after the other. Where one dies,
        that is what both tell. Raises as `measure` does.
        """
        groups = [cell.group for cell in cells]
        if sys.platform != "linux":
            one = self.measure(cells[0], size, number, limit_s, groups)
            alive = self.ready(cells[0])
            return one, self.measure(cells[1], size, number, limit_s, groups) if alive else one
        told: list[Message] = [{} for _ in cells]
        prepared: list[tuple[dict[str, Any], str]] = []

        def run(place: int) -> None:
            told[place] = self._turn(cells[place], size, number, 2 * limit_s)

        at = cells[0]
        try:
            for at in cells:
                prepared.append(self._prepare(at, groups))
            members = [[psutil.Process(self._children.session(cell).pid)] for cell in cells]
            turns = in_turns(members, [partial(run, place) for place in (0, 1)], self.close)
        except EngineCrashError as error:
            at = next((cell for cell, facts in zip(cells, told, strict=True) if not facts), at)
            lost = self._lost(at, error)
            return lost, lost
        one, other = (
            Taken("confounded", wrong, facts=facts)
            if wrong
            else self._read(_without_stops(mine, own), size, limit_s, facts, statistics.fmean)
            for mine, own, (facts, wrong) in zip(told, turns, prepared, strict=True)
        )
        return one, other

    def close(self) -> None:
        """End the children."""
        self._children.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn(self, cell: Cell, size: RungSize, number: int, limit_s: float | None) -> Message:
        """The turn on the cell's context, with what its GPUs said right after it."""
        session = self._children.session(cell)
        depth = self._depth_tokens(session, size.depth)
        prompt = self._tokens(session, size.prompt, PromptMaker(self._seed * 1_000_003 + number + 1))
        told = session.turn(
            depth_tokens=depth,
            prompt_tokens=prompt,
            generate=size.generate,
            limit_s=limit_s,
            depth_limit_s=self._depth_limit_s,
        )
        if any(name.startswith("CUDA") for name in cell.placement.devices):
            told["gpus"] = _gpu_figures()
        return told

    def _lost(self, cell: Cell, error: EngineCrashError) -> Taken:
        """What a death of the engine says of a cell; raises what concerns every cell."""
        if error.kind in ("rpc_lost", "missing"):
            raise error
        if error.kind != "refused" or self._children.others(cell):
            self.close()  # all of them: it may have died of the other one's memory
        else:
            self._children.forget_context(cell)
        for line in error.log_tail:
            logger.info("  | %s", line)
        return self._failed(cell, error)

    def _prepare(
        self, cell: Cell, keep: Collection[str], also: Cell | None = None
    ) -> tuple[dict[str, Any], str]:
        """Make the cell's context the active one: facts of it, once per cell, and what is not as asked."""
        told = self._children.activate(cell, keep, also)
        if told is None or cell.name in self._checked:
            return {}, ""
        active = {name: told.get(name) for name in _ACTIVE}
        sizes = read_buffer_sizes(self._children.session(cell).size_lines)
        allocated = [asdict(device) for device in self._allocated(cell, sizes)]
        wrong = self._not_as_asked(cell, active, sizes)
        if not wrong:
            self._checked.add(cell.name)
        return {"active": active, "allocated": allocated}, wrong

    def _read(
        self,
        told: Message,
        size: RungSize,
        limit_s: float | None,
        facts: dict[str, Any],
        usual: Callable[[Sequence[int]], float] = statistics.median,
    ) -> Taken:
        """`usual` makes one time of the decode steps. The median of few: one that waited for another program
        says nothing of the setting. Of a turn with stops the mean: each has a stop in it or has none.
        """
        if "gpus" in told:
            facts = {**facts, "gpus": told["gpus"]}
        token_ns = tuple(cast("list[int]", told["token_ns"]))
        prefill_ns = cast("int | None", told["prefill_ns"])
        status: Status = "ok"
        because, turn_ns = "", None
        if told["stopped"]:
            status, because = "too-slow", f"not done after {limit_s:.1f} s" if limit_s else "not done in time"
        elif len(token_ns) >= FEWEST_FOR_SPREAD:
            low, middle, high = statistics.quantiles(token_ns, n=4)
            if high - low > NOISY_SPREAD * middle:
                status, because = "noisy", f"half of the steps took {low / 1e6:.1f} to {high / 1e6:.1f} ms"
        if status == "ok" and prefill_ns is not None and token_ns:
            prefill_s = prefill_ns / 1e9 / size.prompt
            decode_s = usual(token_ns) / 1e9
            turn_ns = round(1e9 * objective_seconds(self._objective, self._workload, prefill_s, decode_s))
        return Taken(
            status,
            because,
            prompt=size.prompt,
            depth=size.depth,
            prefill_ns=prefill_ns,
            token_ns=token_ns,
            turn_ns=turn_ns,
            rss_bytes=cast("int | None", told["rss_bytes"]),
            major_faults=cast("int | None", told["major_faults"]),
            facts=facts,
        )

    def _not_as_asked(self, cell: Cell, active: Message, sizes: list[BufferSize]) -> str:
        """What the engine made otherwise than asked; empty when nothing."""
        placement = cell.placement
        wanted: dict[str, object] = {
            "ubatch": min(placement.ubatch, placement.batch, placement.context),
            "batch": min(placement.batch, placement.context),
            "threads": placement.threads,
            "threads_batch": placement.threads_batch,
        }
        if placement.flash_attention != "auto" and active.get("flash_attention") is not None:
            wanted["flash_attention"] = placement.flash_attention
        wrong = [
            f"{name} is {active[name]} instead of {value}"
            for name, value in wanted.items()
            if active.get(name) is not None and active[name] != value
        ]
        planned = sum(device.kv_bytes for device in self._problem.memory(placement).devices)
        real = sum(size.bytes for size in sizes if size.part == "KV")
        if planned and real and abs(real - planned) > KV_TOLERANCE * planned:
            wrong.append(f"the KV cache takes {real} bytes instead of {planned}")
        return "; ".join(wrong)

    def _allocated(self, cell: Cell, sizes: list[BufferSize]) -> tuple[DeviceMemory, ...]:
        names = (HOST, *cell.placement.devices)
        budgets = {budget.name: budget for budget in self._problem.budgets if budget.name in names}
        return allocated_devices(sizes, {name: budgets[name] for name in names if name in budgets})

    def _failed(self, cell: Cell, error: EngineCrashError) -> Taken:
        status: Status = "crashed"
        if error.kind == "hang":
            status = "hung"
        elif error.kind == "killed" and self._crowded(cell):
            status = "out-of-memory"
        elif error.kind in ("refused", "abort", "exit"):
            lines = (error.message, *error.log_tail)
            status = "out-of-memory" if any(_MEMORY.search(line) for line in lines) else "crashed"
        return Taken(status, error.message)

    def _crowded(self, cell: Cell) -> bool:
        host = next(budget for budget in self._problem.budgets if budget.name == HOST)
        planned = self._problem.memory(cell.placement).devices
        taken = next((device.total_bytes for device in planned if device.name == HOST), 0)
        return taken > CROWDED * host.budget_bytes

    def _depth_tokens(self, session: EngineSession, count: int) -> list[int]:
        """The same for all cells, so that the engine may keep what it made of them."""
        if count and count not in self._depths:
            self._depths[count] = self._tokens(session, count, PromptMaker(self._seed))
        return self._depths.get(count, [])

    @staticmethod
    def _tokens(session: EngineSession, count: int, maker: PromptMaker) -> list[int]:
        """Exactly `count` tokens of fresh text."""
        found: list[int] = []
        while len(found) < count:
            found += session.tokenize(" ".join(maker.words(count - len(found) + 4)))
        return found[:count]


def _without_stops(told: Message, turns: Sequence[Span]) -> Message:
    """A turn's times with what the child lay still taken off."""
    prefill_ns = cast("int | None", told["prefill_ns"])
    if prefill_ns is None:
        return told
    began = cast(int, told["began_ns"])
    steps = accumulate(cast("list[int]", told["token_ns"]), initial=began + prefill_ns)
    return {
        **told,
        "prefill_ns": running_ns(turns, began, began + prefill_ns),
        "token_ns": [running_ns(turns, *step) for step in pairwise(steps)],
    }


def _gpu_figures() -> list[dict[str, Any]]:
    """Memory in use, clocks, power and heat of each NVIDIA GPU right after a measurement."""
    return [{name: gpu[name] for name in _GPU if name in gpu} for gpu in read_nvml().values]


_GPU = (
    "name",
    "vram_used",
    "core_clock_now",
    "memory_clock_now",
    "throttle_bits",
    "power_limit",
    "power_now",
    "temperature",
)
_ACTIVE = ("context", "batch", "ubatch", "threads", "threads_batch", "flash_attention")
