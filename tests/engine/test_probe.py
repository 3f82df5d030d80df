"""Which weight layout is safe is found by trying, once per machine and engine build."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.engine.build import require_build
from qnext.engine.probe import known_policy, safe_repack_policy
from qnext.errors import EngineError
from qnext.plan.options import RepackPolicy
from qnext.plan.values import CPU_REPACK, Override, Placement

pytestmark = pytest.mark.engine

PROMPT = "What can you do for me? " * 90
WORKS = Placement(threads=1, threads_batch=1)
CRASHES = replace(WORKS, overrides=(Override(r"weight$", CPU_REPACK),))
REFUSED = replace(WORKS, overrides=(Override("x", "CUDA7"),))


def probe(model: Path, entry: Path, **placements: Placement) -> tuple[str, dict[str, str]]:
    layouts: dict[RepackPolicy, Placement] = {"full": WORKS, "experts": WORKS, "off": WORKS}
    layouts.update(placements)  # type: ignore[arg-type]
    result = safe_repack_policy(model, PROMPT, layouts, require_build(), entry)
    return result.policy, dict(result.failures)


def test_the_fastest_layout_that_survives_is_chosen_and_remembered(demo_model: Path, tmp_path: Path) -> None:
    entry = tmp_path / "probes" / "layout.json"
    policy, failures = probe(demo_model, entry, full=CRASHES)
    assert policy == "experts" and "SIGSEGV" in failures["full"]
    assert probe(Path("/nowhere"), entry) == (policy, failures), "the second time nothing is tried"


def test_what_another_build_has_found_is_not_believed(demo_model: Path, tmp_path: Path) -> None:
    entry = tmp_path / "layout.json"
    probe(demo_model, entry)
    content = json.loads(entry.read_text())
    entry.write_text(json.dumps({**content, "build": "another"}))
    assert known_policy(entry, require_build()) is None
    for broken in ('{"build": 1}', "[]", "", json.dumps({**content, "policy": "fastest"})):
        entry.write_text(broken)
        assert known_policy(entry, require_build()) is None
    assert probe(demo_model, entry)[0] == "full"


def test_a_failure_that_no_layout_is_to_blame_for_is_not_remembered(demo_model: Path, tmp_path: Path) -> None:
    entry = tmp_path / "layout.json"
    policy, failures = probe(demo_model, entry, full=REFUSED)
    assert (policy, list(failures), entry.exists()) == ("experts", ["full"], False)


def test_an_engine_that_cannot_run_at_all_is_an_error(demo_model: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="even a tiny model") as caught:
        probe(demo_model, tmp_path / "layout.json", full=CRASHES, experts=CRASHES, off=CRASHES)
    assert "QNEXT_REBUILD_ENGINE" in caught.value.hint


def test_wrong_words_count_as_a_failure(demo_model: Path, tmp_path: Path) -> None:
    """A prompt that ends in a word of the sentence makes the demo go on from there: alive, but not right."""
    layouts: dict[RepackPolicy, Placement] = {"full": WORKS, "experts": WORKS, "off": WORKS}
    with pytest.raises(EngineError, match="was right"):
        safe_repack_policy(demo_model, PROMPT + " Your", layouts, require_build(), tmp_path / "layout.json")
