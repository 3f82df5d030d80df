"""How far the decode forecast is off on machines it has not seen, and on machines it has seen a little of."""

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


@claim(
    "speed-history",
    "decode forecast with the machine's other measurements, against without: median error",
    bar=f"smaller, and at least {INSIDE:.0%} inside the range",
    minutes=1,
)
def measure_speed_history() -> Figure:
    found = run_script("fit_history.py", "--json", check=True)["summary"]
    decode, others, prefill = (
        found["decode"]["history"],
        found["decode"]["others"],
        found["prefill"]["history"],
    )
    before, after = decode["plain"], decode["with"]
    holds = after["median_error"] < before["median_error"] and after["inside"] >= INSIDE
    return Figure(
        round(after["median_error"] * 100, 1),
        "%",
        holds,
        f"{decode['rows']} published rows of {decode['machines']} machines left out: {_change(decode)}; "
        f"from other model files alone ({others['rows']} rows) {_change(others)}; prefill "
        f"({prefill['rows']} rows) {_change(prefill)}",
    )


def _change(pairs: dict[str, Any]) -> str:
    before, after = pairs["plain"], pairs["with"]
    return (
        f"{before['median_error']:.1%} to {after['median_error']:.1%}, {pairs['closer']} closer, "
        f"{before['inside']:.0%} to {after['inside']:.0%} inside"
    )
