"""Makes the plan: from header, budgets, wishes and speeds to a placement with every byte accounted for.

Pure: the same inputs give the same plan. Nothing here reads a disk, a clock or an engine; figures of a dry
run and of a bandwidth probe come in as values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape
from qnext.plan.alternatives import suggest_changes
from qnext.plan.cache import snapshot_bytes
from qnext.plan.ceiling import longest_context
from qnext.plan.choice import choose_placement
from qnext.plan.flags import llama_server_argv, server_warnings
from qnext.plan.host_caches import HostCaches, plan_host_caches
from qnext.plan.placement import Problem, check_placement
from qnext.plan.reasons import plan_reasons
from qnext.plan.speed import MachineSpeeds
from qnext.plan.turn import forecast
from qnext.plan.values import (
    DeviceMemory,
    Placement,
    Prediction,
    Reason,
    Workload,
    device_to_dict,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A finished plan. `missing` is empty when it fits; `alternatives` name changes that would make it fit.

    `context_ceiling` is how far the context could grow, in tokens over all slots. `compute_measured` says
    that compute buffers come from the engine's dry run and not from the estimate.
    """

    model_ref: str
    header: ModelHeader
    shape: ModelShape
    placement: Placement
    devices: tuple[DeviceMemory, ...]
    caches: HostCaches
    context_ceiling: int | None
    compute_measured: bool
    missing: Mapping[str, int]
    alternatives: tuple[str, ...]
    argv: tuple[str, ...]
    prediction: Prediction
    reasons: tuple[Reason, ...]
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether every device stays inside its budget."""
        return not self.missing


def make_plan(
    model_ref: str, problem: Problem, speeds: MachineSpeeds, *, placement: Placement | None = None
) -> Plan:
    """The plan for one model file on one machine, or what it would be with a given `placement`."""
    header, shape = problem.header, problem.shape
    placed = choose_placement(problem) if placement is None else check_placement(problem, placement)
    placement = placed.placement
    memory = placed.memory.devices
    prediction, speed_reason = forecast(problem, placement, memory, speeds, problem.options.workload)
    caches = plan_host_caches(memory, placement.parallel, snapshot_bytes(shape, placement))
    return Plan(
        model_ref=model_ref,
        header=header,
        shape=shape,
        placement=placement,
        devices=memory,
        caches=caches,
        context_ceiling=longest_context(problem, placed) if placed.fits else None,
        compute_measured=not placed.memory.compute_estimated,
        missing=placed.missing,
        alternatives=(),
        argv=llama_server_argv(
            placement,
            str(header.paths[0]),
            shape,
            caches,
        ),
        prediction=prediction,
        reasons=(
            *plan_reasons(problem, placed, caches),
            *placed.memory.reasons,
            speed_reason,
        ),
        warnings=(*server_warnings(placement), *_context_warnings(problem, placement)),
    )


def explain_misfit(plan: Plan, problem: Problem, fits: Callable[[Problem], bool]) -> Plan:
    """A plan that does not fit, with the changes that would make it fit (`alternatives`).

    `fits` judges a changed problem where the arithmetic alone says that it fits: by a dry run, if there is
    an engine.
    """
    problem = replace(problem, speeds=None)  # whether something fits does not hang on them
    placed = check_placement(problem, plan.placement)

    def both(changed: Problem) -> bool:
        return choose_placement(changed).fits and fits(changed)

    return replace(plan, alternatives=tuple(suggest_changes(problem, placed, both)))


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan as the JSON other programs rely on, without its `schema` field."""
    placement = asdict(plan.placement)
    placement["overrides"] = [f"{rule.pattern}={rule.buffer}" for rule in plan.placement.overrides]
    shape = plan.shape
    return {
        "model": {
            "ref": plan.model_ref,
            "name": shape.name,
            "arch": shape.arch,
            "quant": shape.quant,
            "file_bytes": plan.header.file_bytes,
            "layers": shape.n_layer,
            "experts": shape.experts or None,
            "experts_used": shape.experts_used or None,
        },
        "fits": plan.fits,
        "missing_bytes": dict(plan.missing),
        "alternatives": list(plan.alternatives),
        "devices": [device_to_dict(device) for device in plan.devices],
        "context_ceiling": plan.context_ceiling,
        "host_caches": asdict(plan.caches),
        "compute_source": "dry run" if plan.compute_measured else "estimate",
        "placement": placement,
        "llama_server_argv": list(plan.argv),
        "prediction": asdict(plan.prediction),
        "candidates": [],
        "reasons": [asdict(reason) for reason in plan.reasons],
        "warnings": list(plan.warnings),
    }


def _context_warnings(problem: Problem, placement: Placement) -> tuple[str, ...]:
    per_slot = placement.context // placement.parallel
    trained, options = problem.shape.context_train, problem.options
    if per_slot > trained:
        return (f"{per_slot:,} tokens of context per slot are more than the {trained:,} trained for",)
    stated = options.context is None or options.workload != Workload()
    if stated and per_slot < options.workload.tokens:
        turn = f"{options.workload.tokens:,} that a turn of the workload needs"
        return (f"{per_slot:,} tokens of context per slot are fewer than the {turn}",)
    return ()
