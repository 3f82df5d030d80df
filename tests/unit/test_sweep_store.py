"""Sweeps in the store: nothing that ended is lost, what broke off is seen, nobody takes another's sweep."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.errors import UsageError
from qnext.store.database import MIGRATIONS
from qnext.store.sweeps import Measurement, StoredCell, SweepStore

CELLS = (
    StoredCell("plan", {"ubatch": 512}, "waiting"),
    StoredCell("ub 1024", {"ubatch": 1024}, "waiting"),
    StoredCell("fa off", {}, "does-not-fit", "2.0 MiB on CPU missing"),
)
DONE = Measurement(
    number=0,
    cell=0,
    rung="short",
    started_at="2026-11-21T00:00:00+00:00",
    status="ok",
    prompt=64,
    depth=0,
    prefill_ns=5,
    token_ns=(1, 2, 3),
    turn_ns=9,
    seconds=0.5,
    rss_bytes=7,
    major_faults=0,
    facts={"active": {"ubatch": 512}},
)


def create(store: SweepStore, model: str = "demo") -> str:
    return store.create(
        model=model,
        model_digest="m",
        machine="box",
        engine_build="e",
        seed=3,
        settings={"seconds": 1},
        cells=CELLS,
    )


@pytest.fixture
def store(tmp_path: Path) -> SweepStore:
    return SweepStore(tmp_path / "results.db")


def test_a_sweep_is_read_as_it_was_stored(store: SweepStore) -> None:
    sweep_id = create(store)
    store.end(sweep_id, DONE, "ok")
    found = store.get(sweep_id[:6])
    assert found.cells == (replace(CELLS[0], status="ok"), *CELLS[1:])
    assert found.measurements == (DONE,)
    assert (found.status, found.seed, found.settings, found.same_boot) == ("running", 3, {"seconds": 1}, True)


def test_what_began_and_never_ended_has_no_status_and_is_replaced_by_its_end(store: SweepStore) -> None:
    sweep_id = create(store)
    store.begin(sweep_id, 0, 0, "short")
    assert [one.status for one in store.get(sweep_id).measurements] == [None]
    store.end(sweep_id, DONE, "ok")
    assert store.get(sweep_id).measurements == (DONE,)
    store.forget(sweep_id, 0)
    assert store.get(sweep_id).measurements == (DONE,), "only what has not ended is taken back"
    store.begin(sweep_id, 1, 1, "short")
    store.forget(sweep_id, 1)
    assert store.get(sweep_id).measurements == (DONE,)


def test_a_journal_row_is_on_the_disk_before_the_measurement_begins(store: SweepStore) -> None:
    """A process that dies without a word right after `begin` leaves the row behind."""
    sweep_id = create(store)
    script = (
        "import os, sys; from pathlib import Path; from qnext.store.sweeps import SweepStore;"
        "store = SweepStore(Path(sys.argv[1])); store.adopt(sys.argv[2]);"
        "store.begin(sys.argv[2], 0, 1, 'full'); os.kill(os.getpid(), 9)"
    )
    with closing(sqlite3.connect(store.path)) as connection:
        connection.execute("UPDATE sweeps SET status = 'interrupted'")
        connection.commit()
    done = subprocess.run([sys.executable, "-c", script, str(store.path), sweep_id], check=False)
    assert done.returncode == -9
    found = store.get(sweep_id)
    assert found.status == "interrupted" and found.same_boot
    assert [(one.cell, one.rung, one.status) for one in found.measurements] == [(1, "full", None)]


def test_a_sweep_that_another_process_runs_is_not_taken_from_it(store: SweepStore) -> None:
    sweep_id = create(store)
    script = (
        "import sys; from pathlib import Path; from qnext.store.sweeps import SweepStore;"
        "SweepStore(Path(sys.argv[1])).adopt(sys.argv[2])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.path), sweep_id], capture_output=True, text=True, check=False
    )
    assert done.returncode and f"running in another process ({os.getpid()})" in done.stderr


def test_resume_finds_the_newest_that_was_cut_short_of_the_model(store: SweepStore) -> None:
    assert store.unfinished() is None
    first, second, other = create(store), create(store), create(store, "big.gguf")
    store.finish(second, "ok")
    for sweep_id in (first, other):
        store.finish(sweep_id, "interrupted")
    found = store.unfinished("demo")
    assert found is not None and found.id == first
    newest = store.unfinished()
    assert newest is not None and newest.id == other
    with pytest.raises(UsageError, match="is no sweep"):
        store.get("ffffffffffff")


def test_a_database_of_version_2_gets_the_tables_and_keeps_its_records(tmp_path: Path) -> None:
    path = tmp_path / "results.db"
    with closing(sqlite3.connect(path)) as connection:
        for migration in MIGRATIONS[:2]:
            for statement in migration:
                connection.execute(statement)
        connection.execute("PRAGMA user_version = 2")
        connection.commit()
    store = SweepStore(path)
    assert store.get(create(store)).cells == CELLS
