"""The command when its engine dies: exit 7, what happened, the log, what to try; the record is closed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from qnext.models.synth import DEMO_SENTENCE
from tests.conftest import Qnext

pytestmark = pytest.mark.engine

ENDLESS = ("--temp", "1e9", "--top-k", "0", "--top-p", "1", "--min-p", "0", "--seed", "3", "-n", "30000")
"""At this temperature every token is equally likely, so the demo talks on, the same way for one seed."""


def test_a_run_whose_engine_is_killed_ends_with_an_explanation(qnext: Qnext, demo_model: Path) -> None:
    command = [sys.executable, "-m", "qnext", "run", "demo", "--prompt", "Hi", "-c", "32768", *ENDLESS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.read(1)
        (engine,) = psutil.Process(process.pid).children()
        os.kill(engine.pid, signal.SIGKILL)
        errors = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 7
    lines = errors.splitlines()
    (said,) = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    assert "killed from outside (SIGKILL) while generating" in lines[said]
    assert lines[said - 1].startswith("  | "), "the engine's last log lines come before"
    assert lines[said + 1].startswith("  try: ") and "--ctx-size" in errors
    assert "Traceback" not in errors
    history = json.loads(qnext("bench", "history", "--json").stdout)
    assert history["records"][0]["status"] == "failed", "the record is closed, not half there"
    again = qnext("run", "demo", "--prompt", "Hi", "--temp", "0", "-c", "2048")
    assert (again.returncode, again.stdout.strip()) == (0, DEMO_SENTENCE)


def test_a_benchmark_whose_engine_crashes_keeps_what_was_measured(qnext: Qnext, demo_model: Path) -> None:
    """The layout is not to blame for SIGKILL, so nothing is tried again; the finished test stays."""
    arguments = ("bench", "run", "demo", "-p", "8,4000", "-n", "0", "-d", "0", "-r", "2")
    with subprocess.Popen(
        [sys.executable, "-m", "qnext", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        seen = b""
        while b"pp8" not in seen:
            piece = os.read(process.stderr.fileno(), 4096)
            assert piece, seen.decode()
            seen += piece
        (engine,) = psutil.Process(process.pid).children()
        os.kill(engine.pid, signal.SIGKILL)
        errors = process.communicate(timeout=30)[1].decode()
    assert process.returncode == 7 and "while benchmarking" in errors
    record = json.loads(qnext("bench", "history", "--json").stdout)["records"][0]
    assert record["status"] == "failed"
