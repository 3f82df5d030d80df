"""The SQLite file of results: how it is opened, its tables by version, and its failures in plain words.

Every operation opens its own connection and closes it: no state between calls, any thread may call, and the
file is complete by itself between runs (SQLite folds the write-ahead log back when the last connection
closes). Writers queue behind each other for the length of one small transaction. Nothing here ever deletes
or replaces a file.
"""

from __future__ import annotations

import shlex
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from qnext.errors import StoreError
from qnext.units import MIB

MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE runs (
            id TEXT PRIMARY KEY,
            started_at TEXT NOT NULL,
            status TEXT NOT NULL,
            kind TEXT NOT NULL,
            model TEXT NOT NULL,
            quant TEXT,
            model_digest TEXT NOT NULL,
            engine_name TEXT NOT NULL,
            engine_version TEXT NOT NULL,
            llama_commit TEXT,
            engine_build TEXT NOT NULL,
            machine_digest TEXT NOT NULL,
            placement_digest TEXT NOT NULL,
            workload_digest TEXT NOT NULL,
            planned_json TEXT NOT NULL,
            allocated_json TEXT NOT NULL,
            placement_json TEXT NOT NULL,
            machine_json TEXT NOT NULL,
            command_json TEXT NOT NULL,
            warnings_json TEXT NOT NULL,
            text TEXT,
            error TEXT,
            pid INTEGER,
            process_mark TEXT
        )
        """,
        "CREATE INDEX runs_by_start ON runs (started_at)",
        """
        CREATE TABLE tests (
            run_id TEXT NOT NULL REFERENCES runs (id) ON DELETE CASCADE,
            position INTEGER NOT NULL,
            name TEXT NOT NULL,
            prompt INTEGER NOT NULL,
            generate INTEGER NOT NULL,
            depth INTEGER NOT NULL,
            samples_ns_json TEXT NOT NULL,
            median_tps REAL NOT NULL,
            low_tps REAL NOT NULL,
            high_tps REAL NOT NULL,
            predicted_low_tps REAL,
            predicted_mid_tps REAL,
            predicted_high_tps REAL,
            bandwidth_share REAL,
            PRIMARY KEY (run_id, position)
        )
        """,
        """
        CREATE VIEW speeds AS
        SELECT runs.started_at, runs.id AS run_id, runs.status, runs.model, runs.quant, tests.name AS test,
               tests.median_tps, tests.low_tps, tests.high_tps, tests.predicted_mid_tps,
               tests.bandwidth_share, json_array_length(tests.samples_ns_json) AS samples,
               runs.llama_commit, runs.machine_digest, runs.placement_digest
        FROM tests JOIN runs ON runs.id = tests.run_id
        ORDER BY runs.started_at, runs.rowid, tests.position
        """,
    ),
    (
        "ALTER TABLE runs ADD COLUMN header_digest TEXT",
        "ALTER TABLE runs ADD COLUMN model_type TEXT",
        "ALTER TABLE runs ADD COLUMN model_bytes INTEGER",
        "ALTER TABLE runs ADD COLUMN model_params INTEGER",
        "ALTER TABLE runs ADD COLUMN engine_flags TEXT",
        "ALTER TABLE runs ADD COLUMN devices_json TEXT",
        "ALTER TABLE runs ADD COLUMN driver TEXT",
        "ALTER TABLE runs ADD COLUMN context INTEGER",
        "ALTER TABLE runs ADD COLUMN slots INTEGER",
        "ALTER TABLE runs ADD COLUMN kv_type_k TEXT",
        "ALTER TABLE runs ADD COLUMN kv_type_v TEXT",
        "ALTER TABLE runs ADD COLUMN bandwidths_json TEXT",
        "ALTER TABLE runs ADD COLUMN power_json TEXT",
        "ALTER TABLE runs ADD COLUMN environment_json TEXT",
        "ALTER TABLE runs ADD COLUMN workload_json TEXT",
        "ALTER TABLE tests ADD COLUMN mean_ns INTEGER",
        "ALTER TABLE tests ADD COLUMN stddev_ns INTEGER",
        "CREATE INDEX runs_of_a_model ON runs (model_digest, machine_digest, started_at)",
    ),
    (
        """
        CREATE TABLE sweeps (
            id TEXT PRIMARY KEY,
            started_at TEXT NOT NULL,
            status TEXT NOT NULL,
            model TEXT NOT NULL,
            model_digest TEXT NOT NULL,
            machine_digest TEXT NOT NULL,
            engine_build TEXT NOT NULL,
            seed INTEGER NOT NULL,
            settings_json TEXT NOT NULL,
            result_json TEXT,
            pid INTEGER,
            process_mark TEXT
        )
        """,
        """
        CREATE TABLE cells (
            sweep_id TEXT NOT NULL REFERENCES sweeps (id) ON DELETE CASCADE,
            position INTEGER NOT NULL,
            name TEXT NOT NULL,
            config_json TEXT NOT NULL,
            status TEXT NOT NULL,
            because TEXT NOT NULL,
            record_id TEXT,
            PRIMARY KEY (sweep_id, position)
        )
        """,
        """
        CREATE TABLE measurements (
            sweep_id TEXT NOT NULL REFERENCES sweeps (id) ON DELETE CASCADE,
            number INTEGER NOT NULL,
            cell INTEGER NOT NULL,
            rung TEXT NOT NULL,
            started_at TEXT NOT NULL,
            status TEXT,
            because TEXT NOT NULL DEFAULT '',
            prompt INTEGER,
            depth INTEGER,
            prefill_ns INTEGER,
            token_ns_json TEXT,
            turn_ns INTEGER,
            seconds REAL,
            rss_bytes INTEGER,
            major_faults INTEGER,
            facts_json TEXT,
            PRIMARY KEY (sweep_id, number),
            FOREIGN KEY (sweep_id, cell) REFERENCES cells (sweep_id, position)
        )
        """,
        "CREATE INDEX sweeps_by_start ON sweeps (started_at)",
    ),
)
"""Statements that lead from version i to version i + 1 (`PRAGMA user_version`). Add; never change one."""

_DAMAGED = ("SQLITE_NOTADB", "SQLITE_CORRUPT")
_NOT_WRITABLE = ("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM", "SQLITE_AUTH")
_LOCKED = ("SQLITE_BUSY", "SQLITE_LOCKED")


@contextmanager
def opened(path: Path, *, write: bool, busy_timeout_s: float) -> Iterator[sqlite3.Connection]:
    """A connection inside one transaction, committed at the end and rolled back on any exception.

    Makes the folder and the file when they are missing and brings older files up to date. A transaction to
    read sees a run and its tests as of one moment and waits for nobody; one to write is alone in the file.
    Raises StoreError for everything SQLite or the file system refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=busy_timeout_s, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA foreign_keys = ON")
            connection.execute("PRAGMA synchronous = FULL")  # what was committed survives a power cut, too
            _prepare(connection, path)
            connection.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            yield connection
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise _explained(error, path) from error
    except OSError as error:
        raise StoreError(
            f"cannot use the results database {path}: {error.strerror or error}", hint=_elsewhere(path)
        ) from error


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the tables to the newest version; two processes may come here at the same time."""
    if _version(connection, path) == len(MIGRATIONS):
        return
    try:
        connection.execute("PRAGMA journal_mode = WAL")
    except sqlite3.OperationalError as error:
        if not _name(error).startswith(_LOCKED):
            raise
        # Another process is just making the file and switches it itself; the mode stays with the file.
    connection.execute("BEGIN IMMEDIATE")
    for migration in MIGRATIONS[_version(connection, path) :]:
        for statement in migration:
            connection.execute(statement)
    connection.execute(f"PRAGMA user_version = {len(MIGRATIONS)}")
    connection.execute("COMMIT")


def _version(connection: sqlite3.Connection, path: Path) -> int:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StoreError(
            f"{path} was written by a newer qnext (version {version}, this one knows {len(MIGRATIONS)})",
            hint="Upgrade qnext, or set QNEXT_HOME to another folder; the file was left as it is.",
        )
    return version


def _name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", None) or ""  # absent on errors of the Python module itself


def _explained(error: sqlite3.Error, path: Path) -> StoreError:
    name = _name(error)
    if name.startswith(_DAMAGED):
        return StoreError(
            f"the results database {path} is damaged or no SQLite file ({error})", hint=_aside(path)
        )
    if name == "SQLITE_FULL" or (name.startswith(("SQLITE_IOERR", "SQLITE_CANTOPEN")) and _full(path)):
        return StoreError(
            f"no space left for the results database {path}",
            hint=f"Free some space on the disk of {path.parent} and repeat; what was stored before is kept.",
        )
    if name.startswith(_NOT_WRITABLE):
        return StoreError(f"cannot write the results database {path} ({error})", hint=_elsewhere(path))
    if name.startswith(_LOCKED):
        return StoreError(
            f"the results database {path} is locked by another program",
            hint="Save or close it there (a database browser with an unsaved change, say) and repeat.",
        )
    return StoreError(
        f"the results database {path} cannot be used: {error}",
        hint=f"Check the disk and the file: sqlite3 {shlex.quote(str(path))} 'PRAGMA integrity_check'",
    )


def _full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < MIB
    except OSError:
        return False


def _elsewhere(path: Path) -> str:
    return f"Make {path.parent} a folder you can write to, or set QNEXT_HOME to another one."


def _aside(path: Path) -> str:
    """The write-ahead log goes with its database: left behind, it would be taken for the next one's."""
    folder = path.with_name(path.name + ".damaged")
    return (
        f"Move it aside and a new one is made: mkdir {shlex.quote(str(folder))} && "
        f"mv {' '.join(shlex.quote(str(part)) for part in _parts(path))} {shlex.quote(str(folder))}; "
        f"`sqlite3 FILE .recover` there may save its rows."
    )


def _parts(path: Path) -> list[Path]:
    beside = [path.with_name(path.name + suffix) for suffix in ("-wal", "-shm", "-journal")]
    return [path, *(part for part in beside if part.exists())]
