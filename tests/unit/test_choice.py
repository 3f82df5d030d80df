"""Rules of the one decision: context, cache type, slots and ubatch share the memory that experts want too."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qnext.hardware import Machine, load_machine
from qnext.models.shape import read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.plan.cache import snapshot_bytes
from qnext.plan.choice import SLOTS_COST, SMALL_CACHE_GAIN, cache_types, choose_placement, fitting_placements
from qnext.plan.levers import find_levers, runner_up
from qnext.plan.machine_speeds import machine_speeds, thread_counts
from qnext.plan.options import DEFAULT_CONTEXT, MOST_SLOTS, PlanOptions
from qnext.plan.placement import Problem
from qnext.plan.plan import make_plan
from qnext.plan.problem import make_problem
from qnext.plan.turn import placed_seconds
from qnext.plan.values import HOST, WORKLOADS, Placement, Workload
from qnext.units import GIB
from tests.planning import SPEEDS, model
from tests.planning import problem as tiny

WIDE_CACHE, NARROW_CACHE = "qwen3-30b-a3b", "qwen3-next-80b-a3b"
"""96 KiB a token in f16, and 24."""


@cache
def _machine_problem(model: str, hardware: str) -> Problem:
    machine = load_machine(hardware)
    header = replace(imagined_header(model, "Q4_K_M"), paths=(Path("model.gguf"),))
    decode, prefill = thread_counts(machine)
    options = PlanOptions(threads=decode, threads_batch=prefill)
    return make_problem(header, read_shape(header), machine, options, speeds=machine_speeds(machine))


def asking(model: str, hardware: str = "rtx4070-64gb", **wishes: Any) -> Problem:
    problem = _machine_problem(model, hardware)
    return replace(problem, options=replace(problem.options, **wishes))


def test_the_cache_is_rounded_where_the_experts_it_makes_room_for_are_worth_it() -> None:
    problem = asking(WIDE_CACHE)
    chosen = choose_placement(problem)
    full = choose_placement(asking(WIDE_CACHE, kv_type_k="f16"))
    assert (chosen.placement.kv_type_k, chosen.placement.kv_type_v) == ("q8_0", "q8_0")
    assert len(chosen.placement.cpu_expert_layers) < len(full.placement.cpu_expert_layers)
    assert placed_seconds(problem, chosen) < placed_seconds(problem, full) * (1 - SMALL_CACHE_GAIN)


def test_a_cache_that_takes_little_stays_whole() -> None:
    assert choose_placement(asking(NARROW_CACHE)).placement.kv_type_k == "f16"


@pytest.mark.parametrize(
    "wishes", [{"prefer": "quality"}, {"flash_attention": "auto"}, {"kv_type_k": "f16"}, {"kv_type_v": "f16"}]
)
def test_the_cache_stays_whole_for_those_who_want_that(wishes: dict[str, Any]) -> None:
    placement = choose_placement(asking(WIDE_CACHE, **wishes)).placement
    assert (placement.kv_type_k, placement.kv_type_v) == ("f16", "f16")


def test_a_rounded_cache_counts_no_faster_than_a_whole_one_in_the_same_place() -> None:
    times = []
    for kind in ("f16", "q8_0"):
        problem = asking(WIDE_CACHE, "epyc-12ch-cpu", kv_type_k=kind, kv_type_v=kind)
        times.append(placed_seconds(problem, choose_placement(problem)))
    assert times[0] == pytest.approx(times[1])


def test_the_cache_is_rounded_before_the_context_is_halved_unless_quality_comes_first() -> None:
    whole = choose_placement(tiny(context=None, kv_type_k="f16"))
    host = whole.memory.devices[0]
    tight = host.total_bytes - host.kv_bytes // 4
    for prefer, kind, shorter in (("balanced", "q8_0", False), ("quality", "f16", True)):
        placed = choose_placement(tiny(host=tight, prefer=prefer))
        assert placed.fits
        assert placed.placement.kv_type_k == kind
        assert (placed.placement.context < whole.placement.context) is shorter


def test_what_is_too_tight_for_a_whole_cache_at_a_fixed_context_fits_with_a_rounded_one() -> None:
    whole = choose_placement(tiny(context=16_384, kv_type_k="f16"))
    tight = whole.memory.devices[0].total_bytes - 1
    assert not choose_placement(tiny(context=16_384, kv_type_k="f16", host=tight)).fits
    assert choose_placement(tiny(context=16_384, host=tight)).placement.kv_type_k == "q8_0"


def test_a_workload_longer_than_the_usual_context_gets_what_it_needs() -> None:
    workload = Workload(prompt=2000, generate=500, depth=60_000)
    placement = choose_placement(asking(NARROW_CACHE, workload=workload)).placement
    assert DEFAULT_CONTEXT < workload.tokens <= placement.context < workload.tokens + 4096


def test_slots_are_taken_only_from_what_a_single_user_does_not_miss() -> None:
    one = asking(NARROW_CACHE, "rtx5080-128gb")
    single = choose_placement(one)
    open_ = asking(NARROW_CACHE, "rtx5080-128gb", parallel=None)
    several = choose_placement(open_)
    slots = several.placement.parallel
    assert 1 < slots <= MOST_SLOTS
    assert several.placement.context == slots * single.placement.context
    assert placed_seconds(open_, several) <= placed_seconds(one, single) * (1 + SLOTS_COST)
    more = asking(NARROW_CACHE, "rtx5080-128gb", parallel=slots + 1, context=(slots + 1) * DEFAULT_CONTEXT)
    assert slots == MOST_SLOTS or placed_seconds(more, choose_placement(more)) > placed_seconds(
        one, single
    ) * (1 + SLOTS_COST)


def test_slots_share_a_context_that_was_named_and_each_holds_a_turn() -> None:
    workload = Workload(prompt=2000, generate=500, depth=7000)
    problem = asking(NARROW_CACHE, "rtx5080-128gb", parallel=None, context=20_000, workload=workload)
    placement = choose_placement(problem).placement
    assert placement.parallel == 2 and placement.context == 20_000


def test_the_best_comes_first_and_a_rounded_cache_only_with_its_gain() -> None:
    for name in (WIDE_CACHE, NARROW_CACHE):
        problem = asking(name)
        ranked = fitting_placements(problem)
        for kind in ("f16", "q8_0"):
            times = [placed_seconds(problem, one) for one in ranked if one.placement.kv_type_k == kind]
            assert times and times == sorted(times)
        assert (ranked[0].placement.kv_type_k == "q8_0") is (name == WIDE_CACHE)


def test_caches_of_earlier_prompts_stay_inside_the_ram_that_is_left() -> None:
    plan = make_plan("m", asking(NARROW_CACHE), SPEEDS)
    host = plan.devices[0]
    assert host.name == HOST and host.budget_bytes is not None
    taken = plan.caches.prompt_cache_bytes + plan.caches.checkpoints * plan.caches.checkpoint_bytes
    assert 0 < taken <= host.budget_bytes - host.total_bytes
    assert plan.caches.checkpoint_bytes == pytest.approx(75.4 * (1 << 20), rel=0.01)
    assert any("prompt cache" in reason.what for reason in plan.reasons)
    full = make_plan("m", asking(NARROW_CACHE, "rtx5080-128gb"), SPEEDS)
    assert full.caches.prompt_cache_bytes == 8 * GIB


def test_heads_for_drafting_are_priced_and_left_out() -> None:
    plan = make_plan("m", asking("qwen3-next-80b-a3b-mtp"), SPEEDS)
    told = next(reason for reason in plan.reasons if "speculative" in reason.what)
    assert not plan.placement.load_mtp
    assert 1.0 < float(told.numbers["two_tokens_over_one"]) <= 2.0
    assert int(told.numbers["heads_bytes"]) > 0


def test_a_latent_cache_has_one_type_for_keys_and_values() -> None:
    problem = asking(NARROW_CACHE, kv_type_k="q8_0")
    problem = replace(problem, shape=replace(problem.shape, latent_attention=True))
    assert cache_types(problem) == [("q8_0", "q8_0")]
    assert cache_types(asking(NARROW_CACHE, kv_type_k="q8_0")) == [("q8_0", "f16")]


@pytest.mark.parametrize("slots", [1, 4])
def test_every_slot_holds_a_turn_of_the_workload(slots: int) -> None:
    agent = WORKLOADS["agent"]
    placement = choose_placement(asking(NARROW_CACHE, workload=agent, parallel=slots)).placement
    assert placement.context // slots >= agent.tokens


def test_a_context_too_short_for_the_stated_turn_is_said() -> None:
    def warned(**wishes: Any) -> bool:
        plan = make_plan("m", asking(NARROW_CACHE, **wishes), SPEEDS)
        return any("fewer than" in said for said in plan.warnings)

    assert warned(context=4096, workload=WORKLOADS["documents"])
    assert not warned(context=4096)
    assert not warned(workload=WORKLOADS["documents"])


def test_snapshots_of_sliding_windows_are_counted() -> None:
    shape = model("tiny-gpt-oss")[1]
    placement = Placement(parallel=2, context=8192)
    cells = min(shape.sliding_window, 4096)
    windowed = [layer for layer in shape.attention_layers if shape.sliding[layer]]
    width = sum(
        shape.head_count_kv[layer] * (shape.key_length_swa + shape.value_length_swa) for layer in windowed
    )
    assert windowed and snapshot_bytes(shape, placement) == cells * width * 2


@pytest.mark.parametrize(
    ("wishes", "said"),
    [
        ({"n_gpu_layers": 5}, ("-ngl 5", "experts of 44 of 48")),
        ({"cpu_experts": 46}, ("-ncmoe 46", "experts of 46 of 48")),
    ],
)
def test_what_was_asked_for_is_the_reason(wishes: dict[str, Any], said: tuple[str, str]) -> None:
    reason = make_plan("m", asking(NARROW_CACHE, "rtx5080-128gb", **wishes), SPEEDS).reasons[0]
    assert said[0] in reason.because and said[1] in reason.what


def test_what_does_not_fit_is_told_what_would_make_it_fit() -> None:
    machine = load_machine("rtx3060-32gb")

    def problem(changed: Machine) -> Problem:
        header = imagined_header(NARROW_CACHE, "Q4_K_M")
        return make_problem(
            header, read_shape(header), changed, PlanOptions(), speeds=machine_speeds(changed)
        )

    assert not choose_placement(problem(machine)).fits
    levers = find_levers(machine, problem)
    assert any(lever.what_if.startswith("ram=") and lever.gain is None for lever in levers)


def test_a_turn_of_nothing_has_no_runner_up_to_divide_by() -> None:
    second = runner_up(asking(NARROW_CACHE, workload=Workload(0, 0, 0)))
    assert second is None or second.loss == 0.0
