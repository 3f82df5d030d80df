"""Median and range tell what was measured; a doubtful figure has its warning, a ratio its error."""

from __future__ import annotations

import random
from itertools import combinations
from math import exp
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.bench.statistics import (
    _mann_whitney,
    _unpaired_rank,
    relative_spread,
    sample_warnings,
    summarise,
    trend_chance,
    unpaired_ratio,
)

TIMES = st.lists(st.integers(1, 10**13), min_size=1, max_size=20)
STEADY = st.lists(st.integers(1_000_000, 1_010_000), min_size=3, max_size=30)


def kinds(samples: list[int], *, warmed_up: bool = True) -> list[str]:
    return [warning.kind for warning in sample_warnings(samples, warmed_up=warmed_up)]


def test_speed_is_tokens_over_time() -> None:
    assert summarise([2_000_000_000, 1_000_000_000, 4_000_000_000], 128) == (64.0, 32.0, 128.0)


@given(TIMES, st.integers(1, 10**6))
def test_the_median_lies_between_the_slowest_and_the_fastest_sample(times: list[int], tokens: int) -> None:
    middle, low, high = summarise(times, tokens)
    assert low <= middle <= high
    assert low == tokens * 1e9 / max(times) and high == tokens * 1e9 / min(times)


@given(TIMES.filter(lambda times: len(times) % 2 == 1), st.integers(1, 10**6))
def test_the_speed_of_the_median_time_is_the_median_speed(times: list[int], tokens: int) -> None:
    assert summarise(times, tokens)[0] == tokens * 1e9 / median(times)


@given(TIMES, st.randoms())
def test_the_order_of_samples_does_not_change_the_summary(times: list[int], chance: random.Random) -> None:
    shuffled = chance.sample(times, len(times))
    assert summarise(shuffled, 512) == summarise(times, 512)
    assert relative_spread(shuffled) == relative_spread(times)


def test_one_disturbed_sample_moves_the_range_and_not_the_median() -> None:
    quiet, disturbed = [100, 101, 102, 103, 104], [100, 101, 102, 103, 900]
    assert summarise(quiet, 1)[0] == summarise(disturbed, 1)[0]
    assert summarise(disturbed, 1)[1] < summarise(quiet, 1)[1]


@pytest.mark.parametrize("samples", [[], [0], [5, -1]])
def test_samples_that_cannot_be_are_refused(samples: list[int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        summarise(samples, 128)


@given(STEADY)
def test_samples_within_one_per_cent_raise_no_warning(samples: list[int]) -> None:
    assert kinds(samples) == []


@given(TIMES)
def test_every_warning_says_what_to_do(samples: list[int]) -> None:
    assert all(warning.message and warning.hint for warning in sample_warnings(samples))


def test_fewer_than_three_samples_are_too_few() -> None:
    assert kinds([100]) == ["few_samples"]
    assert kinds([100, 100]) == ["few_samples"]


def test_a_range_over_ten_per_cent_is_a_high_spread() -> None:
    assert kinds([100, 112, 101, 103, 102]) == ["high_spread"]
    assert kinds([100, 109, 101, 103, 102]) == []


def test_the_hint_for_a_slow_first_sample_depends_on_the_warm_up() -> None:
    samples = [150, 101, 100, 102, 101]
    (cold,), (warm,) = sample_warnings(samples, warmed_up=False), sample_warnings(samples)
    assert "with a warm-up" in cold.hint
    assert "in spite of the warm-up" in warm.hint


@pytest.mark.parametrize(
    ("samples", "word"), [([100, 103, 106, 109, 112], "slower"), ([9, 8, 7, 6, 5], "faster")]
)
def test_steadily_changing_samples_are_a_drift_and_not_a_spread(samples: list[int], word: str) -> None:
    (warning,) = sample_warnings(samples)
    assert warning.kind == "drift" and word in warning.message


def test_four_samples_in_a_row_may_be_chance() -> None:
    assert "drift" not in kinds([100, 103, 106, 109])


@given(st.integers(5, 40))
def test_the_chance_of_a_trend_agrees_with_shuffles(count: int) -> None:
    """Among shuffles of equal rank, one in twenty looks like a trend of 5 % chance, not many more."""
    chance = random.Random(count)
    found = [trend_chance(chance.sample(range(1, count + 1), count)) < 0.05 for _ in range(200)]
    assert sum(found) <= 24


def test_the_unpaired_interval_misses_as_rarely_as_the_table_of_mann_and_whitney_says() -> None:
    """Critical values of U, two-sided: 5 against 5 at 5 % is 2, at 1 % is 0; 10 against 10 is 23 and 16."""
    assert _unpaired_rank(5, 5, 0.95)[0] == 3 and _unpaired_rank(5, 5, 0.99)[0] == 1
    assert _unpaired_rank(10, 10, 0.95)[0] == 24 and _unpaired_rank(10, 10, 0.99)[0] == 17
    assert _unpaired_rank(5, 5, 0.99)[1] == pytest.approx(1 - 2 / 252)
    assert _unpaired_rank(3, 3, 0.99) == (1, pytest.approx(0.9))


@pytest.mark.parametrize(("few", "many"), [(2, 3), (4, 4), (3, 6)])
def test_the_chances_of_the_unpaired_test_are_those_of_counting_all_orders(few: int, many: int) -> None:
    orders = list(combinations(range(few + many), few))
    below = [sum(1 for a in ranks for b in set(range(few + many)) - set(ranks) if a < b) for ranks in orders]
    counted = [sum(u <= limit for u in below) / len(orders) for limit in range(few * many + 1)]
    assert _mann_whitney(few, many) == pytest.approx(counted)


def test_the_normal_and_the_exact_interval_agree_where_they_meet() -> None:
    exact, normal = _unpaired_rank(50, 50, 0.99)[0], _unpaired_rank(50, 51, 0.99)[0]
    assert abs(exact / 2500 - normal / 2550) < 0.005


@given(TIMES, TIMES)
def test_swapped_samples_give_the_inverse_ratio(a: list[int], b: list[int]) -> None:
    there, back = unpaired_ratio(a, b), unpaired_ratio(b, a)
    assert there.ratio == pytest.approx(1 / back.ratio) and there.low == pytest.approx(1 / back.high)
    assert there.low <= there.ratio <= there.high and 0 <= there.confidence < 1


def test_alike_samples_are_rarely_told_apart_and_unlike_ones_are() -> None:
    chance = random.Random(7)

    def draw(speed: float) -> list[float]:
        return [speed * exp(chance.gauss(0, 0.02)) for _ in range(8)]

    intervals = [unpaired_ratio(draw(1), draw(1)) for _ in range(2000)]
    missed = sum(not found.low <= 1 <= found.high for found in intervals)
    assert missed <= 2000 * 0.01 * 1.5
    assert all(unpaired_ratio(draw(1.2), draw(1)).low > 1 for _ in range(50))


def test_an_unpaired_ratio_needs_samples_on_both_sides() -> None:
    for a, b in (([], [1.0]), ([1.0], []), ([1.0], [0.0])):
        with pytest.raises(ValueError, match="positive"):
            unpaired_ratio(a, b)
