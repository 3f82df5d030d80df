"""One machine under examination, and the question "how fast would it be if this were different?".

A rule changes one thing (a machine with its second memory channel, an engine with the GPU's backend) and
asks for the price: the same plan and the same speed model as `qnext plan`, before and after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from qnext.doctor.values import Change, EngineFacts, Price, Variable
from qnext.hardware.machine import Gpu, Machine
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape
from qnext.plan.alternatives import suggest_changes
from qnext.plan.choice import choose_placement
from qnext.plan.machine_speeds import machine_speeds, thread_counts
from qnext.plan.options import PlanOptions, RepackPolicy, Wishes
from qnext.plan.placement import Placed, Problem
from qnext.plan.problem import backend_of, make_problem, untried_layout
from qnext.plan.turn import forecast
from qnext.plan.values import HOST, Prediction

_BOUNDLESS = 1 << 50


@dataclass(frozen=True, slots=True)
class Circumstances:
    """All that a model's speed depends on but the model. `backends` None stands for an engine with all.

    The fields from `threads` to `rpc_servers` are the user's wish, None or empty for the usual choice.
    """

    machine: Machine
    wishes: Wishes = field(default_factory=Wishes)
    threads: int | None = None
    threads_batch: int | None = None
    repack: RepackPolicy | None = None
    ram: int | None = None
    vram: int | None = None
    device_memory: Mapping[str, int] = field(default_factory=dict)
    rpc_servers: tuple[str, ...] = ()
    backends: tuple[str, ...] | None = None
    compiled_sets: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """How a model would run; with `missing` bytes per device, how it would if the host had enough RAM."""

    placed: Placed
    prediction: Prediction
    missing: Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """What the rules look at. `model` is the name to quote prices for, `named` whether the user chose it.

    `file_bytes` is the model's download, `on_disk` whether it is here already.
    """

    here: Circumstances
    model: str
    header: ModelHeader
    shape: ModelShape
    engine: EngineFacts | None = None
    variables: tuple[Variable, ...] = ()
    named: bool = False
    on_disk: bool = False

    @property
    def machine(self) -> Machine:
        """The machine under examination."""
        return self.here.machine

    @cached_property
    def now(self) -> Forecast:
        """How the model runs as things are."""
        return self._forecast(self.here)

    @cached_property
    def fits(self) -> bool:
        """Whether the model fits as things are."""
        return not self.now.missing

    @property
    def supposes_memory(self) -> bool:
        """Whether the RAM is unknown, so that enough of it is supposed."""
        memory = self.machine.memory
        known = (memory.usable_bytes, memory.available_bytes, memory.limit_bytes, memory.total_bytes)
        return self.here.ram is None and all(size is None for size in known)

    @property
    def missing(self) -> Mapping[str, int]:
        """Bytes that each device lacks for the model; empty where it fits."""
        return self.now.missing

    @cached_property
    def would_fit(self) -> str:
        """A change under which the model fits, as flags or a smaller file; empty where it fits."""
        if self.fits:
            return ""
        problem = replace(self._problem(self.here), speeds=None)  # whether it fits does not hang on them
        placed = choose_placement(problem)
        return next(suggest_changes(problem, placed, lambda changed: choose_placement(changed).fits), "")

    def with_memory(self, **changes: object) -> Circumstances:
        """Circumstances in which some fields of Memory are others."""
        machine = self.machine
        memory = replace(machine.memory, **changes)  # type: ignore[arg-type]
        return replace(self.here, machine=replace(machine, memory=memory))

    def with_cpu(self, **changes: object) -> Circumstances:
        """Circumstances in which some fields of Cpu are others."""
        machine = self.machine
        return replace(self.here, machine=replace(machine, cpu=replace(machine.cpu, **changes)))  # type: ignore[arg-type]

    def with_gpu(self, position: int, **changes: object) -> Circumstances:
        """Circumstances in which some fields of one Gpu are others."""
        gpus = list(self.machine.gpus)
        gpus[position] = replace(gpus[position], **changes)  # type: ignore[arg-type]
        return replace(self.here, machine=replace(self.machine, gpus=tuple(gpus)))

    def price(self, mended: Circumstances, now: Circumstances | None = None, supposing: str = "") -> Price:
        """The cost of things as they are, or as in `now` (`supposing` why), against things as in `mended`."""
        before = self.now if now is None else self._forecast(now)
        after = self._forecast(mended)
        if before.missing and not after.missing:
            nothing = Prediction(None, None, "roofline")
            return _price(self.model, nothing, after.prediction, "")
        if before.missing or self.supposes_memory:
            supposing = "it fitted into memory"
        return _price(self.model, before.prediction, after.prediction, supposing)

    def _forecast(self, given: Circumstances) -> Forecast:
        problem = self._problem(given)
        placed = choose_placement(problem)
        missing = placed.missing
        if missing:  # what it would reach with enough RAM still tells what a fault costs
            problem = _with_boundless_host(problem)
            placed = choose_placement(problem)
        assert problem.speeds is not None
        workload = problem.options.workload
        prediction, _ = forecast(problem, placed.placement, placed.memory.devices, problem.speeds, workload)
        return Forecast(placed, prediction, missing)

    def _problem(self, given: Circumstances) -> Problem:
        """The problem on the machine with those GPUs that the engine can use."""
        machine = given.machine
        usable = tuple(gpu for gpu in machine.gpus if _is_usable(gpu, given))
        machine = replace(machine, gpus=usable)
        usual, usual_batch = thread_counts(machine)
        options = PlanOptions(
            **given.wishes.wishes(),
            threads=given.threads or usual,
            threads_batch=given.threads_batch or given.threads or usual_batch,
            repack=given.repack or (self.engine and self.engine.safe_layout) or untried_layout(machine),
            repack_asked=given.repack is not None,
        )
        speeds = machine_speeds(machine, given.compiled_sets)
        return make_problem(
            self.header,
            self.shape,
            machine,
            options,
            ram=_BOUNDLESS if self.supposes_memory else given.ram,
            vram=given.vram,
            device_memory=given.device_memory,
            rpc_servers=given.rpc_servers,
            speeds=speeds,
        )


def _is_usable(gpu: Gpu, given: Circumstances) -> bool:
    """Whether an engine with these backends can use the GPU, and its memory, which a plan needs, is known."""
    sized = gpu.vram_total_bytes or gpu.vram_free_bytes or given.machine.unified_memory
    driven = given.backends is None or (backend_of(gpu) in given.backends and gpu.index is not None)
    return bool(sized) and driven


def _price(model: str, now: Prediction, mended: Prediction, supposing: str) -> Price:
    decode = Change(now.decode_tps, mended.decode_tps)
    return Price(model, decode, Change(now.prefill_tps, mended.prefill_tps), supposing)


def _with_boundless_host(problem: Problem) -> Problem:
    budgets = tuple(
        replace(budget, budget_bytes=_BOUNDLESS) if budget.name == HOST else budget
        for budget in problem.budgets
    )
    return replace(problem, budgets=budgets)
