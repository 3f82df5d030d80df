"""How long a plan of the 80B model takes, dry run remembered or not, and what the command itself needs."""

from __future__ import annotations

from functools import cache
from typing import Any

from claims import CannotMeasure, Figure, claim, run_script
from qnext.engine.build import installed_build

CACHED_S, UNCACHED_S, PEAK_MIB = 0.7, 1.5, 120.0


@cache
def _result() -> dict[str, Any]:
    if installed_build() is None:
        raise CannotMeasure("no engine to make a dry run with: ./scripts/qnext --version builds it")
    return run_script("bench_plan_time.py", check=True)


def _figure(kind: str, bar_s: float) -> Figure:
    result = _result()
    wall, processor = result["wall_s"][kind], result["processor_s"][kind]
    detail = (
        f"whole command, median of {result['rounds']} interleaved, {wall['low']}–{wall['high']} s; processor "
        f"{processor['median']} s; bare interpreter {result['wall_s']['bare']['median']} s; "
        f"load {result['load']}"
    )
    return Figure(wall["median"], "s", wall["median"] < bar_s, detail)


@claim("plan-cached", "`qnext plan` on a local 80B header, dry run cached", bar=f"under {CACHED_S} s")
def measure_plan_cached() -> Figure:
    return _figure("cached", CACHED_S)


@claim("plan-uncached", "`qnext plan` on a local 80B header, dry run not yet", bar=f"under {UNCACHED_S} s")
def measure_plan_uncached() -> Figure:
    return _figure("uncached", UNCACHED_S)


@claim("plan-memory", "peak memory of `qnext plan` without the engine's child", bar=f"under {PEAK_MIB:g} MiB")
def measure_plan_memory() -> Figure:
    peak = float(_result()["own_peak_mib"])
    return Figure(peak, "MiB", peak < PEAK_MIB, "VmHWM of the command's own process")
