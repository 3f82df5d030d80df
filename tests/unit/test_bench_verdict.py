"""Nothing is called faster without a test, and equal settings are not called different."""

from __future__ import annotations

import random
from itertools import product
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.bench.pareto import pareto_front
from qnext.bench.verdict import compare_paired, signed_rank_chance

TIMES = st.lists(st.floats(1e3, 1e12), min_size=1, max_size=25)


@given(st.lists(st.integers(-6, 6), min_size=1, max_size=9))
def test_the_chance_is_that_of_all_ways_to_draw_the_signs(differences: list[int]) -> None:
    """Enumerated: every sign pattern is as likely; ties share their mean rank, zeros are left out."""
    sizes = sorted(abs(value) for value in differences)
    rank = {
        size: sum(i for i, one in enumerate(sizes, 1) if one == size) / sizes.count(size) for size in sizes
    }
    ranks = [rank[abs(value)] for value in differences if value]
    seen = sum(rank[abs(value)] for value in differences if value > 0)
    low = min(seen, sum(ranks) - seen)
    sums = [
        sum(r for r, up in zip(ranks, ups, strict=True) if up) for ups in product((0, 1), repeat=len(ranks))
    ]
    expected = min(1.0, 2 * sum(total <= low for total in sums) / len(sums))
    assert signed_rank_chance(differences) == pytest.approx(expected)


def test_the_chance_agrees_with_published_tables() -> None:
    """Hollander, Wolfe, Chicken, table A.4: P(T+ >= 50) is 0.010 for 10 pairs."""
    assert signed_rank_chance([-1, -4, 2, 3, 5, 6, 7, 8, 9, 10]) == pytest.approx(2 * 0.00977, rel=0.01)


def test_exact_and_normal_chance_meet() -> None:
    chance = random.Random(3)
    many = [chance.gauss(0.2, 1) for _ in range(51)]
    assert signed_rank_chance(many) == pytest.approx(signed_rank_chance(many[:50]), rel=0.35)


@given(st.lists(st.tuples(st.floats(1e3, 1e9), st.floats(0.7, 1.1)), min_size=1, max_size=25))
def test_swapping_the_sides_inverts_the_verdict(pairs: list[tuple[float, float]]) -> None:
    a, b = [time for time, _ in pairs], [time * ratio for time, ratio in pairs]
    there, back = compare_paired(a, b), compare_paired(b, a)
    assert there.ratio == pytest.approx(1 / back.ratio)
    assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))
    assert there.p_value == pytest.approx(back.p_value)
    assert {there.word, back.word} in ({"faster", "slower"}, {"no difference shown"})


@given(TIMES)
def test_the_ratio_lies_in_its_interval(a: list[float]) -> None:
    found = compare_paired(a, [1e6] * len(a))
    assert found.low <= found.ratio * (1 + 1e-9) and found.ratio <= found.high * (1 + 1e-9)


def test_a_clear_difference_is_called_one_with_eight_pairs_and_not_with_seven() -> None:
    assert compare_paired([0.8] * 8, [1.0] * 8).word == "faster"
    assert compare_paired([1.25] * 8, [1.0] * 8).word == "slower"
    assert compare_paired([0.8] * 7, [1.0] * 7).word == "no difference shown"


def test_a_difference_that_nobody_would_notice_is_not_called_one() -> None:
    assert compare_paired([0.995] * 40, [1.0] * 40).p_value < 1e-9
    assert compare_paired([0.995] * 40, [1.0] * 40).word == "no difference shown"


def test_one_disturbed_pair_does_not_hide_a_difference() -> None:
    assert compare_paired([0.8] * 19 + [9.0], [1.0] * 20).word == "faster"


@pytest.mark.parametrize("a, b", [([], []), ([1.0], [0.0]), ([1.0, 2.0], [1.0])])
def test_pairs_that_cannot_be_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(ValueError, match=r"positive|zip"):
        compare_paired(a, b)


def equal_pairs(chance: random.Random, pairs: int, *, drawn_order: bool) -> tuple[list[float], list[float]]:
    """Two equal settings on a bad machine: heavy tails, bursts that last, and a rise of 6 % a measurement."""
    burst, clock, sides = 0.0, 0.0, ([], [])  # type: tuple[float, float, tuple[list[float], list[float]]]
    for _ in range(pairs):
        for side in chance.sample((0, 1), 2) if drawn_order else (0, 1):
            burst = 0.8 * burst + chance.gauss(0, 0.03)
            heavy = 0.05 * chance.gauss(0, 1) / max(0.05, chance.gammavariate(1, 1)) ** 0.5
            clock += 0.06
            sides[side].append(exp(clock + burst + heavy))
    return sides


def test_equal_settings_are_called_different_in_under_two_of_a_hundred() -> None:
    """10,000 comparisons of 8 to 10 pairs: then 40 of them give 3 or more in under 2 % of cases."""
    chance = random.Random(20)
    different = sum(
        compare_paired(*equal_pairs(chance, 8 + i % 3, drawn_order=True)).word != "no difference shown"
        for i in range(10_000)
    )
    assert 20 <= different <= 130


def test_without_a_drawn_order_drift_alone_makes_a_difference() -> None:
    """Why the order inside a pair has to be drawn: the same machine fools the test otherwise."""
    chance = random.Random(20)
    words = [compare_paired(*equal_pairs(chance, 14, drawn_order=False)).word for _ in range(300)]
    assert words.count("no difference shown") < 285


def test_the_front_keeps_what_nothing_beats_everywhere() -> None:
    points = [
        (10.0, 500.0, 4096),
        (12.0, 400.0, 4096),
        (9.0, 450.0, 4096),
        (9.0, 450.0, 8192),
        (12.0, 400.0, 4096),
    ]
    assert pareto_front(points) == [0, 1, 3, 4]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=20))
def test_every_point_off_the_front_is_beaten_by_one_on_it(points: list[tuple[float, ...]]) -> None:
    front = pareto_front(points)
    assert front
    for index, point in enumerate(points):
        beaten = any(
            all(x >= y for x, y in zip(points[i], point, strict=True)) and points[i] != point for i in front
        )
        assert beaten == (index not in front)
