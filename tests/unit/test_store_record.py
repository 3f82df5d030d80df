"""A record is its JSON and back; digests are the same exactly when what they stand for is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.errors import ModelError, StoreError
from qnext.plan.values import DeviceMemory, SpeedRange
from qnext.store.identity import digest_of, model_digest, new_record_id, utc_now
from qnext.store.record import (
    EngineIdentity,
    Identity,
    Kind,
    Record,
    Status,
    TestResult,
    record_from_dict,
    record_to_dict,
)

MIB = 1 << 20

TEXT = st.text(max_size=20)
SPEED = st.floats(0, 1e6)
BYTES = st.integers(0, 2**50)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | SPEED | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
JSON_FORMS = st.dictionaries(TEXT, JSON_VALUES, max_size=4)
DEVICES = st.lists(
    st.builds(
        DeviceMemory,
        name=TEXT,
        kind=st.sampled_from(["host", "gpu", "rpc"]),
        budget_bytes=st.none() | BYTES,
        weights_bytes=BYTES,
        kv_bytes=BYTES,
        recurrent_bytes=BYTES,
        compute_bytes=BYTES,
        other_bytes=BYTES,
    ),
    max_size=3,
).map(tuple)
TESTS = st.builds(
    TestResult,
    name=TEXT,
    prompt=BYTES,
    generate=BYTES,
    depth=BYTES,
    samples_ns=st.lists(st.integers(1, 2**62), max_size=5).map(tuple),
    median_tps=SPEED,
    low_tps=SPEED,
    high_tps=SPEED,
    predicted_tps=st.none() | st.builds(SpeedRange, SPEED, SPEED, SPEED),
    bandwidth_share=st.none() | SPEED,
    mean_ns=st.none() | BYTES,
    stddev_ns=st.none() | BYTES,
)
ENGINES = st.builds(EngineIdentity, TEXT, TEXT, st.none() | TEXT, TEXT, st.none() | TEXT)
IDENTITIES = st.builds(
    Identity,
    *(TEXT, st.none() | TEXT, ENGINES, TEXT, TEXT, TEXT),
    header_digest=st.none() | TEXT,
    model_type=st.none() | TEXT,
    model_bytes=st.none() | BYTES,
    model_params=st.none() | BYTES,
    devices=st.none() | st.lists(TEXT, max_size=2).map(tuple),
    driver=st.none() | TEXT,
    context=st.none() | BYTES,
    slots=st.none() | BYTES,
    kv_type_k=st.none() | TEXT,
    kv_type_v=st.none() | TEXT,
    bandwidths=st.none() | st.dictionaries(TEXT, BYTES, max_size=2),
    power=st.none() | st.dictionaries(TEXT, TEXT | BYTES | st.booleans(), max_size=2),
    environment=st.none() | st.dictionaries(TEXT, st.none() | TEXT, max_size=2),
)
RECORDS = st.builds(
    Record,
    id=st.text("0123456789abcdef", min_size=12, max_size=12),
    when=st.datetimes().map(lambda moment: moment.isoformat()),
    status=st.sampled_from(get_args(Status)),
    kind=st.sampled_from(get_args(Kind)),
    model_ref=TEXT,
    identity=IDENTITIES,
    planned=DEVICES,
    allocated=DEVICES,
    tests=st.lists(TESTS, max_size=3).map(tuple),
    text=st.none() | TEXT,
    warnings=st.lists(TEXT, max_size=3).map(tuple),
    placement=JSON_FORMS,
    machine=JSON_FORMS,
    error=st.none() | TEXT,
    command=st.lists(TEXT, max_size=3).map(tuple),
    workload=st.none() | JSON_FORMS,
)

ENGINE = EngineIdentity("llama-cpp-python", "0.3.36", "0c1e57098", "CPU,RPC")
IDENTITY = Identity("sampled-sha256:ab", "Q4_K_M", ENGINE, "m1", "p1", "w1")
RECORD = Record(
    "0123456789ab",
    "2026-10-01T12:00:00+00:00",
    "ok",
    "bench",
    "demo",
    IDENTITY,
    planned=(DeviceMemory("CPU", "host", None, 1, 2, 3, 4, 5),),
    tests=(TestResult("pp512", 512, 0, 0, (1, 2), 3.0, 2.0, 4.0),),
)


@given(RECORDS)
def test_a_record_survives_its_json(record: Record) -> None:
    assert record_from_dict(json.loads(json.dumps(record_to_dict(record)))) == record


def test_the_json_of_a_record_has_the_promised_keys() -> None:
    data = record_to_dict(RECORD)
    promised = {
        "schema",
        "id",
        "status",
        "when",
        "identity",
        "planned",
        "allocated",
        "tests",
        "text",
        "warnings",
    }
    assert set(data) == promised | {"kind", "model", "placement", "machine", "error", "command", "workload"}
    assert data["schema"] == "qnext.record/1"
    assert set(data["identity"]) == {field.name for field in fields(Identity)}
    assert set(data["identity"]["engine"]) == {field.name for field in fields(EngineIdentity)}
    assert {"name", "version", "llama_commit", "build"} <= set(data["identity"]["engine"])
    assert set(data["tests"][0]) == {field.name for field in fields(TestResult)}
    assert set(data["planned"]["devices"][0]) == {field.name for field in fields(DeviceMemory)} | {
        "total_bytes"
    }
    assert data["planned"]["devices"][0]["total_bytes"] == 15


def _without(key: str) -> dict[str, Any]:
    data = record_to_dict(RECORD)
    del data[key]
    return data


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"schema": "qnext.record/2"},
        {"schema": "qnext.plan/1"},
        *(_without(key) for key in record_to_dict(RECORD) if key != "workload"),
        record_to_dict(RECORD) | {"status": "done"},
        record_to_dict(RECORD) | {"id": None},
        record_to_dict(RECORD) | {"tests": [{}]},
        record_to_dict(RECORD) | {"tests": None},
        record_to_dict(RECORD) | {"planned": {"devices": [1]}},
        record_to_dict(RECORD) | {"placement": 3},
    ],
)
def test_what_is_no_record_is_a_store_error(data: dict[str, Any]) -> None:
    with pytest.raises(StoreError) as error:
        record_from_dict(data)
    assert error.value.hint


def test_a_record_of_the_first_release_is_read_with_what_it_does_not_know_as_none() -> None:
    data = record_to_dict(RECORD)
    first = {"model_digest", "quant", "engine", "machine", "placement", "workload"}
    data["identity"] = {key: value for key, value in data["identity"].items() if key in first}
    del data["workload"], data["identity"]["engine"]["flags"]
    for test in data["tests"]:
        del test["mean_ns"], test["stddev_ns"]
    assert record_from_dict(data) == RECORD


def test_a_later_additional_key_is_ignored() -> None:
    assert record_from_dict(record_to_dict(RECORD) | {"new": 1}) == RECORD


@given(JSON_FORMS)
def test_a_digest_knows_no_order_of_keys(form: dict[str, object]) -> None:
    backwards = dict(reversed(form.items()))
    assert digest_of(backwards) == digest_of(form)
    assert len(digest_of(form)) == 16


def test_a_digest_changes_with_any_value() -> None:
    forms: list[dict[str, object]] = [
        {},
        {"a": 1},
        {"a": 2},
        {"b": 1},
        {"a": [1, 2]},
        {"a": [2, 1]},
        {"a": "1"},
    ]
    assert len({digest_of(form) for form in forms}) == len(forms)
    assert digest_of({"a": (1, 2)}) == digest_of({"a": [1, 2]})
    with pytest.raises(ValueError, match="JSON"):
        digest_of({"a": float("nan")})


def _write(path: Path, size: int, changes: dict[int, bytes] | None = None) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        for offset, data in (changes or {}).items():
            file.seek(offset)
            file.write(data)
    return path


def test_a_models_digest_depends_on_its_bytes_and_not_on_its_name(tmp_path: Path) -> None:
    one = _write(tmp_path / "one.gguf", 3 * MIB, {0: b"GGUF"})
    other = _write(tmp_path / "other.gguf", 3 * MIB, {0: b"GGUF"})
    changed = _write(tmp_path / "changed.gguf", 3 * MIB, {0: b"GGUF", 2 * MIB + 7: b"x"})
    assert model_digest([one]) == model_digest([other]) != model_digest([changed])
    assert model_digest([one]).startswith("sampled-sha256:")


def test_a_models_digest_sees_the_size_the_header_the_end_and_a_stretch_of_weights(tmp_path: Path) -> None:
    size = 256 * MIB
    plain = model_digest([_write(tmp_path / "plain", size)])
    header = model_digest([_write(tmp_path / "header", size, {7 * MIB: b"x"})])
    end = model_digest([_write(tmp_path / "end", size, {size - 1: b"x"})])
    weights = model_digest([_write(tmp_path / "weights", size, {100 * MIB: b"x" * (5 * MIB)})])
    longer = model_digest([_write(tmp_path / "longer", size + 1)])
    assert len({plain, header, end, weights, longer}) == 5


def test_a_models_digest_knows_the_order_and_number_of_shards(tmp_path: Path) -> None:
    first, second = _write(tmp_path / "1", 10, {0: b"a"}), _write(tmp_path / "2", 10, {0: b"b"})
    digests = [model_digest(paths) for paths in ([first], [first, second], [second, first])]
    assert len(set(digests)) == 3


def test_a_large_file_is_sampled_and_not_read_whole(tmp_path: Path) -> None:
    sparse = _write(tmp_path / "sparse", 64 << 30)
    code = (
        "import sys; from pathlib import Path; from qnext.store.identity import model_digest\n"
        "def read(): return int(Path('/proc/self/io').read_text().split()[1])\n"
        "before = read(); model_digest([Path(sys.argv[1])]); print(read() - before)"
    )
    if not Path("/proc/self/io").exists():
        pytest.skip("needs /proc/self/io to count the bytes read")
    done = subprocess.run([sys.executable, "-c", code, sparse], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 10 * MIB


def test_a_missing_shard_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf"):
        model_digest([tmp_path / "none.gguf"])
    with pytest.raises(ModelError):
        model_digest([tmp_path])


def test_ids_are_unlike_and_times_sort_as_text() -> None:
    assert len({new_record_id() for _ in range(1000)}) == 1000
    assert utc_now() <= utc_now() and utc_now().endswith("+00:00")


def test_reading_a_record_does_not_load_sqlite_or_numpy() -> None:
    code = "import sys, qnext.store.record, qnext.bench.names; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    loaded = set(done.stdout.split())
    assert not loaded & {"sqlite3", "numpy", "psutil", "pydantic", "rich", "statistics"}
