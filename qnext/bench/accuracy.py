"""How good forecasts have been: each beside what was measured later."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from qnext.plan.values import SpeedRange


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Of `tests` forecasts: the median and the largest error as a share of what was measured, the share that
    was inside its range, and `bias`, the median of forecast over measured (above 1: too fast)."""

    tests: int
    median_error: float
    worst_error: float
    inside: float
    bias: float


def accuracy(pairs: Sequence[tuple[SpeedRange, float]]) -> Accuracy | None:
    """Of (forecast, tokens per second measured); None without any."""
    ratios = [forecast.mid / measured for forecast, measured in pairs if measured > 0]
    if not ratios:
        return None
    errors = [abs(ratio - 1) for ratio in ratios]
    inside = sum(forecast.low <= measured <= forecast.high for forecast, measured in pairs) / len(pairs)
    return Accuracy(len(ratios), median(errors), max(errors), inside, median(ratios))
