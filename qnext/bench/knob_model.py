"""What a few measured configurations say about all the others.

Turn times multiply: twice the threads save a share of the time, nearly the same whatever the ubatch is. So
the logarithm of an arm's time is the plan's prediction, plus an unknown per knob level, plus smaller ones per
pair of levels and per arm. With normal priors on the unknowns (as wide as the prediction's own range) that is
ridge regression, written here by covariances, which need no list of levels: two arms are as alike as the
knobs they share (Rasmussen and Williams 2006, chapter 2). Levels of a number next to each other are alike,
too. How much of the error belongs to single knobs is not known beforehand: of a few answers, the one under
which the measurements are likeliest is taken.

The machine's slow changes (heat, other load) are one more unknown that wanders with time, what disturbs two
measurements taken at once is one that both share, and a disturbed measurement counts less the further it lies
off (Student's t by reweighting), so that none of these decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import log, sqrt
from statistics import NormalDist, fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Level = float | int | str

SHARES = ((0.2, 0.1),)
"""Of the prediction's variance: what two knobs do together, what is an arm's own; the rest is single."""
SCALES = (1.0, 0.4)
LEAST_ERROR = 0.10
REACH = 2.0
"""Levels of a number this many places apart share 1/e of their error."""
SHARED_ERROR = 1.0
DRIFT = 0.20
NOISE, LEAST_NOISE, NOISE_WORTH = 0.07, 0.003, 4.0
"""Spread of a measurement before there is any; the least believed; how many measurements the first counts."""
AT_ONCE = 0.85
"""Of the noise's variance: what two measurements taken at once share."""
FREEDOM = 4.0
REFITS = 1


@dataclass(frozen=True, slots=True)
class Seen:
    """One measurement: the arm by index, its seconds, and when (0 is the start of the sweep, 1 the end).

    Two of one `moment` were taken at once, so that what disturbed one disturbed the other.
    """

    arm: int
    seconds: float
    when: float
    moment: int


@dataclass(frozen=True, slots=True)
class Belief:
    """Logarithm of all arms' seconds: `mean` [arms], `covariance` [arms, arms], `noise` of a measurement."""

    mean: Array
    covariance: Array
    noise: float

    def difference(self, one: int, other: int) -> tuple[float, float]:
        """Logarithm of the time of arm `one` over that of `other`: what is expected, and its spread."""
        cov = self.covariance
        variance = cov[one, one] + cov[other, other] - 2 * cov[one, other]
        return float(self.mean[one] - self.mean[other]), sqrt(max(0.0, variance))

    def draws(self, count: int, seed: Sequence[int]) -> Array:
        """[count, arms]: worlds that this belief holds possible, each with a log time for every arm."""
        import numpy as np

        values, vectors = np.linalg.eigh(self.covariance)
        normal = np.random.default_rng(list(seed)).standard_normal((count, len(values)))
        worlds: Array = self.mean + (normal * np.sqrt(np.maximum(values, 0))) @ vectors.T
        return worlds


class KnobModel:
    """Learns arms' times. `predicted` are (low, mid, high) seconds per arm with 90 % between low and high.

    A model refines what it found at the last call, so call `believe` with a list that only grows.
    """

    def __init__(
        self, knobs: Sequence[Mapping[str, Level]], predicted: Sequence[tuple[float, float, float]]
    ) -> None:
        import numpy as np

        wide = 2 * NormalDist().inv_cdf(0.95)
        error = max(LEAST_ERROR, fmean(log(high / low) / wide for low, _, high in predicted))
        self._mean = np.array([log(mid) for _, mid, _ in predicted])
        self._priors = [error**2 * one + SHARED_ERROR**2 for one in _likenesses(knobs)]
        self._prior, self._chosen_at = self._priors[0], 0
        self._noise, self._weight = NOISE, np.ones(0)

    def believe(self, seen: Sequence[Seen]) -> Belief:
        """The belief about all arms after these measurements."""
        import numpy as np

        if not seen:
            return Belief(self._mean, self._prior, NOISE)
        arms = np.array([one.arm for one in seen])
        when = np.array([one.when for one in seen])
        off = np.log([one.seconds for one in seen]) - self._mean[arms]
        drift = DRIFT**2 * np.minimum.outer(when, when)
        moments = np.array([one.moment for one in seen])
        same = np.equal.outer(moments, moments)
        alone = same.sum(axis=1) < 2
        shared, own = AT_ONCE * (same & ~alone), np.where(alone, 1.0, 1 - AT_ONCE)
        weight = np.append(self._weight, np.ones(len(seen) - len(self._weight)))
        for _ in range(REFITS):
            variance = self._noise**2 * own / weight
            disturbed = drift + self._noise**2 * shared + np.diag(variance)
            inverse = np.linalg.inv(self._prior[np.ix_(arms, arms)] + disturbed)
            left = variance * (inverse @ off)
            weight = (FREEDOM + 1) / (FREEDOM + (left / self._noise) ** 2 / own)
            free = float(variance @ np.diag(inverse))
            squares = float(weight @ (left**2 / own)) + NOISE_WORTH * NOISE**2
            self._noise = max(LEAST_NOISE, (squares / (free + NOISE_WORTH)) ** 0.5)
        self._weight = weight
        prior = self._prior
        if len(seen) > 1.3 * self._chosen_at:
            rest = drift + self._noise**2 * (shared + np.diag(own / weight))
            likely = [_log_likelihood(one[np.ix_(arms, arms)] + rest, off) for one in self._priors]
            self._prior, self._chosen_at = self._priors[int(np.argmax(likely))], len(seen)
        across = prior[:, arms] @ inverse
        return Belief(self._mean + across @ off, prior - across @ prior[arms], self._noise)


def _likenesses(knobs: Sequence[Mapping[str, Level]]) -> list[Array]:
    """[arms, arms] for each of SCALES and SHARES: how much of their error two arms share."""
    import numpy as np

    names = sorted({name for arm in knobs for name in arm})
    alike = [_level_likeness([arm.get(name, "") for arm in knobs]) for name in names]
    alike = [one for one in alike if one.min() < 1] or [np.eye(len(knobs))]
    single = sum(alike) / len(alike)
    pairs = [one * two for one, two in combinations(alike, 2)] or alike
    paired = sum(pairs) / len(pairs)
    return [
        scale * ((1 - two - own) * single + two * paired + own * np.eye(len(knobs)))
        for scale in SCALES
        for two, own in SHARES
    ]


def _level_likeness(levels: Sequence[Level]) -> Array:
    """1 where two arms have the same level; for numbers less the more levels lie between, else 0."""
    import numpy as np

    if any(isinstance(level, str) for level in levels):
        texts = np.array([str(level) for level in levels])
        same: Array = (texts[:, None] == texts[None, :]).astype(np.float64)
        return same
    rank = np.searchsorted(np.unique(levels), levels)
    likeness: Array = np.exp(-np.abs(rank[:, None] - rank[None, :]) / REACH)
    return likeness


def _log_likelihood(covariance: Array, off: Array) -> float:
    import numpy as np

    root = np.linalg.cholesky(covariance)
    return -float((np.linalg.solve(root, off) ** 2).sum()) / 2 - float(np.log(np.diag(root)).sum())
