"""The trip of `qnext plan`: header and surroundings in, a plan out, its compute buffers from a dry run."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TYPE_CHECKING

from qnext.config import Paths
from qnext.engine.dry_run import DryRunner
from qnext.engine.log_reader import BufferSize
from qnext.errors import DoesNotFitError, EngineError
from qnext.hardware import Machine
from qnext.pipeline.locate import LocatedModel, OnHeaders, locate_models
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice, Surroundings, look_around
from qnext.plan.choice import choose_placement
from qnext.plan.machine_speeds import machine_speeds, thread_counts
from qnext.plan.options import PlanOptions
from qnext.plan.placement import Problem, check_placement
from qnext.plan.plan import Plan, explain_misfit, make_plan
from qnext.plan.problem import make_problem
from qnext.plan.speed import MachineSpeeds
from qnext.plan.traits import DeviceTraits
from qnext.plan.turn import forecast
from qnext.plan.values import HOST, Placement, Prediction, Reason, Workload
from qnext.units import format_bytes

if TYPE_CHECKING:
    from qnext.plan.levers import Lever, RunnerUp
    from qnext.plan.quants import Candidate

logger = logging.getLogger(__name__)

_DRY_RUN_ROUNDS = 4


@dataclass(frozen=True, slots=True)
class PlannedModel:
    """A plan with what it was made from, so that a later step can run it or make it again.

    `candidates` are the quants it was chosen from, the best first; empty where there was no choice.
    `environment` is what a tuned profile adds to the engine's.
    """

    model: LocatedModel
    surroundings: Surroundings
    problem: Problem
    plan: Plan
    candidates: tuple[Candidate, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def forecast(self, workload: Workload) -> Prediction:
        """What the plan's placement should reach on another workload than the one it was made for."""
        plan = self.plan
        return forecast(self.problem, plan.placement, plan.devices, self.surroundings.speeds, workload)[0]


@dataclass(frozen=True, slots=True)
class ChosenModel:
    """The model to plan on its machine; `candidates` and `why` are of the choice between several quants."""

    model: LocatedModel
    surroundings: Surroundings
    candidates: tuple[Candidate, ...] = ()
    why: Reason | None = None


def plan_model(
    request: Request, paths: Paths, notice: Notice, on_headers: OnHeaders | None = None
) -> PlannedModel:
    """Plan `request` on its machine. Never raises for a model that does not fit: see `Plan.fits`."""
    return plan_chosen(request, paths, choose_quant_here(request, paths, notice, on_headers))


def choose_quant_here(
    request: Request, paths: Paths, notice: Notice, on_headers: OnHeaders | None = None
) -> ChosenModel:
    """Read the header of the model, or of all its quants, and choose by arithmetic where there are several.

    Each is weighed as its header comes. The machine is looked at before headers are read: what may have to be
    measured for it must not be disturbed by that.
    """

    @cache
    def around() -> Surroundings:
        return look_around(request, paths, notice)

    weighed: list[tuple[Candidate, LocatedModel]] = []

    def weigh(model: LocatedModel) -> None:
        from qnext.pipeline.choosing import weigh_model

        problem = problem_on(around().machine, model, request, around())
        weighed.append((weigh_model(model, problem), model))

    models = locate_models(
        request.model, paths, notice, on_headers=on_headers, on_listed=around, on_model=weigh
    )
    if len(models) == 1:
        return ChosenModel(models[0], around())
    from qnext.pipeline.choosing import choose_model

    model, candidates, why = choose_model(weighed, request.prefer, request.min_tps)
    return ChosenModel(model, around(), candidates, why)


def plan_chosen(request: Request, paths: Paths, chosen: ChosenModel) -> PlannedModel:
    """Plan one model, its compute buffers from a dry run where there is an engine."""
    model, surroundings = chosen.model, chosen.surroundings
    problem = problem_on(surroundings.machine, model, request, surroundings)
    if surroundings.build is None:
        plan = make_plan(model.ref, problem, surroundings.speeds)
        if not plan.fits:
            plan = explain_misfit(plan, problem, lambda changed: True)
    else:
        with closing(DryRunner(model.header, surroundings.build, paths.headers_dir)) as runner:
            plan = _plan_measured(model.ref, problem, surroundings.speeds, runner)
    plan = replace(
        with_path(plan, model),
        reasons=(plan.reasons[0], chosen.why, *plan.reasons[1:]) if chosen.why else plan.reasons,
        warnings=(
            *surroundings.warnings,
            *_known_faults(model),
            *plan.warnings,
            *_too_slow(plan, request.min_tps),
        ),
    )
    return PlannedModel(model, surroundings, problem, plan, chosen.candidates)


def with_path(plan: Plan, model: LocatedModel) -> Plan:
    """The plan with the model's file, in its command line, where it will be loaded from."""
    path = str(plan.header.paths[0])
    return replace(plan, argv=tuple(model.path if word == path else word for word in plan.argv))


def problem_on(
    machine: Machine, model: LocatedModel, request: Request, surroundings: Surroundings
) -> Problem:
    """The problem of placing `model` as `request` wishes on the machine of `surroundings` or another."""
    same = machine is surroundings.machine
    options, speeds = _options(request, surroundings), surroundings.speeds
    if not same:  # the same machine with one part changed: what was learnt of it holds on
        speeds = replace(machine_speeds(machine), history=speeds.history)
        decode, prefill = thread_counts(machine)
        options = replace(
            options,
            threads=request.threads or decode,
            threads_batch=request.threads_batch or request.threads or prefill,
        )
    return make_problem(
        model.header,
        model.shape,
        machine,
        options,
        ram=request.ram,
        vram=request.vram,
        ram_headroom=request.ram_headroom,
        vram_headroom=request.vram_headroom,
        device_memory=request.device_memory,
        rpc_servers=request.rpc_servers,
        speeds=speeds,
    )


def explain_plan(planned: PlannedModel, request: Request) -> tuple[RunnerUp | None, tuple[Lever, ...]]:
    """The next best placement, and what a better machine would bring; both without dry runs."""
    from qnext.plan.levers import find_levers, runner_up

    surroundings = planned.surroundings

    def problem(machine: Machine) -> Problem:
        return problem_on(machine, planned.model, request, surroundings)

    return runner_up(problem(surroundings.machine)), find_levers(surroundings.machine, problem)


def _too_slow(plan: Plan, min_tps: float | None) -> tuple[str, ...]:
    speed = plan.prediction.decode_tps
    if min_tps is None or speed is None or not plan.fits or speed.mid >= min_tps:
        return ()
    return (f"decode is forecast at {speed.mid:.1f} t/s, {min_tps:g} were asked for",)


def _known_faults(model: LocatedModel) -> tuple[str, ...]:
    """What the catalogue knows against this file."""
    if model.published is None:
        return ()
    from qnext.models.catalogue import matching_repo

    known = matching_repo(model.published.repo)
    return tuple(f"{bad.files}: {bad.reason}" for bad in known.bad_files) if known else ()


def _plan_measured(model_ref: str, problem: Problem, speeds: MachineSpeeds, runner: DryRunner) -> Plan:
    try:
        placement, measured = settle_placement(problem, runner)
    except EngineError as error:
        logger.info("no dry run: %s", error.message)
        plan = make_plan(model_ref, problem, speeds)
        plan = replace(plan, warnings=(*plan.warnings, f"no dry run: {error.message}"))
        return plan if plan.fits else explain_misfit(plan, problem, lambda changed: True)
    plan = make_plan(model_ref, measured, speeds, placement=placement)
    return plan if plan.fits else explain_misfit(plan, measured, lambda changed: _fits(changed, runner))


def settle_placement(problem: Problem, runner: DryRunner) -> tuple[Placement, Problem]:
    """Place, measure the compute buffers of that placement, place again with them, until nothing moves.

    Each round plans with the most that any dry run so far has asked for, so that it cannot go back and
    forth. Returns the placement and the problem with the figures of its own dry run. Raises EngineError.
    """
    placement = choose_placement(problem).placement
    # The dry runs to come are of this ubatch: their figures say nothing about another one.
    settled = replace(problem, options=replace(problem.options, ubatch=placement.ubatch))
    most: dict[str, int] = {}
    for rounds_left in reversed(range(_DRY_RUN_ROUNDS)):
        compute = compute_per_device(runner.measure(placement), problem.used(placement))
        for name, size in compute.items():
            most[name] = max(most.get(name, 0), size)
        again = choose_placement(replace(settled, compute=most)).placement
        if again == placement or not rounds_left:
            break
        placement = again
    return placement, replace(problem, compute=compute)


def _fits(problem: Problem, runner: DryRunner) -> bool:
    try:
        placement, measured = settle_placement(problem, runner)
    except EngineError:
        return False
    return check_placement(measured, placement).fits


def compute_per_device(sizes: list[BufferSize], devices: list[DeviceTraits]) -> dict[str, int]:
    """Compute-buffer bytes per device of a dry run's log; every buffer that is no device's is the host's."""
    totals = dict.fromkeys((HOST, *(device.name for device in devices)), 0)
    owners = {device.buffer_type: device.name for device in devices}
    for size in sizes:
        if size.part == "compute":
            totals[owners.get(size.buffer, HOST)] += size.bytes
    return totals


def lacking_words(plan: Plan) -> str:
    """The bytes that are missing, device by device; empty where the plan fits."""
    return ", ".join(f"{format_bytes(size)} on {name}" for name, size in plan.missing.items())


def require_fit(plan: Plan) -> None:
    """Raise DoesNotFitError (exit 4) with the missing bytes per device and what would fit."""
    if plan.fits:
        return
    raise DoesNotFitError(
        f"{plan.model_ref} does not fit: {lacking_words(plan)} missing",
        hint=f"This would fit: {'; or '.join(plan.alternatives)}.",
    )


def _options(request: Request, surroundings: Surroundings) -> PlanOptions:
    return PlanOptions(
        **request.wishes(),
        threads=surroundings.threads,
        threads_batch=surroundings.threads_batch,
        repack=surroundings.repack,
        repack_asked=request.repack is not None,
    )
