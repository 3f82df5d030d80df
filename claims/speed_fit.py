"""How far the decode forecast is off on machines whose measurements it has not seen."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

from claims import Figure, claim

ROOT = Path(__file__).resolve().parent.parent
MEDIAN, INSIDE = 0.20, 0.80


@cache
def _result() -> dict[str, Any]:
    argv = [sys.executable, "-P", str(ROOT / "scripts" / "fit_speed.py"), "--json"]
    ran = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(ran.stdout)
    return result


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
