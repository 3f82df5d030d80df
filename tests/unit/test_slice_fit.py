"""From slices to the whole: weights that are exact, ranges that grow with noise."""

from __future__ import annotations

import random

import pytest

from qnext.plan.slice_fit import FIXED, WIDEST, forecast_whole, part_ns, weights_of

SMALL, LARGE = {FIXED: 1.0, "cpu": 4.0}, {FIXED: 1.0, "cpu": 8.0}


def test_weights_of_two_slices_are_those_of_a_line() -> None:
    assert weights_of([SMALL, LARGE], {FIXED: 1.0, "cpu": 48.0}) == pytest.approx([-10.0, 11.0])


def test_kinds_of_layers_are_told_apart_by_slices_that_have_them() -> None:
    mixed = {FIXED: 1.0, "cpu": 5.0, "gpu": 3.0}
    cost = {FIXED: 7.0, "cpu": 10.0, "gpu": 2.0}

    def ns(parts: dict[str, float]) -> float:
        return sum(cost[name] * amount for name, amount in parts.items())

    whole = {FIXED: 1.0, "cpu": 30.0, "gpu": 18.0}
    weights = weights_of([SMALL, LARGE, mixed], whole)
    found = forecast_whole([[ns(SMALL), ns(LARGE), ns(mixed)]] * 5, weights)
    assert found.ns == pytest.approx(ns(whole)) and not found.noisy
    with pytest.raises(ValueError, match="gpu"):
        weights_of([SMALL, LARGE], whole)


def test_the_range_grows_with_the_spread_of_the_rounds_but_never_beyond_its_bound() -> None:
    weights = weights_of([SMALL, LARGE], {FIXED: 1.0, "cpu": 48.0})
    chance = random.Random(1)

    def rounds(noise: float) -> list[list[float]]:
        return [[4e6 * chance.gauss(1, noise), 8e6 * chance.gauss(1, noise)] for _ in range(9)]

    calm, uneven = (forecast_whole(rounds(noise), weights).speed() for noise in (0.002, 0.02))
    assert calm.mid == pytest.approx(1e9 / 48e6, rel=0.03)
    assert uneven.high / uneven.low > calm.high / calm.low
    wild = forecast_whole(rounds(0.3), weights)
    assert wild.noisy and wild.speed().high / wild.speed().mid == pytest.approx(1 + WIDEST, rel=0.01)


def test_slices_whose_larger_one_is_faster_tell_nothing() -> None:
    weights = weights_of([SMALL, LARGE], {FIXED: 1.0, "cpu": 48.0})
    with pytest.raises(ValueError, match="not slower"):
        forecast_whole([[8e6, 4e6]], weights)


def test_a_part_that_noise_makes_negative_takes_nothing() -> None:
    fixed = weights_of([SMALL, LARGE], {FIXED: 1.0})
    assert part_ns([[5e6, 9e6]] * 3, fixed) == pytest.approx(1e6)
    assert part_ns([[4e6, 9e6]] * 3, fixed) == 0
