"""A forecast from slices beside a run of the file itself, which is larger than the slices.

Each round forecasts and then measures, so that both fall into the same minutes. The file stands for a model
that is not here: the forecast reads its header only. What is compared are tokens per second as
`qnext bench run` prints them, nine repetitions each.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from claims import ROOT, CannotMeasure, Figure, claim
from claims._cells import say
from claims._slice import run_qnext
from qnext.engine.rpc import RpcWorker
from qnext.units import GIB

NEXT, MOE, OSS = "qwen3-next-80b-a3b", "qwen3-30b-a3b", "gpt-oss-20b"
PROMPT, GENERATE = 256, 24
CONTEXT = ("-c", "4096")
SPLITS = (12, 8, 4)
DEVICE_BYTES = 12 << 30


@dataclass(frozen=True, slots=True)
class Case:
    """A file of `layers` layers, and how often it is forecast and measured; `disk` is what both need."""

    shape: str
    quant: str
    layers: int
    rounds: int
    disk: int

    def __str__(self) -> str:
        return f"{self.shape} {self.quant}, {self.layers} layers"


NEXT_Q4 = Case(NEXT, "Q4_K_M", 16, 5, 30 << 30)
NEXT_Q8 = Case(NEXT, "Q8_0", 12, 5, 44 << 30)
"""Twelve layers: sixteen would be 28 GB, more than the machine has."""
MOE_Q8 = Case(MOE, "Q8_0", 16, 5, 20 << 30)
OTHERS = Case(MOE, "Q4_K_M", 12, 3, 12 << 30), Case(OSS, "MXFP4_MOE", 12, 3, 16 << 30)


@dataclass(frozen=True, slots=True)
class Pair:
    """A forecast with its range, and what was measured then: tokens per second."""

    low: float
    mid: float
    high: float
    measured: float

    @property
    def error(self) -> float:
        return self.mid / self.measured - 1

    @property
    def inside(self) -> bool:
        return self.low <= self.measured <= self.high

    @property
    def width(self) -> float:
        return max(self.high / self.mid, self.mid / self.low) - 1


@dataclass(frozen=True, slots=True)
class Measured:
    """All rounds of a case: both tests, and what a layer takes in decode by slices and by the file (ns)."""

    decode: tuple[Pair, ...]
    prefill: tuple[Pair, ...]
    layer_ns: tuple[tuple[float, float], ...]


@claim(
    "forecast-decode",
    "decode forecast from slices of 4 and 8 layers: the larger median error of Q4_K_M and Q8_0, 5 runs each",
    bar="6 %, each within 12 %",
    minutes=60,
)
def measure_decode() -> Figure:
    return _errors({str(case): _measure(case).decode for case in (NEXT_Q4, NEXT_Q8, MOE_Q8)}, 6, 12)


@claim("forecast-prefill", "the same of prefill", bar="6 %, each within 12 %", minutes=60)
def measure_prefill() -> Figure:
    return _errors({str(case): _measure(case).prefill for case in (NEXT_Q4, NEXT_Q8, MOE_Q8)}, 6, 12)


@claim("forecast-families", "the same of qwen3moe and gpt-oss, 12 layers", bar="within 10 %", minutes=20)
def measure_families() -> Figure:
    pairs = {
        f"{case} {test}": getattr(_measure(case), test) for case in OTHERS for test in ("decode", "prefill")
    }
    return _errors(pairs, 10, None)


@claim(
    "forecast-splits",
    f"decode with the experts of {SPLITS} of 16 layers in RAM, the others on a loopback device",
    bar="each within 15 %",
    minutes=25,
)
def measure_splits() -> Figure:
    return _errors({f"{count} in RAM": (pair,) for count, pair in _splits().items()}, 15, 15)


@claim(
    "forecast-range",
    "measurements inside the printed range, all the runs above",
    bar="80 % or more",
    minutes=99,
)
def measure_range() -> Figure:
    pairs = list(_splits().values())
    for case in (NEXT_Q4, NEXT_Q8, MOE_Q8, *OTHERS):
        pairs += [*_measure(case).decode, *_measure(case).prefill]
    inside = 100 * sum(pair.inside for pair in pairs) / len(pairs)
    widest = max(pair.width for pair in pairs)
    detail = f"{len(pairs)} measurements, ranges at most {widest:.1%} wide on a side"
    return Figure(inside, "%", inside >= 80 and widest <= 0.2001, detail)


@claim(
    "forecast-layer",
    "decode time of a layer: slices over the 16-layer file, median of 5",
    bar="5 %",
    minutes=25,
)
def measure_layer() -> Figure:
    ratios = [100 * (ours / real - 1) for ours, real in _measure(NEXT_Q4).layer_ns]
    middle = statistics.median(ratios)
    return Figure(abs(middle), "%", abs(middle) <= 5, ", ".join(f"{ratio:+.1f} %" for ratio in ratios))


@claim(
    "forecast-80b",
    "`qnext forecast` of Qwen3-Next-80B-A3B Q4_K_M from its header alone, slices to be written",
    bar="under 240 s, memory under what was planned, scratch under 12 GB",
    minutes=5,
)
def measure_whole() -> Figure:
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        home = Path(folder)
        header = home / f"{NEXT}.gguf"
        run_qnext(("synth", NEXT, "--quant", "Q4_K_M", "--header-only", "-o", str(header)), home)
        argv = [sys.executable, "-m", "qnext", "forecast", str(header), "-c", "8192", "--json"]
        environment = {**os.environ, "QNEXT_HOME": str(home)}
        began, most = time.monotonic(), 0
        with psutil.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, text=True, env=environment) as running:
            while running.poll() is None:
                most = max(most, _proportional_bytes(running))
                time.sleep(0.5)
            told = json.loads(running.stdout.read())
        seconds, scratch = time.monotonic() - began, told["slice_bytes"]
    holds = seconds < 240 and most < told["memory_bytes"] and scratch < 12e9
    detail = (
        f"memory at most {most / GIB:.2f} GiB, planned {told['memory_bytes'] / GIB:.2f}; "
        f"scratch {scratch / 1e9:.2f} GB; decode {told['decode_tps'][0]}, prefill {told['prefill_tps']}"
    )
    return Figure(seconds, "s", holds, detail)


def _proportional_bytes(process: psutil.Process) -> int:
    """Memory of a process and its children, a page that several have counted once."""
    found = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):
            found += one.memory_full_info().pss
    return found


def _errors(found: dict[str, Sequence[Pair]], bar: float, each: float | None) -> Figure:
    middles, words, worst = [], [], 0.0
    for name, pairs in found.items():
        errors = [100 * pair.error for pair in pairs]
        middles.append(statistics.median(map(abs, errors)))
        worst = max(worst, *map(abs, errors))
        words.append(f"{name}: " + ", ".join(f"{error:+.1f} %" for error in errors))
    holds = max(middles) <= bar and (each is None or worst <= each)
    return Figure(max(middles), "%", holds, "; ".join(words))


@cache
def _measure(case: Case) -> Measured:
    pairs: dict[str, list[Pair]] = {"decode": [], "prefill": []}
    layers = []
    with _file(case) as (model, home):
        for number in range(case.rounds):
            told = json.loads(run_qnext(("forecast", str(model), *CONTEXT, "--json"), home))
            forecasts = {"decode": told["decode_tps"][0], "prefill": told["prefill_tps"]}
            measured = _bench(model, home)
            for test, forecast in forecasts.items():
                pairs[test].append(_pair(forecast, measured[test]))
            say(f"{case}, round {number + 1}: { ({test: each[-1] for test, each in pairs.items()}) }")
            ours = sum(told["layers_ns"].values())
            layers.append((ours, 1e9 / measured["decode"] - told["fixed_ns"]))
    return Measured(tuple(pairs["decode"]), tuple(pairs["prefill"]), tuple(layers))


@cache
def _splits() -> dict[int, Pair]:
    """Decode by the number of layers whose experts are in RAM: one forecast, then a run of each."""
    with _file(NEXT_Q4) as (model, home), RpcWorker(threads=1) as worker:
        device = (
            "--rpc",
            worker.endpoint,
            "--device-memory",
            f"RPC0={DEVICE_BYTES}",
            "-ngl",
            "99",
            "-t",
            "1",
        )
        chosen = (*device, "--n-cpu-moe", str(SPLITS[0]))
        told = json.loads(run_qnext(("forecast", str(model), *CONTEXT, *chosen, "--json"), home))
        curve = {one["cpu_expert_layers"]: one["decode"] for one in told["neighbours"]}
        found = {}
        for count in SPLITS:
            measured = _bench(model, home, *device, "--n-cpu-moe", str(count))
            found[count] = _pair(curve[count], measured["decode"])
            say(f"{count} layers' experts in RAM: {found[count]}")
    return found


@contextmanager
def _file(case: Case) -> Iterator[tuple[Path, Path]]:
    """(the file, a QNEXT_HOME of its own). A file in QNEXT_CLAIMS_SLICES stays there and is used again."""
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        home = Path(folder)
        if shutil.disk_usage(home).free < case.disk:
            raise CannotMeasure(f"needs {case.disk >> 30} GiB of disk in {home}")
        kept = os.environ.get("QNEXT_CLAIMS_SLICES", folder)
        model = Path(kept) / f"{case.shape}-{case.layers}-{case.quant}.gguf"
        if not model.exists():
            say(f"writing {model}")
            arguments = (case.shape, "--quant", case.quant, "--layers", str(case.layers), "-o", str(model))
            run_qnext(("synth", *arguments), home)
        yield model, home


def _bench(model: Path, home: Path, *more: str) -> dict[str, float]:
    arguments = ("-p", str(PROMPT), "-n", str(GENERATE), "-r", "9", *CONTEXT, *more, "--json")
    record: dict[str, Any] = json.loads(run_qnext(("bench", "run", str(model), *arguments), home))
    return {"prefill" if one["prompt"] else "decode": float(one["median_tps"]) for one in record["tests"]}


def _pair(forecast: dict[str, float], measured: float) -> Pair:
    return Pair(forecast["low"], forecast["mid"], forecast["high"], measured)
