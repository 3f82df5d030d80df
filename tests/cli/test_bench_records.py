"""`qnext bench compare | export | import` as commands: what is printed, where it goes, how they end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.store.record import Record
from qnext.store.results import ResultStore
from tests.conftest import Qnext
from tests.unit.test_comparing_records import ENGINE, IDENTITY, OTHER, PLACEMENT, RECORD, result

DATA = Path(__file__).parent.parent / "data"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a baseline, a faster one with another ubatch, and one of another engine and KV type."""
    store = ResultStore(tmp_path / "data" / "results.db")
    fast = (result("tg128", [800, 801, 802, 803, 804]), result("pp512", [5, 6, 7, 8, 9]))
    upgraded = replace(ENGINE, version="0.4.0", llama_commit="feed12345", build="b2 cpu")
    for record in (
        RECORD,
        replace(OTHER, tests=fast, placement=PLACEMENT | {"ubatch": 2048}),
        replace(
            OTHER,
            id="cccc00000000",
            when="2026-10-03T12:00:00+00:00",
            identity=replace(IDENTITY, engine=upgraded),
            placement=PLACEMENT | {"kv_type_k": "q8_0", "cpu_expert_layers": [0, 1, 2, 5]},
        ),
    ):
        store.start(record)
    return tmp_path


@pytest.fixture
def command(qnext: Qnext, home: Path) -> Command:
    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return qnext("bench", *arguments, env={"QNEXT_HOME": str(home), "COLUMNS": "80", **environment})

    return run


def test_a_comparison_says_what_is_faster_and_which_knob_it_was(command: Command) -> None:
    done = command("compare", "aaaa", "bbbb")
    assert done.returncode == 0, done.stderr
    assert "faster" in done.stdout and "Only ubatch differs." in done.stdout
    assert "only in the candidate: pp512" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80
    told = json.loads(command("compare", "aaaa", "bbbb", "--json").stdout)
    assert told["schema"] == "qnext.compare/1" and not told["confounded"] and told["knobs"] == ["ubatch"]
    assert [(test["name"], test["verdict"]) for test in told["tests"]] == [("tg128", "faster")]
    assert told["tests"][0]["low"] <= told["tests"][0]["ratio"] <= told["tests"][0]["high"]


def test_a_regression_watch_ends_well_and_its_json_says_what_is_confounded(command: Command) -> None:
    done = command("compare", "--against", "last", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == 0
    assert (told["baseline"]["id"], told["candidate"]["id"]) == ("bbbb00000000", "cccc00000000")
    assert [test["verdict"] for test in told["tests"]] == ["slower"]
    assert told["confounded"] and set(told["confounded_by"]) == {"engine", "ubatch", "kv_type", "experts"}
    text = command("compare", "cccc", "--against", "0c1e570", "--knob", "engine").stdout
    assert "CONFOUNDED: experts, ubatch, kv_type differ besides engine" in " ".join(text.split())
    assert "0–2, 5" in text and max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("compare",), "two records are needed"),
        (("compare", "aaaa"), "two records are needed"),
        (("compare", "a", "b", "c"), "two records are needed"),
        (("compare", "aaaa", "bbbb", "--against", "last"), "which is the baseline"),
        (("compare", "aaaa", "zzzz"), "no record 'zzzz'"),
        (("compare", "aaaa", "bbbb", "--knob", "ubacth"), "Did you mean ubatch?"),
        (("export", "aaaa", "--model", "Qwen"), "give one of them"),
        (("export", "--model", "Coder"), "no measured test of a model called 'Coder'"),
        (("export", "-o", "/nowhere/x.csv"), "cannot write"),
        (("import", "/nowhere/x.csv"), "cannot read"),
    ],
)
def test_what_cannot_be_is_refused_with_a_way_on(
    command: Command, arguments: tuple[str, ...], told: str
) -> None:
    done = command(*arguments)
    assert done.returncode == 2 and told in done.stderr and "try:" in done.stderr and not done.stdout


@pytest.mark.thorough
def test_exports_go_to_stdout_or_a_file_and_come_back(command: Command, tmp_path: Path) -> None:
    table = command("export", "--format", "markdown").stdout
    assert table.count("tg128") == 3 and "build: feed12345 (0)" in table
    file = tmp_path / "all.csv"
    written = command("export", "--model", "qwen", "--format", "csv", "-o", str(file))
    assert not written.stdout and "wrote 4 tests" in written.stderr
    back = command("import", str(file), QNEXT_HOME=str(tmp_path / "elsewhere"))
    assert back.returncode == 0 and back.stdout.count("tg128") == 3
    elsewhere = ResultStore(tmp_path / "elsewhere" / "data" / "results.db")
    assert samples(elsewhere.get("aaaa")) == samples(RECORD)
    assert "here already: aaaa0000, bbbb0000, cccc0000" in command("import", str(file)).stderr


def test_llama_benchs_own_file_stands_in_the_history(command: Command) -> None:
    told = json.loads(command("import", str(DATA / "llama_bench.jsonl"), "--json").stdout)
    assert told["schema"] == "qnext.import/1" and [record["kind"] for record in told["records"]] == ["import"]
    name = told["records"][0]["id"]
    assert name[:8] in command("history").stdout and command("show", name).returncode == 0
    blind = command("import", str(DATA / "llama_bench.csv"))
    assert "means only" in blind.stderr


def test_the_commands_load_no_engine_and_no_numpy() -> None:
    code = (
        "import sys, qnext.cli.bench_records, qnext.pipeline.comparing_records, qnext.pipeline.exchanging\n"
        "import qnext.report.compare_view; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"llama_cpp", "numpy", "pydantic", "huggingface_hub", "psutil"}


def samples(record: Record) -> list[tuple[int, ...]]:
    return [test.samples_ns for test in record.tests]
