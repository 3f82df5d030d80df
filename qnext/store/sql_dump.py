"""Reads the SQL text of one or two tables (`llama-bench -o sql`, `sqlite3 FILE .dump`) without trusting it.

The statements run in a database in memory that belongs to nothing. SQLite asks an authorizer before it does
anything: to make the named tables and to insert plain values into them is allowed; no SELECT, so nothing can
be multiplied; no ATTACH, trigger, view, virtual table or function but `last_insert_rowid`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from qnext.errors import UsageError

_ALLOWED = {
    sqlite3.SQLITE_CREATE_TABLE,
    sqlite3.SQLITE_INSERT,
    sqlite3.SQLITE_READ,
    sqlite3.SQLITE_UPDATE,
}
"""What making a table and inserting a row asks for; the last two only of SQLite's own list of tables."""

MOST_COLUMNS = 200
MOST_STATEMENT_BYTES = 200_000
MOST_PAGES = 1 << 16
"""256 MiB in all, whatever a column's DEFAULT may make of a short line."""


_HINT = (
    "Give what `llama-bench -o sql`, `qnext bench export --format sql` or `sqlite3 FILE .dump` printed; a "
    "quote in a file name breaks llama-bench's SQL: take its -o jsonl."
)


def read_dump(text: str, tables: Sequence[str]) -> dict[str, list[tuple[int, int, dict[str, object]]]]:
    """table -> (line of its INSERT, rowid, values by column) for each row, in order; {} for absent tables.

    Raises UsageError with the line for a statement that is malformed, not allowed or cut off.
    """
    lines: dict[str, dict[int, int]] = {name: {} for name in tables}
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MOST_STATEMENT_BYTES)
        connection.setlimit(sqlite3.SQLITE_LIMIT_COLUMN, MOST_COLUMNS)
        connection.execute(f"PRAGMA max_page_count = {MOST_PAGES}")
        connection.set_authorizer(_authorizer(tables))
        for line, statement in _statements(text):
            touched = _run(connection, line, statement, tables)
            if touched is not None:
                name, rowid = touched
                lines[name][rowid] = line
        connection.set_authorizer(None)
        connection.row_factory = sqlite3.Row
        found: dict[str, list[tuple[int, int, dict[str, object]]]] = {}
        for name, known in lines.items():
            if known:
                rows = connection.execute(f"SELECT rowid AS in_table, * FROM {name} ORDER BY rowid")
                found[name] = [(known[id_], id_, values) for id_, values in map(_split, rows)]
        return found


def _split(row: sqlite3.Row) -> tuple[int, dict[str, object]]:
    values = dict(row)
    return values.pop("in_table"), values


def _run(
    connection: sqlite3.Connection, line: int, statement: str, tables: Sequence[str]
) -> tuple[str, int] | None:
    """Run one statement; the table and rowid of what it inserted."""
    before = connection.total_changes
    try:
        cursor = connection.execute(statement)
    except sqlite3.Error as error:
        raise UsageError(
            f"line {line}: {_reason(error)}",
            hint=_HINT,
        ) from error
    if connection.total_changes == before or cursor.lastrowid is None:
        return None
    words = statement.replace("(", " ").replace('"', " ").lower().split()
    name = next((word for word in words if word in tables), None)
    return None if name is None else (name, cursor.lastrowid)


def _reason(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", "")
    return "a statement that has no place in results" if name == "SQLITE_AUTH" else str(error)


def _authorizer(tables: Sequence[str]) -> Callable[..., int]:
    def decide(action: int, first: str | None, second: str | None, *_: object) -> int:
        own = (first or "").lower() in tables
        if action in (sqlite3.SQLITE_CREATE_TABLE, sqlite3.SQLITE_INSERT) and own:
            return sqlite3.SQLITE_OK
        if action in _ALLOWED and first in ("sqlite_master", "sqlite_schema"):
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_TRANSACTION:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA and (first or "").lower() == "foreign_keys":
            return sqlite3.SQLITE_IGNORE
        if action == sqlite3.SQLITE_FUNCTION and second == "last_insert_rowid":
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_DENY

    return decide


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """(line where it begins, statement) for each; a line may hold several, a statement several lines."""
    pending, begins = "", 1
    for number, line in enumerate(text.split("\n"), start=1):
        for part in _cut(line + "\n"):
            if not pending.strip():
                pending, begins = "", number
            pending += part
            if sqlite3.complete_statement(pending):
                if pending.strip(" \t\r\n;"):
                    yield begins, pending
                pending = ""
            elif len(pending) > MOST_STATEMENT_BYTES:
                raise UsageError(f"line {begins}: the statement that begins here has no end", hint=_HINT)
    if any(line.strip() and not line.lstrip().startswith("--") for line in pending.splitlines()):
        raise UsageError(f"line {begins}: the statement that begins here has no end", hint=_HINT)


def _cut(line: str) -> Iterator[str]:
    start = 0
    while (end := line.find(";", start)) != -1:
        yield line[start : end + 1]
        start = end + 1
    yield line[start:]
