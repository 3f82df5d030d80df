"""Prepares a sweep: the plan, llama.cpp's own placement, the cells, and how large a measurement may be.

All sizes follow from the forecast and the budget, before anything is measured, and are stored: a sweep that
is resumed measures as it did before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qnext.bench.racing import MAX_LOADS
from qnext.config import Paths
from qnext.engine.probe import known_policy
from qnext.errors import EngineError, UsageError
from qnext.pipeline.comparing import compare_fit
from qnext.pipeline.planning import PlannedModel, plan_model, require_fit
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice, layout_entry, require_this_machine
from qnext.pipeline.sweep_cells import make_cells
from qnext.pipeline.sweep_values import Cell, Grid, Objective, RungSize, SweepSettings
from qnext.plan.placement import ALL_LAYERS
from qnext.plan.values import HOST, Placement

SHORT_TOKENS, FEWEST_SHORT_TOKENS, SLOW_TOKEN_S = 24, 16, 0.2
"""Tokens generated in a short measurement; fewer where a token takes longer than this."""
FULL_SHARE = 1 / 40
"""Of the budget: what one full measurement may take by the forecast."""
DEPTH_SHARE = 1 / 30
"""Of the budget: what reading the depth may take; it is read once for each kind of cache and load."""
LOAD_SHARE = 0.35
"""Of the budget: what loading every way to place the weights once may take. One beside the baselines' is
there in any case: the race leaves it out where loads turn out to take too long."""
LOAD_BPS, LOAD_S = 0.6e9, 0.5
"""Rate of a load, and what it takes beside: a guess that only bounds how many there are."""
CELL_SECONDS = 6.0
"""Short measurements that a budget in cells grants each of them, in all."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sweep before its first step."""

    planned: PlannedModel
    settings: SweepSettings
    cells: tuple[Cell, ...]

    @property
    def live(self) -> tuple[Cell, ...]:
        """The cells that may be run."""
        return tuple(cell for cell in self.cells if not cell.status)


def prepare_sweep(
    request: Request,
    paths: Paths,
    notice: Notice,
    *,
    objective: Objective = "turn",
    grid: Grid | None = None,
    seconds: float | None = 600.0,
    cell_limit: int | None = None,
    cooldown_s: float = 0.0,
    seed: int = 0,
) -> Prepared:
    """Plan the model and list what to try. `seconds` None: as long as `cell_limit` cells should take.

    Raises DoesNotFitError for a model without a plan, UsageError for a workload that the context cannot hold.
    """
    if request.parallel != 1:
        raise UsageError("a sweep measures one sequence at a time", hint="Leave out -np.")
    planned = plan_model(request, paths, notice)
    build = require_this_machine(planned.surroundings)
    require_fit(planned.plan)
    workload, plan = request.workload, planned.plan.placement
    if workload.tokens > plan.context:
        raise UsageError(
            f"a turn of {workload.tokens:,} tokens is longer than the context of {plan.context:,}",
            hint=f"Give -c {workload.tokens} or more, or a shorter workload.",
        )
    known = known_policy(layout_entry(paths, planned.surroundings.machine, build), build)
    crashes: Mapping[str, str] = known.failures if known else {}
    defaults = default_placement(planned, request, crashes)
    cells = make_cells(
        planned,
        objective=objective,
        grid=grid or Grid(),
        fit=_fit(planned, paths, notice, defaults),
        defaults=defaults,
        crashes=crashes,
    )
    first = cells[0]
    prediction = first.prediction
    prefill = prediction.prefill_tps.mid if prediction.prefill_tps else 100.0
    decode = prediction.decode_tps.mid if prediction.decode_tps else 10.0
    tokens = FEWEST_SHORT_TOKENS if decode * SLOW_TOKEN_S < 1 else SHORT_TOKENS
    short = RungSize(
        prompt=min(workload.prompt, plan.ubatch), generate=min(workload.generate, tokens), depth=0
    )
    if seconds is None:
        each = CELL_SECONDS * (short.prompt / prefill + short.generate / decode)
        seconds = max(20.0, (cell_limit or len(cells)) * each + MAX_LOADS * _load_seconds(planned))
    depth = min(workload.depth, round(DEPTH_SHARE * seconds * prefill))
    turn_s = workload.prompt / prefill + workload.generate / decode
    share = min(1.0, FULL_SHARE * seconds / turn_s)
    full = RungSize(
        prompt=max(short.prompt, round(share * workload.prompt)),
        generate=max(min(workload.generate, 2 * short.generate), round(share * workload.generate)),
        depth=depth,
    )
    cover = bool(grid and grid.closed)
    baselines = len({cell.group for cell in cells if cell.roles and not cell.status})
    paid = int(LOAD_SHARE * seconds / _load_seconds(planned))
    groups = MAX_LOADS if cover else min(MAX_LOADS, max(baselines + 1, paid))
    settings = SweepSettings(
        request=request,
        objective=objective,
        seconds=seconds,
        cells=cell_limit,
        max_loads=MAX_LOADS,
        short=replace(short, depth=depth),
        full=full,
        cooldown_s=cooldown_s,
        seed=seed,
        cover=cover,
        room=_room(planned, cells),
    )
    return Prepared(planned, settings, _affordable(cells, groups))


def default_placement(planned: PlannedModel, request: Request, crashes: Mapping[str, str]) -> Placement:
    """What llama.cpp takes for all that `request` leaves open, but for the context, which is the plan's.

    Source: `common_params` of common.h and `common_cpu_get_num_math`: a thread per physical core.
    """
    base, machine = planned.plan.placement, planned.surroundings.machine
    cores = machine.cpu.usable_cores or machine.cpu.physical_cores or base.threads
    devices = planned.problem.offload_devices()
    threads = request.threads or cores
    return replace(
        base,
        devices=devices,
        n_gpu_layers=ALL_LAYERS if devices else 0,
        cpu_expert_layers=(),
        overrides=(),
        tensor_split=None,
        batch=request.batch,
        ubatch=request.ubatch or 512,
        kv_type_k=request.kv_type_k or "f16",
        kv_type_v=request.kv_type_v or "f16",
        flash_attention=request.flash_attention if request.flash_attention == "off" else "auto",
        threads=threads,
        threads_batch=request.threads_batch or threads,
        load_mode="mmap",
        extra_buffers="full" not in crashes,
    )


def _fit(planned: PlannedModel, paths: Paths, notice: Notice, base: Placement) -> Placement | None:
    """llama.cpp's own placement with its own defaults; None where there is nothing to place or to ask."""
    if not planned.problem.offload_devices():
        return None
    asked = replace(planned, plan=replace(planned.plan, placement=base))
    try:
        found = compare_fit(asked, paths, notice)
    except (EngineError, UsageError) as error:
        notice(f"without llama.cpp's --fit: {error.message}")
        return None
    if found.plan is None:
        notice(f"without llama.cpp's --fit: {found.error}")
        return None
    return found.plan.placement


def _room(planned: PlannedModel, cells: Sequence[Cell]) -> int:
    """Bytes for models loaded at once. None beside devices: their memory and workers serve one at a time."""
    if any(cell.placement.devices for cell in cells if not cell.status):
        return 0
    return next(budget.budget_bytes for budget in planned.problem.budgets if budget.name == HOST)


def _load_seconds(planned: PlannedModel) -> float:
    return LOAD_S + sum(tensor.nbytes for tensor in planned.model.header.tensors) / LOAD_BPS


def _affordable(cells: Sequence[Cell], groups: int) -> tuple[Cell, ...]:
    """The cells of so many ways to place the weights: the baselines', then those with the best forecasts."""
    live = [cell for cell in cells if not cell.status]
    wanted = dict.fromkeys(cell.group for cell in live if cell.roles)
    for cell in sorted(live, key=lambda one: one.predicted_s[1]):
        if len(wanted) < groups:
            wanted.setdefault(cell.group)
    return tuple(cell for cell in cells if cell.status or cell.group in wanted)
