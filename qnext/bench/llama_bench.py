"""llama-bench's table: its fields, a record as rows of them, and the five formats that it prints.

Names, order and types are those of `test::get_fields` and `get_field_type` in llama.cpp's
tools/llama-bench/llama-bench.cpp, so that its scripts/compare-llama-bench.py reads what is written here. That
script joins two builds on equal values, and in SQL nothing equals NULL: a text that is not known is written
as an empty one. What llama-bench has no field for is added behind: `samples_ns` in every format, and
`qnext_…` with a record's own identity; the script passes over what it does not know.

In SQL the additions are rows of a table of their own, tied by rowid: a table that llama-bench made takes our
rows too.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import PurePath
from typing import Literal

from qnext.store.record import Record, TestResult, identity_to_dict

Format = Literal["csv", "json", "jsonl", "sql", "markdown"]
FieldType = Literal["text", "int", "bool", "float"]
Row = dict[str, object]

_NAMES = """
build_commit build_number cpu_info gpu_info backends model_filename model_type model_size model_n_params
n_batch n_ubatch n_threads cpu_mask cpu_strict poll type_k type_v n_gpu_layers n_cpu_moe split_mode main_gpu
no_kv_offload flash_attn devices tensor_split tensor_buft_overrides load_mode lazy_mode embeddings
no_op_offload no_host repack fit_target fit_min_ctx n_prompt n_gen n_depth test_time avg_ns stddev_ns avg_ts
stddev_ts
"""
_INTS = """
build_number n_batch n_ubatch n_threads poll model_size model_n_params n_gpu_layers main_gpu n_prompt n_gen
n_depth avg_ns stddev_ns no_op_offload n_cpu_moe fit_target fit_min_ctx flash_attn
"""
_BOOLS = "no_kv_offload cpu_strict embeddings no_host repack"
_FLOATS = "avg_ts stddev_ts"


def _type_of(name: str) -> FieldType:
    listed: dict[FieldType, str] = {"int": _INTS, "bool": _BOOLS, "float": _FLOATS}
    return next((kind for kind, names in listed.items() if name in names.split()), "text")


FIELDS: dict[str, FieldType] = {name: _type_of(name) for name in _NAMES.split()}
"""llama-bench's fields in its order, each with its type."""

PER_TEST = ("n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts")
"""Fields that belong to one test; the others describe the configuration."""

TOLD = "llama_bench"
"""Key of a record's `machine` under which the fields of the file that it was imported from are kept."""

LISTS = ("samples_ns", "samples_ts")
OWN_TEXTS = ("qnext_record",)
OWN_OBJECTS = ("qnext_identity", "qnext_placement")
_ADDITIONS = ("samples_ns", *OWN_TEXTS, *OWN_OBJECTS)
"""What is added behind llama-bench's fields. `samples_ts` follows from `samples_ns`; in JSON it has both."""

_BACKENDS = {
    "cuda": "CUDA",
    "hip": "ROCm",
    "vulkan": "Vulkan",
    "metal": "MTL",
    "sycl": "SYCL",
    "blas": "BLAS",
}
_FLASH = {"on": 1, "off": 0, "auto": -1}


def record_rows(record: Record) -> list[Row]:
    """A row per test of the record: llama-bench's fields in order, then the additions."""
    told = record.machine.get(TOLD)
    if isinstance(told, Mapping):
        configuration: Row = {name: told.get(name) for name in FIELDS} | dict(told)
    else:
        configuration = _configuration(record)
    rows = []
    for test in record.tests:
        row = configuration | _measured(record, test)
        threads = record.placement.get("threads_batch" if test.prompt else "threads")
        row["n_threads"] = row.get("n_threads") if threads is None else threads
        if test.samples_ns:
            row["samples_ns"] = list(test.samples_ns)
            row["samples_ts"] = [_tokens(test) * 1e9 / sample for sample in test.samples_ns]
        row["qnext_record"] = record.id
        row["qnext_identity"] = identity_to_dict(record.identity)
        row["qnext_placement"] = dict(record.placement)
        rows.append(row)
    return rows


def _configuration(record: Record) -> Row:
    """The fields of a record made here. What qnext never changes has the value that its engine runs with."""
    identity, form = record.identity, record.placement
    backends = identity.engine.build.partition(" ")[2].split("+")
    used = [_BACKENDS[name] for name in backends if name in _BACKENDS]
    used += ["RPC"] if form.get("rpc_servers") else []
    model = _model_name(record.model_ref)
    moved, devices = _list(form.get("cpu_expert_layers")), _list(form.get("devices"))
    return {
        "build_commit": identity.engine.llama_commit or "unknown",
        "build_number": 0,
        "cpu_info": _at(record.machine, "cpu", "model") or "",
        "gpu_info": ", ".join(str(_at(gpu, "name") or "") for gpu in _list(record.machine.get("gpus"))),
        "backends": ",".join(used) or "CPU",
        "model_filename": model,
        "model_type": identity.model_type or f"{model} {identity.quant or ''}".strip(),
        "model_size": identity.model_bytes,
        "model_n_params": identity.model_params,
        "n_batch": form.get("batch"),
        "n_ubatch": form.get("ubatch"),
        "n_threads": form.get("threads"),
        "cpu_mask": "0x0",
        "cpu_strict": False,
        "poll": form.get("poll", 50),
        "type_k": form.get("kv_type_k"),
        "type_v": form.get("kv_type_v"),
        "n_gpu_layers": form.get("n_gpu_layers"),
        "n_cpu_moe": len(moved) if moved == list(range(len(moved))) else 0,
        "split_mode": "layer",
        "main_gpu": 0,
        "no_kv_offload": not form.get("kv_offload", True),
        "flash_attn": _FLASH.get(str(form.get("flash_attention"))),
        "devices": "/".join(map(str, devices)) or "none",
        "tensor_split": "/".join(f"{share:.2f}" for share in _list(form.get("tensor_split"))) or "0.00",
        "tensor_buft_overrides": ";".join(
            f"{_at(rule, 'pattern')}={_at(rule, 'buffer')}" for rule in _list(form.get("overrides"))
        )
        or "none",
        "load_mode": form.get("load_mode"),
        "lazy_mode": "auto",
        "embeddings": False,
        "no_op_offload": int(not form.get("op_offload", True)),
        "no_host": False,
        "repack": form.get("extra_buffers"),
        "fit_target": 0,
        "fit_min_ctx": 0,
    }


def told_placement(row: Mapping[str, object]) -> dict[str, object]:
    """The configuration of a row of llama-bench under the names of `Placement`, as far as it tells it."""
    names = {entry: entry for entry in ("n_gpu_layers", "load_mode")}
    names |= {"batch": "n_batch", "ubatch": "n_ubatch", "threads": "n_threads", "threads_batch": "n_threads"}
    names |= {"kv_type_k": "type_k", "kv_type_v": "type_v", "extra_buffers": "repack", "poll": "poll"}
    found = {ours: row[theirs] for ours, theirs in names.items() if row.get(theirs) is not None}
    for ours, theirs in (("kv_offload", "no_kv_offload"), ("op_offload", "no_op_offload")):
        if row.get(theirs) is not None:
            found[ours] = not row[theirs]
    if row.get("flash_attn") in _FLASH.values():
        found["flash_attention"] = next(word for word, code in _FLASH.items() if code == row["flash_attn"])
    if row.get("tensor_buft_overrides") not in (None, ""):
        found["overrides"] = _rules(str(row["tensor_buft_overrides"]))
    found["parallel"] = 1
    return found


def _rules(text: str) -> list[dict[str, str]]:
    rules = [rule.rpartition("=") for rule in text.split(";")] if text != "none" else []
    return [{"pattern": pattern, "buffer": buffer} for pattern, _, buffer in rules]


def _measured(record: Record, test: TestResult) -> Row:
    samples, tokens = test.samples_ns, _tokens(test)
    speeds = [tokens * 1e9 / sample for sample in samples]
    return {
        "n_prompt": test.prompt,
        "n_gen": test.generate,
        "n_depth": test.depth,
        "test_time": record.when.replace("+00:00", "Z"),
        "avg_ns": sum(samples) // len(samples) if samples else test.mean_ns,
        "stddev_ns": int(_deviation(samples)) if samples else test.stddev_ns,
        "avg_ts": sum(speeds) / len(speeds) if speeds else test.median_tps,
        "stddev_ts": _deviation(speeds) if speeds else test.high_tps - test.median_tps,
    }


def _tokens(test: TestResult) -> int:
    return test.prompt + test.generate


def _deviation(values: Sequence[float]) -> float:
    """Of a sample, 0 for a single one, as llama-bench's `stdev`."""
    if len(values) < 2:
        return 0.0
    mean = sum(values) / len(values)
    return sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _model_name(ref: str) -> str:
    """A local file by its name alone: the folders above it tell of the person, not of the model."""
    return PurePath(ref).name if ref.endswith(".gguf") else ref


def _at(value: object, *keys: str) -> object:
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def _list(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else []


def write_rows(rows: Sequence[Row], format_: Format) -> str:
    """The rows as llama-bench would print them, additions included. Empty for no rows in `markdown`."""
    if format_ == "markdown":
        from qnext.bench.llama_bench_table import table

        return table(rows)
    if format_ == "json":
        entries = ",\n".join("  " + json.dumps(row, ensure_ascii=False) for row in rows)
        return f"[\n{entries}\n]\n"
    if format_ == "jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if format_ == "csv":
        return _csv(rows)
    return _sql(rows)


def _csv(rows: Sequence[Row]) -> str:
    columns = [*FIELDS, *_ADDITIONS]
    file = io.StringIO()
    file.write(",".join(columns) + "\n")
    writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writerows([_plain(row.get(name)) for name in columns] for row in rows)
    return file.getvalue()


SQL_TABLE, SQL_ADDITIONS = "llama_bench", "qnext_tests"
_SQL_TYPES = {"text": "TEXT", "int": "INTEGER", "bool": "INTEGER", "float": "REAL"}


def _sql(rows: Sequence[Row]) -> str:
    columns = ",\n".join(f"  {name} {_SQL_TYPES[kind]}" for name, kind in FIELDS.items())
    text = [
        f"CREATE TABLE IF NOT EXISTS {SQL_TABLE} (\n{columns}\n);\n",
        f"CREATE TABLE IF NOT EXISTS {SQL_ADDITIONS} (\n  of_row INTEGER,\n"
        + ",\n".join(f"  {name} TEXT" for name in _ADDITIONS)
        + "\n);\n",
    ]
    for row in rows:
        values = ", ".join(_literal(row.get(name)) for name in FIELDS)
        text.append(f"INSERT INTO {SQL_TABLE} ({', '.join(FIELDS)}) VALUES ({values});")
        values = ", ".join(_literal(row.get(name)) for name in _ADDITIONS)
        text.append(
            f"INSERT INTO {SQL_ADDITIONS} (of_row, {', '.join(_ADDITIONS)}) "
            f"VALUES (last_insert_rowid(), {values});"
        )
    return "\n".join(text) + "\n"


def _plain(value: object) -> str:
    """A value as the text of one cell."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, list | dict):
        return json.dumps(value, ensure_ascii=False)
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _literal(value: object) -> str:
    return "NULL" if value is None else "'" + _plain(value).replace("'", "''") + "'"
