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
from qnext.plan.choice import choose_placement
from qnext.plan.flags import llama_server_argv, server_warnings
from qnext.plan.options import DEFAULT_CONTEXT, GPU_UBATCHES
from qnext.plan.placement import Placed, Problem, check_placement
from qnext.plan.speed import MachineSpeeds
from qnext.plan.turn import forecast
from qnext.plan.values import (
    DeviceMemory,
    Placement,
    Prediction,
    Reason,
    device_to_dict,
)
from qnext.units import format_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """A finished plan. `missing` is empty when it fits; `alternatives` name changes that would make it fit.

    `compute_measured` says that compute buffers come from the engine's dry run and not from the estimate.
    """

    model_ref: str
    header: ModelHeader
    shape: ModelShape
    placement: Placement
    devices: tuple[DeviceMemory, ...]
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
    host = placed.memory.devices[0]
    return Plan(
        model_ref=model_ref,
        header=header,
        shape=shape,
        placement=placement,
        devices=placed.memory.devices,
        compute_measured=not placed.memory.compute_estimated,
        missing=placed.missing,
        alternatives=(),
        argv=llama_server_argv(
            placement,
            str(header.paths[0]),
            shape,
            spare_host_bytes=max(0, (host.budget_bytes or 0) - host.total_bytes),
            snapshot_bytes=sum(one.recurrent_bytes for one in placed.memory.devices) // placement.parallel,
        ),
        prediction=prediction,
        reasons=(*_reasons(problem, placed), *placed.memory.reasons, speed_reason),
        warnings=(*server_warnings(placement), *_context_warnings(shape, placement)),
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
        "compute_source": "dry run" if plan.compute_measured else "estimate",
        "placement": placement,
        "llama_server_argv": list(plan.argv),
        "prediction": asdict(plan.prediction),
        "candidates": [],
        "reasons": [asdict(reason) for reason in plan.reasons],
        "warnings": list(plan.warnings),
    }


def _context_warnings(shape: ModelShape, placement: Placement) -> tuple[str, ...]:
    per_slot = placement.context // placement.parallel
    if per_slot <= shape.context_train:
        return ()
    return (f"{per_slot:,} tokens of context per slot are more than the {shape.context_train:,} trained for",)


def _reasons(problem: Problem, placed: Placed) -> list[Reason]:
    shape, placement = problem.shape, placed.placement
    reasons = [_placement_reason(problem, placed)]
    if problem.options.context is None:
        reasons.append(
            Reason(
                what=f"context {placement.context}",
                because="the usual default, halved until it fits; the model was trained for more"
                if placement.context < shape.context_train
                else "all the model was trained for",
                numbers={"trained": shape.context_train, "default": DEFAULT_CONTEXT},
            )
        )
    chosen = problem.options.ubatch is None and placement.ubatch in GPU_UBATCHES
    if placement.cpu_expert_layers and placement.devices and chosen:
        reasons.append(
            Reason(
                what=f"ubatch {placement.ubatch}",
                because="experts in RAM are copied to the GPU once per ubatch of the prompt, and a larger "
                "ubatch takes the room of experts on the GPU: this one makes the turn shortest",
                numbers={
                    "largest_tried": GPU_UBATCHES[0],
                    "prompt": problem.options.workload.prompt,
                    "generate": problem.options.workload.generate,
                },
            )
        )
    if not placement.devices:
        asked = problem.options.repack_asked
        reason = _REPACK_REASONS[problem.options.repack]
        reasons.append(replace(reason, because="asked for with --repack") if asked else reason)
    return reasons


def _placement_reason(problem: Problem, placed: Placed) -> Reason:
    shape, placement = problem.shape, placed.placement
    host, others = placed.memory.devices[0], placed.memory.devices[1:]
    left = {f"{one.name}_left_bytes": (one.budget_bytes or 0) - one.total_bytes for one in others}
    if not placement.devices:
        offered = problem.offload_devices()
        why = "there is no device with memory beside the host"
        if offered:
            why = f"{', '.join(offered)} cannot hold even one layer with its cache"
        if problem.options.n_gpu_layers == 0:
            why = "asked for with -ngl 0"
        return Reason("everything on the CPU", why, {"host_bytes": host.total_bytes})
    layers = min(placement.n_gpu_layers, shape.n_layer_all + 1)
    partly = layers <= shape.n_layer_all
    numbers: dict[str, float | int | str] = {"layers_on_gpu": layers, "layers": shape.n_layer, **left}
    if shape.dense:
        what = f"{layers - 1} of {shape.n_layer} layers on the GPU" if partly else "all layers on the GPU"
        return Reason(
            what,
            "a dense model has no experts to leave in RAM: every layer is read in full for every token, so "
            "whole layers move, the last ones first",
            numbers,
        )
    moved = len(placement.cpu_expert_layers)
    numbers["cpu_expert_layers"] = moved
    what = f"experts of {moved} of {shape.n_layer} layers on the CPU" if moved else "all experts on the GPU"
    if partly:
        return Reason(
            f"{what}, {layers - 1} layers without them on the GPU",
            "the GPU has no room for attention and cache of all layers",
            numbers,
        )
    because = (
        "attention, cache and shared experts serve every token and go to the GPU first; experts follow from "
        "the first layer on while they fit"
    )
    if moved and problem.options.cpu_experts is None:
        following = shape.layer_bytes[placement.cpu_expert_layers[0]].expert_bytes
        numbers["next_layer_bytes"] = following
        room = format_bytes(sum(one for one in left.values() if one > 0))
        because += f"; the next layer's take {format_bytes(following)}, {room} are left"
    return Reason(what, because, numbers)


_REPACK_REASONS = {
    "full": Reason("weights repacked by the engine", "wider SIMD kernels; no crash is known on this CPU"),
    "experts": Reason(
        "routed experts in CPU_REPACK, nothing in AMX buffers",
        "llama.cpp crashes with AMX buffers on such CPUs; this is the fastest layout that avoids them",
    ),
    "off": Reason("weights as they are in the file", "repacking is off"),
}
