"""A sweep against llama-optimus on the same model: the speed of what each ends with, and the time it takes.

llama-optimus 0.1.9 (Optuna over llama-bench) runs as its README shows, decode being its usual metric, on
llama-bench of the same source with the very libraries that qnext loads. It gets ten times the time of the
sweep, and what its trials have found by then counts. Both results run against each other in rounds.
"""

from __future__ import annotations

import ast
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from claims import CannotMeasure, Figure, claim
from claims._cells import measure_rounds, say
from claims._slice import peer, true_slice, wheel_libraries
from qnext.bench.verdict import compare_paired
from qnext.config import Paths
from qnext.pipeline.request import Request
from qnext.pipeline.sweep_setup import default_placement, prepare_sweep
from qnext.pipeline.sweep_values import Cell, Grid
from qnext.pipeline.sweeping import SweepWatch, run_sweep, start_sweep
from qnext.plan.values import Placement, Workload

PACKAGE = "llama-optimus==0.1.9"
LAYERS, TRIALS, TIMES = 4, 35, 10.0
WORKLOAD = Workload(prompt=16, generate=64, depth=0)
SWEEP_S = 60.0
ROUNDS, TURNS = 6, 3


@claim(
    "sweep-optimus",
    "decode of the sweep's winner beside llama-optimus's, 4-layer slice, time of a token",
    bar="not slower than what it finds in ten times the time",
    minutes=15,
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
        chosen, theirs_s = _optimus(model, home, TIMES * ours_s)
        if chosen is None:
            return Figure(
                0.0, "x time", True, f"nothing found in {theirs_s:.0f} s; '{winner.name}' in {ours_s:.0f} s"
            )
        theirs = _cell(winner, _as_chosen(default_placement(prepared.planned, request, {}), chosen))
        say(f"llama-optimus: {chosen} in {theirs_s:.0f} s")
        times = measure_rounds(prepared, [winner, theirs], rounds=ROUNDS, turns=TURNS)
    verdict = compare_paired(times[winner.name], times[theirs.name])
    holds = verdict.word != "slower" and ours_s <= 1.01 * theirs_s / TIMES
    detail = (
        f"{verdict.low:.3f}-{verdict.high:.3f}, {verdict.word} over {verdict.pairs} pairs; '{winner.name}' in"
        f" {ours_s:.0f} s against {chosen} in {theirs_s:.0f} s"
    )
    return Figure(verdict.ratio, "x time", holds, detail)


def _optimus(model: Path, home: Path, limit_s: float) -> tuple[dict[str, Any] | None, float]:
    """(the best of its trials, None without one; seconds until it ended or was ended)."""
    argv = [
        str(_installed()), "--llama-bin", str(peer("llama-bench").parent), "--model", str(model),
        "--trials", str(TRIALS), "--metric", "tg",
    ]  # fmt: skip
    environment = {**os.environ, **wheel_libraries(), "PYTHONUNBUFFERED": "1"}
    log, began = home / "optimus.log", time.monotonic()
    with log.open("w") as file:
        process = subprocess.Popen(
            argv, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    seconds, text = time.monotonic() - began, log.read_text(errors="replace")
    for line in [line for line in text.splitlines() if "Warmup" in line or "finished with value" in line][
        -3:
    ]:
        say(line)
    found = re.findall(r"finished with value: ([0-9.e+-]+) and parameters: (\{.*?\})", text)
    whole: dict[str, Any] = {}
    best: tuple[float, dict[str, Any]] | None = None
    for value, parameters in found:
        whole = {**whole, **ast.literal_eval(parameters)}
        if best is None or float(value) > best[0]:
            best = float(value), dict(whole)
    return (best[1] if best else None), seconds


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


def _as_chosen(defaults: Placement, told: dict[str, Any]) -> Placement:
    """What llama-bench does with these parameters, on a machine without a device."""
    flash = {1: "on", 0: "auto"}[told.get("flash_attn", 0)]
    return replace(
        defaults,
        threads=told["threads"],
        threads_batch=told["threads"],
        batch=told["batch"],
        ubatch=min(told["u_batch"], told["batch"]),
        flash_attention=flash,  # type: ignore[arg-type]
    )


def _cell(like: Cell, placement: Placement) -> Cell:
    return replace(like, name="llama-optimus", placement=placement, roles=(), status="", because="")
