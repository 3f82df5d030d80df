"""A forecast from slices beside a run of the file itself: 16 layers of Qwen3-Next-80B-A3B from 4 and 8.

Each round forecasts and then measures, so that both fall into the same minutes. The 16-layer file stands for
a model that is not here: the forecast reads its header only. Needs about 40 GB of disk for both.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from claims import CannotMeasure, Figure, claim
from claims._cells import say
from claims._slice import MODEL, run_qnext

LAYERS, ROUNDS, QUANTS = 16, 5, ("Q4_K_M", "Q8_0")
DISK_BYTES = {"Q4_K_M": 30 << 30, "Q8_0": 52 << 30}
PROMPT, GENERATE = 256, 24


@dataclass(frozen=True, slots=True)
class _Error:
    """Forecast over measured, less 1; whether what was measured lies in the range; the range's half width."""

    error: float
    inside: bool
    width: float


@claim(
    "forecast-decode",
    f"decode of {LAYERS} layers forecast from 4 and 8, Q4_K_M: median error of {ROUNDS}",
    bar="6 %, each within 12 %",
    minutes=25,
)
def measure_decode() -> Figure:
    return _figure("Q4_K_M", "decode")


@claim(
    "forecast-prefill",
    f"prefill of {LAYERS} layers forecast from 4 and 8, Q4_K_M: median error of {ROUNDS}",
    bar="6 %, each within 12 %",
    minutes=25,
)
def measure_prefill() -> Figure:
    return _figure("Q4_K_M", "prefill")


@claim("forecast-range", "measurements inside the printed range, both tests", bar="80 % or more", minutes=25)
def measure_range() -> Figure:
    found = [one for test in ("decode", "prefill") for one in _errors("Q4_K_M")[test]]
    inside = 100 * sum(one.inside for one in found) / len(found)
    widest = max(one.width for one in found)
    detail = f"{len(found)} measurements, ranges at most {widest:.0%} wide on a side"
    return Figure(inside, "%", inside >= 80 and widest <= 0.2, detail)


def _figure(quant: str, test: str) -> Figure:
    errors = [one.error for one in _errors(quant)[test]]
    middle = 100 * statistics.median(abs(error) for error in errors)
    worst = 100 * max(abs(error) for error in errors)
    detail = f"{quant}: " + ", ".join(f"{100 * error:+.1f} %" for error in errors)
    return Figure(middle, "%", middle <= 6 and worst <= 12, detail)


@cache
def _errors(quant: str) -> dict[str, list[_Error]]:
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        home = Path(folder)
        if shutil.disk_usage(home).free < DISK_BYTES[quant]:
            raise CannotMeasure(f"needs {DISK_BYTES[quant] >> 30} GiB of disk in {home}")
        model = Path(os.environ.get("QNEXT_CLAIMS_SLICES", folder)) / f"{MODEL}-{LAYERS}-{quant}.gguf"
        if not model.exists():
            run_qnext(("synth", MODEL, "--quant", quant, "--layers", str(LAYERS), "-o", str(model)), home)
        found: dict[str, list[_Error]] = {"decode": [], "prefill": []}
        for number in range(ROUNDS):
            told = json.loads(run_qnext(("forecast", str(model), "-c", "4096", "--json"), home))
            arguments = ("-p", str(PROMPT), "-n", str(GENERATE), "-r", "5", "-c", "4096", "--json")
            record = json.loads(run_qnext(("bench", "run", str(model), *arguments), home))
            for test, forecast in (("decode", told["decode_tps"][0]), ("prefill", told["prefill_tps"])):
                found[test].append(_compare(forecast, _measured(record, test)))
            say(f"round {number + 1}: { ({test: each[-1] for test, each in found.items()}) }")
        return found


def _compare(forecast: dict[str, float], measured: float) -> _Error:
    inside = forecast["low"] <= measured <= forecast["high"]
    width = max(forecast["high"] / forecast["mid"], forecast["mid"] / forecast["low"]) - 1
    return _Error(forecast["mid"] / measured - 1, inside, width)


def _measured(record: dict[str, Any], test: str) -> float:
    return next(
        float(one["median_tps"]) for one in record["tests"] if bool(one["prompt"]) is (test == "prefill")
    )
