"""Two cells measured at once: each has the processor in its turns, and what ends one is told of both."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from qnext.bench.race_values import Step
from qnext.config import Paths, find_paths
from qnext.pipeline.request import Request
from qnext.pipeline.sweep_engine import SweepEngine, Taken
from qnext.pipeline.sweep_setup import prepare_sweep
from qnext.pipeline.sweep_values import Cell, Grid, RungSize
from qnext.pipeline.sweeping import SweepWatch, run_sweep, start_sweep
from qnext.plan.values import Workload
from tests.engine_processes import children

pytestmark = [
    pytest.mark.engine,
    pytest.mark.usefixtures("demo_model"),
    pytest.mark.skipif(sys.platform != "linux", reason="elsewhere cells are measured one after the other"),
]

WORKLOAD = Workload(prompt=32, generate=400, depth=0)
REQUEST = Request(model="demo", context=1024, threads=1, threads_batch=1, workload=WORKLOAD)
SIZE = RungSize(32, 400, 0)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    shared = find_paths()
    return replace(shared, data_dir=tmp_path / "data", config_dir=tmp_path / "config")


@contextmanager
def two_loaded(paths: Paths) -> Iterator[tuple[SweepEngine, list[Cell]]]:
    """An engine with the demo loaded in two ways, each measured once."""
    sweep = prepare_sweep(REQUEST, paths, print, grid=Grid(load_mode=("none", "mmap")), seconds=5.0)
    cells = list({cell.group: cell for cell in sweep.live}.values())[:2]
    with SweepEngine(
        sweep.planned.model.path,
        replace(sweep.planned.problem, compute=None),
        objective="turn",
        workload=WORKLOAD,
        seed=1,
        silence_limit_s=20.0,
        depth_limit_s=20.0,
    ) as engine:
        groups, small = [cell.group for cell in cells], RungSize(8, 2, 0)
        assert engine.measure(cells[0], small, 0, 20.0, groups, also=cells[1]).status == "ok"
        assert all(map(engine.ready, cells)) and len(children()) == 2
        assert engine.measure(cells[1], small, 1, 20.0, groups).status == "ok"
        yield engine, cells
    assert not children()


def busy_ns(taken: Taken) -> int:
    return (taken.prefill_ns or 0) + sum(taken.token_ns)


def test_times_of_both_are_their_own_turns_alone(paths: Paths) -> None:
    with two_loaded(paths) as (engine, cells):
        began = time.perf_counter_ns()
        one, other = engine.measure_both(cells, SIZE, 7, 20.0)
        elapsed = time.perf_counter_ns() - began
        assert one.status == other.status == "ok"
        assert len(one.token_ns) == len(other.token_ns) == SIZE.generate
        assert one.turn_ns is not None and other.turn_ns is not None
        assert 0 < busy_ns(one) + busy_ns(other) <= elapsed
        assert all(child.status() != psutil.STATUS_STOPPED for child in children())
        assert engine.measure(cells[0], SIZE, 8, 20.0).status == "ok", "both go on afterwards"


def test_the_death_of_one_is_told_of_both(paths: Paths) -> None:
    with two_loaded(paths) as (engine, cells):
        threading.Timer(0.15, children()[0].kill).start()
        one, other = engine.measure_both(cells, SIZE, 7, 20.0)
        assert one == other and one.status in ("crashed", "out-of-memory") and one.because
        assert not any(map(engine.ready, cells))


def test_ctrl_c_ends_both_at_once(paths: Paths) -> None:
    with two_loaded(paths) as (engine, cells):
        threading.Timer(0.15, os.kill, (os.getpid(), signal.SIGINT)).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            engine.measure_both(cells, RungSize(32, 900, 0), 7, 20.0)
        assert time.monotonic() - began < 3
        assert not children()


def test_a_killed_sweep_leaves_no_stopped_engine_behind(tmp_path: Path) -> None:
    """SIGKILL gives nobody the time to let a stopped child go on: it has to end by itself."""
    (tmp_path / "cache").symlink_to(find_paths().cache_dir)
    command = [sys.executable, "-m", "qnext", "bench", "sweep", "demo", "-c", "1024", "-t", "1", "-tb", "1"]
    command += ["-p", "32", "-n", "400", "-d", "0", "--budget", "20s"]
    environment = {**os.environ, "QNEXT_HOME": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        sweep, stopped = psutil.Process(process.pid), list[psutil.Process]()
        deadline = time.monotonic() + 60
        while not stopped and time.monotonic() < deadline:
            engines = sweep.children()
            stopped = [one for one in engines if one.status() == psutil.STATUS_STOPPED]
        process.kill()
        assert len(engines) == 2 and stopped, "two engines took turns"
    _, alive = psutil.wait_procs(engines, timeout=5)
    for one in alive:
        one.kill()
    assert not alive


def test_a_sweep_measures_two_ways_to_load_at_once(paths: Paths) -> None:
    sweep = prepare_sweep(REQUEST, paths, print, grid=Grid(), seconds=8.0)
    steps: list[Step] = []

    def look(step: Step, cell: Cell) -> None:
        steps.append(step)

    run = run_sweep(start_sweep(sweep, paths), sweep, paths, SweepWatch(on_step=look))
    assert steps[0].load and steps[0].also is not None, "two are loaded at the same time"
    assert sum(step.partner is not None for step in steps) > 4
    assert {one.status for one in run.sweep.measurements} <= {"ok", "noisy"}
    assert run.result.winner is not None
