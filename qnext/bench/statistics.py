"""What a handful of samples says, and what it does not.

Speeds are told by their median, which one disturbed sample does not move, with the slowest and the fastest
sample beside it: with five samples any finer measure of spread would be invented. llama-bench prints mean and
standard deviation; on quiet machines they agree with the median. Two settings are compared over interleaved
pairs, so that heat and other load strike both. All of this is arithmetic on the samples, without chance: the
same samples give the same words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import comb, exp, log, sqrt
from statistics import NormalDist, median
from typing import Literal, TypeVar

FEW_SAMPLES = 3
HIGH_SPREAD = 0.10
DRIFT_CHANGE = 0.03
DRIFT_CHANCE = 0.05

_Number = TypeVar("_Number", int, float)

WarningKind = Literal["few_samples", "high_spread", "drift"]


@dataclass(frozen=True, slots=True)
class SampleWarning:
    """Why a figure deserves less trust, and what would give a better one."""

    kind: WarningKind
    message: str
    hint: str

    def __str__(self) -> str:
        return f"{self.message} {self.hint}"


@dataclass(frozen=True, slots=True)
class UnpairedRatio:
    """`ratio` is how much larger values of a are than values of b, measured apart from each other.

    The true one is in low..high with chance `confidence`: at least what was asked when there are samples
    enough (5 against 5 for 99 %), else what the full range has.
    """

    ratio: float
    low: float
    high: float
    confidence: float


def summarise(samples_ns: Sequence[int], tokens: int) -> tuple[float, float, float]:
    """(median, low, high) in tokens per second of `tokens` tokens per sample.

    `low` is the slowest sample and `high` the fastest: the full range, so one disturbed sample shows.
    The median is that of the speeds; with an even count, the mean of the middle two.
    Raises ValueError without samples or with a time that is not positive.
    """
    speeds = [tokens * 1e9 / sample for sample in _positive(samples_ns)]
    return median(speeds), min(speeds), max(speeds)


def relative_spread(samples_ns: Sequence[int]) -> float:
    """(slowest - fastest) / median of the times; 0 for one sample. Raises ValueError as `summarise` does."""
    times = _positive(samples_ns)
    return (max(times) - min(times)) / median(times)


def relative_drift(samples_ns: Sequence[int]) -> float:
    """Change of the time from the earlier to the later half, by medians: 0.05 is 5 % slower at the end."""
    times = _positive(samples_ns)
    half = len(times) // 2
    return median(times[-half:]) / median(times[:half]) - 1 if half else 0.0


def trend_chance(samples_ns: Sequence[int]) -> float:
    """Probability that samples without a trend rise or fall as steadily as these do (both directions).

    Mann-Kendall test: S counts the pairs whose later sample is the larger one, less those whose later sample
    is the smaller; without a trend S is near normal with variance n(n-1)(2n+5)/18 (Kendall 1975, with the
    usual correction of 1 for S being whole). Ties count as no direction, which errs towards no trend.
    """
    times = _positive(samples_ns)
    count = len(times)
    steps = sum(
        (later > earlier) - (later < earlier) for i, earlier in enumerate(times) for later in times[i:]
    )
    if count < 2 or steps == 0:
        return 1.0
    deviation = sqrt(count * (count - 1) * (2 * count + 5) / 18)
    return min(1.0, 2 * (1 - NormalDist().cdf((abs(steps) - 1) / deviation)))


def sample_warnings(samples_ns: Sequence[int], *, warmed_up: bool = True) -> tuple[SampleWarning, ...]:
    """What to say beside the figure of these samples, in the order in which they were taken.

    - `few_samples`: fewer than 3.
    - `drift`: the later half is 3 % or more off the earlier one and `trend_chance` is under 5 %
      (which fewer than 5 samples never reach).
    - `high_spread`: slowest and fastest are more than 10 % of the median apart, unless drift explains it.

    `warmed_up` says whether a warm-up that is not counted went before; the hints depend on it.
    """
    found = []
    if len(samples_ns) < FEW_SAMPLES:
        found.append(
            SampleWarning(
                "few_samples",
                f"Too few samples to tell their spread: {len(samples_ns)}.",
                "Measure with -r 5 or more.",
            )
        )
    drift = relative_drift(samples_ns)
    if abs(drift) >= DRIFT_CHANGE and trend_chance(samples_ns) < DRIFT_CHANCE:
        found.append(_drift_warning(drift, warmed_up))
    elif (spread := relative_spread(samples_ns)) > HIGH_SPREAD:
        found.append(_spread_warning(samples_ns, spread, warmed_up))
    return tuple(found)


def unpaired_ratio(a: Sequence[float], b: Sequence[float], *, confidence: float = 0.99) -> UnpairedRatio:
    """How much larger a is than b where each was measured by itself, in any number of samples.

    Give times and a ratio over 1 says that b is faster. `ratio` is the Hodges-Lehmann estimate: the median of
    all differences of a logarithm of a and one of b. low..high lie between the differences that the
    Mann-Whitney test at this confidence does not reject (Hollander, Wolfe, Chicken 2014, chapter 4): whatever
    the distribution, and without chance. Swapping a and b gives exactly the inverse.

    The samples must stand for all that can differ between a and b. Those of one process do not: each start
    lays out memory anew and meets another temperature, so a caller that compares two processes has to allow
    for that beside this interval. Raises ValueError without samples or with a value that is not positive.
    """
    first, second = [log(x) for x in _positive(a)], [log(y) for y in _positive(b)]
    steps = sorted(x - y for x in first for y in second)
    rank, reached = _unpaired_rank(len(first), len(second), confidence)
    return UnpairedRatio(
        ratio=exp(median(steps)), low=exp(steps[rank - 1]), high=exp(steps[-rank]), confidence=reached
    )


EXACT_SAMPLES = 100
"""The Mann-Whitney distribution is counted out up to so many samples in all, and near normal beyond."""


@lru_cache(maxsize=64)
def _unpaired_rank(count_a: int, count_b: int, confidence: float) -> tuple[int, float]:
    """(k, confidence reached): the k-th smallest and k-th largest difference bound the interval."""
    most = count_a * count_b
    if count_a + count_b > EXACT_SAMPLES:
        spread = sqrt(most * (count_a + count_b + 1) / 12)
        half = NormalDist().inv_cdf((1 + confidence) / 2) * spread
        return max(1, int(most / 2 - half)), confidence
    at_most = _mann_whitney(count_a, count_b)
    rank = 1
    while 2 * rank <= most and 2 * at_most[rank] <= 1 - confidence:
        rank += 1
    return rank, max(0.0, 1 - 2 * at_most[rank - 1])


def _mann_whitney(count_a: int, count_b: int) -> list[float]:
    """[u] is the chance that at most u of the pairs have the a below the b, if both are drawn alike.

    The ways to get u are the coefficients of the Gaussian binomial of count_a + count_b over count_a, the
    product of (1 - q^(count_b + i)) / (1 - q^i) for i from 1 to count_a.
    """
    ways = [1] + [0] * (count_a * count_b)
    for i in range(1, count_a + 1):
        for u in range(len(ways) - 1, count_b + i - 1, -1):
            ways[u] -= ways[u - count_b - i]
        for u in range(i, len(ways)):
            ways[u] += ways[u - i]
    total = comb(count_a + count_b, count_a)
    return [count / total for count in accumulate(ways)]


def _drift_warning(drift: float, warmed_up: bool) -> SampleWarning:
    if drift > 0:
        hint = (
            "Clocks fall as the machine heats up, or another program began to work: let it cool, repeat, and "
            "compare settings only over interleaved runs."
        )
    elif warmed_up:
        hint = "Caches and clocks were still settling after the warm-up: repeat at once, or raise -r."
    else:
        hint = "There was no warm-up: measure with it."
    word = "slower" if drift > 0 else "faster"
    return SampleWarning(
        "drift", f"The samples became steadily {word} ({abs(drift):.0%} of their time).", hint
    )


def _spread_warning(samples_ns: Sequence[int], spread: float, warmed_up: bool) -> SampleWarning:
    message = f"The samples lie {spread:.0%} of their median apart."
    first_stands_out = (
        len(samples_ns) > FEW_SAMPLES
        and samples_ns[0] == max(samples_ns)
        and relative_spread(samples_ns[1:]) <= HIGH_SPREAD
    )
    if not first_stands_out:
        hint = "Close other programs, or raise -r; the full list of samples is in the record."
    elif warmed_up:
        hint = "Only the first is slow, in spite of the warm-up: the model was not all in memory; repeat now."
    else:
        hint = "Only the first is slow: measure with a warm-up."
    return SampleWarning("high_spread", message, hint)


def _positive(values: Sequence[_Number]) -> Sequence[_Number]:
    if not values or min(values) <= 0:
        raise ValueError("samples must be there and positive")
    return values
