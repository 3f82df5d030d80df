"""Results are kept as soon as they are measured, whoever else writes and whatever dies meanwhile."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from qnext.errors import QnextError, StoreError, UsageError
from qnext.plan.values import DeviceMemory
from qnext.store import rows
from qnext.store.database import MIGRATIONS
from qnext.store.record import Record
from qnext.store.results import ResultStore, _insert
from tests.unit.test_store_record import RECORD, RECORDS

HOST = DeviceMemory("CPU", "host", None, 1, 2, 3, 4, 5)
RUNNING = replace(RECORD, status="running", tests=())

PRELUDE = """
import sys, time
from dataclasses import replace
from pathlib import Path
from qnext.store.record import *
from qnext.store.results import ResultStore
engine = EngineIdentity("e", "1", None, "")
record = Record("abc", "2026-10-01T12:00:00+00:00", "running", "bench", "demo",
                Identity("d", None, engine, "m", "p", "w"))
test = TestResult("pp512", 512, 0, 0, (1, 2, 3), 2.0, 1.0, 3.0)
store = ResultStore(Path(sys.argv[1]))
"""


def spawn(code: str, *arguments: object) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", PRELUDE + code, *map(str, arguments)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path / "home" / "results.db")


@given(RECORDS.filter(lambda record: record.status != "running"))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_record_comes_back_as_it_was_stored(record: Record) -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = ResultStore(Path(folder, "results.db"))
        store.start(record)
        assert store.get(record.id) == record
        assert store.history(kind=record.kind) == [record]
        assert store.history() == ([] if record.kind == "sweep" else [record])


def test_a_record_grows_test_by_test_and_is_finished(store: ResultStore) -> None:
    (first,) = RECORD.tests
    second = replace(first, name="tg128", prompt=0, generate=128)
    store.start(replace(RUNNING, warnings=("planned",)))
    store.add_test(RECORD.id, first)
    assert store.get(RECORD.id).tests == (first,)
    assert store.get(RECORD.id).status == "running"
    store.add_test(RECORD.id, second)
    store.finish(RECORD.id, "ok", allocated=[HOST], text="Hello", warnings=["planned", "spread"])
    found = store.get(RECORD.id)
    assert (found.status, found.tests, found.allocated) == ("ok", (first, second), (HOST,))
    assert (found.text, found.warnings, found.error) == ("Hello", ("planned", "spread"), None)


def test_a_failed_record_keeps_its_tests_and_its_reason(store: ResultStore) -> None:
    store.start(RUNNING)
    store.add_test(RECORD.id, RECORD.tests[0])
    store.finish(RECORD.id, "failed", error="the engine died: SIGSEGV")
    found = store.get(RECORD.id)
    assert (found.status, found.error, found.tests) == ("failed", "the engine died: SIGSEGV", RECORD.tests)


def test_looking_at_no_results_makes_no_file(store: ResultStore) -> None:
    assert store.history() == []
    with pytest.raises(UsageError, match="abc"):
        store.get("abc")
    assert not store.path.parent.exists()


def test_an_id_may_be_shortened_as_long_as_it_is_the_only_one(store: ResultStore) -> None:
    for name in ("abcd", "abce", "ab", "f%__"):
        store.start(replace(RECORD, id=name))
    assert store.get("abcd").id == "abcd"
    assert store.get("ab").id == "ab"
    assert store.get("f").id == "f%__"
    for prefix in ("abc", "x", "%", "_"):
        with pytest.raises(UsageError) as error:
            store.get(prefix)
        assert error.value.hint
    with pytest.raises(UsageError) as error:
        store.get("abc")
    assert "abcd" in error.value.hint and "abce" in error.value.hint


def test_history_is_newest_first_and_can_be_narrowed(store: ResultStore) -> None:
    for day in range(1, 6):
        store.start(
            replace(
                RECORD,
                id=f"r{day}",
                when=f"2026-10-0{day}T00:00:00+00:00",
                model_ref="Qwen/Coder:Q4_K_M" if day % 2 else "demo",
                kind="run" if day == 5 else "bench",
            )
        )
    assert [record.id for record in store.history()] == ["r5", "r4", "r3", "r2", "r1"]
    assert [record.id for record in store.history(2)] == ["r5", "r4"]
    assert [record.id for record in store.history(None, model="coder")] == ["r5", "r3", "r1"]
    assert [record.id for record in store.history(model="coder", kind="bench")] == ["r3", "r1"]
    assert store.history(model="%") == []


def test_no_record_is_stored_over_another_and_none_is_finished_that_was_not_begun(store: ResultStore) -> None:
    store.start(RECORD)
    with pytest.raises(StoreError, match="stored already"):
        store.start(replace(RECORD, text="other"))
    assert store.get(RECORD.id) == RECORD
    for write in (lambda: store.add_test("none", RECORD.tests[0]), lambda: store.finish("none", "ok")):
        with pytest.raises(StoreError, match="record none"):
            write()


def test_names_that_are_no_utf_8_can_be_stored(store: ResultStore) -> None:
    store.start(replace(RECORD, model_ref="/models/\udcff.gguf", command=("run", "/models/\udcff.gguf")))
    assert store.get(RECORD.id).model_ref == "/models/\\udcff.gguf"
    assert store.get(RECORD.id).command[1] == "/models/\udcff.gguf"


def test_other_tools_read_speeds_and_the_file_is_complete_by_itself(store: ResultStore) -> None:
    store.start(RECORD)
    assert [path.name for path in store.path.parent.iterdir()] == ["results.db"]
    with sqlite3.connect(store.path) as connection:
        row = connection.execute(
            "SELECT model, quant, test, median_tps, samples, status FROM speeds"
        ).fetchone()
        assert row == ("demo", "Q4_K_M", "pp512", 3.0, 2, "ok")
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []


def test_processes_that_write_at_once_lose_nothing(store: ResultStore) -> None:
    """Four processes make the database together and add tests to a record of their own and a shared one."""
    code = """
go, name = Path(sys.argv[2]), sys.argv[3]
print("ready", flush=True)
while not go.exists(): time.sleep(0.001)
store.start(replace(record, id=name))
while not store.history(1, model="shared"): time.sleep(0.01)
for number in range(25):
    store.add_test(name, replace(test, depth=number))
    store.add_test("shared", replace(test, name=name, depth=number))
store.finish(name, "ok")
"""
    go = store.path.parent.parent / "go"
    processes = [spawn(code, store.path, go, f"p{number}") for number in range(4)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
    go.touch()
    store.start(replace(RECORD, id="shared", model_ref="shared", tests=()))
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    for number in range(4):
        found = store.get(f"p{number}")
        assert found.status == "ok" and [test.depth for test in found.tests] == list(range(25))
    shared = store.get("shared").tests
    assert len(shared) == 100
    for number in range(4):
        assert [test.depth for test in shared if test.name == f"p{number}"] == list(range(25))


def test_threads_of_one_store_lose_nothing(store: ResultStore) -> None:
    store.start(RUNNING)

    def add() -> None:
        for _ in range(10):
            store.add_test(RECORD.id, RECORD.tests[0])

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.get(RECORD.id).tests) == 40


def test_a_killed_bench_keeps_its_tests_and_shows_as_interrupted(store: ResultStore) -> None:
    code = """
store.start(record)
for number in range(10**6):
    store.add_test("abc", replace(test, depth=number))
    print(number, flush=True)
"""
    process = spawn(code, store.path)
    assert process.stdout is not None
    while process.stdout.readline() != "5\n":
        pass
    assert store.get("abc").status == "running"
    process.kill()
    rest, _ = process.communicate(timeout=30)
    last = int(rest.split()[-1]) if rest.split() else 5
    found = store.get("abc")
    assert found.status == "interrupted"
    depths = [test.depth for test in found.tests]
    assert depths == list(range(len(depths))) and len(depths) in (last + 1, last + 2)
    store.finish("abc", "failed", error="killed")
    assert store.get("abc").status == "failed"


def test_another_process_with_the_same_number_is_not_the_owner(store: ResultStore) -> None:
    store.start(RUNNING)
    with sqlite3.connect(store.path) as connection:
        connection.execute("UPDATE runs SET process_mark = 'another boot 1'")
    assert store.get(RECORD.id).status == "interrupted"


def actions(store: ResultStore) -> list[Callable[[], object]]:
    return [
        lambda: store.start(replace(RECORD, id="new")),
        lambda: store.add_test(RECORD.id, RECORD.tests[0]),
        lambda: store.finish(RECORD.id, "ok"),
        lambda: store.get(RECORD.id),
        store.history,
    ]


def refusals(store: ResultStore) -> Iterator[StoreError]:
    for action in actions(store):
        with pytest.raises(StoreError) as error:
            action()
        assert error.value.exit_code == 8 and str(store.path.name) in error.value.message and error.value.hint
        yield error.value


def write_version_1(store: ResultStore) -> None:
    """The file as qnext 0.1 left it, with one record."""
    store.path.parent.mkdir()
    with sqlite3.connect(store.path) as connection:
        for statement in MIGRATIONS[0]:
            connection.execute(statement)
        connection.execute("PRAGMA user_version = 1")
        row, (test,) = rows.run_row(RECORD), RECORD.tests
        old = {column[1] for column in connection.execute("PRAGMA table_info(runs)")}
        _insert(connection, "runs", {name: value for name, value in row.items() if name in old})
        old = {column[1] for column in connection.execute("PRAGMA table_info(tests)")}
        values = rows.test_row(RECORD.id, 0, test)
        _insert(connection, "tests", {name: value for name, value in values.items() if name in old})
    connection.close()


def test_a_database_of_the_first_release_is_brought_up_to_date_and_its_records_stay(
    store: ResultStore,
) -> None:
    write_version_1(store)
    assert store.history() == [RECORD]
    store.start(replace(RECORD, id="new", workload={"tests": ["pp512"]}))
    assert store.get("new").workload == {"tests": ["pp512"]}
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (len(MIGRATIONS),)


def test_a_kill_in_the_middle_of_a_migration_leaves_the_older_file(store: ResultStore) -> None:
    write_version_1(store)
    code = """
import os, signal
from qnext.store import database
def half(statements=database.MIGRATIONS[1]):
    yield from statements[:5]
    os.kill(os.getpid(), signal.SIGKILL)
database.MIGRATIONS = (database.MIGRATIONS[0], half())
store.history()
"""
    process = spawn(code, store.path)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
    assert store.history() == [RECORD]


def test_a_log_of_another_file_or_of_nothing_is_passed_over(store: ResultStore) -> None:
    store.start(RECORD)
    store.path.with_name("results.db-wal").write_bytes(b"\xa5" * 5000)
    assert store.history() == [RECORD]
    store.add_test(RECORD.id, RECORD.tests[0])
    assert len(store.get(RECORD.id).tests) == 2


def test_records_are_kept_together_and_those_that_are_here_stay(store: ResultStore) -> None:
    store.start(RECORD)
    other = replace(RECORD, id="other")
    assert store.keep([replace(RECORD, text="changed"), other]) == {RECORD.id}
    assert store.find(RECORD.id) == RECORD and store.find("other") == other
    assert store.find("othe") is None


def test_processes_that_migrate_at_once_do_it_once(store: ResultStore) -> None:
    write_version_1(store)
    processes = [spawn("print(len(store.history()))", store.path) for _ in range(4)]
    for process in processes:
        assert process.communicate(timeout=60) == ("1\n", "")


def test_a_kill_at_any_moment_loses_no_finished_test(store: ResultStore) -> None:
    """What the process said it had stored is there, and at most the one test that it was about to tell of."""
    code = """
name = sys.argv[2]
store.start(replace(record, id=name))
for number in range(10**6):
    store.add_test(name, replace(test, depth=number))
    print(number, flush=True)
"""
    chance = random.Random(5)
    for round_ in range(8):
        process = spawn(code, store.path, f"run{round_}")
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
        told, _ = process.communicate(timeout=30)
        last = max([0, *(int(line) for line in told.split("\n")[:-1])])
        depths = [test.depth for test in store.get(f"run{round_}").tests]
        assert depths == list(range(len(depths))) and len(depths) in (last + 1, last + 2)
    with sqlite3.connect(store.path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_kin_are_the_other_records_of_the_same_model_and_machine(store: ResultStore) -> None:
    def stored(name: str, day: int, **changes: str) -> Record:
        record = replace(
            RECORD,
            id=name,
            when=f"2026-10-{day:02}T00:00:00+00:00",
            identity=replace(RECORD.identity, **changes),  # type: ignore[arg-type]
        )
        store.start(record)
        return record

    mine = stored("mine", 2)
    stored("other model", 3, model_digest="sampled-sha256:cd")
    stored("other machine", 4, machine="m2")
    for name, day in (("older", 1), ("newer", 5)):
        stored(name, day, placement="p2")
    assert [record.id for record in store.kin(mine)] == ["newer", "older"]


def test_a_newer_database_is_left_alone(store: ResultStore) -> None:
    store.start(RECORD)
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"PRAGMA user_version = {len(MIGRATIONS) + 1}")
    before = store.path.read_bytes()
    for error in refusals(store):
        assert "newer qnext" in error.message and "Upgrade" in error.hint
    assert store.path.read_bytes() == before


@pytest.mark.parametrize("content", [b"this is no database" * 100, b"SQLite format 3\x00" + b"\xff" * 5000])
def test_a_damaged_file_is_kept_and_the_hint_moves_it_aside(store: ResultStore, content: bytes) -> None:
    store.path.parent.mkdir()
    store.path.write_bytes(content)
    for error in refusals(store):
        assert str(store.path) in error.message
    assert store.path.read_bytes() == content
    command = error.hint.split(": ", 1)[1].split("; ")[0]
    subprocess.run(command, shell=True, check=True)
    assert store.path.with_name("results.db.damaged").joinpath("results.db").read_bytes() == content
    store.start(RECORD)
    assert store.get(RECORD.id) == RECORD


def test_pages_damaged_later_are_a_store_error(store: ResultStore) -> None:
    for number in range(30):
        store.start(replace(RECORD, id=f"r{number}", text="x" * 3000))
    content = bytearray(store.path.read_bytes())
    content[4096:] = b"\xa5" * (len(content) - 4096)
    store.path.write_bytes(bytes(content))
    with pytest.raises(StoreError, match="damaged"):
        store.history(None)


@pytest.mark.parametrize(
    "change",
    ["planned_json = '{'", "status = 'done'", "samples_ns_json = 'x'", "model = CAST(x'ff' AS TEXT)"],
)
def test_a_row_edited_badly_by_hand_is_a_store_error(store: ResultStore, change: str) -> None:
    store.start(RECORD)
    table = "tests" if change.startswith("samples") else "runs"
    with sqlite3.connect(store.path) as connection:
        connection.execute(f"UPDATE {table} SET {change}")
    with pytest.raises(StoreError) as error:
        store.history()
    assert error.value.hint


def test_a_foreign_database_is_a_store_error(store: ResultStore) -> None:
    store.path.parent.mkdir()
    with sqlite3.connect(store.path) as connection:
        connection.execute("CREATE TABLE runs (mine)")
    for _ in refusals(store):
        pass


def test_a_folder_in_the_place_of_the_file_is_a_store_error(store: ResultStore) -> None:
    store.path.mkdir(parents=True)
    for error in refusals(store):
        assert "QNEXT_HOME" in error.hint


def test_a_file_in_the_place_of_the_folder_is_a_store_error(store: ResultStore) -> None:
    store.path.parent.touch()
    for error in refusals(store):
        assert "QNEXT_HOME" in error.hint


def test_a_folder_without_write_permission_is_a_store_error() -> None:
    """The child gives up root, for whom no permission counts, after it has loaded everything."""
    code = """
import os
from qnext.errors import StoreError
store.history()
if os.getuid() == 0: os.setuid(65534)
for action in (lambda: store.start(replace(record, id="new")), lambda: store.finish("0123456789ab", "ok")):
    try: action()
    except StoreError as error: print(error.message, error.hint)
"""
    with tempfile.TemporaryDirectory() as folder:
        store = ResultStore(Path(folder, "results.db"))
        store.start(RECORD)
        store.path.chmod(0o644)
        Path(folder).chmod(0o555)
        output, errors = spawn(code, store.path).communicate(timeout=30)
        Path(folder).chmod(0o755)
        assert not errors
        lines = output.splitlines()
        assert len(lines) == 2 and all("cannot write" in line and "QNEXT_HOME" in line for line in lines)
        assert store.get(RECORD.id) == RECORD


def test_a_locked_database_names_the_lock(store: ResultStore) -> None:
    store.start(RUNNING)
    hasty = ResultStore(store.path, busy_timeout_s=0.05)
    browser = sqlite3.connect(store.path, isolation_level=None)
    browser.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(StoreError, match="locked by another program"):
            hasty.add_test(RECORD.id, RECORD.tests[0])
        assert hasty.get(RECORD.id) == RUNNING
    finally:
        browser.close()
    store.add_test(RECORD.id, RECORD.tests[0])


def test_a_full_disk_loses_nothing_that_was_stored(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.strip()}")
    try:
        store = ResultStore(disk / "results.db")
        stored = 0
        with pytest.raises(StoreError) as error:
            for number in range(200):
                store.start(replace(RECORD, id=f"r{number}", text="x" * 20_000))
                stored += 1
        assert stored > 5 and "no space" in error.value.message and "Free some space" in error.value.hint
        ballast = disk / "ballast"
        with suppress(OSError):
            ballast.write_bytes(b"x" * (1 << 20))
        more = replace(RECORD.tests[0], samples_ns=tuple(range(1, 9999)))
        for action in (
            store.history,
            lambda: store.add_test("r0", more),
            lambda: store.keep([replace(RECORD, id=name) for name in ("late", "later")]),
            lambda: store.start(replace(RECORD, id="late")),
        ):
            try:
                action()
            except QnextError as refused:
                assert "no space" in refused.message
        ballast.unlink()
        found = store.history(None)
        assert len(found) in range(stored, stored + 3) and store.get("r0").tests[:1] == RECORD.tests
    finally:
        subprocess.run(["umount", str(disk)], check=True)
