"""How often equal things are called different: pairs of equal benchmark runs, and pairs of equal series.

Both on the real engine with the demo model, while whatever else the machine does goes on. `same-runs` is what
`qnext bench compare` says of two runs of `qnext bench run`, first where the store knows no others, then with
those before; `same-turns` what a sweep's duel says of two settings that are one setting, measured in turns
whose order is drawn.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

from claims import Figure, claim
from claims._cells import measure_rounds, say
from qnext.bench.names import Scenario
from qnext.bench.verdict import compare_paired
from qnext.config import Paths
from qnext.models.synth import make_demo
from qnext.pipeline.benching import BenchWatch, run_bench
from qnext.pipeline.comparing_records import compare_stored
from qnext.pipeline.request import Request
from qnext.pipeline.sweep_setup import prepare_sweep
from qnext.pipeline.sweep_values import Grid
from qnext.plan.values import Workload
from qnext.store.results import ResultStore

PAIRS, MOST = 40, 2
TESTS, REPETITIONS = (Scenario(256, 0), Scenario(0, 64)), 8
TURNS = 16


@claim(
    "same-runs",
    f"of {PAIRS} pairs of equal `bench run`s those that `bench compare` calls different",
    bar=f"{MOST} or fewer",
    minutes=6,
)
def measure_runs() -> Figure:
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        request, paths = _demo(Path(folder))
        store, called, furthest = ResultStore(paths.results_db), list[int](), 1.0
        for number in range(PAIRS):
            one, other = (
                run_bench(request, list(TESTS), REPETITIONS, paths, say, sys.argv, BenchWatch())
                for _ in range(2)
            )
            found = compare_stored(store, one, other)
            if any(test.word != "no difference shown" for test in found.tests):
                called.append(number + 1)
            furthest = max([furthest, *(max(test.ratio, 1 / test.ratio) for test in found.tests)])
    different = len(called)
    detail = f"{PAIRS} pairs, two tests each of {REPETITIONS} samples; furthest apart {furthest:.3f} x"
    detail += f"; called different: pairs {', '.join(map(str, called))}" if called else ""
    return Figure(different, f"of {PAIRS}", different <= MOST, detail)


@claim(
    "same-turns",
    f"of {PAIRS} pairs of equal settings those that the test of a sweep calls different",
    bar=f"{MOST} or fewer",
    minutes=4,
)
def measure_turns() -> Figure:
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        request, paths = _demo(Path(folder))
        prepared = prepare_sweep(request, paths, say, grid=Grid(threads=(1,)), seconds=10.0)
        plan = prepared.live[0]
        times = measure_rounds(prepared, [plan], rounds=PAIRS, turns=2 * TURNS)[plan.name]
    chance, different, furthest = random.Random(3), 0, 1.0
    for start in range(0, len(times), 2 * TURNS):
        series = times[start : start + 2 * TURNS]
        pairs = [chance.sample(series[at : at + 2], 2) for at in range(0, len(series), 2)]
        verdict = compare_paired([one for one, _ in pairs], [other for _, other in pairs])
        different += verdict.word != "no difference shown"
        furthest = max(furthest, verdict.ratio, 1 / verdict.ratio)
    detail = f"{PAIRS} series of {TURNS} pairs of turns; furthest apart {furthest:.3f} x"
    return Figure(different, f"of {PAIRS}", different <= MOST, detail)


def _demo(folder: Path) -> tuple[Request, Paths]:
    model = folder / "demo.gguf"
    make_demo(model)
    workload = Workload(prompt=128, generate=24, depth=0)
    request = Request(model=str(model), context=512, threads=1, threads_batch=1, workload=workload)
    return request, Paths(folder / "config", folder / "data", folder / "cache")
