"""`SweepStore`: sweeps, their cells and every measurement, in the same SQLite file as the records.

A measurement that may take the machine down has its row before it begins, without a status, and the file is
synced to the disk (`PRAGMA synchronous = FULL`). A row that is still without one when nobody works on the
sweep any more names what was running when the process or the machine ended. A finished measurement is one
transaction, so a kill at any moment loses at most the one that was running.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from qnext.errors import StoreError, UsageError
from qnext.store.database import opened
from qnext.store.identity import new_record_id, utc_now
from qnext.store.owner import process_mark
from qnext.store.rows import storable

SweepStatus = Literal["running", "interrupted", "ok", "failed"]


@dataclass(frozen=True, slots=True)
class StoredCell:
    """One configuration of a sweep. `config` is whatever makes it again; `status` says how it stands."""

    name: str
    config: Mapping[str, Any]
    status: str
    because: str = ""
    record_id: str | None = None


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measurement of the cell at position `cell`; `status` None: it began and never ended.

    `prefill_ns` is the time of `prompt` tokens after `depth` others, `token_ns` of each decode step,
    `turn_ns` of the sweep's objective, `seconds` of all that was needed for it. `facts` hold what else was
    seen: what is active and allocated, at first.
    """

    number: int
    cell: int
    rung: str
    started_at: str
    status: str | None = None
    because: str = ""
    prompt: int | None = None
    depth: int | None = None
    prefill_ns: int | None = None
    token_ns: tuple[int, ...] = ()
    turn_ns: int | None = None
    seconds: float | None = None
    rss_bytes: int | None = None
    major_faults: int | None = None
    facts: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StoredSweep:
    """A sweep as it stands. `status` is `interrupted` when the process that ran it is gone.

    `same_boot` tells whether the machine is still up since its last process began.
    """

    id: str
    started_at: str
    status: SweepStatus
    model: str
    model_digest: str
    machine: str
    engine_build: str
    seed: int
    settings: Mapping[str, Any]
    result: Mapping[str, Any] | None
    cells: tuple[StoredCell, ...]
    measurements: tuple[Measurement, ...]
    same_boot: bool


class SweepStore:
    """Sweeps in the results database at `path`. Every method raises StoreError on trouble."""

    def __init__(self, path: Path, *, busy_timeout_s: float = 10.0) -> None:
        self.path = path
        self._busy_timeout_s = busy_timeout_s

    def create(
        self,
        *,
        model: str,
        model_digest: str,
        machine: str,
        engine_build: str,
        seed: int,
        settings: Mapping[str, Any],
        cells: Sequence[StoredCell],
    ) -> str:
        """Store a new sweep that this process owns; returns its id."""
        sweep_id = new_record_id()
        row = {
            "id": sweep_id,
            "started_at": utc_now(),
            "status": "running",
            "model": storable(model),
            "model_digest": model_digest,
            "machine_digest": machine,
            "engine_build": engine_build,
            "seed": seed,
            "settings_json": json.dumps(settings),
            "pid": os.getpid(),
            "process_mark": process_mark(os.getpid()),
        }
        with self._writing() as connection:
            _insert(connection, "sweeps", row)
            for position, cell in enumerate(cells):
                _insert(
                    connection,
                    "cells",
                    {
                        "sweep_id": sweep_id,
                        "position": position,
                        "name": cell.name,
                        "config_json": json.dumps(cell.config),
                        "status": cell.status,
                        "because": storable(cell.because),
                    },
                )
        return sweep_id

    def adopt(self, sweep_id: str) -> None:
        """Make this process the owner of an interrupted sweep. Raises UsageError while another one is."""
        with self._writing() as connection:
            row = self._row(connection, sweep_id)
            if _shown_status(row) == "running" and row["pid"] != os.getpid():
                raise UsageError(
                    f"sweep {sweep_id} is running in another process ({row['pid']})",
                    hint="Wait for it, or end it with Ctrl-C there.",
                )
            connection.execute(
                "UPDATE sweeps SET status = 'running', pid = ?, process_mark = ? WHERE id = ?",
                (os.getpid(), process_mark(os.getpid()), sweep_id),
            )

    def begin(self, sweep_id: str, number: int, cell: int, rung: str) -> None:
        """Note on the disk that a measurement begins that may not come back."""
        row = {"sweep_id": sweep_id, "number": number, "cell": cell, "rung": rung, "started_at": utc_now()}
        with self._writing() as connection:
            _insert(connection, "measurements", row, replace=True)

    def forget(self, sweep_id: str, number: int) -> None:
        """Take back `begin`: the measurement was called off by the user."""
        with self._writing() as connection:
            connection.execute(
                "DELETE FROM measurements WHERE sweep_id = ? AND number = ? AND status IS NULL",
                (sweep_id, number),
            )

    def end(self, sweep_id: str, done: Measurement, cell_status: str, because: str = "") -> None:
        """Store a finished measurement and what its cell is now."""
        row = {
            "sweep_id": sweep_id,
            "number": done.number,
            "cell": done.cell,
            "rung": done.rung,
            "started_at": done.started_at,
            "status": done.status,
            "because": storable(done.because),
            "prompt": done.prompt,
            "depth": done.depth,
            "prefill_ns": done.prefill_ns,
            "token_ns_json": json.dumps(done.token_ns),
            "turn_ns": done.turn_ns,
            "seconds": done.seconds,
            "rss_bytes": done.rss_bytes,
            "major_faults": done.major_faults,
            "facts_json": None if done.facts is None else json.dumps(done.facts),
        }
        with self._writing() as connection:
            _insert(connection, "measurements", row, replace=True)
            connection.execute(
                "UPDATE cells SET status = ?, because = ? WHERE sweep_id = ? AND position = ?",
                (cell_status, storable(because), sweep_id, done.cell),
            )

    def finish(
        self,
        sweep_id: str,
        status: SweepStatus,
        *,
        result: Mapping[str, Any] | None = None,
        standings: Mapping[int, tuple[str, str]] | None = None,
        records: Mapping[int, str] | None = None,
    ) -> None:
        """Give a sweep its status; `standings` are the (status, because) of cells, `records` their ids."""
        with self._writing() as connection:
            connection.execute(
                "UPDATE sweeps SET status = ?, result_json = coalesce(?, result_json) WHERE id = ?",
                (status, None if result is None else json.dumps(result), sweep_id),
            )
            for position, (word, because) in (standings or {}).items():
                connection.execute(
                    "UPDATE cells SET status = ?, because = ? WHERE sweep_id = ? AND position = ?",
                    (word, storable(because), sweep_id, position),
                )
            for position, record_id in (records or {}).items():
                connection.execute(
                    "UPDATE cells SET record_id = ? WHERE sweep_id = ? AND position = ?",
                    (record_id, sweep_id, position),
                )

    def get(self, id_or_prefix: str) -> StoredSweep:
        """The sweep with this id, or the only one whose id starts so. UsageError when none or many do."""
        rows = self._select("substr(id, 1, ?) = ? LIMIT 6", (len(id_or_prefix), id_or_prefix))
        if len(rows) != 1 or not id_or_prefix:
            what = "is the start of several sweeps" if len(rows) > 1 else "is no sweep"
            raise UsageError(f"'{id_or_prefix}' {what}", hint="Give its id, or a model and --resume.")
        return rows[0]

    def unfinished(self, model: str | None = None) -> StoredSweep | None:
        """The newest sweep that was cut short, of this model (with whatever quant) if one is named."""
        where, values = "status IN ('running', 'interrupted', 'failed')", list[object]()
        if model is not None:
            where = f"{where} AND (model = ? OR instr(model, ? || ':') = 1)"
            values = [storable(model), storable(model)]
        found = self._select(f"{where} ORDER BY started_at DESC, rowid DESC LIMIT 1", values)
        return found[0] if found else None

    def newest(self) -> StoredSweep | None:
        """The sweep that was started last."""
        found = self._select("1 ORDER BY started_at DESC, rowid DESC LIMIT 1", ())
        return found[0] if found else None

    def _select(self, where: str, values: Iterable[object]) -> list[StoredSweep]:
        if not self.path.exists():
            return []
        with opened(self.path, write=False, busy_timeout_s=self._busy_timeout_s) as connection:
            rows = connection.execute(f"SELECT * FROM sweeps WHERE {where}", tuple(values)).fetchall()
            return [_sweep(connection, row) for row in rows]

    def _row(self, connection: sqlite3.Connection, sweep_id: str) -> sqlite3.Row:
        row: sqlite3.Row | None = connection.execute(
            "SELECT * FROM sweeps WHERE id = ?", (sweep_id,)
        ).fetchone()
        if row is None:
            raise StoreError(
                f"sweep {sweep_id} is not in {self.path}", hint="The file was replaced; start the sweep anew."
            )
        return row

    def _writing(self) -> AbstractContextManager[sqlite3.Connection]:
        return opened(self.path, write=True, busy_timeout_s=self._busy_timeout_s)


def _insert(
    connection: sqlite3.Connection, table: str, row: Mapping[str, object], *, replace: bool = False
) -> None:
    verb = "INSERT OR REPLACE" if replace else "INSERT"
    marks = ", ".join("?" * len(row))
    connection.execute(f"{verb} INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))


def _shown_status(row: sqlite3.Row) -> str:
    status: str = row["status"]
    if status == "running" and (row["pid"] is None or process_mark(row["pid"]) != row["process_mark"]):
        return "interrupted"
    return status


def _boot(mark: str | None) -> str | None:
    return mark.split()[0] if mark else None


def _sweep(connection: sqlite3.Connection, row: sqlite3.Row) -> StoredSweep:
    cells = connection.execute("SELECT * FROM cells WHERE sweep_id = ? ORDER BY position", (row["id"],))
    told = connection.execute("SELECT * FROM measurements WHERE sweep_id = ? ORDER BY number", (row["id"],))
    try:
        return StoredSweep(
            id=row["id"],
            started_at=row["started_at"],
            status=_shown_status(row),  # type: ignore[arg-type]
            model=row["model"],
            model_digest=row["model_digest"],
            machine=row["machine_digest"],
            engine_build=row["engine_build"],
            seed=row["seed"],
            settings=json.loads(row["settings_json"]),
            result=None if row["result_json"] is None else json.loads(row["result_json"]),
            cells=tuple(
                StoredCell(
                    cell["name"],
                    json.loads(cell["config_json"]),
                    cell["status"],
                    cell["because"],
                    cell["record_id"],
                )
                for cell in cells.fetchall()
            ),
            measurements=tuple(_measurement(entry) for entry in told.fetchall()),
            same_boot=_boot(row["process_mark"]) == _boot(process_mark(os.getpid())),
        )
    except json.JSONDecodeError as error:
        raise StoreError(
            f"sweep {row['id']} cannot be read: {error}",
            hint="It was changed by another program; start the sweep anew.",
        ) from error


def _measurement(row: sqlite3.Row) -> Measurement:
    return Measurement(
        number=row["number"],
        cell=row["cell"],
        rung=row["rung"],
        started_at=row["started_at"],
        status=row["status"],
        because=row["because"],
        prompt=row["prompt"],
        depth=row["depth"],
        prefill_ns=row["prefill_ns"],
        token_ns=tuple(json.loads(row["token_ns_json"] or "[]")),
        turn_ns=row["turn_ns"],
        seconds=row["seconds"],
        rss_bytes=row["rss_bytes"],
        major_faults=row["major_faults"],
        facts=None if row["facts_json"] is None else json.loads(row["facts_json"]),
    )
