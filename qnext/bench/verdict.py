"""Whether one setting is faster than another: said only after a test, with the size of the difference.

Two settings are measured in pairs, one right after the other, and which of the two goes first is drawn for
each pair. Then, if they are equally fast, the logarithm of a pair's ratio is as likely x as -x, however the
noise is shaped, however it drifts or comes in bursts: a flip of the draw flips the sign. That is all that
Wilcoxon's signed-rank test asks for, so its p-value is exact here. In a fixed order drift alone makes
"faster".

At 95 % two of 40 equal settings would be called different on average, and more than two in every third such
set. So the default is 99 %, and a difference under 1 % is never called one: nobody would notice it, and the
layout of a process in memory alone can make it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import exp, log, sqrt
from statistics import NormalDist, median
from typing import Literal

CONFIDENCE = 0.99
SMALLEST_EFFECT = 0.01
EXACT_PAIRS = 50

Word = Literal["faster", "slower", "no difference shown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the pairs say of a against b. `ratio` is time of a / time of b: 0.8 takes a fifth less time.

    The true ratio is in low..high with chance `confidence`: at least what was asked when there are pairs
    enough (8 for 99 %, 6 for 95 %), else what the full range has. `p_value` is two-sided.
    """

    ratio: float
    low: float
    high: float
    confidence: float
    p_value: float
    pairs: int
    word: Word


def compare_paired(
    a_ns: Sequence[float],
    b_ns: Sequence[float],
    *,
    confidence: float = CONFIDENCE,
    smallest_effect: float = SMALLEST_EFFECT,
) -> Verdict:
    """Is a faster than b? a_ns[i] and b_ns[i] are times measured side by side, the order drawn for each pair.

    `ratio` is the Hodges-Lehmann estimate: the median of the means of every two log ratios (Walsh averages);
    low..high lie between the Walsh averages that the signed-rank test at this confidence does not reject
    (Hollander, Wolfe, Chicken 2014, chapter 3). Swapping a and b gives the inverse. The word needs the test,
    the interval and a ratio at least `smallest_effect` from 1.
    Raises ValueError when the lengths differ, are 0, or a time is not positive.
    """
    if not a_ns or min(*a_ns, *b_ns) <= 0:
        raise ValueError("times must be there and positive")
    logs = [log(a) - log(b) for a, b in zip(a_ns, b_ns, strict=True)]
    averages = sorted((x + y) / 2 for i, x in enumerate(logs) for y in logs[i:])
    rank, reached = _interval_rank(len(logs), confidence)
    middle, low, high = median(averages), averages[rank - 1], averages[-rank]
    p_value = signed_rank_chance(logs)
    shown = p_value <= 1 - confidence and not low <= 0 <= high and abs(middle) >= log(1 + smallest_effect)
    return Verdict(
        ratio=exp(middle),
        low=exp(low),
        high=exp(high),
        confidence=reached,
        p_value=p_value,
        pairs=len(logs),
        word=("faster" if middle < 0 else "slower") if shown else "no difference shown",
    )


def signed_rank_chance(differences: Sequence[float]) -> float:
    """Two-sided p-value of Wilcoxon's signed-rank test that `differences` are symmetric about 0.

    Exact up to 50 of them, ties and zeros included (equal sizes share their mean rank; zeros are ranked and
    then left out, after Pratt 1959); the normal approximation beyond.
    """
    sizes = sorted(abs(difference) for difference in differences)
    last = {size: end for end, size in enumerate(sizes, start=1)}
    counts = Counter(sizes)
    twice_rank = {size: 2 * last[size] - counts[size] + 1 for size in counts}
    ranks = tuple(sorted(twice_rank[abs(value)] for value in differences if value))
    positive = sum(twice_rank[value] for value in differences if value > 0)
    return min(1.0, 2 * _at_most(ranks, min(positive, sum(ranks) - positive)))


def _at_most(ranks: tuple[int, ...], total: int) -> float:
    """Chance that the ranks which a fair coin picks sum to at most `total`."""
    if len(ranks) <= EXACT_PAIRS:
        return _rank_sums(ranks)[total]
    spread = sqrt(sum(rank * rank for rank in ranks)) / 2
    return NormalDist().cdf((total + 1 - sum(ranks) / 2) / spread)


@lru_cache(maxsize=64)
def _rank_sums(ranks: tuple[int, ...]) -> tuple[float, ...]:
    """[s] is the chance of a sum of at most s: each rank is in or out, so the counts add up rank by rank."""
    ways = [1] + [0] * sum(ranks)
    for rank in ranks:
        ways = [in_or_out + (ways[s - rank] if s >= rank else 0) for s, in_or_out in enumerate(ways)]
    scale = 0.5 ** len(ranks)
    return tuple(count * scale for count in accumulate(ways))


@lru_cache(maxsize=256)
def _interval_rank(count: int, confidence: float) -> tuple[int, float]:
    """(k, confidence reached): the k-th smallest and k-th largest Walsh average bound the interval."""
    ranks = tuple(range(2, 2 * count + 1, 2))
    rank = 1
    while rank < count * (count + 1) // 4 and 2 * _at_most(ranks, 2 * rank) <= 1 - confidence:
        rank += 1
    return rank, 1 - 2 * _at_most(ranks, 2 * rank - 2)
