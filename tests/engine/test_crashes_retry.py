"""A layout that crashes costs the user a moment: explained, retried safer, and remembered once that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from qnext.config import Paths, find_paths
from qnext.engine.build import require_build
from qnext.engine.crash import EngineCrashError
from qnext.engine.probe import known_policy, remember_policy
from qnext.models.synth import DEMO_SENTENCE
from qnext.pipeline.planning import PlannedModel, plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.running import RunningModel
from qnext.pipeline.surroundings import Notice, layout_entry
from qnext.plan.values import CPU_REPACK, Override, Placement
from tests.conftest import Qnext

pytestmark = pytest.mark.engine

QUESTION = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"
REQUEST = Request(model="demo", context=2048, threads=1, threads_batch=1)


def everything_repacked(placement: Placement) -> Placement:
    """Crashes the loader on every CPU, as the AMX buffers crash the first decode on some."""
    return replace(placement, overrides=(Override(r"weight$", CPU_REPACK),))


def planner_with_crash(*layouts: str) -> Callable[[Request, Paths, Notice], PlannedModel]:
    """The real planner, but what it plans for `layouts` crashes for real."""

    def plan(request: Request, paths: Paths, notice: Notice) -> PlannedModel:
        planned = plan_model(request, paths, notice)
        if planned.surroundings.repack not in layouts:
            return planned
        crashing = everything_repacked(planned.plan.placement)
        return replace(planned, plan=replace(planned.plan, placement=crashing))

    return plan


@pytest.fixture
def paths(tmp_path: Path, demo_model: Path) -> Paths:
    """A copy of the session's caches, so that what is remembered here harms no other test."""
    shared = find_paths()
    plan_model(REQUEST, shared, print)
    shutil.copytree(shared.cache_dir, tmp_path / "cache")
    return replace(shared, cache_dir=tmp_path / "cache")


def entry_for_this_machine(paths: Paths) -> Path:
    return layout_entry(paths, plan_model(REQUEST, paths, print).surroundings.machine, require_build())


def say_the_sentence(model: RunningModel) -> str:
    events = model.generate(QUESTION, max_tokens=60, sampling={})
    return "".join(str(event["text"]) for event in events if event["event"] == "token")


def test_a_remembered_layout_that_crashes_is_retried_safer_and_remembered_anew(paths: Paths) -> None:
    entry, notices = entry_for_this_machine(paths), list[str]()
    remember_policy(entry, require_build(), "full", {})
    with RunningModel(REQUEST, paths, notices.append, planner=planner_with_crash("full")) as model:
        assert say_the_sentence(model) == DEMO_SENTENCE
        assert model.planned.surroundings.repack == "experts"
        assert any("--repack full was given up" in warning for warning in model.warnings)
    said = "\n".join(notices)
    assert "SIGSEGV" in said and "trying again with --repack experts" in said
    assert "  | " in said, "the engine's last lines are shown"
    known = known_policy(entry, require_build())
    assert known is not None and known.policy == "experts"
    assert "SIGSEGV" in known.failures["full"]
    with RunningModel(REQUEST, paths, notices.append, planner=planner_with_crash("full")) as model:
        assert say_the_sentence(model) == DEMO_SENTENCE
    assert "\n".join(notices).count("trying again") == 1, "the next run starts with the safe layout"


def test_two_layouts_may_crash_and_what_is_known_of_both_is_kept(paths: Paths) -> None:
    entry = entry_for_this_machine(paths)
    remember_policy(entry, require_build(), "full", {})
    with RunningModel(REQUEST, paths, print, planner=planner_with_crash("full", "experts")) as model:
        assert say_the_sentence(model) == DEMO_SENTENCE
        assert model.planned.surroundings.repack == "off"
    content = json.loads(entry.read_text())
    assert (content["policy"], sorted(content["failures"])) == ("off", ["experts", "full"])


def test_a_layout_that_was_asked_for_is_retried_too_but_not_held_against_the_machine(paths: Paths) -> None:
    entry, notices = entry_for_this_machine(paths), list[str]()
    before = entry.read_text()
    asked = replace(REQUEST, repack="full")
    with RunningModel(asked, paths, notices.append, planner=planner_with_crash("full")) as model:
        assert say_the_sentence(model) == DEMO_SENTENCE
    assert "trying again with --repack experts" in "\n".join(notices)
    assert entry.read_text() == before


def test_when_every_layout_crashes_the_error_remains_and_nothing_is_remembered(paths: Paths) -> None:
    entry = entry_for_this_machine(paths)
    before, children = entry.read_text(), psutil.Process().children(recursive=True)
    with pytest.raises(EngineCrashError, match="crashed") as caught:
        RunningModel(REQUEST, paths, print, planner=planner_with_crash("full", "experts", "off"))
    assert caught.value.exit_code == 7 and caught.value.log_tail
    assert entry.read_text() == before
    assert psutil.Process().children(recursive=True) == children


def test_a_crash_under_the_users_own_overrides_is_not_retried(paths: Paths) -> None:
    notices = list[str]()

    def plan(request: Request, folders: Paths, notice: Notice) -> PlannedModel:
        planned = plan_model(request, folders, notice)
        return replace(
            planned, plan=replace(planned.plan, placement=everything_repacked(planned.plan.placement))
        )

    own = replace(REQUEST, overrides=(Override("exps", "CPU"),))
    with pytest.raises(EngineCrashError) as caught:
        RunningModel(own, paths, notices.append, planner=plan)
    assert "-ot" in caught.value.hint and not any("trying again" in notice for notice in notices)


def test_asking_for_full_repack_on_the_command_line_ends_well_on_any_cpu(qnext: Qnext) -> None:
    """Where the CPU has AMX this crashes for real in the first decode, is explained, and is tried again."""
    result = qnext("run", "demo", "--prompt", "Hi", "--temp", "0", "--repack", "full", "-c", "2048")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == DEMO_SENTENCE
    if "trying again" in result.stderr:
        assert "crashed" in result.stderr and "--repack experts" in result.stderr
