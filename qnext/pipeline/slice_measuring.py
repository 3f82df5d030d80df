"""Measures slices of a model: loaded side by side where memory allows, in rounds that go there and back."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from statistics import median
from typing import cast

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
from qnext.units import MIB

LEAST_ROUNDS, USUAL_ROUNDS, MOST_ROUNDS = 5, 9, 60
LEAST_SECONDS, SECONDS = 10.0, 75.0
"""Rounds go on until they are USUAL_ROUNDS and have taken LEAST_SECONDS, or until SECONDS are over."""
ROUNDS_SHARE = 0.8
"""Of the time to measure, for who waits."""
VISITS_ALONE, REPEATS_ALONE = 2, 4
"""Where only one slice can be loaded at a time: loads of each, there and back, and rounds in each of them."""
PROMPT, GENERATE = 256, 8
PIECES = 3
"""Answers per round and prompt: short ones, by turns, fall into the same moments of an uneven machine."""
DEPTH = 2048
"""Tokens that the depth is measured with."""
UBATCHES = 128, 256, 512, 1024, 2048, 4096
UBATCH_SECONDS = 5.0
"""Sizes of a batch that a prompt is measured with, as long as one takes no longer than this."""
PROGRAM_BYTES = 64 * MIB
"""What a process takes beside its model, at most: the interpreter and the engine's library."""
BARE_TOKENS = 64
PAIRS = 8
"""How often depth and experts are measured, each time beside the usual."""


@dataclass(frozen=True, slots=True)
class ForecastWatch:
    """What a caller may follow: the share written, the share loaded, (what is measured now, share done)."""

    on_write: Callable[[float], None] | None = None
    on_load: Callable[[float], None] | None = None
    on_measure: Callable[[str, float], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """A slice as it is loaded; one with fewer experts per token is measured apart from the others."""

    layers: int
    request: Request


@dataclass(slots=True)
class Measured:
    """Nanoseconds per token of each arm, a list per round.

    `shallow` and `deep` are pairs at depth 0 and at DEPTH, of the smallest with few experts per token;
    `fewer` and `usual` are pairs of it and of the smallest as it is, none where only one can be loaded.
    `ubatch` is what a prompt takes in the smallest, by its batch; `bare` what a step of each bare slice does.
    `memory_bytes` is what the plans of all
    slices in memory at once add up to, and their programs.
    """

    rounds: dict[Test, list[list[float]]] = field(default_factory=dict)
    shallow: list[float] = field(default_factory=list)
    deep: list[float] = field(default_factory=list)
    fewer: list[float] = field(default_factory=list)
    usual: list[float] = field(default_factory=list)
    ubatch: dict[int, list[float]] = field(default_factory=dict)
    bare: list[list[float]] = field(default_factory=list)
    memory_bytes: int = 0


class _Loaded:
    """The arms in memory: all of them where they fit, else the one that is asked for."""

    def __init__(self, paths: Paths, notice: Notice, on_load: Callable[[float], None] | None) -> None:
        self._paths, self._notice, self._on_load = paths, notice, on_load
        self._models: dict[Arm, RunningModel] = {}
        self.planned: dict[Arm, PlannedModel] = {}
        self.alone = False
        self.most_bytes = 0

    @property
    def repeats(self) -> int:
        """Rounds in each visit of an arm."""
        return REPEATS_ALONE if self.alone else 1

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
            self.planned[arm] = self._models[arm].planned
            plans = [model.planned.plan for model in self._models.values()]
            planned = sum(device.total_bytes for plan in plans for device in plan.devices)
            self.most_bytes = max(self.most_bytes, planned + PROGRAM_BYTES * (1 + len(plans)))
        return self._models[arm]

    def _open(self, arm: Arm) -> RunningModel:
        model = RunningModel(arm.request, self._paths, self._notice, self._on_load, planner=plan_model)
        try:
            _time(model, PROMPT, 0, seed=0, warmup=False)  # touches every page
        except BaseException:
            model.close()
            raise
        return model

    def close(self) -> None:
        for model in self._models.values():
            model.close()
        self._models.clear()


def measure_slices(
    arms: Sequence[Arm],
    few: Arm | None,
    bare: Sequence[Arm],
    paths: Paths,
    notice: Notice,
    watch: ForecastWatch,
) -> tuple[Measured, dict[Test, list[Features]]]:
    """What was measured of the slices, and what each of them consists of by test.

    `few` is the smallest with fewer experts per token: depth is measured there, as a prompt takes less time.
    `bare` have next to no weights, one for each way to place layers.
    """

    def say(what: str, share: float) -> None:
        if watch.on_measure is not None:
            watch.on_measure(what, share)

    loaded, measured = _Loaded(paths, notice, watch.on_load), Measured({"decode": [], "prefill": []})
    loaded.alone = any(arm.request.rpc_servers for arm in arms)  # a worker has one client at a time
    with contextlib.closing(loaded):
        for arm in () if loaded.alone else arms:
            loaded.get(arm)
        began, number, repeats = time.monotonic(), 0, loaded.repeats
        while not (
            number >= VISITS_ALONE * repeats if loaded.alone else _enough(number, time.monotonic() - began)
        ):
            count = VISITS_ALONE * repeats if loaded.alone else max(number + 1, USUAL_ROUNDS)
            say(f"round {number + 1} of {count}", ROUNDS_SHARE * number / count)
            order = arms[::-1] if number // repeats % 2 else arms  # back to the first, which is used again
            for test, rows in _measure_round(loaded, order, number):
                measured.rounds[test] += [[row[arm] for arm in arms] for row in rows]
            number += repeats
        smallest = loaded.get(arms[0])
        say("batch sizes", ROUNDS_SHARE)
        _measure_ubatch(smallest, measured)
        model = smallest if few is None else loaded.get(few)
        say("depth", (1 + ROUNDS_SHARE) / 2)
        _measure_depth(model, measured)
        if model is not smallest and not loaded.alone:
            say("experts", 0.95)
            for seed in range(PAIRS):
                measured.fewer.append(_time(model, 0, GENERATE, seed=seed) / GENERATE)
                measured.usual.append(_time(smallest, 0, GENERATE, seed=seed) / GENERATE)
        say("synchronisation", 0.98)
        for one in bare:
            empty = loaded.get(one)
            steps = [_time(empty, 0, BARE_TOKENS, seed=seed) / BARE_TOKENS for seed in range(PAIRS)]
            measured.bare.append(steps)
        measured.memory_bytes = loaded.most_bytes
    parts: dict[Test, list[Features]] = {
        test: [features_planned(loaded.planned[arm], test) for arm in arms] for test in measured.rounds
    }
    return measured, parts


def _measure_round(
    loaded: _Loaded, arms: Sequence[Arm], number: int
) -> Iterable[tuple[Test, list[dict[Arm, float]]]]:
    """Rows with a time for each arm: those of a row near each other where all arms are in memory."""
    rows: dict[Test, list[dict[Arm, float]]] = {
        "prefill": [{} for _ in range(loaded.repeats)],
        "decode": [{} for _ in range(PIECES * loaded.repeats)],
    }
    steps = [(test, again) for test, each in rows.items() for again in range(len(each))]
    turns = product(arms, steps) if loaded.alone else ((arm, step) for step in steps for arm in arms)
    for arm, (test, again) in turns:
        prompt, generate = (PROMPT, 0) if test == "prefill" else (0, GENERATE)
        ns = _time(loaded.get(arm), prompt, generate, seed=PIECES * number + again, warmup=not prompt)
        rows[test][again][arm] = ns / (prompt + generate)
    return rows.items()


def _measure_ubatch(model: RunningModel, measured: Measured) -> None:
    """Prompts of one full batch each, every size twice, there and back."""
    planned = model.planned.plan.placement
    sizes: list[int] = []
    for size in UBATCHES:
        measured.ubatch[size] = [_time_ubatch(model, size)]
        sizes.append(size)
        if 2 * size * measured.ubatch[size][0] > UBATCH_SECONDS * 1e9:
            break
    for size in sizes[::-1]:
        measured.ubatch[size].append(_time_ubatch(model, size))
    model.session.renew(planned)
    model.session.warm_up()


def _time_ubatch(model: RunningModel, size: int) -> float:
    planned = model.planned.plan.placement
    model.session.renew(replace(planned, ubatch=size, batch=max(planned.batch, size)), context=size + 64)
    model.session.warm_up()
    return _time(model, size, 0, seed=size, warmup=False) / size


def _measure_depth(model: RunningModel, measured: Measured) -> None:
    chance, rows = random.Random(1), model.planned.model.shape.n_vocab
    before = [chance.randrange(rows) for _ in range(DEPTH)]
    for number in range(PAIRS + 1):
        for tokens, kept in (([], measured.shallow), (before, measured.deep)):
            done = model.session.turn(
                depth_tokens=tokens, prompt_tokens=[chance.randrange(rows)], generate=GENERATE
            )
            if number:  # the first warms up
                kept.append(median(cast("list[int]", done["token_ns"])))


def _enough(rounds: int, seconds: float) -> bool:
    if rounds < LEAST_ROUNDS or rounds >= MOST_ROUNDS:
        return rounds >= MOST_ROUNDS
    done = rounds >= USUAL_ROUNDS and seconds >= LEAST_SECONDS
    return done or seconds + seconds / rounds > SECONDS


def _time(model: RunningModel, prompt: int, generate: int, *, seed: int, warmup: bool = True) -> float:
    """Nanoseconds of one test as llama-bench times it."""
    events = model.session.bench(
        prompt=prompt, generate=generate, depth=0, repetitions=1, warmup=warmup, seed=seed
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
