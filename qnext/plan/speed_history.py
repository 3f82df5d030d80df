"""What tests on a machine teach about its other forecasts: by how much each part of the time is off there.

A forecast is a sum of times: the GPUs' own work, the CPU's, and what travels between memories. On one machine
each of them takes exp(x) times as long as forecast, x being the machine's own and the same in every placement
and for every model: a normal distribution around 0 with the standard deviation `machine` of the published
machines. What is peculiar to working with several GPUs is one more such x, of the GPUs' part. A model adds
its own deviation (`model`) and each test another (`test`):

    log(measured time / forecast time) = log(sum of share * exp(x of its part)) + x of the model + noise

That is linear near any point, so every test updates mean and covariance of all x together (a Kalman filter
without motion, the sum of exponentials taken by its slope). A test without a GPU so teaches nothing about a
GPU, one with the experts in RAM something about both, many tests of one model no more about other models than
their likeness allows. Corrections belong to parts and not to kinds of placement, because placements are
compared with them: moving one more layer to RAM then changes the forecast by that layer's work alone.

The range around a forecast narrows in the proportion in which its standard deviation shrinks by these rules.
The three deviations are fitted by `scripts/fit_history.py`, which also shows what this gains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qnext.models.shape import ModelShape
from qnext.plan.values import SpeedRange

SURPRISE = 2.0
"""Standard deviations beyond which a test is taken for disturbed: its noise then counts as so much larger
that it lies there. One answer on a busy machine would otherwise be believed however far it is off."""
_TRAVEL = ("crossing", "gpu_hop", "gpu_copy")
_EFFECTS = {"gpu": ("gpu",), "gpus": ("gpu", "several gpus"), "cpu": ("cpu",), "travel": ("travel",)}
"""Whose x a part of the time follows; `gpus` is the work of GPUs where several share it."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviations of the logarithm of time: of a machine's parts, of a model on it, of one test."""

    machine: float
    model: float
    test: float


@dataclass(frozen=True, slots=True)
class SpeedTest:
    """One measured speed beside the uncorrected forecast.

    `parts` are the forecast's nanoseconds per token, by part; `longer` is log(measured / forecast time).
    `doubt` is how many times further than usual the test may lie off what it stands for. `sliced`: it is what
    slices of the model said.
    """

    model: str
    parts: Mapping[str, float]
    longer: float
    doubt: float = 1.0
    sliced: bool = False


@dataclass(frozen=True, slots=True)
class Learnt:
    """What tests taught: mean and covariance of each x they bear upon. `tests` is their number.

    `sliced` are the models whose newest test is of slices.
    """

    spread: Spread
    tests: int = 0
    mean: Mapping[str, float] = field(default_factory=dict)
    covariance: Mapping[tuple[str, str], float] = field(default_factory=dict)
    sliced: frozenset[str] = frozenset()

    def times_longer(self, part: str) -> float:
        """What the forecast time of a part is multiplied by."""
        return math.exp(sum(self.mean.get(name, 0.0) for name in _EFFECTS.get(part, ())))

    def model_longer(self, model: str) -> float:
        """What the time of a model is multiplied by, beside its parts."""
        return math.exp(self.mean.get(_of_model(model), 0.0))

    def narrowing(self, parts: Mapping[str, float], model: str) -> float:
        """Standard deviation of a forecast over what it would be without any test, at most 1.

        `parts` are its corrected nanoseconds.
        """
        slope = _slope(parts, model)
        noise = self.spread.test**2
        before = sum((weight * self._prior(name)) ** 2 for name, weight in slope.items()) + noise
        after = sum(
            one * other * self._covariance(name, second)
            for name, one in slope.items()
            for second, other in slope.items()
        )
        return math.sqrt(min(1.0, max(0.0, after + noise) / before))

    def _prior(self, name: str) -> float:
        return self.spread.model if name.startswith(_MODEL) else self.spread.machine

    def _covariance(self, one: str, other: str) -> float:
        unmet = self._prior(one) ** 2 if one == other else 0.0
        return self.covariance.get((one, other), unmet)

    def with_test(self, test: SpeedTest) -> Learnt:
        """After one more test."""
        parts = {part: ns * self.times_longer(part) for part, ns in test.parts.items()}
        slope = _slope(parts, test.model)
        expected = math.log(sum(parts.values()) / sum(test.parts.values()))
        expected += self.mean.get(_of_model(test.model), 0.0)
        names = list(dict.fromkeys((*self.mean, *slope)))
        shared = {
            name: sum(weight * self._covariance(name, other) for other, weight in slope.items())
            for name in names
        }
        variance = sum(weight * shared[name] for name, weight in slope.items())
        surprise = test.longer - expected
        variance = max(variance + (self.spread.test * test.doubt) ** 2, (surprise / SURPRISE) ** 2)
        gain = surprise / variance
        return Learnt(
            self.spread,
            self.tests + 1,
            {name: self.mean.get(name, 0.0) + shared[name] * gain for name in names},
            {
                (one, other): self._covariance(one, other) - shared[one] * shared[other] / variance
                for one in names
                for other in names
            },
            self.sliced | {test.model} if test.sliced else self.sliced - {test.model},
        )


@dataclass(frozen=True, slots=True)
class SpeedHistory:
    """What was learnt on a machine about decode and about prefill; None where nothing was measured."""

    decode: Learnt | None = None
    prefill: Learnt | None = None


NOTHING_LEARNT = SpeedHistory()


def learn(tests: Sequence[SpeedTest], spread: Spread) -> Learnt:
    """What `tests` teach, all of them of one machine and one engine build, of decode or of prefill."""
    learnt = Learnt(spread)
    for test in tests:
        learnt = learnt.with_test(test)
    return learnt


def corrected_terms(
    terms: Mapping[str, float], learnt: Learnt | None, several_gpus: bool
) -> dict[str, float]:
    """A forecast's terms, each as many times longer as its part is on this machine."""
    if learnt is None:
        return dict(terms)
    return {term: ns * learnt.times_longer(part_of(term, several_gpus)) for term, ns in terms.items()}


def forecast_range(
    parts: Mapping[str, float], factors: tuple[float, float], learnt: Learnt | None, model: str
) -> tuple[SpeedRange, str]:
    """Tokens per second of corrected `parts`, and in words what tests here made of it, "" where nothing.

    `factors` are what the middle is multiplied by at both ends of the range while nothing is learnt.
    """
    total, narrowing, words = sum(parts.values()), 1.0, ""
    if learnt is not None and total > 0:
        raw = sum(ns / learnt.times_longer(part) for part, ns in parts.items())
        total *= learnt.model_longer(model)
        narrowing = learnt.narrowing(parts, model)
        words = _words(learnt.tests, raw / total - 1) if narrowing < 0.999 else ""
    mid = 1e9 / max(total, 1.0)
    low, high = (factor**narrowing for factor in factors)
    return SpeedRange(round(mid * low, 2), round(mid, 2), round(mid * high, 2)), words


def _words(tests: int, change: float) -> str:
    measured = f"{tests} test{'' if tests == 1 else 's'} here"
    if abs(change) < 0.005:
        return f"as in {measured}"
    return f"{abs(change):.0%} {'lower' if change < 0 else 'higher'} than without {measured}"


def part_of(term: str, several_gpus: bool) -> str:
    """The part of the time that a forecast's term belongs to: `gpu`, `gpus`, `cpu` or `travel`.

    `rpc` is by itself: what a round trip to another machine takes is not learnt.
    """
    if term in _TRAVEL:
        return "travel"
    if term.startswith("gpu_"):
        return "gpus" if several_gpus else "gpu"
    return "cpu" if term.startswith("cpu_") else term


def parts_ns(
    terms: Mapping[str, float], constants: Mapping[str, float], several_gpus: bool
) -> dict[str, float]:
    """Nanoseconds by part of a forecast's terms."""
    parts: dict[str, float] = {}
    for term, amount in terms.items():
        part = part_of(term, several_gpus)
        parts[part] = parts.get(part, 0.0) + amount * constants.get(term, 1.0)
    return parts


def model_key(shape: ModelShape) -> str:
    """What tells one model file from another here: name, file type, layers and the bytes in them."""
    size = sum(layer.total_bytes for layer in shape.layer_bytes)
    return f"{shape.name or shape.arch} {shape.quant} {shape.n_layer} layers {size}"


_MODEL = "model "


def _of_model(model: str) -> str:
    return _MODEL + model


def _slope(parts: Mapping[str, float], model: str) -> dict[str, float]:
    """How much the logarithm of the time grows with each x it depends on."""
    total = sum(parts.values())
    slope = {_of_model(model): 1.0}
    for part, ns in parts.items():
        for name in _EFFECTS.get(part, ()):
            slope[name] = slope.get(name, 0.0) + ns / total
    return slope
