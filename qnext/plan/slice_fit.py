"""From the times of slices to the time of the whole model: a weighted sum.

A slice's step takes a fixed time (embedding, head, starting the graph) and a time for each layer, by where
the layer's parts are, and for each attention layer and token of context. So the whole model is a sum of
slices with weights, some of them negative: with 4 and 8 layers measured, 48 layers are eleven times the
difference, and four layers. The weights are the same for every round of measurements, hence each round gives
a forecast of its own, and their spread is the forecast's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import fmean, median
from typing import Literal

from qnext.models.shape import ModelShape, is_expert, layer_of
from qnext.plan.values import HOST, SpeedRange
from qnext.plan.weights import PlacedTensor

FIXED = "fixed"
"""What a step takes without any layer."""

Features = Mapping[str, float]
"""What a model or slice consists of: `fixed` is 1, layers by where they and their experts are, in megabytes
of what a token reads (decode) or millions of parameters that it multiplies (prefill)."""

Test = Literal["decode", "prefill"]

MODEL_ERROR = 0.05
"""Standard deviation of what slices leave out: caches, memory pages, what the router chooses."""
CONFIDENCE = 1.5
"""Standard deviations at each end of the range: 87 % of what is measured later should be inside."""
WIDEST = 0.20
"""A range is not stated wider than this share on each side; where the rounds scatter more, that is said."""


@dataclass(frozen=True, slots=True)
class SliceForecast:
    """Nanoseconds of a step of the whole model, and the standard deviation of their logarithm."""

    ns: float
    spread: float

    @property
    def noisy(self) -> bool:
        """Whether what was measured scattered more than a range may be wide."""
        return math.exp(CONFIDENCE * self.spread) > 1 + WIDEST

    def after(self, depth: int, slope: tuple[float, float]) -> SliceForecast:
        """With `depth` tokens before it, each of which adds `slope` nanoseconds (and its deviation)."""
        ns = self.ns + slope[0] * depth
        return SliceForecast(ns, math.hypot(self.spread * self.ns, slope[1] * depth) / ns)

    def speed(self, tokens: int = 1) -> SpeedRange:
        """Tokens per second of steps of so many tokens."""
        factor = min(math.exp(CONFIDENCE * self.spread), 1 + WIDEST)
        mid = tokens * 1e9 / self.ns
        return SpeedRange(round(mid / factor, 2), round(mid, 2), round(mid * factor, 2))


def features_of(
    shape: ModelShape, placed: Sequence[PlacedTensor], owners: Mapping[str, str], test: Test
) -> dict[str, float]:
    """What a token, or a token of a prompt, goes through. `owners` maps buffer types to devices."""
    share = shape.experts_used / shape.experts if shape.experts else 1.0
    homes: dict[int, str] = {}
    experts: dict[int, str] = {}
    amounts: dict[int, float] = {}
    for item in placed:
        layer = layer_of(item.tensor.name)
        if layer is None or layer >= shape.n_layer:
            continue
        routed = is_expert(item.tensor.name)
        (experts if routed else homes).setdefault(layer, owners.get(item.buffer, HOST))
        size = item.tensor.nbytes if test == "decode" else prod(item.tensor.shape)
        amounts[layer] = amounts.get(layer, 0.0) + size * (share if routed else 1.0) / 1e6
    found = {FIXED: 1.0}
    for layer, amount in amounts.items():
        home = homes.get(layer, HOST)
        kind = kind_of_layer(home, experts.get(layer, home))
        found[kind] = found.get(kind, 0.0) + amount
    return found


def kind_of_layer(home: str, experts: str) -> str:
    """How a layer on `home` with its experts on `experts` is called among the features."""
    return f"layers on {home}, experts on {experts}"


def weights_of(arms: Sequence[Features], whole: Features) -> list[float]:
    """How often each arm counts, so that together they consist of what the whole does.

    The smallest weights there are: they carry the least noise. Raises ValueError where the arms lack a part.
    """
    import numpy as np

    names = sorted({name for one in (*arms, whole) for name in one})
    matrix = np.array([[arm.get(name, 0.0) for arm in arms] for name in names])
    wanted = np.array([whole.get(name, 0.0) for name in names])
    found, *_ = np.linalg.lstsq(matrix, wanted, rcond=None)
    if not np.allclose(matrix @ found, wanted, rtol=1e-6, atol=1e-9):
        short = [name for name, row in zip(names, matrix, strict=True) if not row.any()]
        raise ValueError(f"no slice has {', '.join(short) or 'such a mixture'}")
    return [float(weight) for weight in found]


def part_ns(rounds: Sequence[Sequence[float]], weights: Sequence[float]) -> float:
    """What a part of a step takes by these rounds; noise can make a small part nothing, but not less."""
    return max(0.0, median(sum(w * ns for w, ns in zip(weights, one, strict=True)) for one in rounds))


def forecast_whole(rounds: Sequence[Sequence[float]], weights: Sequence[float]) -> SliceForecast:
    """The forecast from rounds of measurements, each with nanoseconds of every arm.

    Raises ValueError where a round comes out at nothing: what was measured cannot be times of these arms.
    """
    values = [sum(w * ns for w, ns in zip(weights, one, strict=True)) for one in rounds]
    middle, error = median_with_error(values)
    if middle <= 0:
        raise ValueError("the larger slice was not slower than the smaller one")
    return SliceForecast(middle, math.hypot(MODEL_ERROR, error / middle, unevenness(rounds)))


def unevenness(rounds: Sequence[Sequence[float]]) -> float:
    """Standard deviation of the logarithm of a slice's own times: what runs at other moments differ by."""
    arms = [[math.log(ns) for ns in arm] for arm in zip(*rounds, strict=True)]
    return fmean(_deviation(arm) for arm in arms)


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation by the median deviation: a few values may be disturbed."""
    middle = median(values)
    return 1.4826 * median(abs(value - middle) for value in values)


def median_with_error(values: Sequence[float]) -> tuple[float, float]:
    """The median, and its standard deviation."""
    return median(values), 1.25 * _deviation(values) / math.sqrt(len(values))
