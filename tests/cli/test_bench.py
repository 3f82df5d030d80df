"""`qnext bench run | history | show`: what is printed, what is kept when it is stopped."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from tests.cli.conftest import CTRL_C, Terminal
from tests.conftest import Qnext

pytestmark = pytest.mark.engine


def test_a_record_has_every_sample_and_is_found_again(qnext: Qnext) -> None:
    done = qnext("bench", "run", "demo", "-p", "32", "-n", "4", "-d", "0,16", "-r", "2", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["schema"] == "qnext.record/1" and record["status"] == "ok"
    assert {test["name"] for test in record["tests"]} == {"pp32", "tg4", "pp32 @ d16", "tg4 @ d16"}
    for test in record["tests"]:
        assert len(test["samples_ns"]) == 2
        assert test["low_tps"] <= test["median_tps"] <= test["high_tps"]
        assert {"name", "prompt", "generate", "depth", "predicted_tps", "bandwidth_share"} <= test.keys()
    shown = qnext("bench", "show", record["id"][:8], "--json")
    assert json.loads(shown.stdout) == record
    text = qnext("bench", "show", record["id"][:8]).stdout
    assert "pp32 samples in ms" in text and "bench run demo" in text
    assert max(map(len, text.splitlines())) <= 80
    history = qnext("bench", "history", "--limit", "1").stdout
    assert record["id"][:8] in history and "tg4 @ d16" in history
    listed = json.loads(qnext("bench", "history", "--json").stdout)
    assert listed["schema"] == "qnext.history/1" and listed["records"][0]["id"] == record["id"]


def test_ctrl_c_keeps_the_tests_that_ended(terminal: Callable[..., Terminal], qnext: Qnext) -> None:
    bench = terminal("bench", "run", "demo", "-p", "32", "-n", "2000", "-r", "5", columns=120)
    bench.wait_for("qnext: pp32: ")
    bench.type(CTRL_C)
    told = bench.wait_for("stopped", timeout=5)
    assert "1 of 2 tests are kept; see: qnext bench show" in told
    assert bench.wait() == 130
    record = json.loads(qnext("bench", "show", "--json").stdout)
    assert record["status"] == "interrupted"
    assert [test["name"] for test in record["tests"]] == ["pp32"]


def test_an_empty_history_says_how_to_begin(qnext: Qnext, tmp_path: object) -> None:
    home = {"QNEXT_HOME": str(tmp_path)}
    empty = qnext("bench", "history", env=home)
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "qnext bench run demo" in empty.stderr
    shown = qnext("bench", "show", env=home)
    assert shown.returncode == 2
    assert "nothing was measured yet" in shown.stderr
