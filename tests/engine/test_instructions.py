"""The installed engine's instruction sets, asked of the engine itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qnext.engine.build import require_build
from qnext.engine.instructions import REPORTED, compiled_sets
from qnext.hardware import detect_machine

pytestmark = pytest.mark.engine


def test_the_engine_runs_here_so_it_needs_nothing_this_cpu_lacks(tmp_path: Path) -> None:
    build, entry = require_build(), tmp_path / "probes" / "instructions.json"
    answer = compiled_sets(build, entry)
    assert answer.sets
    assert set(answer.sets) <= REPORTED
    assert set(answer.sets) <= set(detect_machine(tmp_path).cpu.instruction_sets or answer.sets)
    assert compiled_sets(build, entry, ask=False) == answer


def test_an_engine_that_dies_of_an_illegal_instruction_is_remembered_as_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The child kills itself with SIGILL before it loads the library; a foreign build while it does."""
    (tmp_path / "sitecustomize.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    build, entry = require_build(), tmp_path / "instructions.json"
    answer = compiled_sets(build, entry)
    assert (answer.sets, answer.illegal) == (None, True)
    assert answer.reason
    assert json.loads(entry.read_text())["illegal"] is True
    monkeypatch.delenv("PYTHONPATH")
    assert compiled_sets(build, entry).illegal


def test_an_answer_that_failed_otherwise_is_asked_for_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    answer = compiled_sets(require_build(), tmp_path / "instructions.json")
    assert (answer.sets, answer.illegal) == (None, False)
    assert not (tmp_path / "instructions.json").exists()
