"""Rows of llama-bench as records, so that they stand in the history and can be compared.

One record is one configuration, as it is for runs of our own; a test that is there twice was measured twice
and begins another record. What llama-bench does not tell stays None: it names the model by its description
and size, not by its contents, and the machine by its processor and GPUs. Digests made of such words say so in
their prefix, so that they are never taken for ours. A record's id is made of its contents: reading a file
again gives the same records.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from qnext.bench.llama_bench import LISTS, OWN_OBJECTS, OWN_TEXTS, PER_TEST, TOLD, Row, told_placement
from qnext.bench.llama_bench_table import test_name
from qnext.bench.statistics import summarise
from qnext.errors import UsageError
from qnext.models.shape import quant_in_name
from qnext.store.identity import digest_of
from qnext.store.record import EngineIdentity, Identity, Record, TestResult, identity_from_dict

DESCRIBED_PREFIX = "llama-bench:"
"""Begins digests of a model or machine that are made of llama-bench's description of it."""

NO_SAMPLES = "imported with means only: nothing can be called faster or slower than this"

_OF_THE_TEST = frozenset((*PER_TEST, *LISTS, *OWN_TEXTS, *OWN_OBJECTS))


def imported_records(rows: Sequence[tuple[int, Row]]) -> list[Record]:
    """Records of kind `import`, in the order of the file, from rows that `read_rows` has checked.

    Rows that qnext exported keep the id of their record. Raises UsageError with the line where such a row was
    damaged.
    """
    groups: dict[tuple[str, int], list[tuple[int, Row]]] = {}
    times: dict[tuple[object, ...], int] = {}
    for line, row in rows:
        key = str(row["qnext_record"]) if row.get("qnext_record") else _canonical(_told(row))
        test = (key, row["n_prompt"], row["n_gen"], row["n_depth"])
        times[test] = times.get(test, 0) + 1
        groups.setdefault((key, times[test]), []).append((line, row))
    return [_record(group) for group in groups.values()]


def _record(group: Sequence[tuple[int, Row]]) -> Record:
    line, first = group[0]
    told = _told(first)
    tests = tuple(_test(line, row) for line, row in group)
    placement = _own_placement(line, first) or told_placement(first)
    if first.get("qnext_identity"):
        identity = _own_identity(line, first)
    else:
        identity = _described(told, placement, tests)
    when = min(str(row["test_time"]) for _, row in group)
    unknown = [test for test in tests if not test.samples_ns]
    return Record(
        id=_id(line, first, {"told": told, "when": when, "tests": [_content(test) for test in tests]}),
        when=when,
        status="ok",
        kind="import",
        model_ref=str(told.get("model_filename") or told.get("model_type") or "unknown"),
        identity=identity,
        tests=tests,
        warnings=(NO_SAMPLES,) if unknown else (),
        placement=placement,
        machine={TOLD: told},
        workload={"tests": [test.name for test in tests]},
    )


def _id(line: int, row: Row, content: Mapping[str, object]) -> str:
    name = row.get("qnext_record")
    if name is None:
        return digest_of(content)[:12]
    if not re.fullmatch(r"[0-9a-f]{12}", str(name)):
        raise UsageError(f"line {line}: qnext_record is {name!r}, which is no record's id", hint=_HINT)
    return str(name)


def _test(line: int, row: Row) -> TestResult:
    prompt, generate, depth = (cast(int, row[name]) for name in ("n_prompt", "n_gen", "n_depth"))
    samples = tuple(cast(list[int], row.get("samples_ns", [])))
    if samples:
        mid, low, high = summarise(samples, prompt + generate)
    else:
        mid, spread = cast(float, row["avg_ts"]), cast(float, row["stddev_ts"])
        low, high = max(0.0, mid - spread), mid + spread
    if not all(map(math.isfinite, (mid, low, high))):
        raise UsageError(f"line {line}: its speed is no number", hint=_HINT)
    return TestResult(
        name=test_name(prompt, generate, depth),
        prompt=prompt,
        generate=generate,
        depth=depth,
        samples_ns=samples,
        median_tps=mid,
        low_tps=low,
        high_tps=high,
        mean_ns=None if samples else cast(int, row["avg_ns"]),
        stddev_ns=None if samples else cast(int, row["stddev_ns"]),
    )


def _content(test: TestResult) -> list[object]:
    return [test.name, list(test.samples_ns), test.mean_ns, test.stddev_ns]


def _own_identity(line: int, row: Row) -> Identity:
    try:
        return identity_from_dict(_dict(row["qnext_identity"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"line {line}: qnext_identity cannot be read: {error}", hint=_HINT) from error


def _own_placement(line: int, row: Row) -> dict[str, Any]:
    """The form of a placement, as far as comparing relies on it."""
    form = _dict(row.get("qnext_placement"))
    for name, value in form.items():
        if name == "overrides":
            wanted = isinstance(value, list) and all(
                isinstance(rule, dict) and isinstance(rule.get("pattern"), str) and "buffer" in rule
                for rule in value
            )
        elif name in ("threads", "threads_batch"):
            wanted = type(value) is int
        elif name == "cpu_expert_layers":
            wanted = isinstance(value, list) and all(type(layer) is int for layer in value)
        else:
            wanted = not isinstance(value, dict)
        if not wanted:
            raise UsageError(f"line {line}: qnext_placement has {name} = {value!r}", hint=_HINT)
    return form


def _described(
    told: Mapping[str, Any], placement: Mapping[str, object], tests: Sequence[TestResult]
) -> Identity:
    model = {name: told.get(name) for name in ("model_type", "model_size", "model_n_params")}
    machine = {name: told.get(name) for name in ("cpu_info", "gpu_info")}
    commit, devices = told.get("build_commit"), told.get("devices", "auto")
    return Identity(
        model_digest=DESCRIBED_PREFIX + digest_of(model),
        quant=quant_in_name(str(told.get("model_filename", ""))),
        engine=EngineIdentity(
            name="llama-bench",
            version=str(told.get("build_number", "unknown")),
            llama_commit=None if commit in (None, "", "unknown") else str(commit),
            build=str(told.get("backends", "")),
        ),
        machine=DESCRIBED_PREFIX + digest_of(machine),
        placement=digest_of(placement),
        workload=digest_of({"tests": [test.name for test in tests]}),
        model_type=told.get("model_type"),
        model_bytes=told.get("model_size"),
        model_params=told.get("model_n_params"),
        devices={"auto": None, "none": ()}.get(devices, tuple(str(devices).split("/"))),
        slots=1,
        kv_type_k=told.get("type_k"),
        kv_type_v=told.get("type_v"),
    )


def _told(row: Row) -> dict[str, object]:
    """What the row says of its configuration."""
    return {name: value for name, value in row.items() if name not in _OF_THE_TEST and value is not None}


def _canonical(told: Mapping[str, object]) -> str:
    return json.dumps(told, sort_keys=True)


def _dict(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


_HINT = "Export the record again, or take the qnext_ fields out."
