"""The trip of `qnext plan --compare-fit`: the same model and budgets placed by llama.cpp's own fit."""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace

from qnext.config import Paths
from qnext.engine.dry_run import DryRunner
from qnext.engine.fit import find_fit_program, read_fit, run_fit
from qnext.errors import EngineError
from qnext.pipeline.planning import PlannedModel, compute_per_device
from qnext.pipeline.surroundings import Notice
from qnext.plan.plan import Plan, make_plan

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FitComparison:
    """llama.cpp's fit counted and forecast as qnext's own plan is; None with its `error` where it found none.

    `flags` are those it printed, `seconds` the time it took.
    """

    plan: Plan | None
    flags: tuple[str, ...]
    seconds: float
    error: str = ""


def compare_fit(planned: PlannedModel, paths: Paths, notice: Notice) -> FitComparison:
    """Ask llama.cpp for its placement of a planned model. Raises EngineError without its program."""
    program = find_fit_program(paths.cache_dir)
    problem, placement = planned.problem, planned.plan.placement
    notice("asking llama.cpp's own --fit")
    answer = run_fit(program, planned.model.path, placement, problem.budgets)
    if not answer.flags:
        return FitComparison(None, (), answer.seconds, answer.error)
    fitted = read_fit(answer, placement, problem.header, problem.offload_devices())
    build = planned.surroundings.build
    if build is not None:
        try:
            with closing(DryRunner(problem.header, build, paths.headers_dir)) as runner:
                compute = compute_per_device(runner.measure(fitted), problem.used(fitted))
            problem = replace(problem, compute=compute)
        except EngineError as error:
            logger.info("no dry run of the fit: %s", error.message)
    plan = make_plan(planned.plan.model_ref, problem, planned.surroundings.speeds, placement=fitted)
    return FitComparison(plan, answer.flags, answer.seconds)
