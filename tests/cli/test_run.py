"""`qnext run MODEL --prompt`: what goes to stdout, what to stderr, what is recorded."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.models.synth import DEMO_SENTENCE
from tests.conftest import Qnext

pytestmark = pytest.mark.engine


def test_stdout_is_the_answer_and_stderr_has_predicted_allocated_and_measured(qnext: Qnext) -> None:
    done = qnext("run", "demo", "--prompt", "Hello")
    assert done.returncode == 0, done.stderr
    assert done.stdout == DEMO_SENTENCE + "\n"
    rows = {line.split()[0]: line.split() for line in done.stderr.splitlines() if line.strip()}
    assert {"measured", "predicted"} <= set(rows["tokens"])
    assert rows["prefill"].count("t/s") == rows["decode"].count("t/s") == 2
    assert rows["memory"] == ["memory", "planned", "allocated"]
    assert rows["weights"] == ["weights", "11.1", "MiB", "11.1", "MiB"]
    assert "qnext bench show" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "compute buffer size" not in done.stderr, "the engine's log is shown with -v only"


def test_standard_input_is_a_prompt_too(qnext: Qnext) -> None:
    assert qnext("run", "demo", input="Hello\n").stdout == DEMO_SENTENCE + "\n"


def test_json_is_a_record_with_the_text(qnext: Qnext) -> None:
    done = qnext("run", "demo", "-p", "Hello", "--json")
    record = json.loads(done.stdout)
    assert record["schema"] == "qnext.record/1"
    assert record["status"] == "ok"
    assert record["text"] == DEMO_SENTENCE
    assert {"model_digest", "quant", "engine", "machine", "placement", "workload"} <= record[
        "identity"
    ].keys()
    (planned,), (allocated,) = record["planned"]["devices"], record["allocated"]["devices"]
    assert planned.keys() == allocated.keys()
    for part in ("weights_bytes", "kv_bytes", "recurrent_bytes"):
        assert abs(planned[part] - allocated[part]) <= 10_500, f"{part}: beyond llama.cpp's print resolution"
    prefill, decode = record["tests"]
    assert prefill["name"].startswith("pp") and decode["name"].startswith("tg")
    for test in (prefill, decode):
        assert len(test["samples_ns"]) == 1
        assert test["median_tps"] > 0
        assert test["predicted_tps"].keys() == {"low", "mid", "high"}
    assert not done.stderr.count("error")


def test_nothing_that_was_said_is_in_the_results_database(qnext: Qnext, qnext_home: Path) -> None:
    for arguments in (
        ("--prompt", "xyzzy one", "--system=xyzzy two"),
        ("-pxyzzy", "-sys", "xyzzy", "-n", "4"),
    ):
        done = qnext("run", "demo", *arguments)
        assert done.returncode == 0, done.stderr
    database = sqlite3.connect(qnext_home / "data" / "results.db")
    dump = "\n".join(database.iterdump())
    assert "--prompt" in dump
    assert "xyzzy" not in dump
    assert "built-in demo" not in dump


def test_a_prompt_longer_than_the_context_is_explained(qnext: Qnext) -> None:
    done = qnext("run", "demo", "-c", "256", input="word " * 500)
    assert done.returncode == 7
    assert done.stdout == ""
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error: the prompt is ") and error.endswith("the context has room for 256")
    assert "--ctx-size 2048" in hint


def test_an_answer_cut_off_says_by_what(qnext: Qnext) -> None:
    done = qnext("run", "demo", "--prompt", "Hello", "--max-tokens", "3")
    assert DEMO_SENTENCE.startswith(done.stdout.strip())
    assert "cut off after 3 tokens (--max-tokens)" in done.stderr


def test_flags_override_the_files_sampling(qnext: Qnext) -> None:
    done = qnext("run", "demo", "-p", "Hello", "--temp", "0", "--top-k", "1", "--seed", "7")
    assert done.stdout == DEMO_SENTENCE + "\n"


def test_verbose_shows_the_engines_log(qnext: Qnext) -> None:
    assert "compute buffer size" in qnext("run", "demo", "-p", "Hi", "-n", "1", "-v").stderr


def test_bytes_that_are_not_text_do_not_end_in_a_traceback(qnext_home: Path) -> None:
    command = [sys.executable, "-m", "qnext", "run", "demo", "-n", "2", "--prompt"]
    given = subprocess.run([*command, b"a\xffb"], capture_output=True, stdin=subprocess.DEVNULL)
    piped = subprocess.run([*command, "-"], capture_output=True, input=b"a\xffb")
    assert given.returncode == 0
    assert piped.returncode in (0, 2)
    assert b"Traceback" not in given.stderr + piped.stderr


def test_a_terminal_without_unicode_is_no_reason_to_fail(qnext: Qnext) -> None:
    done = qnext("plan", "demo", env={"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "llama-server" in done.stdout


def test_a_reader_that_leaves_is_no_failure(qnext_home: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "qnext", "run", "demo", "--prompt", "Hello"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(os.environ),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait(30) == 0
    assert "Traceback" not in told and "Broken" not in told
