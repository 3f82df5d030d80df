"""A sweep on the real engine: it ends with a winner, whatever cells, children and processes die."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qnext.bench.race_duel import BELIEVED
from qnext.config import Paths, find_paths
from qnext.pipeline.planning import plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.sweep_cell_results import summarise_cells
from qnext.pipeline.sweep_results import conclude, sweep_to_dict
from qnext.pipeline.sweep_setup import Prepared, prepare_sweep
from qnext.pipeline.sweep_values import Cell, Grid
from qnext.pipeline.sweeping import (
    Progress,
    SweepRun,
    SweepWatch,
    reopen_sweep,
    run_sweep,
    start_sweep,
)
from qnext.plan.values import CPU_REPACK, Override, Workload
from qnext.store.sweeps import StoredSweep, SweepStore
from tests.conftest import Qnext
from tests.engine_processes import children

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("demo_model")]

REQUEST = Request(
    model="demo",
    context=1024,
    threads=1,
    threads_batch=1,
    workload=Workload(prompt=32, generate=16, depth=16),
)
GRID = Grid(ubatch=(16, 32), kv_type_k=("f16", "q8_0"))
SMALL = ("-c", "1024", "-p", "32", "-n", "16", "-d", "16", "-ub", "16,32", "-ctk", "f16,q8_0")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A store and a folder of profiles of this test's own; caches are the session's."""
    shared = find_paths()
    return replace(shared, data_dir=tmp_path / "data", config_dir=tmp_path / "config")


@pytest.fixture
def home(tmp_path: Path, demo_model: Path) -> Path:
    """A QNEXT_HOME of this test's own for processes; what was probed once is the session's."""
    plan_model(REQUEST, find_paths(), print)
    (tmp_path / "cache").symlink_to(find_paths().cache_dir)
    return tmp_path


def prepared(paths: Paths, seconds: float = 1.0) -> Prepared:
    return prepare_sweep(REQUEST, paths, print, grid=GRID, seconds=seconds)


def with_crash(sweep: Prepared, name: str) -> Prepared:
    """The sweep with a cell whose layout crashes the loader on every CPU (see test_crashes)."""

    def broken(cell: Cell) -> Cell:
        if cell.name != name:
            return cell
        rule = (Override(r"weight$", CPU_REPACK),)
        knobs = {**cell.knobs, "layout": "broken"}
        return replace(cell, placement=replace(cell.placement, overrides=rule), knobs=knobs)

    return replace(sweep, cells=tuple(broken(cell) for cell in sweep.cells))


def raced(sweep: Prepared, paths: Paths, watch: SweepWatch | None = None) -> SweepRun:
    return run_sweep(start_sweep(sweep, paths), sweep, paths, watch or SweepWatch())


def test_a_sweep_ends_with_a_winner_its_records_and_a_profile_that_run_takes(
    qnext: Qnext, home: Path
) -> None:
    environment = {"QNEXT_HOME": str(home)}
    done = qnext("bench", "sweep", "demo", *SMALL, "--budget", "1s", "--json", env=environment)
    assert done.returncode == 0, done.stderr
    end = json.loads(done.stdout)
    assert end["schema"] == "qnext.sweep/1"
    cells = {cell["name"]: cell for cell in end["cells"]}
    ran = [cell for cell in end["cells"] if cell["status"] == "ok"]
    assert end["winner"] in cells and cells[end["winner"]]["status"] == "ok"
    assert end["best"]["status"] == "ok" and end["baseline"]["kind"] == end["fit"]["kind"] == "bench"
    assert all(cell["turn_s"] > 0 and cell["decode_tps"] > 0 and cell["tests"] for cell in ran)
    assert end["loads"] <= 10
    if "plan" not in cells[end["winner"]]["roles"]:
        shown = [one["word"] == "faster" for one in end["against"].values()]
        assert any(shown) or end["likely"] >= BELIEVED, "a test makes a winner, or all that was measured"
    shown = json.loads(qnext("bench", "history", "--json", env=environment).stdout)["records"]
    assert {record["kind"] for record in shown} == {"bench"}, "the cells that lost do not crowd the history"

    said = qnext("run", "demo", "-p", "Hello", "-n", "2", "-c", "512", "--json", env=environment)
    assert said.returncode == 0 and said.stderr.count("tuned profile of") == 1, said.stderr
    placement, tuned = json.loads(said.stdout)["placement"], end["best"]["placement"]
    assert placement == {**tuned, "context": 512}
    plain = qnext("run", "demo", "-p", "Hello", "-n", "2", "-c", "512", "--no-tuned", env=environment)
    assert plain.returncode == 0 and "tuned" not in plain.stderr


def test_a_layout_that_crashes_is_explained_and_the_sweep_goes_on(paths: Paths) -> None:
    sweep = with_crash(prepared(paths), "ub 32")
    run = raced(sweep, paths)
    end = conclude(run, paths, (), 0)
    broken = next(one for one in end.results if one.cell.name == "ub 32")
    assert broken.status == "crashed" and "crashed (SIG" in broken.because
    assert broken.turn_s is None and broken.record is None
    assert end.winner.cell.name != "ub 32"
    assert sum(one.status == "ok" for one in end.results) >= 2
    assert json.dumps(sweep_to_dict(end))

    told = {one.arm: one.ratio for one in run.result.standings if one.ratio}
    plan, ran = end.of_role("plan"), [one for one in end.results if one.turn_s and one.cell.name in told]
    assert plan is not None and plan.gain == 1
    for one in ran:
        assert one.gain == pytest.approx(told[plan.cell.name][1] / told[one.cell.name][1])
    kept = {one.cell.name: one.gain for one in summarise_cells(end.sweep, run.cells, None)}
    assert kept == {one.cell.name: one.gain for one in end.results}


@pytest.mark.parametrize(
    ("signal_number", "statuses"), [(signal.SIGKILL, {"crashed"}), (signal.SIGSTOP, {"hung"})]
)
def test_an_engine_that_dies_or_hangs_costs_its_cell_and_no_other(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, signal_number: int, statuses: set[str]
) -> None:
    monkeypatch.setenv("QNEXT_ENGINE_TIMEOUT", "1.5")
    hit: list[str] = []

    def strike(step: Any, cell: Cell) -> None:
        if not hit and children() and not cell.roles and not step.load:
            hit.append(cell.name)
            child = children()[0].pid
            os.kill(child, signal.SIGSTOP)  # so that it cannot have ended before it is struck
            threading.Timer(0.2, os.kill, (child, signal_number)).start()

    run = raced(prepared(paths), paths, SweepWatch(on_step=strike))
    told = [one for one in run.sweep.measurements if run.cells[one.cell].name == hit[0]]
    assert {one.status for one in told[:1]} == statuses, told[:1]
    assert run.result.winner is not None and run.result.winner != hit[0]
    assert {one.status for one in run.sweep.measurements} >= {"ok"}
    assert not children(), "no engine is left behind"


def test_a_cell_that_gets_other_settings_than_asked_is_confounded(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = prepared(paths)
    cells = tuple(
        replace(cell, placement=replace(cell.placement, ubatch=2000, batch=2000))
        if cell.name == "ub 32"
        else cell
        for cell in sweep.cells
    )
    # The engine cuts batches to the context: what it says is active is not what was asked.
    monkeypatch.setattr("qnext.pipeline.sweep_engine._ACTIVE", ("ubatch",))
    short = replace(sweep, cells=cells, planned=sweep.planned)
    import qnext.pipeline.sweep_engine as engine

    wanted = engine.SweepEngine._not_as_asked

    def uncut(self: Any, cell: Cell, active: Any, sizes: Any) -> str:
        lying = {**active, "ubatch": 7} if cell.name == "ub 32" else active
        return wanted(self, cell, lying, sizes)

    monkeypatch.setattr(engine.SweepEngine, "_not_as_asked", uncut)
    run = raced(short, paths)
    place = [cell.name for cell in run.cells].index("ub 32")
    told = [one for one in run.sweep.measurements if one.cell == place]
    assert all(one.status == "confounded" and "ubatch is 7" in one.because for one in told)
    assert run.result.winner != "ub 32"


def test_ctrl_c_keeps_what_was_measured_and_resume_repeats_nothing(paths: Paths) -> None:
    sweep = prepared(paths)
    stored = start_sweep(sweep, paths)

    def stop(progress: Progress) -> None:
        if progress.number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(stored, sweep, paths, SweepWatch(on_measured=stop))
    store = SweepStore(paths.results_db)
    before = store.get(stored.id)
    assert before.status == "interrupted" and len(before.measurements) == 4
    found = store.unfinished("demo")
    assert found is not None and found.id == stored.id
    run = run_sweep(found, reopen_sweep(found, paths, print), paths, SweepWatch(), resumed=True)
    assert run.sweep.measurements[:4] == before.measurements
    assert [one.number for one in run.sweep.measurements] == list(range(len(run.sweep.measurements)))
    assert run.result.winner is not None


def kill_after(lines: int, home: Path) -> str:
    """Start a sweep as a process, kill it (SIGKILL) after so many measurements; returns the sweep's id."""
    environment = {**os.environ, "QNEXT_HOME": str(home)}
    command = [sys.executable, "-m", "qnext", "bench", "sweep", "demo", *SMALL, "--budget", "1s"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        seen, sweep_id = 0, ""
        for line in process.stderr:
            if "started sweep" in line:
                sweep_id = line.split("started sweep ")[1].split(":")[0]
            seen += "(short)" in line or "(full)" in line
            if seen == lines:
                break
        time.sleep(0.02 * lines)
        process.kill()
        process.stderr.read()
    return sweep_id


def stored(home: Path, sweep_id: str) -> StoredSweep:
    return SweepStore(home / "data" / "results.db").get(sweep_id)


def test_a_killed_sweep_is_resumed_without_losing_or_repeating_a_finished_cell(
    qnext: Qnext, home: Path
) -> None:
    lines = 3
    sweep_id = kill_after(lines, home)
    before = stored(home, sweep_id)
    assert before.status == "interrupted"
    finished = [one for one in before.measurements if one.status is not None]
    assert len(finished) >= lines
    done = qnext("bench", "sweep", "--resume", "--json", env={"QNEXT_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    end, after = json.loads(done.stdout), stored(home, sweep_id)
    assert end["id"] == sweep_id and after.status == "ok"
    assert after.measurements[: len(finished)] == tuple(finished)
    assert [one.number for one in after.measurements] == list(range(len(after.measurements)))
    for one in before.measurements[len(finished) :]:
        cell = after.cells[one.cell]
        if "plan" not in cell.config["roles"] and one.cell not in {m.cell for m in finished}:
            assert cell.status == "crashed" and "not tried again" in cell.because
    with contextlib.closing(sqlite3.connect(home / "data" / "results.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    finished_again = qnext("bench", "sweep", sweep_id, "--resume", env={"QNEXT_HOME": str(home)})
    assert finished_again.returncode == 2 and "is finished" in finished_again.stderr


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system does not tell where threads run")
def test_bound_threads_stay_on_one_core(paths: Paths) -> None:
    sweep = prepare_sweep(REQUEST, paths, print, grid=Grid(affinity=("free", "cores")), seconds=5.0)
    bound = next(cell for cell in sweep.live if cell.environment)
    assert bound.name == "affinity cores"
    places: dict[str, set[int]] = {}

    def look(step: Any, cell: Cell) -> None:
        if not step.load:
            for child in children():
                name = bound.name if bound.environment.items() <= child.environ().items() else "plan"
                places[name] = os.sched_getaffinity(child.pid)

    run = raced(sweep, paths, SweepWatch(on_step=look))
    assert len(places["affinity cores"]) == 1
    assert places["plan"] == os.sched_getaffinity(0)
    assert {one.status for one in run.sweep.measurements} <= {"ok", "noisy"}


def test_a_dry_run_measures_nothing(qnext: Qnext, home: Path) -> None:
    environment = {"QNEXT_HOME": str(home)}
    done = qnext("bench", "sweep", "demo", *SMALL, "--dry-run", env=environment)
    assert done.returncode == 0, done.stderr
    assert "ub 32" in done.stdout and "expected time 10 min" in " ".join(done.stdout.split())
    assert not (home / "data" / "results.db").exists()


@pytest.fixture(autouse=True)
def no_child_left() -> Iterator[None]:
    yield
    assert not children()
