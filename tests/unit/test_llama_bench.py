"""llama-bench's output is read exactly, ours is read by its tools, and nothing in a file is taken on trust.

The files in tests/data were printed by llama-bench of llama.cpp 0c1e570 for the demo model, in each format
from a run of its own.
"""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.bench.llama_bench import FIELDS, Format, record_rows, write_rows
from qnext.bench.llama_bench_reading import read_rows
from qnext.bench.llama_bench_records import NO_SAMPLES, imported_records
from qnext.bench.statistics import summarise
from qnext.errors import StoreError, UsageError
from qnext.pipeline.exchanging import export_text, import_file
from qnext.store.record import EngineIdentity, Identity, Record, TestResult, record_to_dict
from qnext.store.results import ResultStore

DATA = Path(__file__).parent.parent / "data"
KEPT: tuple[Format, ...] = ("csv", "json", "jsonl", "sql")
COMPARE_KEYS = """
cpu_info gpu_info backends n_gpu_layers n_cpu_moe tensor_buft_overrides model_filename model_type n_batch
n_ubatch embeddings cpu_mask cpu_strict poll n_threads type_k type_v load_mode no_kv_offload split_mode
main_gpu tensor_split flash_attn n_prompt n_gen n_depth fit_target fit_min_ctx build_commit test_time avg_ts
"""
"""What compare-llama-bench.py joins two builds by, and what else it requires of each row."""


def measured(name: str, prompt: int, generate: int, samples: tuple[int, ...]) -> TestResult:
    return TestResult(name, prompt, generate, 0, samples, *summarise(samples, prompt + generate))


PLACEMENT: dict[str, object] = {
    "devices": ["CUDA0"],
    "n_gpu_layers": 999,
    "cpu_expert_layers": [0, 1],
    "overrides": [{"pattern": "blk\\.(0|1)\\.ffn='x'", "buffer": "CPU"}],
    "tensor_split": None,
    "context": 4096,
    "batch": 2048,
    "ubatch": 1024,
    "kv_type_k": "q8_0",
    "kv_type_v": "f16",
    "flash_attention": "on",
    "threads": 6,
    "threads_batch": 12,
    "load_mode": "mmap",
    "kv_offload": True,
    "op_offload": True,
    "extra_buffers": False,
}
RECORD = Record(
    "0123456789ab",
    "2026-10-01T12:00:00+00:00",
    "ok",
    "bench",
    "/home/someone/models/Qwen's-Q4_K_M.gguf",
    Identity(
        "sampled-sha256:ab",
        "Q4_K_M",
        EngineIdentity("llama-cpp-python", "0.3.36", "0c1e57098", "b5 cpu+cuda+rpc"),
        "m1",
        "p1",
        "w1",
        devices=("CUDA0 RTX",),
        bandwidths={"ram": 80_000_000_000},
    ),
    tests=(measured("pp512", 512, 0, (10**9, 11 * 10**8)), measured("tg128", 0, 128, (3 * 10**9,))),
    placement=PLACEMENT,
    machine={"cpu": {"model": "Ryzen 9"}, "gpus": [{"name": "RTX 4090"}]},
)


def again(text: str) -> list[Record]:
    return imported_records(read_rows(text.encode()))


def samples(record: Record) -> list[tuple[str, tuple[int, ...]]]:
    return [(test.name, test.samples_ns) for test in record.tests]


@pytest.mark.parametrize("format_", KEPT)
def test_what_llama_bench_prints_is_one_record_with_a_test_per_row(format_: str) -> None:
    content = (DATA / f"llama_bench.{format_}").read_bytes()
    (record,) = imported_records(read_rows(content))
    assert [test.name for test in record.tests] == ["pp16", "tg4", "pp16 @ d16", "tg4 @ d16"]
    assert record.kind == "import" and record.identity.model_type == "qwen3next ?B Q4_K - Medium"
    assert record.identity.engine == EngineIdentity("llama-bench", "1", "0c1e570", "CPU")
    assert (record.identity.model_bytes, record.identity.model_params) == (11657664, 16563120)
    assert record.placement["ubatch"] == 512 and record.placement["flash_attention"] == "auto"
    known = format_ in ("json", "jsonl")
    assert all(bool(test.samples_ns) == known == (test.mean_ns is None) for test in record.tests)
    assert record.warnings == (() if known else (NO_SAMPLES,))
    if format_ == "json":
        told = json.loads(content)
        assert [list(test.samples_ns) for test in record.tests] == [row["samples_ns"] for row in told]


@pytest.mark.parametrize("format_", KEPT)
@pytest.mark.parametrize("source", [*KEPT, "own"])
def test_export_and_import_again_keep_samples_identity_and_configuration(
    source: str, format_: Format
) -> None:
    record = RECORD
    if source != "own":
        (record,) = imported_records(read_rows((DATA / f"llama_bench.{source}").read_bytes()))
    (back,) = again(write_rows(record_rows(record), format_))
    assert (back.id, back.kind, back.when) == (record.id, "import", record.when)
    assert samples(back) == samples(record)
    assert [(test.mean_ns, test.stddev_ns) for test in back.tests] == [
        (test.mean_ns, test.stddev_ns) for test in record.tests
    ]
    assert (back.identity, back.placement) == (record.identity, record.placement)


@given(
    st.lists(st.lists(st.integers(1, 2**62), min_size=1, max_size=6), min_size=1, max_size=4),
    st.sampled_from(KEPT),
)
def test_any_samples_survive_every_format(lists: list[list[int]], format_: Format) -> None:
    tests = tuple(measured(f"pp{i + 1}", i + 1, 0, tuple(times)) for i, times in enumerate(lists))
    (back,) = again(write_rows(record_rows(replace(RECORD, tests=tests)), format_))
    assert samples(back) == [(test.name, test.samples_ns) for test in tests]


def test_the_fields_are_those_that_llama_bench_prints_in_its_order() -> None:
    assert (DATA / "llama_bench.csv").read_text().splitlines()[0] == ",".join(FIELDS)
    types = {"text": str, "int": int, "bool": bool, "float": float}
    for row in json.loads((DATA / "llama_bench.json").read_text()):
        assert all(type(row[name]) is types[kind] for name, kind in FIELDS.items())


def test_an_exported_row_has_all_that_the_compare_script_joins_by() -> None:
    for row in record_rows(RECORD):
        assert list(row)[: len(FIELDS)] == list(FIELDS)
        assert not [name for name in COMPARE_KEYS.split() if row[name] is None]
    prefill, decode = record_rows(RECORD)
    assert (prefill["n_threads"], decode["n_threads"]) == (12, 6)
    assert (prefill["backends"], prefill["n_cpu_moe"], prefill["flash_attn"]) == ("CUDA", 2, 1)
    assert "someone" not in json.dumps(prefill)


def test_exported_sql_goes_into_a_table_that_llama_bench_made() -> None:
    with sqlite3.connect(":memory:") as connection:
        connection.executescript((DATA / "llama_bench.sql").read_text())
        connection.executescript(write_rows(record_rows(RECORD), "sql"))
        assert connection.execute("SELECT count(*) FROM llama_bench").fetchone() == (6,)
        joined = connection.execute(
            "SELECT n_gen, samples_ns FROM llama_bench JOIN qnext_tests ON of_row = llama_bench.rowid"
        ).fetchall()
        assert [(gen, json.loads(times)) for gen, times in joined] == [
            (0, [10**9, 11 * 10**8]),
            (128, [3 * 10**9]),
        ]
        dump = "\n".join(connection.iterdump())
    theirs, ours = again(dump)
    assert samples(ours) == samples(RECORD) and len(theirs.tests) == 4


def test_the_markdown_table_is_llama_benchs() -> None:
    printed = (DATA / "llama_bench.md").read_text().splitlines()
    (record,) = imported_records(read_rows((DATA / "llama_bench.jsonl").read_bytes()))
    ours = write_rows(record_rows(record), "markdown").splitlines()

    def cells(line: str) -> list[str]:
        return [cell.strip() for cell in line.split("|")[1:-1]]

    assert cells(ours[0]) == cells(printed[0])
    assert [cells(line)[:-1] for line in ours[2:6]] == [cells(line)[:-1] for line in printed[2:6]]
    assert ours[-1] == printed[-1] == "build: 0c1e570 (1)"


def test_a_test_that_is_there_twice_was_measured_twice() -> None:
    content = (DATA / "llama_bench.jsonl").read_bytes()
    first, second = imported_records(read_rows(content + content))
    assert samples(first) == samples(second)


ROW: dict[str, Any] = json.loads((DATA / "llama_bench.jsonl").read_text().splitlines()[0])
GOOD = json.dumps(ROW)


def changed(**changes: object) -> str:
    return json.dumps(ROW | changes)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "empty"),
        ("hello\n", "no results"),
        ("[]", "no test"),
        ("| model | t/s |\n", "Markdown"),
        (GOOD + "\n{oops}\n", "line 2"),
        (GOOD + "\n" + GOOD[:200], "line 2"),
        ("[\n" + GOOD + ",\n", "line 3: the list has no end: llama-bench was stopped after 1 test"),
        ("[\n" + GOOD + ",\n[1]]", "line 3"),
        (GOOD + "\n\n" + changed(n_prompt=0), "line 3: n_prompt and n_gen"),
        (changed(n_prompt=-1), "n_prompt is -1"),
        (changed(n_prompt="many"), "n_prompt is 'many'"),
        (changed(n_prompt=None), "n_prompt is missing"),
        (changed(samples_ns=[1.5]), "samples_ns"),
        (changed(samples_ns=[0]), "samples_ns"),
        (changed(samples_ns=[2**63]), "samples_ns"),
        (changed(samples_ns="x"), "samples_ns"),
        (changed(samples_ns=[5, 6]), "avg_ns"),
        (changed(samples_ns=[], avg_ns=None), "avg_ns"),
        (changed(test_time="yesterday"), "test_time"),
        (changed(test_time=None), "test_time is missing"),
        (changed(model_size=10**30), "model_size"),
        (changed(cpu_strict="maybe"), "cpu_strict"),
        (changed(extra=[1]), "extra"),
        (changed(qnext_record="../x"), "qnext_record"),
        (changed(qnext_identity={"quant": None}), "qnext_identity"),
        (GOOD.replace('"avg_ts": ', '"avg_ts": NaN, "x": '), "NaN"),
        ("n_prompt,n_gen\n1,2,3\n", "line 2: 3 values for 2 columns"),
        ('n_prompt,n_gen\n"1,2\n', "line 2"),
        ("CREATE TABLE llama_bench (n_prompt);\nINSERT INTO llama_bench VALUES ('it's');\n", "line 2"),
        ("CREATE TABLE llama_bench (n_prompt);\nINSERT INTO llama_bench VALUES (1)", "line 2"),
        ("create table other (a);", "line 1"),
    ],
)
def test_a_malformed_file_is_refused_with_the_line_at_fault(text: str, told: str) -> None:
    with pytest.raises(UsageError) as error:
        again(text)
    assert told in error.value.message and error.value.hint


@pytest.mark.parametrize(
    "statement",
    [
        "ATTACH '/tmp/x' AS x;",
        "DROP TABLE llama_bench;",
        "DELETE FROM llama_bench;",
        "UPDATE llama_bench SET n_prompt = 1;",
        "INSERT INTO llama_bench SELECT 1;",
        "WITH RECURSIVE c(x) AS (SELECT 1 UNION SELECT x FROM c) INSERT INTO llama_bench SELECT x FROM c;",
        "INSERT INTO llama_bench VALUES (randomblob(1000000000));",
        "CREATE TRIGGER t AFTER INSERT ON llama_bench BEGIN SELECT 1; END;",
        "CREATE VIEW qnext_tests AS SELECT 1;",
        "CREATE VIRTUAL TABLE qnext_tests USING fts5(a);",
        "VACUUM INTO '/tmp/x';",
        "PRAGMA writable_schema = 1;",
        "SELECT load_extension('x');",
    ],
)
def test_sql_may_only_fill_its_table(statement: str) -> None:
    with pytest.raises(UsageError, match="line 2"):
        again(f"CREATE TABLE llama_bench (n_prompt);\n{statement}\n")


def test_files_of_powershell_and_older_releases_are_read() -> None:
    (record,) = imported_records(read_rows(GOOD.encode("utf-16")))
    assert record.tests[0].name == "pp16"
    old = {name: value for name, value in ROW.items() if name not in ("n_depth", "load_mode", "samples_ns")}
    (record,) = again(json.dumps(old | {"flash_attn": True, "f16_kv": "true"}))
    assert record.tests[0].depth == 0 and record.placement["flash_attention"] == "on"


def test_a_file_is_imported_once_and_nothing_of_one_with_a_mistake(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results.db")
    first = import_file(store, DATA / "llama_bench.jsonl")
    assert len(first.new) == 1 and not first.known
    second = import_file(store, DATA / "llama_bench.jsonl")
    assert not second.new and [record.id for record in second.known] == [first.new[0].id]
    bad = tmp_path / "bad.jsonl"
    bad.write_text(changed(n_ubatch=1) + "\n" + changed(n_prompt=0))
    with pytest.raises(UsageError, match=r"bad\.jsonl: line 2"):
        import_file(store, bad)
    assert len(store.history()) == 1
    with pytest.raises(UsageError, match=r"none\.json"):
        import_file(store, tmp_path / "none.json")


def test_a_record_comes_home_as_itself_and_goes_elsewhere_under_its_id(tmp_path: Path) -> None:
    home, elsewhere = ResultStore(tmp_path / "a.db"), ResultStore(tmp_path / "b.db")
    home.start(RECORD)
    text, count = export_text(home, [], None, "csv")
    file = tmp_path / "out.csv"
    file.write_text(text)
    assert count == 2 and [record.id for record in import_file(home, file).known] == [RECORD.id]
    assert home.get(RECORD.id) == RECORD
    assert samples(import_file(elsewhere, file).new[0]) == samples(RECORD)
    file.write_text(text.replace("[1000000000, 1100000000]", "[1050000000]"))
    with pytest.raises(StoreError, match="other samples of pp512"):
        import_file(home, file)


def test_only_benchmarks_are_exported_and_nothing_is_an_error(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results.db")
    store.start(replace(RECORD, kind="run"))
    for ids, model in (([], None), ([], "Coder")):
        with pytest.raises(UsageError, match="no measured test"):
            export_text(store, ids, model, "json")
    assert export_text(store, ["0123"], None, "json")[1] == 2


SCRAPS = st.sampled_from(
    [b'"', b"'", b";", b",", b"null", b"-1", b"1e999", b"NaN", b"9" * 30, b"\x00", b"\xff", b"[", b"}", b"--"]
) | st.binary(max_size=6)


@given(
    st.sampled_from(KEPT),
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 40), SCRAPS), min_size=1, max_size=4),
)
def test_a_damaged_file_is_refused_or_read_and_never_a_crash(
    format_: Format, own: bool, damage: list[tuple[int, int, bytes]]
) -> None:
    content = (DATA / f"llama_bench.{format_}").read_bytes()
    if own:
        content = write_rows(record_rows(RECORD), format_).encode()
    for position, removed, scrap in damage:
        position %= len(content) + 1
        content = content[:position] + scrap + content[position + removed :]
    try:
        records = imported_records(read_rows(content))
    except UsageError as error:
        assert error.hint
    else:
        for record in records:
            json.dumps(record_to_dict(record), allow_nan=False)
