"""From a planned model to the cells of a sweep: the plan, llama.cpp's own choice, and what may beat them.

Weights are placed in a few ways (layouts of the host's weights, load modes, experts on the devices around
what fits with each ubatch and cache), each of which costs a load. On each of them the cheap knobs are
crossed, and of the product those are kept that the forecast likes best and that are not far from the plan:
a combination of many changes is worth a measurement only where the changes have shown something, and the
race learns that from the others. What arithmetic says cannot be held is kept as a cell that is never run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product

from qnext.bench.knob_model import Level
from qnext.errors import UsageError
from qnext.pipeline.planning import PlannedModel
from qnext.pipeline.sweep_levels import Levels, cache_word
from qnext.pipeline.sweep_values import (
    Cell,
    Grid,
    Objective,
    Role,
    predicted_seconds,
)
from qnext.plan.choice import choose_placement
from qnext.plan.expert_rules import expert_pattern
from qnext.plan.options import RepackPolicy
from qnext.plan.placement import check_placement, on_cpu, with_layout
from qnext.plan.turn import forecast
from qnext.plan.values import HOST, MODEL_FIELDS, Override, Placement
from qnext.units import format_bytes

MOST_CELLS = 150
MOST_REFUSED = 30
OFFLOAD_THRESHOLDS = (8, 128, 512)
"""Tokens from which a prompt is multiplied on the GPU, beside llama.cpp's own 32."""
OFFLOAD_VARIABLE = "GGML_OP_OFFLOAD_MIN_BATCH"
BOUND_THREADS = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores"}
"""Each thread on a core of its own, neighbours first. The wheel's engine computes in OpenMP's threads, which
also wait in OpenMP's way: llama.cpp's --poll has nothing to say there, so it is no knob."""
FEWER_EXPERTS = (1, 2, 4)
"""Expert layers to leave off the devices, of what fits."""
FIT_SPARE = 0.05
"""What llama.cpp's own placements may lack of a budget by our arithmetic and are run all the same: it counts
the margin otherwise, and a baseline is worth the try."""
FAR = 0.03
"""How much longer a forecast counts for each knob that differs from the plan."""
CACHE_BYTES = {"f32": 4.0, "f16": 2.0, "bf16": 2.0, "q8_0": 1.0625, "q5_1": 0.75, "q5_0": 0.6875}


@dataclass(frozen=True, slots=True)
class _Base:
    """Weights placed one way. `knobs` say which; `status` and `because` why it is not run."""

    placement: Placement
    knobs: Mapping[str, Level]
    environment: Mapping[str, str] = field(default_factory=dict)
    status: str = ""
    because: str = ""


def make_cells(
    planned: PlannedModel,
    *,
    objective: Objective,
    grid: Grid,
    fit: Placement | None,
    defaults: Placement,
    crashes: Mapping[str, str],
) -> tuple[Cell, ...]:
    """The baselines first, then what may beat them, then what is refused, with the reason.

    `fit` is llama.cpp's own placement, None where it cannot be asked, `defaults` what it takes unasked;
    `crashes` are the weight layouts that are known to end the engine here, with what happened. Raises
    UsageError for a grid without any cell.
    """
    return _Maker(planned, objective, grid, crashes).cells(fit, defaults)


class _Maker:
    def __init__(
        self, planned: PlannedModel, objective: Objective, grid: Grid, crashes: Mapping[str, str]
    ) -> None:
        self._planned, self._objective, self._grid, self._crashes = planned, objective, grid, crashes
        # The dry run's figures are of the plan's own ubatch and cache: others are estimated.
        self._problem = replace(planned.problem, compute=None)
        self._plan = plan = planned.plan.placement
        self._plan_threads = (plan.threads, plan.threads_batch)
        self._all_on_devices = bool(
            plan.devices
            and not plan.cpu_expert_layers
            and plan.n_gpu_layers > planned.model.shape.n_layer_all
        )
        self._levels = Levels(planned, objective, grid, self._all_on_devices)
        self._base_knobs = self._knobs_of_weights(self._plan, self._layout_of(self._plan))
        self._plan_knobs = self._knobs(_Base(self._plan, self._base_knobs), self._plan)

    def cells(self, fit: Placement | None, defaults: Placement) -> tuple[Cell, ...]:
        """All cells, in the order that `make_cells` states."""
        baselines = self._baselines(fit, defaults)
        known = {_identity(cell.placement, cell.environment) for cell in baselines}
        live: dict[str, list[Cell]] = {}
        refused: list[Cell] = []
        taken = {cell.name for cell in baselines}
        for base in self._bases():
            if self._grid.affinity == ("cores",):
                base = _with_bound_threads(base)
            for placement in self._levels.contexts(base.placement):
                cell = self._cell(base, placement)
                identity = _identity(placement, base.environment)
                if identity in known or cell.name in taken:
                    continue
                known.add(identity)
                taken.add(cell.name)
                if cell.status:
                    if (placement.threads, placement.threads_batch) == self._plan_threads:
                        refused.append(cell)  # threads take no memory: one of them tells it all
                else:
                    live.setdefault(cell.group, []).append(cell)
        chosen = self._trimmed(live, MOST_CELLS - len(baselines))
        running = [cell for cell in baselines if not cell.status]
        if not running:
            raise UsageError("no baseline of the sweep can run here", hint="Plan it first: qnext plan MODEL")
        refused.sort(key=self._far)
        unable = [cell for cell in baselines if cell.status]
        return (*running, *chosen, *unable, *refused[:MOST_REFUSED])

    def _baselines(self, fit: Placement | None, defaults: Placement) -> list[Cell]:
        """The plan, llama.cpp's fit and its defaults; one cell has two roles where they are the same."""
        wanted: list[tuple[Role, str, Placement]] = [("plan", "plan", self._plan)]
        if fit is not None:
            wanted.append(("fit", "llama.cpp fit", fit))
        elif not defaults.devices:
            wanted.append(("fit", "llama.cpp fit", defaults))
        wanted.append(("defaults", "llama.cpp defaults", defaults))
        found: dict[object, Cell] = {}
        refused = []
        for role, name, placement in wanted:
            identity = _identity(placement, {})
            if identity in found:
                known = found[identity]
                found[identity] = replace(known, roles=(*known.roles, role))
                continue
            if role != "plan" and "full" in self._crashes:
                crashing = _Base(
                    replace(placement, extra_buffers=True),
                    self._knobs_of_weights(placement, "full"),
                    status="crashed",
                    because=self._crashes["full"],
                )
                refused.append(replace(self._cell(crashing, crashing.placement), name=f"{name} as it comes"))
            base = _Base(placement, self._knobs_of_weights(placement, self._layout_of(placement)))
            cell = self._cell(base, placement, spare=0.0 if role == "plan" else FIT_SPARE)
            found[identity] = replace(cell, name=name, roles=() if cell.status else (role,))
        return [*found.values(), *refused]

    def _bases(self) -> Iterator[_Base]:
        """The ways to place the weights, the plan's first."""
        plan, grid, problem = self._plan, self._grid, self._problem
        first = _Base(plan, self._base_knobs)
        yield first
        layouts = () if self._all_on_devices else ("full", "experts", "off")
        for layout in self._levels.levels("repack", layouts, self._layout_of(plan)):
            yield from self._laid_out(plan, str(layout))
        if plan.devices:
            for placement in self._placements():
                yield _Base(placement, self._knobs_of_weights(placement, self._layout_of(placement)))
        # Repacked weights are copies, so a mapped file serves only the layout that leaves it as it is.
        bare = plan
        if not plan.devices and not grid.closed and grid.repack is None:
            bare = on_cpu(replace(problem, options=replace(problem.options, repack="off")), plan)
        copied = self._layout_of(bare) != "off" or self._all_on_devices
        usual = () if copied and grid.load_mode is None else ("none", "mmap")
        for mode in self._levels.levels("load_mode", usual, plan.load_mode):
            placement = replace(bare, load_mode=mode)  # type: ignore[arg-type]
            yield _Base(placement, self._knobs_of_weights(placement, self._layout_of(placement)))
        gpus = [budget.name for budget in problem.budgets if budget.kind == "gpu"]
        if set(gpus) & set(plan.devices) and plan.cpu_expert_layers and not grid.closed:
            for threshold in OFFLOAD_THRESHOLDS:
                yield _Base(
                    plan, {**self._base_knobs, "offload": threshold}, {OFFLOAD_VARIABLE: str(threshold)}
                )
        yield from self._bound(first)

    def _bound(self, base: _Base) -> Iterator[_Base]:
        """`base` with its threads bound to cores, where cores are not all alike or the user asks."""
        machine = self._planned.surroundings.machine
        uneven = machine.cpu.performance_cores and machine.cpu.efficiency_cores
        apart = len(machine.memory.numa_nodes or ()) > 1
        usual = ("cores",) if (uneven or apart) and not self._all_on_devices else ()
        if "cores" in self._levels.levels("affinity", usual, "free"):
            yield _with_bound_threads(base)

    def _laid_out(self, plan: Placement, layout: str) -> Iterator[_Base]:
        """The plan with the host's weights in another layout."""
        problem = self._problem
        if not plan.devices:
            options = replace(problem.options, repack=_policy(layout))
            placement = on_cpu(replace(problem, options=options), plan)
        else:
            placement = with_layout(problem, plan, _policy(layout))
        if _identity(placement, {}) == _identity(plan, {}):
            return
        because = self._crashes.get(layout, "")
        yield _Base(
            placement,
            self._knobs_of_weights(placement, layout),
            status="crashed" if because else "",
            because=because and f"not run, it ended the engine before: {because}",
        )

    def _placements(self) -> Iterator[Placement]:
        """Other shares on the devices: the most that fits with each ubatch and cache, and a few fewer."""
        options, plan = self._problem.options, self._plan
        base = replace(options, context=plan.context, parallel=plan.parallel)
        forced = options.overrides or options.tensor_split or options.n_gpu_layers is not None
        if self._grid.cpu_experts is not None:
            wishes = [replace(base, cpu_experts=count) for count in self._grid.cpu_experts]
        elif self._grid.closed or forced or options.cpu_experts is not None:
            return
        else:
            pairs = product(self._levels.ubatches(), self._levels.attention())
            wishes = [
                replace(base, ubatch=ubatch, kv_type_k=kv, kv_type_v=kv)
                for ubatch, (flash, kv) in pairs
                if flash == "on"
            ]
        for wish in wishes:
            placed = choose_placement(replace(self._problem, options=wish))
            if placed.gpus_fit and placed.placement.devices:
                yield _as(placed.placement, plan)
        if self._grid.cpu_experts is None and not self._all_on_devices:
            yield from _with_fewer_experts(plan, self._planned.model.shape.n_layer)

    def _cell(self, base: _Base, placement: Placement, spare: float = 0.0) -> Cell:
        """One cell with its forecast; refused where it lacks more than the share `spare` of a budget."""
        problem, planned = self._problem, self._planned
        status, because = base.status, base.because
        if placement == planned.plan.placement:
            devices, missing = planned.plan.devices, planned.plan.missing
        else:
            placed = check_placement(problem, placement)
            devices, missing = placed.memory.devices, placed.missing
        budgets = {device.name: device.budget_bytes or 0 for device in devices}
        missing = {name: size for name, size in missing.items() if size > spare * budgets[name]}
        if missing and not status:
            lacking = ", ".join(f"{format_bytes(size)} on {name}" for name, size in missing.items())
            status, because = "does-not-fit", f"{lacking} missing, by arithmetic"
        workload = problem.options.workload
        prediction, _ = forecast(problem, placement, devices, planned.surroundings.speeds, workload)
        knobs = self._knobs(base, placement)
        on_devices = self._experts_on_devices(placement)
        cache_bytes = CACHE_BYTES.get(placement.kv_type_k, 0.6) + CACHE_BYTES.get(placement.kv_type_v, 0.6)
        return Cell(
            name=self._name(knobs),
            placement=placement,
            knobs=knobs,
            demands={
                "experts on devices": float(on_devices),
                "layers on devices": float(placement.n_gpu_layers),
                "ubatch": float(placement.ubatch),
                "cache bytes": cache_bytes,
            },
            order=on_devices,
            predicted_s=predicted_seconds(prediction, self._objective, workload),
            prediction=prediction,
            environment=base.environment,
            status=status,
            because=because,
            host_bytes=next((device.total_bytes for device in devices if device.name == HOST), 0),
        )

    def _knobs(self, base: _Base, placement: Placement) -> dict[str, Level]:
        return {
            **base.knobs,
            "threads": placement.threads,
            "threads_batch": placement.threads_batch,
            "ubatch": min(placement.ubatch, placement.batch),
            "batch": placement.batch,
            "flash": placement.flash_attention,
            "kv": cache_word(placement),
        }

    def _knobs_of_weights(self, placement: Placement, layout: str) -> dict[str, Level]:
        experts = self._planned.model.shape.n_layer - self._experts_on_devices(placement)
        return {
            "layout": layout,
            "load": placement.load_mode,
            "cpu experts": experts,
            "gpu layers": placement.n_gpu_layers,
            "offload": 32,
            "affinity": "free",
        }

    def _layout_of(self, placement: Placement) -> str:
        if placement.extra_buffers:
            return "full"
        return "experts" if any(rule.buffer == "CPU_REPACK" for rule in placement.overrides) else "off"

    def _experts_on_devices(self, placement: Placement) -> int:
        layers = self._planned.model.shape.n_layer
        moved = min(layers, placement.n_gpu_layers) if placement.devices else 0
        return max(0, moved - len(placement.cpu_expert_layers))

    def _name(self, knobs: Mapping[str, Level]) -> str:
        words = {"threads": "t", "threads_batch": "tb", "ubatch": "ub", "batch": "b", "flash": "fa"}
        changed = [
            f"{words.get(knob, knob)} {level}"
            for knob, level in knobs.items()
            if level != self._plan_knobs.get(knob)
        ]
        return ", ".join(changed) or "plan"

    def _far(self, cell: Cell) -> int:
        """Knobs that differ from the plan."""
        return sum(level != self._plan_knobs.get(knob) for knob, level in cell.knobs.items())

    def _trimmed(self, live: Mapping[str, list[Cell]], room: int) -> list[Cell]:
        """About as many of each group, the most promising first."""
        queues = [
            sorted(cells, key=lambda cell: cell.predicted_s[1] * (1 + FAR * self._far(cell)))
            for cells in live.values()
        ]
        chosen: list[Cell] = []
        place = 0
        while len(chosen) < room and any(place < len(queue) for queue in queues):
            chosen += [queue[place] for queue in queues if place < len(queue)][: room - len(chosen)]
            place += 1
        return chosen


def _with_bound_threads(base: _Base) -> _Base:
    return replace(
        base,
        knobs={**base.knobs, "affinity": "cores"},
        environment={**base.environment, **BOUND_THREADS},
    )


def _policy(layout: str) -> RepackPolicy:
    if layout not in ("full", "experts", "off"):
        raise UsageError(f"'{layout}' is not a layout", hint="Choose one of: full, experts, off.")
    return layout  # type: ignore[return-value]


def _identity(placement: Placement, environment: Mapping[str, str]) -> object:
    """Equal where the engine would do the same."""
    same_ubatch = min(placement.ubatch, placement.batch)
    return replace(placement, cpu_expert_layers=(), ubatch=same_ubatch), tuple(sorted(environment.items()))


def _as(weights: Placement, context: Placement) -> Placement:
    """The weights of one placement with the context of another."""
    chosen = {name: getattr(weights, name) for name in (*MODEL_FIELDS, "cpu_expert_layers")}
    return replace(context, **chosen)


def _with_fewer_experts(plan: Placement, layers: int) -> Iterator[Placement]:
    """The plan with the experts of some more layers on the host, the last of those on devices first."""
    rules = plan.overrides
    own = (Override(expert_pattern(plan.cpu_expert_layers), HOST),) if plan.cpu_expert_layers else ()
    if rules != own:
        return
    held = [layer for layer in range(layers) if layer not in plan.cpu_expert_layers]
    for fewer in FEWER_EXPERTS:
        moved = held[-max(1, fewer * layers // 48) :]
        chosen = tuple(sorted((*plan.cpu_expert_layers, *moved)))
        if moved and len(moved) < len(held):
            yield replace(plan, cpu_expert_layers=chosen, overrides=(Override(expert_pattern(chosen), HOST),))


def loads_of(cells: Iterable[Cell]) -> int:
    """Different ways to load the model among cells that may run."""
    return len({cell.group for cell in cells if not cell.status})
