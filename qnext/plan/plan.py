"""Makes the plan: from header, budgets, wishes and speeds to a placement with every byte accounted for.

Pure: the same inputs give the same plan. Nothing here reads a disk, a clock or an engine; figures of a dry
run and of a bandwidth probe come in as values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape
from qnext.plan.flags import llama_server_argv, server_warnings
from qnext.plan.options import DEFAULT_CONTEXT, SMALLEST_CONTEXT, PlanOptions
from qnext.plan.placement import Placed, Problem, find_placement
from qnext.plan.speed import MachineSpeeds, predict_speed
from qnext.plan.traits import DeviceTraits
from qnext.plan.values import HOST, Budget, DeviceMemory, Placement, Prediction, Reason
from qnext.plan.weights import assign_buffers
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
    model_ref: str,
    header: ModelHeader,
    shape: ModelShape,
    budgets: tuple[Budget, ...],
    traits: Mapping[str, DeviceTraits],
    options: PlanOptions,
    speeds: MachineSpeeds,
    *,
    rpc_servers: tuple[str, ...] = (),
    compute: Mapping[str, int] | None = None,
) -> Plan:
    """The plan for one model file on one machine. `compute` are compute-buffer bytes of a dry run."""
    problem = Problem(header, shape, budgets, traits, options, compute)
    placed, reasons = _choose(problem, rpc_servers)
    placement = placed.placement
    used = [traits[name] for name in placement.devices]
    tensors = assign_buffers(header, shape, placement, traits[HOST], used)
    prediction, speed_reason = predict_speed(
        shape,
        placement,
        tensors,
        placed.memory.devices,
        {device.buffer_type: device.name for device in used},
        speeds,
        options.workload,
    )
    return Plan(
        model_ref=model_ref,
        header=header,
        shape=shape,
        placement=placement,
        devices=placed.memory.devices,
        compute_measured=not placed.memory.compute_estimated,
        missing=placed.missing,
        alternatives=tuple(_alternatives(problem, placed, rpc_servers)) if placed.missing else (),
        argv=llama_server_argv(placement, str(header.paths[0]), shape),
        prediction=prediction,
        reasons=(*reasons, *placed.memory.reasons, speed_reason),
        warnings=server_warnings(placement),
    )


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


def device_to_dict(device: DeviceMemory) -> dict[str, Any]:
    """One entry of `devices`, the total included."""
    return {**asdict(device), "total_bytes": device.total_bytes}


def _choose(problem: Problem, rpc_servers: tuple[str, ...]) -> tuple[Placed, list[Reason]]:
    """Context and ubatch by wish or by what fits, then the placement for them."""
    placed: Placed | None = None
    for context, ubatch in _context_and_ubatch(problem):
        placed = find_placement(problem, _base(problem, rpc_servers, context, ubatch))
        if placed.fits:
            break
    assert placed is not None
    return placed, _reasons(problem, placed)


def _context_and_ubatch(problem: Problem) -> Iterator[tuple[int, int]]:
    """Combinations to try, most wanted first: the context shrinks before the ubatch does."""
    options = problem.options
    largest = problem.shape.context_train * options.parallel
    wanted = options.context or min(DEFAULT_CONTEXT, largest)
    contexts = [wanted]
    while options.context is None and contexts[-1] > SMALLEST_CONTEXT:
        contexts.append(max(SMALLEST_CONTEXT, contexts[-1] // 2))
    has_gpu = any(budget.kind == "gpu" and budget.budget_bytes > 0 for budget in problem.budgets)
    ubatches = [options.ubatch] if options.ubatch else ([2048, 512] if has_gpu else [512])
    for ubatch in ubatches:
        for context in contexts:
            yield context, min(ubatch, options.batch)


def _base(problem: Problem, rpc_servers: tuple[str, ...], context: int, ubatch: int) -> Placement:
    options = problem.options
    return Placement(
        rpc_servers=rpc_servers,
        context=context,
        batch=options.batch,
        ubatch=ubatch,
        kv_type_k=options.kv_type_k,
        kv_type_v=options.kv_type_v,
        flash_attention=options.flash_attention,
        threads=options.threads,
        threads_batch=options.threads_batch,
        load_mode=options.load_mode,
        parallel=options.parallel,
        outputs_max=options.parallel,
    )


def _alternatives(problem: Problem, placed: Placed, rpc_servers: tuple[str, ...]) -> Iterator[str]:
    """Changes that would fit, the smallest loss first; last what a smaller quant would have to weigh."""
    options, base = problem.options, placed.placement
    per_sequence = base.context // options.parallel
    eight_bit = replace(options, kv_type_k="q8_0", kv_type_v="q8_0")
    smaller_contexts = [base.context >> step for step in range(1, 8) if base.context >> step >= 1024]
    ladders: list[list[tuple[str, PlanOptions]]] = [
        [(f"--ctx-size {size}", replace(options, context=size)) for size in smaller_contexts],
        [("-ctk q8_0 -ctv q8_0", eight_bit)],
        [("--ubatch 128", replace(options, ubatch=128))],
        [("-np 1", replace(options, parallel=1, context=per_sequence))] if options.parallel > 1 else [],
        [("--load-mode none", replace(options, load_mode="none"))] if base.load_mode != "none" else [],
        [
            (
                f"-ctk q8_0 -ctv q8_0 --ubatch 128 --ctx-size {size}",
                replace(eight_bit, ubatch=128, context=size),
            )
            for size in smaller_contexts
        ],
    ]
    found = False
    for number, ladder in enumerate(ladders):
        if found and number == len(ladders) - 1:
            break
        for text, wishes in ladder:
            wished = replace(problem, options=wishes, compute=None)
            size, ubatch = wishes.context or base.context, wishes.ubatch or base.ubatch
            if find_placement(wished, _base(wished, rpc_servers, size, ubatch)).fits:
                found = True
                yield text
                break
    yield _smaller_file(problem, placed)


def _smaller_file(problem: Problem, placed: Placed) -> str:
    weights = sum(device.weights_bytes for device in placed.memory.devices)
    room = weights - sum(placed.missing.values())
    return f"a smaller quant: a file of about {format_bytes(max(room, 0))} or less"


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
                numbers={"trained": shape.context_train},
            )
        )
    if not placement.devices:
        reasons.append(_REPACK_REASONS[problem.options.repack])
    return reasons


def _placement_reason(problem: Problem, placed: Placed) -> Reason:
    shape, placement = problem.shape, placed.placement
    if not placement.devices:
        return Reason("everything on the CPU", "no device with room for it beside the host's RAM")
    if shape.dense:
        return Reason(
            "whole layers on the GPU",
            "a dense model has no experts to leave in RAM: every layer is read in full for every token",
            {"layers_on_gpu": min(placement.n_gpu_layers, shape.n_layer_all + 1)},
        )
    return Reason(
        f"experts of {len(placement.cpu_expert_layers)} of {shape.n_layer} layers on the CPU",
        "attention, cache and shared experts serve every token and go to the GPU first; experts follow from "
        "the first layer on while they fit",
        {"cpu_expert_layers": len(placement.cpu_expert_layers), "layers": shape.n_layer},
    )


_REPACK_REASONS = {
    "full": Reason("weights repacked by the engine", "wider SIMD kernels; a probe ran here without a crash"),
    "experts": Reason(
        "routed experts in CPU_REPACK, nothing in AMX buffers",
        "llama.cpp crashes with AMX buffers on such CPUs; this is the fastest layout that avoids them",
    ),
    "off": Reason("weights as they are in the file", "repacking is off"),
}
