"""Measures slices of a model: loaded side by side where memory allows, in rounds that go there and back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from qnext.config import Paths
from qnext.errors import DoesNotFitError, EngineError
from qnext.pipeline.planning import PlannedModel, plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.running import RunningModel
from qnext.pipeline.surroundings import Notice
from qnext.plan.placement import Problem
from qnext.plan.slice_fit import Features, Test, features_of
from qnext.plan.turn import place_tensors
from qnext.plan.values import Placement

LEAST_ROUNDS, USUAL_ROUNDS, MOST_ROUNDS = 5, 9, 60
LEAST_SECONDS, SECONDS = 10.0, 100.0
"""Rounds go on until they are USUAL_ROUNDS and have taken LEAST_SECONDS, or until SECONDS are over."""
VISITS_ALONE, REPEATS_ALONE = 2, 4
"""Where only one slice can be loaded at a time: loads of each, there and back, and rounds in each of them."""
PROMPT, GENERATE = 256, 24
DEPTH = 1024
"""Tokens that the depth is measured with."""
FEWER_ROUNDS = 5
"""Rounds that tell what experts take."""


@dataclass(frozen=True, slots=True)
class ForecastWatch:
    """What a caller may follow: the share written, the share loaded, (round, rounds) as each begins."""

    on_write: Callable[[float], None] | None = None
    on_load: Callable[[float], None] | None = None
    on_round: Callable[[int, int], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """A slice as it is loaded; one with fewer experts per token is measured apart from the others."""

    layers: int
    request: Request


@dataclass(slots=True)
class Measured:
    """Nanoseconds per token of each arm, a list per round; of the smallest at depth 0 and at DEPTH.

    `usual` and `fewer` are of the smallest and of the same with fewer experts per token, by turns.
    """

    rounds: dict[Test, list[list[float]]] = field(default_factory=dict)
    shallow: list[float] = field(default_factory=list)
    deep: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    fewer: list[float] = field(default_factory=list)


class _Loaded:
    """The arms in memory: all of them where they fit, else the one that is asked for."""

    def __init__(self, paths: Paths, notice: Notice, on_load: Callable[[float], None] | None) -> None:
        self._paths, self._notice, self._on_load = paths, notice, on_load
        self._models: dict[Arm, RunningModel] = {}
        self.alone = False

    def get(self, arm: Arm) -> RunningModel:
        """The arm's model, loaded now if it is not."""
        if arm not in self._models:
            if self.alone:
                self.close()
            try:
                self._models[arm] = self._open(arm)
            except DoesNotFitError:
                if not self._models:
                    raise
                self.alone = True
                self.close()
                self._models[arm] = self._open(arm)
        return self._models[arm]

    def _open(self, arm: Arm) -> RunningModel:
        return RunningModel(arm.request, self._paths, self._notice, self._on_load, planner=plan_model)

    def close(self) -> None:
        for model in self._models.values():
            model.close()
        self._models.clear()


def measure_slices(
    arms: Sequence[Arm], few: Arm | None, paths: Paths, notice: Notice, watch: ForecastWatch
) -> tuple[Measured, dict[Test, list[Features]]]:
    """What was measured of the slices, and what each of them consists of by test.

    `few` is the smallest with fewer experts per token, measured where all slices can be loaded at once.
    """
    loaded, measured = _Loaded(paths, notice, watch.on_load), Measured({"decode": [], "prefill": []})
    loaded.alone = any(arm.request.rpc_servers for arm in arms)  # a worker has one client at a time
    parts: dict[Test, list[Features]] = {"decode": [], "prefill": []}
    with contextlib.closing(loaded):
        for arm in arms:
            planned = loaded.get(arm).planned
            for test in parts:
                parts[test].append(features_planned(planned, test))
            _time(loaded.get(arm), PROMPT, 0, seed=0, warmup=False)  # touches every page
        began, number = time.monotonic(), 0
        repeats = REPEATS_ALONE if loaded.alone else 1
        while not (
            number >= VISITS_ALONE * repeats if loaded.alone else _enough(number, time.monotonic() - began)
        ):
            if watch.on_round is not None:
                watch.on_round(number + 1, max(number + 1, USUAL_ROUNDS))
            taken: dict[Test, list[dict[Arm, float]]] = {test: [{} for _ in range(repeats)] for test in parts}
            for arm in arms if number // repeats % 2 else arms[::-1]:
                model = loaded.get(arm)
                for again in range(repeats):
                    seed = number + again + 1
                    taken["prefill"][again][arm] = _time(model, PROMPT, 0, seed=seed, warmup=False) / PROMPT
                    taken["decode"][again][arm] = _time(model, 0, GENERATE, seed=seed) / GENERATE
            number += repeats
            for test, rounds in taken.items():
                measured.rounds[test] += [[by_arm[arm] for arm in arms] for by_arm in rounds]
        smallest = loaded.get(min(arms, key=lambda arm: arm.layers))
        for _ in range(2):
            measured.shallow.append(_time(smallest, 0, GENERATE, seed=1) / GENERATE)
            measured.deep.append(_time(smallest, 0, GENERATE, seed=1, depth=DEPTH) / GENERATE)
        if few is not None and not loaded.alone:
            fewer = loaded.get(few)  # instead of the others, where it does not fit beside them
            for seed in () if loaded.alone else range(FEWER_ROUNDS):
                measured.fewer.append(_time(fewer, 0, GENERATE, seed=seed) / GENERATE)
                measured.usual.append(_time(smallest, 0, GENERATE, seed=seed) / GENERATE)
    return measured, parts


def _enough(rounds: int, seconds: float) -> bool:
    if rounds < LEAST_ROUNDS or rounds >= MOST_ROUNDS:
        return rounds >= MOST_ROUNDS
    done = rounds >= USUAL_ROUNDS and seconds >= LEAST_SECONDS
    return done or seconds + seconds / rounds > SECONDS


def _time(
    model: RunningModel, prompt: int, generate: int, *, seed: int, warmup: bool = True, depth: int = 0
) -> float:
    """Nanoseconds of one test as llama-bench times it."""
    events = model.session.bench(
        prompt=prompt, generate=generate, depth=depth, repetitions=1, warmup=warmup, seed=seed
    )
    samples = [float(str(event["ns"])) for event in events if event["event"] == "sample"]
    if not samples:
        raise EngineError("the engine timed nothing", hint="Try again with -v to see what it says.")
    return samples[0]


def features_planned(planned: PlannedModel, test: Test) -> dict[str, float]:
    """What a planned model consists of."""
    return features_placed(planned.problem, planned.plan.placement, test)


def features_placed(problem: Problem, placement: Placement, test: Test) -> dict[str, float]:
    """What a model consists of with any placement."""
    return features_of(problem.shape, *place_tensors(problem, placement), test)
