"""The trip of `qnext plan`: header and surroundings in, a plan out, its compute buffers from a dry run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace

from qnext.config import Paths
from qnext.engine.dry_run import DryRunner
from qnext.engine.log_reader import BufferSize, device_of_buffer
from qnext.errors import DoesNotFitError, EngineError
from qnext.pipeline.locate import LocatedModel, locate_model
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice, Surroundings, look_around
from qnext.plan.budgets import make_budgets
from qnext.plan.options import PlanOptions
from qnext.plan.plan import Plan, make_plan
from qnext.plan.traits import DeviceTraits, device_traits, host_traits
from qnext.plan.values import HOST, Budget
from qnext.units import format_bytes

logger = logging.getLogger(__name__)

_DRY_RUN_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A plan with what it was made from, so that a later step can run it or make it again."""

    model: LocatedModel
    surroundings: Surroundings
    budgets: tuple[Budget, ...]
    plan: Plan


def plan_model(request: Request, paths: Paths, notice: Notice) -> PlannedModel:
    """Plan `request` on its machine. Never raises for a model that does not fit: see `Plan.fits`."""
    model = locate_model(request.model, paths)
    surroundings = look_around(request, paths, notice)
    budgets = make_budgets(
        surroundings.machine,
        ram=request.ram,
        vram=request.vram,
        device_memory=request.device_memory,
        rpc_servers=request.rpc_servers,
    )
    traits = _traits(surroundings, budgets)
    options = _options(request, surroundings)

    def plan_with(compute: Mapping[str, int] | None) -> Plan:
        return make_plan(
            request.model,
            model.header,
            model.shape,
            budgets,
            traits,
            options,
            surroundings.speeds,
            rpc_servers=request.rpc_servers,
            compute=compute,
        )

    plan = plan_with(None)
    if surroundings.build is not None:
        with closing(DryRunner(model.header, surroundings.build, paths.headers_dir)) as runner:
            for _ in range(_DRY_RUN_ROUNDS):
                try:
                    compute = compute_per_device(runner.measure(plan.placement), plan.placement.devices)
                except EngineError as error:
                    logger.info("no dry run: %s", error.message)
                    plan = replace(plan, warnings=(*plan.warnings, f"no dry run: {error.message}"))
                    break
                measured = plan_with(compute)
                settled = measured.placement == plan.placement
                plan = measured
                if settled:
                    break
    return PlannedModel(model, surroundings, budgets, plan)


def compute_per_device(sizes: list[BufferSize], devices: tuple[str, ...]) -> dict[str, int]:
    """Compute-buffer bytes per device of a dry run's log."""
    totals = dict.fromkeys((HOST, *devices), 0)
    for size in sizes:
        if size.part == "compute":
            totals[device_of_buffer(size.buffer, devices)] += size.bytes
    return totals


def require_fit(plan: Plan) -> None:
    """Raise DoesNotFitError (exit 4) with the missing bytes per device and what would fit."""
    if plan.fits:
        return
    lacking = ", ".join(f"{format_bytes(size)} on {name}" for name, size in plan.missing.items())
    raise DoesNotFitError(
        f"{plan.model_ref} does not fit: {lacking} missing",
        hint=f"This would fit: {'; or '.join(plan.alternatives)}.",
    )


def _traits(surroundings: Surroundings, budgets: tuple[Budget, ...]) -> dict[str, DeviceTraits]:
    traits = {HOST: host_traits(surroundings.machine.cpu.instruction_sets or ())}
    for budget in budgets:
        if budget.name != HOST:
            traits[budget.name] = device_traits(budget, free_bytes=budget.budget_bytes)
    return traits


def _options(request: Request, surroundings: Surroundings) -> PlanOptions:
    return PlanOptions(
        workload=request.workload,
        context=request.context,
        parallel=request.parallel,
        batch=request.batch,
        ubatch=request.ubatch,
        kv_type_k=request.kv_type_k,
        kv_type_v=request.kv_type_v,
        flash_attention=request.flash_attention,
        load_mode=request.load_mode,
        threads=surroundings.threads,
        threads_batch=surroundings.threads_batch,
        repack=surroundings.repack,
        n_gpu_layers=request.n_gpu_layers,
        cpu_experts=request.cpu_experts,
        overrides=request.overrides,
        tensor_split=request.tensor_split,
    )
