"""A record as rows of the results database and back.

What people ask for with SQL has a column of its own; lists and descriptions are columns of JSON text.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable
from typing import Any

from qnext.errors import StoreError
from qnext.store.owner import process_mark
from qnext.store.record import SCHEMA, Record, TestResult, record_from_dict, record_to_dict


def run_row(record: Record) -> dict[str, object]:
    """The row of `runs`; a running record belongs to this process."""
    data = record_to_dict(record)
    identity, engine = record.identity, record.identity.engine
    running = record.status == "running"
    return {
        "id": record.id,
        "started_at": record.when,
        "status": record.status,
        "kind": record.kind,
        "model": storable(record.model_ref),
        "quant": identity.quant,
        "model_digest": identity.model_digest,
        "engine_name": engine.name,
        "engine_version": engine.version,
        "llama_commit": engine.llama_commit,
        "engine_build": engine.build,
        "machine_digest": identity.machine,
        "placement_digest": identity.placement,
        "workload_digest": identity.workload,
        "planned_json": json.dumps(data["planned"]["devices"]),
        "allocated_json": json.dumps(data["allocated"]["devices"]),
        "placement_json": json.dumps(data["placement"]),
        "machine_json": json.dumps(data["machine"]),
        "command_json": json.dumps(data["command"]),
        "warnings_json": json.dumps(data["warnings"]),
        "text": storable(record.text),
        "error": storable(record.error),
        "pid": os.getpid() if running else None,
        "process_mark": process_mark(os.getpid()) if running else None,
        "engine_flags": engine.flags,
        **{name: getattr(identity, name) for name in _PLAIN},
        **{f"{name}_json": _json(data["identity"][name]) for name in _LISTS},
        "workload_json": _json(data["workload"]),
    }


_PLAIN = (
    "header_digest",
    "model_type",
    "model_bytes",
    "model_params",
    "driver",
    "context",
    "slots",
    "kv_type_k",
    "kv_type_v",
)
_LISTS = ("devices", "bandwidths", "power", "environment")
"""Fields of `Identity` that are columns by their own name, and those that are JSON text; since version 2."""


def _json(value: object) -> str | None:
    return None if value is None else json.dumps(value)


def _read_json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def test_row(record_id: str, position: int, test: TestResult) -> dict[str, object]:
    """The row of `tests` at `position` of a record."""
    predicted = test.predicted_tps
    return {
        "run_id": record_id,
        "position": position,
        "name": test.name,
        "prompt": test.prompt,
        "generate": test.generate,
        "depth": test.depth,
        "samples_ns_json": json.dumps(test.samples_ns),
        "median_tps": test.median_tps,
        "low_tps": test.low_tps,
        "high_tps": test.high_tps,
        "predicted_low_tps": predicted and predicted.low,
        "predicted_mid_tps": predicted and predicted.mid,
        "predicted_high_tps": predicted and predicted.high,
        "bandwidth_share": test.bandwidth_share,
        "mean_ns": test.mean_ns,
        "stddev_ns": test.stddev_ns,
    }


def record_of(row: sqlite3.Row, tests: Iterable[sqlite3.Row]) -> Record:
    """The record of a row of `runs` and its rows of `tests`. Raises StoreError when they make no record."""
    try:
        return record_from_dict(_as_json(row, [_test_as_json(test) for test in tests]))
    except json.JSONDecodeError as error:
        raise StoreError(
            f"record {row['id']} cannot be read: {error}",
            hint="It was changed by another program; restore the database from a copy.",
        ) from error


def _as_json(row: sqlite3.Row, tests: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "id": row["id"],
        "status": _shown_status(row),
        "when": row["started_at"],
        "kind": row["kind"],
        "model": row["model"],
        "identity": {
            "model_digest": row["model_digest"],
            "quant": row["quant"],
            "engine": {
                "name": row["engine_name"],
                "version": row["engine_version"],
                "llama_commit": row["llama_commit"],
                "build": row["engine_build"],
                "flags": row["engine_flags"],
            },
            "machine": row["machine_digest"],
            "placement": row["placement_digest"],
            "workload": row["workload_digest"],
            **{name: row[name] for name in _PLAIN},
            **{name: _read_json(row[f"{name}_json"]) for name in _LISTS},
        },
        "planned": {"devices": json.loads(row["planned_json"])},
        "allocated": {"devices": json.loads(row["allocated_json"])},
        "tests": tests,
        "text": row["text"],
        "warnings": json.loads(row["warnings_json"]),
        "placement": json.loads(row["placement_json"]),
        "machine": json.loads(row["machine_json"]),
        "error": row["error"],
        "command": json.loads(row["command_json"]),
        "workload": _read_json(row["workload_json"]),
    }


def _test_as_json(row: sqlite3.Row) -> dict[str, Any]:
    low, mid, high = row["predicted_low_tps"], row["predicted_mid_tps"], row["predicted_high_tps"]
    return {
        **dict(row),
        "samples_ns": json.loads(row["samples_ns_json"]),
        "predicted_tps": None if mid is None else {"low": low, "mid": mid, "high": high},
    }


def _shown_status(row: sqlite3.Row) -> str:
    status: str = row["status"]
    if status == "running" and (row["pid"] is None or process_mark(row["pid"]) != row["process_mark"]):
        return "interrupted"
    return status


def storable(text: str | None) -> str | None:
    """Text as SQLite takes it: UTF-8 has no lone surrogates, which Python makes of odd file names."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
