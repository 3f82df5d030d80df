"""A record's identity holds what moves speeds between two runs that look alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from qnext.config import find_paths
from qnext.engine.build import EngineBuild
from qnext.pipeline.planning import PlannedModel, plan_model
from qnext.pipeline.recording import new_record
from qnext.pipeline.request import Request
from qnext.plan.values import Placement
from qnext.store.differences import find_differences
from qnext.store.record import Record

BUILD = EngineBuild("llama-cpp-python", "0.3.36", "0c1e57098", "b1", ("cpu", "cuda"))


@pytest.fixture(scope="module")
def planned(demo_model: Path) -> PlannedModel:
    request = Request(model=str(demo_model), hardware="rtx4090-rtx3060")
    return plan_model(request, find_paths(), print)


def record(planned: PlannedModel, **facts: object) -> Record:
    return new_record(planned, BUILD, "bench", (), (), {"tests": ["pp512"]}, facts)


def placed(planned: PlannedModel, placement: Placement) -> PlannedModel:
    return replace(planned, plan=replace(planned.plan, placement=placement))


def test_devices_are_named_in_their_order_with_their_driver_and_limits(planned: PlannedModel) -> None:
    first, second = planned.surroundings.machine.gpus
    gpus = (
        replace(first, name="RTX 4090", driver="580.1", power_limit_w=300),
        replace(second, name="RTX 3060", driver="580.1", power_limit_w=170, h2d_pinned_bps=12 * 10**9),
    )
    machine = replace(planned.surroundings.machine, gpus=gpus)
    planned = replace(planned, surroundings=replace(planned.surroundings, machine=machine))
    both = replace(planned.plan.placement, devices=("CUDA1", "CUDA0"))
    identity = record(placed(planned, both)).identity
    assert (identity.devices, identity.driver) == (("CUDA1 RTX 3060", "CUDA0 RTX 4090"), "580.1")
    assert identity.power is not None and identity.bandwidths is not None
    assert (identity.power["CUDA0 limit_w"], identity.power["CUDA1 limit_w"]) == (300, 170)
    assert identity.bandwidths["CUDA1 h2d"] == 12 * 10**9 and "CUDA0 h2d" not in identity.bandwidths
    none = replace(planned.plan.placement, devices=())
    assert record(placed(planned, none)).identity.devices == ()


def test_the_model_is_counted_as_llama_bench_counts_it(planned: PlannedModel) -> None:
    """llama-bench of 0c1e570 prints these two for the demo (tests/data/llama_bench.csv)."""
    identity = record(planned).identity
    assert (identity.model_bytes, identity.model_params) == (11657664, 16563120)


def test_what_the_engine_says_of_itself_and_the_model_is_kept(planned: PlannedModel) -> None:
    told = record(planned, system_info="CPU : AVX2 = 1 | ", model_desc="qwen3next ?B Q4_K - Medium")
    assert told.identity.engine.flags == "CPU : AVX2 = 1 |"
    assert told.identity.model_type == "qwen3next ?B Q4_K - Medium"
    untold = record(planned)
    assert untold.identity.engine.flags is None and untold.identity.model_type is None
    assert not find_differences(told, untold).differing


def test_a_variable_that_reaches_the_engine_is_part_of_it(
    planned: PlannedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = record(planned)
    monkeypatch.setenv("GGML_OP_OFFLOAD_MIN_BATCH", "64")
    monkeypatch.setenv("LD_PRELOAD", "/home/someone/secret.so")
    after = record(planned)
    assert after.identity.environment is not None
    assert dict(after.identity.environment) == {"GGML_OP_OFFLOAD_MIN_BATCH": "64", "LD_PRELOAD": None}
    assert find_differences(before, after).knobs == ("environment",)
    assert before.workload == {"tests": ["pp512"]}


def test_a_battery_is_told_from_the_mains(planned: PlannedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for held in (True, False, None):
        monkeypatch.setattr("qnext.pipeline.recording.on_battery", lambda held=held: held)
        power = record(planned).identity.power
        assert power is not None and power.get("on_battery") is held
