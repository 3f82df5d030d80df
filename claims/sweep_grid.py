"""A sweep against the exhaustive grid of the same cells, against llama.cpp's fit and its defaults.

On a true-shape slice of Qwen3-Next-80B-A3B, on the CPU alone and with a second device (an RPC worker on
loopback with 2 GiB), over the knobs that llama-bench has: threads for batches stay at all cores. The grid
measures every cell as llama-bench would by itself: a warm-up, then REPEATS turns, one cell after the other,
each way to place the weights loaded once. The sweep then gets a fifth of the grid's
time. What the grid calls best is the luckiest of many, so its BEST_CELLS best, the sweep's winner and the
baselines then run against the winner on fresh turns, two at a time, both in memory, in turns of a tenth of a
second.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache

import psutil

from claims import Figure, claim
from claims._cells import Duellist, measure_duel, measure_grid, say
from claims._slice import peer, true_slice
from qnext.bench.verdict import Verdict, compare_paired
from qnext.config import Paths
from qnext.engine.rpc import RpcWorker
from qnext.hardware import detect_machine
from qnext.pipeline.request import Request
from qnext.pipeline.sweep_results import conclude
from qnext.pipeline.sweep_setup import prepare_sweep
from qnext.pipeline.sweep_values import Grid
from qnext.pipeline.sweeping import Progress, SweepWatch, run_sweep, start_sweep
from qnext.plan.values import Workload

LAYERS = 8
DEVICE_BYTES = 2 << 30
WORKLOAD = Workload(prompt=128, generate=16, depth=0)
REPEATS, SHARE, OVERRUN_SHARE = 5, 0.2, 0.01
BEST_CELLS, TURNS = 3, 12


@dataclass(frozen=True, slots=True)
class Contest:
    """`against[name]` compares the sweep's winner with that cell: under 1 the winner takes less time.

    `best` are the grid's best; `roles` says which baselines a cell is.
    """

    winner: str
    grid_s: float
    sweep_s: float
    cells: int
    loads: int
    best: tuple[str, ...]
    roles: dict[str, str]
    against: dict[str, Verdict]


@claim(
    "sweep-grid-cpu",
    "turn of the sweep's winner beside the exhaustive grid's best, 8-layer slice, CPU alone",
    bar="0.98 of the best, in a fifth of the grid's time",
    minutes=40,
)
def measure_cpu() -> Figure:
    return _of_best(_contest(rpc=False))


@claim("sweep-baselines-cpu", "the same beside llama.cpp's fit and defaults", bar="never slower", minutes=40)
def measure_cpu_baselines() -> Figure:
    return _of_baselines(_contest(rpc=False))


@claim(
    "sweep-grid-rpc",
    "turn of the sweep's winner beside the exhaustive grid's best, CPU and loopback device of 2 GiB",
    bar="0.98 of the best, in a fifth of the grid's time",
    minutes=50,
)
def measure_rpc() -> Figure:
    return _of_best(_contest(rpc=True))


@claim("sweep-baselines-rpc", "the same beside llama.cpp's fit and defaults", bar="never slower", minutes=50)
def measure_rpc_baselines() -> Figure:
    return _of_baselines(_contest(rpc=True))


@claim("sweep-loads", "loads of the model in both sweeps", bar="10 at most", minutes=90)
def measure_loads() -> Figure:
    loads = [_contest(rpc=rpc).loads for rpc in (False, True)]
    return Figure(max(loads), "loads", max(loads) <= 10, f"CPU alone {loads[0]}, with the device {loads[1]}")


def _of_best(contest: Contest) -> Figure:
    rivals = {name: contest.against[name] for name in contest.best if name != contest.winner}
    closest = max(rivals.values(), key=lambda verdict: verdict.ratio, default=None)
    of_best = min(1.0, 1 / closest.ratio) if closest else 1.0
    spent = contest.sweep_s / contest.grid_s
    detail = (
        f"winner '{contest.winner}', {_said(rivals)}; {contest.cells} cells, grid {contest.grid_s:.0f} s,"
        f" sweep {contest.sweep_s:.0f} s ({spent:.3f} of it), {contest.loads} loads"
    )
    return Figure(of_best, "x", of_best >= 0.98 and spent <= SHARE, detail)


def _of_baselines(contest: Contest) -> Figure:
    found = {
        f"{role} ({name})": contest.against[name]
        for name, role in contest.roles.items()
        if name in contest.against
    }
    if not found:
        return Figure(1.0, "x", True, f"the winner is a baseline itself: '{contest.winner}'")
    slower = [name for name, verdict in found.items() if verdict.word == "slower"]
    least = max(verdict.ratio for verdict in found.values())
    return Figure(least, "x time", not slower, f"winner '{contest.winner}', {_said(found)}")


def _said(verdicts: dict[str, Verdict]) -> str:
    return ", ".join(
        f"{one.ratio:.3f} x the time of '{name}' ({one.low:.3f}-{one.high:.3f}, {one.word})"
        for name, one in verdicts.items()
    )


@cache
def _contest(*, rpc: bool) -> Contest:
    with true_slice(LAYERS) as (model, home), _second_devices(rpc) as workers:
        cores = detect_machine(home).cpu.usable_cores or 1
        grid = Grid(threads_batch=(cores,))
        paths = Paths(home / "config", home / "data", home / "cache")
        request = Request(model=str(model), context=1024, threads_batch=cores, workload=WORKLOAD)
        requests = [_with_device(request, worker) for worker in workers]
        corners = [prepare_sweep(one, paths, say, grid=grid, seconds=3600.0) for one in requests]
        request, prepared = requests[0], corners[0]
        times, grid_s = measure_grid(prepared, REPEATS)
        middle = {name: statistics.median(all_of_it) for name, all_of_it in times.items()}
        best = sorted(middle, key=lambda name: middle[name])[:BEST_CELLS]
        say(f"grid: {len(middle)} cells in {grid_s:.0f} s; { ({name: middle[name] / 1e9 for name in best}) }")
        began = time.monotonic()
        seconds = (SHARE - OVERRUN_SHARE) * grid_s - 2.0  # preparing and the last measurement are the sweep's
        steps: list[Progress] = []

        def note(step: Progress) -> None:
            steps.append(step)
            what = f"{step.cell.name}, {step.rung}: {step.taken.status}"
            say(f"{step.spent_s:.0f} s: {what}, {step.seconds:.2f} s, turn {step.taken.turn_ns} ns")

        short = prepare_sweep(request, paths, say, grid=grid, seconds=seconds)
        run = run_sweep(start_sweep(short, paths), short, paths, SweepWatch(on_measured=note))
        loads = steps[-1].race.loads + steps[-1].race.reloads
        end = conclude(run, paths, ["claims"], loads)
        chosen = end.winner.cell.name  # what `qnext run` takes from then on
        sweep_s = time.monotonic() - began
        cells = {cell.name: cell for cell in prepared.live}
        roles = {cell.name: " and ".join(cell.roles) for cell in prepared.live if cell.roles}
        names = dict.fromkeys((chosen, *best, *roles))
        say(f"sweep: {chosen} in {sweep_s:.0f} s, {run.result.verdict}")
        winner = cells[chosen]
        duels: dict[str, Verdict] = {}
        for name in names:
            if name != winner.name:
                pair = (
                    Duellist(
                        corner, next(cell for cell in corner.live if cell.name == named), _process(worker)
                    )
                    for corner, named, worker in zip(corners, (winner.name, name), workers, strict=True)
                )
                duels[name] = compare_paired(*measure_duel(*pair, count=TURNS))
                say(_said({name: duels[name]}))
        return Contest(
            winner=winner.name,
            grid_s=grid_s,
            sweep_s=sweep_s,
            cells=len(times),
            loads=loads,
            best=tuple(best),
            roles=roles,
            against=duels,
        )


@contextmanager
def _second_devices(wanted: bool) -> Iterator[list[RpcWorker | None]]:
    """A second device for each of two engines: a worker answers one at a time. None where unwanted."""
    if not wanted:
        yield [None, None]
        return
    os.environ["PATH"] += os.pathsep + str(peer("llama-fit-params").parent)  # the baseline
    with RpcWorker(threads=1) as one, RpcWorker(threads=1) as other:
        yield [one, other]


def _with_device(request: Request, worker: RpcWorker | None) -> Request:
    if worker is None:
        return request
    return replace(request, rpc_servers=(worker.endpoint,), device_memory={"RPC0": DEVICE_BYTES})


def _process(worker: RpcWorker | None) -> tuple[psutil.Process, ...]:
    return () if worker is None else (psutil.Process(worker.pid),)
