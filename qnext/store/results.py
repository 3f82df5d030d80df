"""`ResultStore`: records in a SQLite file that people open with other tools (`SELECT * FROM speeds`).

A record is stored when it starts and each test as soon as it is measured, so a crash loses at most the test
that was running. Nobody is left to mark the record of a killed process: a record says `running` together with
the process that owns it, and is shown as `interrupted` once that process is gone.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from qnext.errors import StoreError, UsageError
from qnext.plan.values import DeviceMemory, device_to_dict
from qnext.store.database import opened
from qnext.store.record import Kind, Record, Status, TestResult
from qnext.store.rows import record_of, run_row, storable, test_row


class ResultStore:
    """The results database at `path`. Made on the first write; every method raises StoreError on trouble.

    Any number of processes and threads may use the same file; a writer waits up to `busy_timeout_s` for the
    others.
    """

    def __init__(self, path: Path, *, busy_timeout_s: float = 10.0) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s

    def start(self, record: Record) -> None:
        """Store a new record with the tests it has; if it is `running`, this process is its owner."""
        with self._writing() as connection:
            if connection.execute("SELECT 1 FROM runs WHERE id = ?", (record.id,)).fetchone():
                raise StoreError(
                    f"record {record.id} is stored already in {self.path}",
                    hint=f"Look at it: qnext bench show {record.id}",
                )
            _insert_record(connection, record)

    def keep(self, records: Sequence[Record]) -> set[str]:
        """Store finished records all together; the ids of those that were here already, which stay."""
        known = set()
        with self._writing() as connection:
            for record in records:
                if connection.execute("SELECT 1 FROM runs WHERE id = ?", (record.id,)).fetchone():
                    known.add(record.id)
                else:
                    _insert_record(connection, record)
        return known

    def add_test(self, record_id: str, test: TestResult) -> None:
        """Store one more test of a record, at once and for good."""
        with self._writing() as connection:
            self._require(connection, record_id)
            query = "SELECT coalesce(max(position) + 1, 0) FROM tests WHERE run_id = ?"
            position = connection.execute(query, (record_id,)).fetchone()[0]
            _insert(connection, "tests", test_row(record_id, position, test))

    def finish(
        self,
        record_id: str,
        status: Status,
        *,
        allocated: Sequence[DeviceMemory] | None = None,
        text: str | None = None,
        warnings: Sequence[str] = (),
        error: str | None = None,
    ) -> None:
        """Give a record its final state. `None` keeps what is stored; new warnings join the stored ones."""
        with self._writing() as connection:
            row = self._require(connection, record_id)
            joined = dict.fromkeys([*json.loads(row["warnings_json"]), *warnings])
            changes: dict[str, object] = {"status": status, "warnings_json": json.dumps(list(joined))}
            if allocated is not None:
                changes["allocated_json"] = json.dumps([device_to_dict(device) for device in allocated])
            if text is not None:
                changes["text"] = storable(text)
            if error is not None:
                changes["error"] = storable(error)
            assignments = ", ".join(f"{column} = ?" for column in changes)
            connection.execute(f"UPDATE runs SET {assignments} WHERE id = ?", (*changes.values(), record_id))

    def get(self, id_or_prefix: str) -> Record:
        """The record with this id, or the only one whose id starts so. UsageError when none or many do."""
        rows: list[sqlite3.Row] = []
        if not self._is_missing():
            with self._reading() as connection:
                query = "SELECT * FROM runs WHERE substr(id, 1, ?) = ? ORDER BY length(id), id LIMIT 6"
                rows = connection.execute(query, (len(id_or_prefix), id_or_prefix)).fetchall()
                if len(rows) == 1 or (rows and rows[0]["id"] == id_or_prefix):
                    return _record(connection, rows[0])
        if not rows:
            raise UsageError(f"no record '{id_or_prefix}'", hint="List them: qnext bench history")
        raise UsageError(
            f"'{id_or_prefix}' is the start of several records",
            hint=f"Give more digits, for example one of {', '.join(row['id'] for row in rows[:5])}.",
        )

    def find(self, record_id: str) -> Record | None:
        """The record with exactly this id, if it is here."""
        if self._is_missing():
            return None
        with self._reading() as connection:
            row = connection.execute("SELECT * FROM runs WHERE id = ?", (record_id,)).fetchone()
            return None if row is None else _record(connection, row)

    def history(
        self, limit: int | None = 20, *, model: str | None = None, kind: Kind | None = None
    ) -> list[Record]:
        """Records, newest first, those of kind `sweep` only where asked for.

        `model` is a part of the model's reference or digest, in any case.
        """
        if self._is_missing():
            return []
        query, values = "SELECT * FROM runs WHERE 1", list[object]()
        if kind is None:
            query += " AND kind != 'sweep'"
        if model is not None:
            query += " AND (instr(lower(model), lower(?)) OR instr(model_digest, ?))"
            values += [model, model]
        if kind is not None:
            query += " AND kind = ?"
            values.append(kind)
        query += " ORDER BY started_at DESC, rowid DESC LIMIT ?"
        values.append(-1 if limit is None else limit)
        with self._reading() as connection:
            rows = connection.execute(query, values).fetchall()
            return [_record(connection, row) for row in rows]

    def kin(self, record: Record) -> list[Record]:
        """Other records of the same model file and machine, newest first, whatever their configuration."""
        if self._is_missing():
            return []
        query = """
            SELECT * FROM runs WHERE model_digest = ? AND machine_digest = ? AND id != ?
            ORDER BY started_at DESC, rowid DESC
        """
        with self._reading() as connection:
            identity = record.identity
            values = (identity.model_digest, identity.machine, record.id)
            return [_record(connection, row) for row in connection.execute(query, values).fetchall()]

    def _is_missing(self) -> bool:
        try:
            self.path.stat()
        except FileNotFoundError:
            return True
        except OSError:
            return False  # opening it will say why
        return False

    def _reading(self) -> AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, write=False, busy_timeout_s=self._busy_timeout_s)

    def _writing(self) -> AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, write=True, busy_timeout_s=self._busy_timeout_s)

    def _require(self, connection: sqlite3.Connection, record_id: str) -> sqlite3.Row:
        row: sqlite3.Row | None = connection.execute(
            "SELECT * FROM runs WHERE id = ?", (record_id,)
        ).fetchone()
        if row is None:
            raise StoreError(
                f"record {record_id} is not in {self.path}",
                hint="The file was replaced or edited while qnext ran; run the command again.",
            )
        return row


def _insert_record(connection: sqlite3.Connection, record: Record) -> None:
    _insert(connection, "runs", run_row(record))
    for position, test in enumerate(record.tests):
        _insert(connection, "tests", test_row(record.id, position, test))


def _insert(connection: sqlite3.Connection, table: str, row: dict[str, object]) -> None:
    marks = ", ".join("?" * len(row))
    connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))


def _record(connection: sqlite3.Connection, row: sqlite3.Row) -> Record:
    tests = connection.execute("SELECT * FROM tests WHERE run_id = ? ORDER BY position", (row["id"],))
    return record_of(row, tests)
