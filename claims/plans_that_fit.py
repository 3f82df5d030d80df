"""Plans that say they fit, loaded for real: on loopback budgets, and under a memory limit of the kernel."""

from __future__ import annotations

from functools import cache
from typing import Any

from claims import CannotMeasure, Figure, claim, run_script
from qnext.engine.build import installed_build

ENOUGH = 200


@claim(
    "plans-that-fit",
    "random plans that say they fit, CPU and 1 and 2 loopback RPC workers, loaded and decoded with",
    bar=f"0 of {ENOUGH} or more over a budget or out of memory",
    minutes=6,
)
def measure_plans_that_fit() -> Figure:
    found = _load_all()
    failed = len(found["failures"])
    detail = (
        f"{found['loaded']} of {found['plans']} loaded, {found['split_between_host_and_devices']} of them"
        f" split; most over a budget {found['worst_over_budget_bytes']} bytes, which is print rounding"
    )
    return Figure(failed, "failures", failed == 0 and found["plans"] >= ENOUGH, detail)


@claim(
    "plans-under-limit",
    "such plans of larger models in a cgroup limited to the plan's host budget and the engine's base",
    bar="0 killed",
    minutes=6,
)
def measure_plans_under_limit() -> Figure:
    found = _load_all()["under_cgroup"]
    if found is None:
        raise CannotMeasure(
            "memory groups of version 1 cannot be made here: run as root where they are mounted"
        )
    failed = len(found["failures"])
    budgets, bases = found["host_budgets_mib"], found["bases_mib"]
    detail = (
        f"{found['loaded']} of {found['plans']} loaded, {found['oom_kills']} killed; host budgets "
        f"{budgets[0]}–{budgets[-1]} MiB, bases {bases[0]}–{bases[-1]} MiB"
    )
    return Figure(failed, "failures", failed == 0 and found["plans"] > 0, detail)


@cache
def _load_all() -> dict[str, Any]:
    if installed_build() is None:
        raise CannotMeasure("no engine to load with: ./scripts/qnext --version builds it")
    return run_script("bench_plans_that_fit.py")
