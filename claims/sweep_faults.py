"""What a sweep of the demo loses when it is killed, or when its engine dies: nothing that was finished.

Kills are SIGKILL of the sweep's process at moments drawn at random, start and load included, each followed
by `--resume`. Faults are real ones: a layout that crashes llama.cpp's loader on every CPU, a stopped child
(SIGSTOP), and the kernel's own out-of-memory killer in a memory group (needs root).
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claims import ROOT, CannotMeasure, Figure, claim
from claims._cells import say

if TYPE_CHECKING:
    from qnext.pipeline.sweep_values import Cell
    from qnext.store.sweeps import Measurement, StoredSweep

KILLS, LATEST_KILL_S = 25, 4.0
SWEEP = ("demo", "-c", "1024", "-t", "1", "-tb", "1", "-p", "96", "-n", "48", "-d", "0",
         "-ub", "8,16,32,48,96", "-ctk", "f16,q8_0,q4_0", "-lm", "none,mmap", "--budget", "60s")  # fmt: skip

GROUP_BYTES, TOO_LONG = 150 << 20, 524_288
"""The memory group's limit, and a context whose cache alone takes half a gigabyte."""
CELLS, CRASHES, HANGS, TOO_LARGE = 30, 4, 3, 3
EXPLAINED = ("crashed", "hung", "out-of-memory", "does-not-fit")


@claim(
    "sweep-killed",
    f"finished measurements lost or repeated over {KILLS} SIGKILLs of one sweep, each then resumed",
    bar="0, database intact",
    minutes=3,
)
def measure_kills() -> Figure:
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        return _kill_and_resume(Path(folder))


@claim(
    "sweep-faults",
    f"cells of {CELLS} that are ranked or explained, with 4 crashes, 3 hangs, 3 out-of-memory kills",
    bar=f"{CELLS}: 20 ok cells ranked, 10 explained",
    minutes=2,
)
def measure_faults() -> Figure:
    from tests.engine_processes import memory_cgroup

    with contextlib.ExitStack() as group:
        try:
            procs = group.enter_context(memory_cgroup(GROUP_BYTES))
        except OSError as error:
            raise CannotMeasure(f"needs root and a memory controller: {error}") from error
        folder = group.enter_context(tempfile.TemporaryDirectory(prefix="qnext-claims-"))
        return _strike_cells(Path(folder), procs)


def _kill_and_resume(home: Path) -> Figure:
    chance = random.Random(4)
    sweep_id, wrong = "", list[str]()
    kept: tuple[Measurement, ...] = ()
    measured_before_kill = 0
    for number in range(KILLS):
        again = (sweep_id, "--resume") if sweep_id else SWEEP
        process = _start(again, home)
        time.sleep(chance.uniform(0.1, LATEST_KILL_S))
        if process.poll() is not None:
            wrong.append(f"kill {number} came too late: the sweep had ended with {process.returncode}")
            break
        process.kill()
        process.wait()
        found = _stored(home)
        if found is None:
            continue  # killed before there was a sweep
        sweep_id, now = found.id, _finished(found)
        wrong += [f"after kill {number}: {what}" for what in _compare(kept, now, home)]
        measured_before_kill += len(now) > len(kept)
        kept = now
    last = _start((sweep_id, "--resume", "--json"), home)
    output, errors = last.communicate()
    if last.returncode:
        return Figure(len(wrong) + 1, "losses", False, errors.strip().splitlines()[-1])
    end = _stored(home)
    assert end is not None
    wrong += [f"at the end: {what}" for what in _compare(kept, _finished(end), home)]
    numbers = [one.number for one in end.measurements]
    if numbers != list(range(len(numbers))):
        wrong.append("the numbers of the measurements have gaps or repeat")
    detail = (
        f"{len(kept)} measurements kept over {KILLS} kills ({measured_before_kill} of them after new ones),"
        f" {len(end.measurements)} in the end; winner '{json.loads(output)['winner']}'"
    )
    return Figure(len(wrong), "losses", not wrong, "; ".join(wrong) or detail)


def _start(arguments: tuple[str, ...], home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "qnext", "bench", "sweep", *arguments],
        cwd=ROOT,
        env={**os.environ, "QNEXT_HOME": str(home)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _stored(home: Path) -> StoredSweep | None:
    from qnext.store.sweeps import SweepStore

    store = home / "data" / "results.db"
    if not store.exists():
        return None
    with contextlib.closing(sqlite3.connect(store)) as connection:
        try:
            row = connection.execute("SELECT id FROM sweeps").fetchone()
        except sqlite3.OperationalError:  # killed before the tables were made
            return None
    return SweepStore(store).get(row[0]) if row else None


def _finished(sweep: StoredSweep) -> tuple[Measurement, ...]:
    return tuple(one for one in sweep.measurements if one.status is not None)


def _compare(kept: tuple[Measurement, ...], now: tuple[Measurement, ...], home: Path) -> Iterator[str]:
    """What is wrong with the store after a kill."""
    if now[: len(kept)] != kept:
        yield "a finished measurement is lost or changed"
    with contextlib.closing(sqlite3.connect(home / "data" / "results.db")) as connection:
        if connection.execute("PRAGMA integrity_check").fetchone() != ("ok",):
            yield "the database is not intact"


def _strike_cells(home: Path, procs: Path) -> Figure:
    from qnext.config import Paths
    from qnext.models.synth import make_demo
    from qnext.pipeline.request import Request
    from qnext.pipeline.sweep_results import conclude
    from qnext.pipeline.sweep_setup import prepare_sweep
    from qnext.pipeline.sweep_values import Grid
    from qnext.pipeline.sweeping import SweepWatch, run_sweep, start_sweep
    from qnext.plan.values import Workload
    from tests.engine_processes import children

    os.environ["QNEXT_ENGINE_TIMEOUT"] = "2"
    model, paths = home / "demo.gguf", Paths(home / "config", home / "data", home / "cache")
    make_demo(model)
    request = Request(
        model=str(model), context=1024, threads=1, threads_batch=1, ram=900 << 20,
        workload=Workload(prompt=96, generate=24, depth=0),
    )  # fmt: skip
    grid = Grid(ubatch=(8, 16, 32, 48, 96), kv_type_k=("f16", "q8_0", "q4_0"), load_mode=("none", "mmap"))
    prepared = prepare_sweep(request, paths, say, grid=grid, seconds=60.0)
    live = [cell for cell in prepared.live if not cell.roles]
    chosen = random.Random(5).sample(live, CELLS - sum(bool(cell.roles) for cell in prepared.live))
    names = [cell.name for cell in random.Random(6).sample(chosen, CRASHES + HANGS + TOO_LARGE)]
    crashing, hanging, large = names[:CRASHES], names[CRASHES:-TOO_LARGE], names[-TOO_LARGE:]
    wanted = {cell.name for cell in chosen}
    cells = tuple(
        _tampered(cell, crash=cell.name in crashing, large=cell.name in large)
        for cell in prepared.cells
        if cell.roles or cell.name in wanted
    )
    current = ""

    def on_step(_step: Any, cell: Cell) -> None:
        nonlocal current
        current = cell.name
        strike()

    def strike(_share: float = 1.0) -> None:
        """Every child into the memory group; the child of a cell that is to hang is stopped."""
        for pid in (child.pid for child in children()):
            with contextlib.suppress(OSError):
                procs.write_text(str(pid))
            if current in hanging:
                threading.Timer(0.02, _stop, (pid,)).start()

    prepared = replace(prepared, cells=cells)
    run = run_sweep(
        start_sweep(prepared, paths), prepared, paths, SweepWatch(on_step=on_step, on_load=strike)
    )
    results = {one.cell.name: one for one in conclude(run, paths, (), 0).results}
    ranked = [
        name for name, one in results.items() if one.status == "ok" and one.turn_s and name not in names
    ]
    explained = [name for name in names if results[name].status in EXPLAINED and results[name].because]
    said = sorted({f"{results[name].status}: {results[name].because.split(';')[0]}" for name in names})
    lost = {
        name: one.status
        for name, one in results.items()
        if name not in {*ranked, *names} and one.cell in cells
    }
    good = len(ranked) == CELLS - len(names) and len(explained) == len(names) and run.result.winner in ranked
    detail = (
        f"{len(ranked)} ranked, {len(explained)} explained ({' | '.join(said)}); winner '{run.result.winner}'"
        + (f"; neither: {lost}" if lost else "")
    )
    return Figure(len(ranked) + len(explained), "cells", good, detail)


def _tampered(cell: Cell, *, crash: bool, large: bool) -> Cell:
    from qnext.plan.values import CPU_REPACK, Override

    if crash:
        rule = (Override(r"weight$", CPU_REPACK),)
        knobs = {**cell.knobs, "layout": "broken"}
        return replace(cell, placement=replace(cell.placement, overrides=rule), knobs=knobs)
    if large:
        demands = {**cell.demands, "context": TOO_LONG}
        return replace(cell, placement=replace(cell.placement, context=TOO_LONG), demands=demands)
    return cell


def _stop(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)
