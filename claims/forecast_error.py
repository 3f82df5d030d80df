"""Forecasts from slices beside runs of the files themselves, which are larger than the slices.

**Paired**, what slices say is told apart from what the machine does meanwhile: two of them, or a slice and
the file, are in memory at once and compute in turns of a tenth of a second, so that a slow minute strikes
both. Their ratios go through the tool's own sum (`plan.slice_fit`). **As it is used**, `qnext forecast` and
then `qnext bench run` each have minutes of their own, and the printed range has to hold what the second says.

The file stands for a model that is not here: the forecast reads its header only.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import psutil

from claims import ROOT, CannotMeasure, Figure, claim
from claims._cells import say
from claims._slice import run_qnext
from qnext.config import Paths
from qnext.engine.llama.quantize import quantise_rows
from qnext.engine.rpc import RpcWorker
from qnext.engine.turns import Span, in_turns, running_ns
from qnext.models.gguf_reader import read_header
from qnext.models.shape import read_shape
from qnext.models.synth.slices import choose_slices, write_slices
from qnext.pipeline.forecasting import LAYERS, slices_dir
from qnext.pipeline.planning import plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.running import RunningModel
from qnext.pipeline.slice_measuring import features_planned
from qnext.plan.slice_fit import FIXED, Features, Test, weights_of
from qnext.units import GIB
from tests.engine_processes import children

NEXT, MOE, OSS = "qwen3-next-80b-a3b", "qwen3-30b-a3b", "gpt-oss-20b"
PROMPT, GENERATE = 256, 24
CONTEXT = ("-c", "4096")
SPLITS = (12, 8, 4)
DEVICE_BYTES = 12 << 30
ROUNDS, PAIRED_GENERATE = 5, 16
SECONDS = {"decode": 12.0, "prefill": 40.0}
"""Of each paired round, at least: it lasts until both have run."""


@dataclass(frozen=True, slots=True)
class Case:
    """A file of `layers` layers; `disk` is what it and its slices need, `used` how often both are used."""

    shape: str
    quant: str
    layers: int
    disk: int
    used: int

    def __str__(self) -> str:
        return f"{self.shape} {self.quant}, {self.layers} layers"


NEXT_Q4 = Case(NEXT, "Q4_K_M", 16, 30 << 30, 1)
MOE_Q8 = Case(MOE, "Q8_0", 16, 20 << 30, 2)
"""Sixteen layers of Qwen3-Next in Q8_0 would be 28 GB, more than the machine has."""
OTHERS = Case(MOE, "Q4_K_M", 12, 12 << 30, 1), Case(OSS, "MXFP4_MOE", 12, 16 << 30, 1)


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
class Paired:
    """A round: time of the file, and of its slice of 8 layers, over that of 4; what the slices say of it.

    `layer` is what a layer takes beyond the first four, by the file over by the slice.
    """

    file: float
    slice: float
    forecast: float
    layer: float

    @property
    def error(self) -> float:
        return self.file / self.forecast - 1


@claim(
    "forecast-decode",
    "decode of 16 layers from slices of 4 and 8, paired: the larger median error of Q4_K_M and Q8_0",
    bar="6 %, each of five within 12 %",
    minutes=30,
)
def measure_decode() -> Figure:
    return _errors({str(case): _paired(case, "decode") for case in (NEXT_Q4, MOE_Q8)}, 6, 12)


@claim("forecast-prefill", "the same of prefill", bar="6 %, each of five within 12 %", minutes=30)
def measure_prefill() -> Figure:
    return _errors({str(case): _paired(case, "prefill") for case in (NEXT_Q4, MOE_Q8)}, 6, 12)


@claim("forecast-families", "decode of qwen3moe and gpt-oss, 12 layers", bar="within 10 %", minutes=10)
def measure_families() -> Figure:
    return _errors({str(case): _paired(case, "decode") for case in OTHERS}, 10, None)


@claim("forecast-families-prefill", "the same of prefill", bar="within 10 %", minutes=10)
def measure_families_prefill() -> Figure:
    return _errors({str(case): _paired(case, "prefill") for case in OTHERS}, 10, None)


@claim(
    "forecast-layer",
    "decode time of a layer in the 16-layer file over that in its slices, paired: median of five",
    bar="within 5 %",
    minutes=15,
)
def measure_layer() -> Figure:
    ratios = [100 * (one.layer - 1) for one in _paired(NEXT_Q4, "decode")]
    middle = statistics.median(ratios)
    return Figure(middle, "%", abs(middle) <= 5, ", ".join(f"{ratio:+.1f} %" for ratio in ratios))


@claim(
    "forecast-splits",
    f"decode with the experts of {SPLITS} of 16 layers in RAM, others on a loopback device: medians of five",
    bar="each within 15 %",
    minutes=40,
)
def measure_splits() -> Figure:
    splits = _splits()
    middles = {
        f"{count} in RAM": (replace(runs[0], measured=statistics.median(run.measured for run in runs)),)
        for count, runs in splits.items()
    }
    figure = _errors(middles, 15, 15)
    runs = [run for one in splits.values() for run in one]
    inside, widest = sum(run.inside for run in runs), max(run.width for run in runs)
    ranges = f"{inside} of {len(runs)} runs inside their ranges, at most {widest:.1%} wide on a side"
    singles = "; ".join(
        f"{count}: " + ", ".join(f"{100 * run.error:+.1f}" for run in one) for count, one in splits.items()
    )
    return replace(figure, detail=f"{figure.detail}; {ranges}; singles {singles} %")


@claim(
    "forecast-range",
    "runs inside the range that a forecast printed before: decode and prefill of four files",
    bar="80 % or more, ranges at most 20 % wide on a side",
    minutes=30,
)
def measure_range() -> Figure:
    pairs = [pair for case in (NEXT_Q4, MOE_Q8, *OTHERS) for pair in _used(case)]
    inside = 100 * sum(pair.inside for pair in pairs) / len(pairs)
    widest = max(pair.width for pair in pairs)
    errors = ", ".join(f"{100 * pair.error:+.1f}" for pair in pairs)
    detail = f"{len(pairs)} runs, ranges at most {widest:.1%} wide on a side; errors {errors} %"
    return Figure(inside, "%", inside >= 80 and widest <= 0.2001, detail)


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


def _errors(found: Mapping[str, Sequence[Pair | Paired]], bar: float, each: float | None) -> Figure:
    middles, words, worst = [], [], 0.0
    for name, rounds in found.items():
        errors = [100 * one.error for one in rounds]
        middles.append(statistics.median(map(abs, errors)))
        worst = max(worst, *map(abs, errors))
        words.append(f"{name}: " + ", ".join(f"{error:+.1f} %" for error in errors))
    holds = max(middles) <= bar and (each is None or worst <= each)
    return Figure(max(middles), "%", holds, "; ".join(words))


@cache
def _paired(case: Case, test: Test) -> tuple[Paired, ...]:
    """What the slices of a file say of it, and the file, all relative to the smallest slice."""
    with _file(case) as (model, home):
        paths = Paths(home / "config", home / "data", home / "cache")
        header = read_header(model)
        shape = read_shape(header)
        chosen = choose_slices(shape, LAYERS)
        written = write_slices(header, shape, chosen, slices_dir(paths), quantizer=quantise_rows).paths
        small, large = (written[size] for size in chosen.sizes)
        by_slice, (first, second) = _ratios(small, large, paths, test)
        by_file, (_, whole) = _ratios(small, model, paths, test)
        weights = weights_of((first, second), whole)
        kind = next(name for name in whole if name != FIXED)
        found = []
        for one, file in zip(by_slice, by_file, strict=True):
            layer = (file - 1) / (whole[kind] - first[kind]) / ((one - 1) / (second[kind] - first[kind]))
            found.append(Paired(file, one, weights[0] + weights[1] * one, layer))
            say(f"{case}, {test}: {found[-1]}")
        return tuple(found)


def _ratios(
    small: Path, large: Path, paths: Paths, test: Test
) -> tuple[list[float], tuple[Features, Features]]:
    """Time of `large` over that of `small`, both in memory and computing in turns; what they consist of."""
    request = Request(model="", context=1024, ubatch=512, kv_type_k="f16", kv_type_v="f16")
    with ExitStack() as stack:
        models, members = [], []
        for path in (small, large):
            there = children()
            running = RunningModel(replace(request, model=str(path)), paths, say, planner=plan_model)
            models.append(stack.enter_context(running))
            members.append([child for child in children() if child not in there])
        ratios = []
        for number in range(ROUNDS + 1):
            ratio = _by_turns(models, members, test, number)
            if number:  # the first touches every page
                ratios.append(ratio)
        features = [features_planned(model.planned, test) for model in models]
        return ratios, (features[0], features[1])


def _by_turns(
    models: Sequence[RunningModel], members: Sequence[Sequence[psutil.Process]], test: Test, number: int
) -> float:
    """Time of the second over that of the first, its own turns alone counted: median over the second's runs,
    each beside what the first did in the same moments. A single long run that something disturbs, as a page
    that has to come back from disk, is one of several.

    The second repeats its run until the time is over, the first until the second's last run is.
    """
    prompt, generate = (PROMPT, 0) if test == "prefill" else (0, PAIRED_GENERATE)
    deadline = time.monotonic() + SECONDS[test]
    runs: list[list[Span]] = [[] for _ in models]
    over = threading.Event()

    def run(side: int) -> None:
        try:
            while not over.is_set() and (side == 0 or time.monotonic() < deadline):
                began, seed = time.perf_counter_ns(), 1000 * number + len(runs[side])
                for _ in models[side].session.bench(
                    prompt=prompt, generate=generate, depth=0, repetitions=1, warmup=False, seed=seed
                ):
                    pass
                runs[side].append((began, time.perf_counter_ns()))
        finally:
            over.set()

    turns = in_turns(members, [partial(run, side) for side in range(len(models))])
    ratios = [running_ns(turns[1], *one) / _ns_meanwhile(turns[0], runs[0], one) for one in runs[1]]
    say(f"{test}, round {number}: " + ", ".join(f"{ratio:.3f}" for ratio in ratios))
    return statistics.median(ratios)


def _ns_meanwhile(turns: Sequence[Span], runs: Sequence[Span], span: Span) -> float:
    """Ns that a run takes by what of `runs` fell into `span`; parts of runs count as parts."""
    done, spent = 0.0, 0
    for began, ended in runs:
        if part := running_ns(turns, max(began, span[0]), min(ended, span[1])):
            done += part / running_ns(turns, began, ended)
            spent += part
    return spent / done


@cache
def _used(case: Case) -> tuple[Pair, ...]:
    """Forecasts and runs of a file, one after the other, decode and prefill."""
    pairs = []
    with _file(case) as (model, home):
        for number in range(case.used):
            told = json.loads(run_qnext(("forecast", str(model), *CONTEXT, "--json"), home))
            measured = _bench(model, home)
            pairs += [
                _pair(told["decode_tps"][0], measured["decode"]),
                _pair(told["prefill_tps"], measured["prefill"]),
            ]
            say(f"{case}, used {number + 1} times: {pairs[-2:]}")
    return tuple(pairs)


@cache
def _splits() -> dict[int, list[Pair]]:
    """Decode by the number of layers whose experts are in RAM: one forecast, then runs of each in turn."""
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
        found: dict[int, list[Pair]] = {count: [] for count in SPLITS}
        for _ in range(ROUNDS):
            for count in SPLITS:
                measured = _bench(model, home, *device, "--n-cpu-moe", str(count))
                found[count].append(_pair(curve[count], measured["decode"]))
                say(f"{count} layers' experts in RAM: {found[count][-1]}")
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
    arguments = ("-p", str(PROMPT), "-n", str(GENERATE), "-r", "5", *CONTEXT, *more, "--json")
    record: dict[str, Any] = json.loads(run_qnext(("bench", "run", str(model), *arguments), home))
    return {"prefill" if one["prompt"] else "decode": float(one["median_tps"]) for one in record["tests"]}


def _pair(forecast: dict[str, float], measured: float) -> Pair:
    return Pair(forecast["low"], forecast["mid"], forecast["high"], measured)
