"""A tuned profile: taken when it is good, stale when the machine is another, never above the user's word."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qnext.config import Paths, find_paths
from qnext.engine.build import require_build
from qnext.errors import UsageError
from qnext.hardware import machine_fingerprint
from qnext.pipeline.planning import PlannedModel, plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.tuned import (
    TunedProfile,
    load_profiles,
    memory_of,
    plan_tuned,
    profile_name,
    save_profile,
)
from qnext.store.identity import model_digest

pytestmark = [pytest.mark.engine, pytest.mark.usefixtures("demo_model")]

REQUEST = Request(model="demo", context=1024, threads=1, threads_batch=1)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return replace(find_paths(), config_dir=tmp_path)


@pytest.fixture(scope="module")
def planned(demo_model: Path) -> PlannedModel:
    return plan_model(REQUEST, find_paths(), print)


def profile_of(planned: PlannedModel, **changes: object) -> TunedProfile:
    machine = planned.surroundings.machine
    placement = replace(planned.plan.placement, ubatch=128, flash_attention="off", load_mode="mmap")
    profile = TunedProfile(
        name="demo-1",
        model="demo",
        model_digest=model_digest(planned.model.header.paths),
        machine=machine_fingerprint(machine),
        cpu=machine.cpu.model,
        engine=require_build().digest,
        driver=None,
        memory_bytes=memory_of(machine),
        when="2026-11-21T00:00:00+00:00",
        sweep="abc",
        objective="turn",
        workload={"prompt": 1, "generate": 2, "depth": 3},
        turn_s=1.5,
        ratio=(0.9, 0.85, 0.95),
        verdict="faster",
        placement=placement,
        environment={"GGML_OP_OFFLOAD_MIN_BATCH": "8"},
    )
    return replace(profile, **changes)  # type: ignore[arg-type]


def tuned(paths: Paths, request: Request = REQUEST) -> tuple[PlannedModel, str]:
    said: list[str] = []
    return plan_tuned(request, paths, said.append), "\n".join(said)


def test_a_good_profile_is_taken_with_its_environment_and_said_in_one_line(
    paths: Paths, planned: PlannedModel
) -> None:
    profile = profile_of(planned)
    save_profile(profile, paths)
    assert load_profiles(paths) == [profile]
    found, said = tuned(paths)
    assert found.plan.placement == profile.placement and found.plan.fits
    assert found.environment == {"GGML_OP_OFFLOAD_MIN_BATCH": "8"}
    assert "10% less time than the plan" in said and "\n" not in said
    assert found.plan.compute_measured


def test_what_the_user_names_stays_as_named(paths: Paths, planned: PlannedModel) -> None:
    profile = profile_of(planned)
    save_profile(profile, paths)
    found, _ = tuned(paths, replace(REQUEST, ubatch=64, context=512))
    assert found.plan.placement == replace(profile.placement, ubatch=64, context=512)
    forced, said = tuned(paths, replace(REQUEST, repack="off", n_gpu_layers=0))
    assert "not used, because of -ngl, --repack" in said
    assert forced.plan.placement.load_mode == "none"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"engine": "another"}, "the engine"),
        ({"driver": "550.1"}, "the GPU driver"),
        ({"memory_bytes": (1,)}, "the memory"),
        ({"machine": "another"}, "the machine"),
    ],
)
def test_a_profile_of_another_engine_driver_or_memory_is_stale_and_says_so(
    paths: Paths, planned: PlannedModel, change: dict[str, object], word: str
) -> None:
    save_profile(profile_of(planned, **change), paths)
    found, said = tuned(paths)
    assert found.plan.placement == planned.plan.placement and not found.environment
    assert "stale" in said and word in said and "qnext bench sweep demo" in said


def test_a_profile_of_another_model_is_none_of_ours(paths: Paths, planned: PlannedModel) -> None:
    save_profile(profile_of(planned, model_digest="other"), paths)
    found, said = tuned(paths)
    assert found.plan.placement == planned.plan.placement and not said


def test_a_profile_without_room_gives_way_to_the_plan(paths: Paths, planned: PlannedModel) -> None:
    large = replace(planned.plan.placement, context=1024, batch=1024, ubatch=1024)
    save_profile(profile_of(planned, placement=large), paths)
    bytes_needed = planned.plan.devices[0].total_bytes
    found, said = tuned(paths, replace(REQUEST, ram=bytes_needed))
    assert "no room" in said
    assert found.plan.placement == planned.plan.placement


def test_a_file_that_is_no_profile_is_named(paths: Paths) -> None:
    (paths.config_dir / "tuned").mkdir()
    (paths.config_dir / "tuned" / "x.yaml").write_text("schema: qnext.tuned/1\nname: x\n")
    with pytest.raises(UsageError, match=r"x\.yaml is no tuned profile"):
        tuned(paths)


def test_names_of_profiles_are_file_names() -> None:
    assert profile_name("user/Some Model:Q4_K_M", "sampled-sha256:0123456789", "box:abcdef0123") == (
        "Some-Model-Q4_K_M-01234567-abcdef01"
    )
