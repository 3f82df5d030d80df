"""The choice of a quant: what fits is told apart, and each preference means what it says."""

from __future__ import annotations

from functools import cache

import pytest

from qnext.hardware import load_machine
from qnext.models.shape import read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.plan.ceiling import longest_context
from qnext.plan.choice import choose_placement
from qnext.plan.machine_speeds import machine_speeds, thread_counts
from qnext.plan.options import PlanOptions, Preference
from qnext.plan.placement import find_placement
from qnext.plan.problem import make_problem
from qnext.plan.quants import Candidate, Offer, choose_quant, weigh

LADDER = ("IQ2_XXS", "Q3_K_M", "Q4_K_M", "Q6_K", "Q8_0")


def offer(quant: str, hardware: str) -> Offer:
    machine = load_machine(hardware)
    header = imagined_header("qwen3-next-80b-a3b", quant)
    decode, prefill = thread_counts(machine)
    problem = make_problem(
        header,
        read_shape(header),
        machine,
        PlanOptions(threads=decode, threads_batch=prefill),
        speeds=machine_speeds(machine),
    )
    place = LADDER.index(quant)
    return Offer(quant, header.file_bytes, problem, float(place), "some", place == 0, "its place here")


@cache
def weighed(hardware: str) -> tuple[Candidate, ...]:
    return tuple(weigh(offer(quant, hardware)) for quant in LADDER)


def test_what_does_not_fit_says_what_is_missing() -> None:
    by_name = {one.quant: one for one in weighed("rtx4070-64gb")}
    assert [one.fits for one in by_name.values()] == [True, True, True, True, False]
    assert by_name["Q8_0"].missing and by_name["Q8_0"].prediction is None
    assert by_name["Q8_0"].context_ceiling is None


def test_a_smaller_quant_is_never_forecast_slower() -> None:
    speeds = [one.prediction.decode_tps.mid for one in weighed("rtx5080-128gb") if one.prediction]  # type: ignore[union-attr]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(("prefer", "expected"), [("quality", "Q8_0"), ("speed", "Q3_K_M")])
def test_the_extremes_take_the_ends_of_what_is_not_poor(prefer: Preference, expected: str) -> None:
    chosen, reason = choose_quant(weighed("rtx5080-128gb"), prefer)
    assert chosen is not None and reason is not None
    assert chosen.quant == expected and expected in reason.what


def test_balanced_lies_between_and_says_what_the_next_better_one_costs() -> None:
    chosen, reason = choose_quant(weighed("rtx5080-128gb"))
    assert chosen is not None and reason is not None
    assert chosen.quant in ("Q3_K_M", "Q4_K_M", "Q6_K")
    assert "above it decodes" in reason.because


def test_a_least_speed_passes_over_what_is_slower() -> None:
    everything = weighed("rtx5080-128gb")
    floor = 30.0
    chosen, _ = choose_quant(everything, "quality", floor)
    assert chosen is not None and chosen.prediction is not None
    assert chosen.prediction.decode_tps is not None and chosen.prediction.decode_tps.mid >= floor
    fastest, reason = choose_quant(everything, "quality", 10_000)
    assert fastest is not None and fastest.quant == "IQ2_XXS"
    assert reason is not None and "none reaches" in reason.because


def test_nothing_is_chosen_where_nothing_fits() -> None:
    assert choose_quant(weighed("laptop-8gb")) == (None, None)


def test_the_longest_context_fits_and_a_longer_one_does_not() -> None:
    from dataclasses import replace

    problem = offer("Q6_K", "rtx4070-64gb").problem
    problem = replace(problem, options=replace(problem.options, kv_type_k="f16"))
    placed = choose_placement(problem)
    longest = longest_context(problem, placed)
    assert longest is not None and 32_768 < longest < problem.shape.context_train

    def fits(context: int) -> bool:
        options = replace(problem.options, context=context, ubatch=placed.placement.ubatch)
        return choose_placement(replace(problem, options=options)).fits

    assert fits(longest)
    assert not fits(longest + longest // 8)
    assert find_placement(problem, placed.placement).fits
