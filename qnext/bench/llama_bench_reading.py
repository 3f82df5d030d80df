"""Reads what llama-bench printed, in any of its formats, or `qnext bench export`: rows, each with its line.

The format is told by the contents, because people name such files as they like. Everything is checked here,
once: a row that contradicts itself is refused with its line, never taken for a measurement.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import NoReturn

from qnext.bench.llama_bench import FIELDS, LISTS, OWN_OBJECTS, OWN_TEXTS, SQL_ADDITIONS, SQL_TABLE, Row
from qnext.errors import UsageError

MOST_BYTES = 64 << 20
_MOST = 2**63 - 1
"""Integers are kept in SQLite's 64 bits."""

_HINT = "Give a file written by `llama-bench -o jsonl` (or json, csv, sql) or by `qnext bench export`."
_SQL_STARTS = ("create ", "insert ", "pragma ", "begin", "--")


def read_rows(content: bytes) -> list[tuple[int, Row]]:
    """(line, row) for every test in the file, in order; fields that are not llama-bench's are kept.

    Values have the types of `FIELDS`, None where they are missing. What a test needs is always there:
    `n_prompt` and `n_gen` (not both 0), `n_depth`, `test_time`, `avg_ns`, `stddev_ns`, `avg_ts` and
    `stddev_ts`. Raises UsageError with the line for anything else.
    """
    if len(content) > MOST_BYTES:
        raise UsageError("the file is larger than 64 MiB", hint="Results are small: is it the right file?")
    text = _decoded(content)
    start = text.lstrip()[:2000].lower()
    if not start:
        raise UsageError("the file is empty", hint=_HINT)
    reader: Callable[[str], Iterator[tuple[int, Mapping[str, object]]]]
    if start.startswith("["):
        reader = _json
    elif start.startswith("{"):
        reader = _jsonl
    elif start.startswith(_SQL_STARTS):
        reader = _sql
    elif "," in start.split("\n")[0] and "n_prompt" in start.split("\n")[0]:
        reader = _csv
    elif start.startswith("|"):
        raise UsageError("a Markdown table is for reading: samples and settings are missing", hint=_HINT)
    else:
        raise UsageError("the file holds no results of llama-bench", hint=_HINT)
    rows = [(line, _checked(line, raw)) for line, raw in reader(text)]
    if not rows:
        raise UsageError("the file holds no test", hint=_HINT)
    return rows


def _decoded(content: bytes) -> str:
    """UTF-8, or UTF-16 with its mark, which PowerShell's `>` writes."""
    if content.startswith(b"SQLite format 3\x00"):
        raise UsageError(
            "this is a SQLite database, not its text", hint="Print it first: sqlite3 FILE .dump > results.sql"
        )
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        _refuse(content.count(b"\n", 0, error.start) + 1, "this is no text")
    if "\x00" in text:
        _refuse(text.count("\n", 0, text.index("\x00")) + 1, "this is no text")
    return text


def _json(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    """Entry by entry, so that each knows its line, and what is complete of a cut-off file can be named."""
    decoder, position, count = json.JSONDecoder(parse_constant=_no_number), text.index("[") + 1, 0
    while True:
        position = _after_blanks(text, position)
        if text[position : position + 1] == "]" and not text[position + 1 :].strip():
            return
        line = text.count("\n", 0, position) + 1
        if position >= len(text):
            raise UsageError(
                f"line {line}: the list has no end: llama-bench was stopped after {count} tests",
                hint="Put a ] at the end of the file to import those.",
            )
        entry, position = _decode(decoder, text, position, line)
        yield line, entry
        count += 1
        position = _after_blanks(text, position)
        if text[position : position + 1] == ",":
            position += 1


def _decode(
    decoder: json.JSONDecoder, text: str, position: int, line: int
) -> tuple[Mapping[str, object], int]:
    try:
        entry, end = decoder.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        bad = error.lineno if isinstance(error, json.JSONDecodeError) else line
        _refuse(bad, error.msg if isinstance(error, json.JSONDecodeError) else str(error))
    if not isinstance(entry, dict):
        _refuse(line, "an object with the fields of a test is expected here")
    return entry, end


def _jsonl(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    decoder = json.JSONDecoder(parse_constant=_no_number)
    for line, part in enumerate(text.split("\n"), start=1):
        if not part.strip():
            continue
        try:
            entry, end = decoder.raw_decode(part, _after_blanks(part, 0))
        except (ValueError, RecursionError) as error:
            _refuse(line, error.msg if isinstance(error, json.JSONDecodeError) else str(error))
        if not isinstance(entry, dict) or part[end:].strip():
            _refuse(line, "one object with the fields of a test is expected on each line")
        yield line, entry


def _csv(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            if names and cells:
                if len(cells) != len(names):
                    _refuse(line, f"{len(cells)} values for {len(names)} columns")
                yield (
                    line,
                    {name: value for name, value in zip(names, cells, strict=True) if _said(name, value)},
                )
            elif cells:
                names = [name.strip() for name in cells]
            line = reader.line_num + 1
    except csv.Error as error:
        _refuse(line, str(error))


def _said(name: str, value: str) -> bool:
    """An empty cell is an empty text, or nothing."""
    return value != "" or FIELDS.get(name) == "text"


def _sql(text: str) -> Iterator[tuple[int, Mapping[str, object]]]:
    from qnext.store.sql_dump import read_dump

    found = read_dump(text, (SQL_TABLE, SQL_ADDITIONS))
    additions = {values.pop("of_row", None): values for _, _, values in found.get(SQL_ADDITIONS, [])}
    for line, rowid, values in found.get(SQL_TABLE, []):
        both = values | additions.get(rowid, {})
        yield line, {name: value for name, value in both.items() if value is not None}


def _after_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of a measurement")


def _refuse(line: int, why: str) -> NoReturn:
    raise UsageError(f"line {line}: {why}", hint=_HINT)


def _checked(line: int, raw: Mapping[str, object]) -> Row:
    """The row with its types, and the figures that every later step relies on."""
    row: Row = {name: _typed(line, name, kind, raw.get(name)) for name, kind in FIELDS.items()}
    for name, value in raw.items():
        if name in OWN_OBJECTS:
            row[name] = _object(line, name, value)
        elif name in OWN_TEXTS:
            row[name] = _typed(line, name, "text", value)
        elif name not in row and name not in LISTS:
            if not isinstance(value, str | int | float) or not _finite(value):
                _refuse(line, f"{name} is neither text nor a number")
            row[name] = _written(line, name, value) if isinstance(value, str) else value
    prompt, generate = _count(line, row, "n_prompt"), _count(line, row, "n_gen")
    row["n_depth"] = _count(line, row, "n_depth") if row["n_depth"] is not None else 0  # older ones have none
    tokens = prompt + generate
    if tokens == 0:
        _refuse(line, "n_prompt and n_gen are both 0: nothing was measured")
    row["test_time"] = _moment(line, row["test_time"])
    samples = _samples(line, raw.get("samples_ns"))
    if samples:
        row["samples_ns"] = samples
    _check_means(line, row, samples, tokens)
    return row


def _check_means(line: int, row: Row, samples: list[int], tokens: int) -> None:
    """Fills in what follows from the rest, and refuses means that are not those of the samples."""
    mean = sum(samples) / len(samples) if samples else row["avg_ns"]
    if not isinstance(mean, int | float) or mean <= 0:
        _refuse(line, "neither samples_ns nor avg_ns is there and positive")
    told = row["avg_ns"]
    if isinstance(told, int) and abs(told - mean) > 1 + mean / 1e6:
        _refuse(line, f"avg_ns is {told}, but its samples have a mean of {mean:.0f}")
    row["avg_ns"] = int(mean)
    for name, otherwise in (("stddev_ns", 0), ("avg_ts", tokens * 1e9 / mean), ("stddev_ts", 0.0)):
        value = row[name] = otherwise if row[name] is None else row[name]
        if not isinstance(value, int | float) or value < 0:
            _refuse(line, f"{name} is {value}")
    if not samples and not row["avg_ts"]:
        _refuse(line, "avg_ts is 0")


def _typed(line: int, name: str, kind: str, value: object) -> object:
    if value is None or (value == "" and kind != "text"):
        return None
    if kind == "text":
        if isinstance(value, bool | list | dict):
            _refuse(line, f"{name} is no text")
        return _written(line, name, str(value))
    if kind == "bool":
        words: dict[object, bool] = {"0": False, "1": True, "false": False, "true": True}
        found = words.get(str(value).lower())
        if found is None:
            _refuse(line, f"{name} is {value!r}, which is neither 0 nor 1")
        return found
    text = {"true": "1", "false": "0"}.get(str(value).lower(), str(value))  # flash_attn was a bool once
    try:
        number = float(text) if kind == "float" else int(text)
    except ValueError:
        _refuse(line, f"{name} is {value!r}, which is no number")
    if not _finite(number):
        _refuse(line, f"{name} is {value!r}, which no measurement gives")
    return number


def _written(line: int, name: str, text: str) -> str:
    """Text that can be kept: JSON can spell half a character (`\\ud800`) and NUL, which no database takes."""
    if "\x00" in text or (not text.isascii() and text.encode("utf-8", "ignore").decode() != text):
        _refuse(line, f"{name} is no text")
    return text


def _finite(value: str | int | float) -> bool:
    return isinstance(value, str) or (math.isfinite(value) and abs(value) <= _MOST)


def _count(line: int, row: Row, name: str) -> int:
    value = row[name]
    if not isinstance(value, int) or not 0 <= value < 2**31:
        _refuse(line, f"{name} is {'missing' if value is None else value}")
    return value


def _moment(line: int, value: object) -> str:
    """UTC as records write it."""
    try:
        moment = datetime.fromisoformat(str(value))
    except ValueError:
        missing = value is None
        _refuse(line, "test_time is missing" if missing else f"test_time is {value!r}, which is no time")
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    try:
        return moment.astimezone(UTC).isoformat(timespec="seconds")
    except OverflowError:
        _refuse(line, f"test_time is {value!r}, which is no time")


def _samples(line: int, value: object) -> list[int]:
    """A list of JSON, or its text in one cell."""
    if isinstance(value, str) and value:
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            _refuse(line, "samples_ns is no list of numbers")
    if value in (None, ""):
        return []
    whole = isinstance(value, list) and all(type(sample) is int for sample in value)
    if not isinstance(value, list) or not whole or not all(0 < sample <= _MOST for sample in value):
        _refuse(line, "samples_ns is no list of whole, positive numbers")
    return value


def _object(line: int, name: str, value: object) -> dict[str, object]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            _refuse(line, f"{name} is no object of JSON")
    if not isinstance(value, dict):
        _refuse(line, f"{name} is no object of JSON")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        _refuse(line, f"{name} holds a figure that is no number")
    _written(line, name, text)
    return value
