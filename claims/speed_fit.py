"""How far the decode forecast is off on machines whose measurements it has not seen."""

from __future__ import annotations

from functools import cache
from typing import Any

from claims import Figure, claim, run_script

MEDIAN, INSIDE = 0.20, 0.80


@cache
def _result() -> dict[str, Any]:
    return run_script("fit_speed.py", "--json", check=True)


def _detail() -> str:
    judged, every = (_result()["summary"]["decode"][label] for label in ("judged", "all"))
    return (
        f"{judged['rows']} published rows of {judged['machines']} machines, builds from March 2026 on; all "
        f"{every['rows']} of {every['machines']}: {every['median_error']:.1%}, {every['inside']:.0%} inside"
    )


@claim(
    "speed-unseen", "decode forecast, machine left out of the fit: median error", bar=f"at most {MEDIAN:.0%}"
)
def measure_speed_unseen() -> Figure:
    error = float(_result()["summary"]["decode"]["judged"]["median_error"])
    return Figure(round(error * 100, 1), "%", error <= MEDIAN, _detail())


@claim(
    "speed-range", "published decode speeds inside the range forecast unseen", bar=f"at least {INSIDE:.0%}"
)
def measure_speed_range() -> Figure:
    inside = float(_result()["summary"]["decode"]["judged"]["inside"])
    return Figure(round(inside * 100), "%", inside >= INSIDE, _detail())
