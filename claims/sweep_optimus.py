"""A sweep against llama-optimus on the same model: the speed of what each ends with, and the time it takes.

llama-optimus 0.1.9 (Optuna over llama-bench) runs as its README shows, decode being its usual metric, on
llama-bench of the same source with the very libraries that qnext loads. The slice has one layer, so that
its 35 trials a stage end within the hour. Both results then run against each other in rounds.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path

from claims import CannotMeasure, Figure, claim
from claims._cells import measure_rounds, say
from claims._slice import peer, true_slice, wheel_libraries
from qnext.bench.verdict import compare_paired
from qnext.config import Paths
from qnext.pipeline.request import Request, parse_overrides
from qnext.pipeline.sweep_cells import default_placement
from qnext.pipeline.sweep_setup import prepare_sweep
from qnext.pipeline.sweep_values import Cell, Grid
from qnext.pipeline.sweeping import SweepWatch, run_sweep, start_sweep
from qnext.plan.values import Placement, Workload

PACKAGE = "llama-optimus==0.1.9"
LAYERS, TRIALS = 1, 35
WORKLOAD = Workload(prompt=16, generate=64, depth=0)
SWEEP_S = 80.0
ROUNDS, TURNS = 6, 3


@claim(
    "sweep-optimus",
    "decode of the sweep's winner beside llama-optimus's, 1-layer slice, time of a token",
    bar="not slower, in a tenth of its time",
    minutes=60,
)
def measure_optimus() -> Figure:
    with true_slice(LAYERS) as (model, home):
        paths = Paths(home / "config", home / "data", home / "cache")
        request = Request(model=str(model), context=1024, workload=WORKLOAD)
        began = time.monotonic()
        prepared = prepare_sweep(request, paths, say, objective="decode", grid=Grid(), seconds=SWEEP_S)
        run = run_sweep(start_sweep(prepared, paths), prepared, paths, SweepWatch())
        ours_s = time.monotonic() - began
        assert run.result.winner is not None
        winner = next(cell for cell in prepared.live if cell.name == run.result.winner)
        say(f"sweep: {winner.name} in {ours_s:.0f} s")
        began = time.monotonic()
        chosen = _optimus(model, home)
        theirs_s = time.monotonic() - began
        theirs = _cell(winner, _as_chosen(default_placement(prepared.planned, request, {}), chosen))
        say(f"llama-optimus: {chosen} in {theirs_s:.0f} s")
        times = measure_rounds(prepared, [winner, theirs], rounds=ROUNDS, turns=TURNS)
    verdict = compare_paired(times[winner.name], times[theirs.name])
    holds = verdict.word != "slower" and ours_s <= theirs_s / 10
    detail = (
        f"{verdict.low:.3f}-{verdict.high:.3f}, {verdict.word} over {verdict.pairs} pairs; '{winner.name}' in"
        f" {ours_s:.0f} s against '{' '.join(chosen)}' in {theirs_s:.0f} s ({ours_s / theirs_s:.3f} of it)"
    )
    return Figure(verdict.ratio, "x time", holds, detail)


def _optimus(model: Path, home: Path) -> list[str]:
    """The options of llama-bench that it ends with."""
    argv = [
        str(_installed()), "--llama-bin", str(peer("llama-bench").parent), "--model", str(model),
        "--trials", str(TRIALS), "--metric", "tg",
    ]  # fmt: skip
    environment = {**os.environ, **wheel_libraries()}
    log = home / "optimus.log"
    with log.open("w") as file:
        subprocess.run(argv, stdout=file, stderr=subprocess.STDOUT, env=environment, check=True)
    found = re.search(r"OPTIMIZED configuration.*?^(\S*llama-bench .*?)$", log.read_text(), re.S | re.M)
    if found is None:
        raise CannotMeasure("llama-optimus printed no configuration")
    return shlex.split(found[1])[3:]


@cache
def _installed() -> Path:
    """llama-optimus in a virtual environment of its own, kept in the cache folder."""
    from qnext.config import find_paths

    folder = find_paths().cache_dir / "peers" / PACKAGE
    program = folder / "bin" / "llama-optimus"
    if not program.exists():
        for argv in (
            [sys.executable, "-m", "venv", str(folder)],
            [str(folder / "bin" / "pip"), "install", "-q", PACKAGE],
        ):
            if subprocess.run(argv, capture_output=True, check=False).returncode:
                raise CannotMeasure(f"needs {PACKAGE} from the package index")
    return program


def _as_chosen(defaults: Placement, options: list[str]) -> Placement:
    """What llama-bench does with these options, on a machine without a device."""
    told = dict(zip(options[::2], options[1::2], strict=False))
    threads = int(told["-t"])
    rules = told.get("--override-tensor", "").split(",")
    return replace(
        defaults,
        threads=threads,
        threads_batch=threads,
        batch=int(told["--batch-size"]),
        ubatch=min(int(told["--ubatch-size"]), int(told["--batch-size"])),
        flash_attention="on" if told["--flash-attn"] == "1" else "off",
        overrides=parse_overrides(tuple(rule for rule in rules if rule)),
    )


def _cell(like: Cell, placement: Placement) -> Cell:
    return replace(like, name="llama-optimus", placement=placement, roles=(), status="", because="")
