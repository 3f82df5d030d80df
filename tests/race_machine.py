"""A made-up machine for races: 150 configurations whose true turn times are known.

Time is a product of effects of threads, ubatch, expert layers on the CPU and cache type, with random
interactions of four pairs of them (1.5 % each); the plan's prediction knows the placement well and the rest
badly. A short measurement has 5 to 10 % lognormal noise, a full one 0.7 of that; one in 33 takes three times
as long, and what disturbs one of two measured at once disturbs the other; the machine drifts by up to 20 %
over the sweep with a wave of up to 10 % on it. Configurations that
need too much are out of memory, and on every other machine one pair of threads and ubatch kills the engine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from math import exp, log, sin
from statistics import median

from qnext.bench.race_values import Arm, Outcome, Result, Status, Step
from qnext.bench.racing import Race

THREADS, UBATCH, EXPERT_LAYERS, CACHES = (
    (4, 6, 8, 12, 16),
    (256, 512, 1024),
    (40, 34, 28, 22, 16),
    ("f16", "q8_0"),
)
LOAD_S, START_S = 30.0, 1.0
OWN_NOISE = 0.5
"""Of the noise: how far two measurements taken at once lie apart by themselves."""
GRID_REPEATS = 5
"""llama-bench's default."""


class Machine:
    """`true` and `bad` by name of the arm; `grid_s` is GRID_REPEATS full turns of every cell that runs."""

    def __init__(self, seed: int, *, equal: bool = False, share: float = 0.2) -> None:
        self._chance = chance = random.Random(seed)
        self._noise = chance.uniform(0.05, 0.10)
        self._drift, self._wave, self._phase = (
            chance.uniform(-0.2, 0.2),
            chance.uniform(0, 0.1),
            chance.random() * 6,
        )
        base, room = chance.uniform(20, 60), chance.uniform(3.6, 5.4)
        pairs: dict[tuple[object, ...], float] = {}
        single = {
            **_valley(THREADS, chance.uniform(0, 4), chance.uniform(0.01, 0.04)),
            **_valley(UBATCH, chance.uniform(0, 2.5), chance.uniform(0.02, 0.06)),
            **{n: -0.06 * i * chance.uniform(0.6, 1.4) for i, n in enumerate(EXPERT_LAYERS)},
            "f16": 0.0,
            "q8_0": chance.gauss(0, 0.05),
        }
        guess = {
            **_valley(THREADS, chance.uniform(0, 4), 0.02),
            **_valley(UBATCH, chance.uniform(0, 2.5), 0.03),
            **{n: -0.06 * i for i, n in enumerate(EXPERT_LAYERS)},
        }
        deadly = (chance.choice(THREADS), chance.choice(UBATCH)) if chance.random() < 0.5 else None
        self.true: dict[str, float] = {}
        self.bad: dict[str, Status] = {}
        arms = []
        for t, u, n, k in product(THREADS, UBATCH, EXPERT_LAYERS, CACHES):
            name = f"t{t} ub{u} ncmoe{n} {k}"
            couples = (("tu", t, u), ("tn", t, n), ("un", u, n), ("tk", t, k))
            both = sum(pairs.setdefault(couple, chance.gauss(0, 0.015)) for couple in couples)
            effect = single[t] + single[u] + single[n] + single[k] + both
            self.true[name] = base if equal else base * exp(effect)
            need = EXPERT_LAYERS.index(n) + 0.6 * UBATCH.index(u) + (0.5 if k == "f16" else 0)
            if not equal and need > room:
                self.bad[name] = "out-of-memory"
            elif not equal and (t, u) == deadly:
                self.bad[name] = "crashed"
            middle = base * exp(guess[t] + guess[u] + guess[n])
            arms.append(
                Arm(
                    name,
                    group=f"ncmoe{n}",
                    order=-n,
                    knobs={"threads": t, "ubatch": u, "n_cpu_moe": n, "kv": k},
                    predicted_s=(middle * 0.75, middle, middle * 1.3),
                    demands={"gpu_layers": -n, "ubatch": u, "kv": 2.0 if k == "f16" else 1.06},
                    host_bytes=1,
                )
            )
        fitting = [arm for arm in arms if arm.name not in self.bad]
        plan = min(fitting, key=lambda arm: arm.predicted_s[1])
        plain = [
            arm
            for arm in fitting
            if (arm.knobs["threads"], arm.knobs["ubatch"], arm.knobs["kv"]) == (8, 512, "f16")
        ]
        fit = max(plain or fitting, key=lambda arm: arm.order)
        self.baselines = {plan.name, fit.name}
        self.arms = [replace(arm, baseline=arm.name in self.baselines) for arm in arms]
        self.best_s = min(self.true[arm.name] for arm in fitting)
        self.grid_s = sum((self.true[arm.name] + START_S) * GRID_REPEATS for arm in fitting) + 5 * LOAD_S
        self.budget_s = self.grid_s * share
        self._clock = 0.0
        self._at_once: float | None = None

    def measure(self, step: Step) -> Outcome:
        """One step, with the machine's mood at that time."""
        load = LOAD_S * (1.3 if step.also else 1.0) if step.load else 0.0
        if (status := self.bad.get(step.arm)) is not None:
            return self._took(status, None, load + 2 * START_S)
        now = self._clock / self.budget_s
        mood = self._drift * now + self._wave * sin(self._phase + 9 * now)
        noise = self._noise if step.rung == "short" else 0.7 * self._noise
        if self._at_once is None:
            trouble = self._chance.gauss(0, noise) + (log(3) if self._chance.random() < 0.03 else 0)
        else:
            trouble = self._at_once + self._chance.gauss(0, OWN_NOISE * noise)
        self._at_once = trouble if step.partner else None
        seconds = self.true[step.arm] * exp(mood + trouble)
        busy = seconds / (6 if step.rung == "short" else 1) + START_S + load
        return self._took("ok", round(seconds * 1e9), busy)

    def _took(self, status: Status, turn_ns: int | None, seconds: float) -> Outcome:
        self._clock += seconds
        return Outcome(status, turn_ns, seconds)


@dataclass(frozen=True, slots=True)
class Finish:
    """How a race ended: shares of the best's and the baseline's speed and of the grid's time; loads."""

    of_best: float
    against_baseline: float
    of_grid: float
    loads: int
    reloads: int
    result: Result


def run_race(
    seed: int, *, equal: bool = False, tamper: Callable[[Machine], None] | None = None, room: int = 0
) -> Finish:
    """`room`: how many models memory has room for at once; with 0 there is never more than one."""
    machine = Machine(seed, equal=equal)
    if tamper:
        tamper(machine)
    race = Race(machine.arms, seconds=machine.budget_s, seed=seed, room=room)
    while (step := race.next()) is not None:
        race.observe(step, machine.measure(step))
    result = race.result()
    assert result.winner is not None
    won = machine.true[result.winner]
    baseline = min(machine.true[name] for name in machine.baselines if name not in machine.bad)
    return Finish(
        machine.best_s / won, baseline / won, race.spent_s / machine.grid_s, race.loads, race.reloads, result
    )


def grid_finds(seed: int) -> float:
    """Share of the true best that the whole grid finds, medians of GRID_REPEATS full turns taken in order."""
    machine = Machine(seed, share=1.0)
    steps = (
        Step(0, arm.name, arm.group, "full", False) for arm in machine.arms if arm.name not in machine.bad
    )
    told = {
        step.arm: median(machine.measure(step).turn_ns or 0 for _ in range(GRID_REPEATS)) for step in steps
    }
    return machine.best_s / machine.true[min(told, key=lambda name: told[name])]


def _valley(levels: tuple[int, ...], bottom: float, steepness: float) -> dict[int | str, float]:
    return {level: steepness * (place - bottom) ** 2 for place, level in enumerate(levels)}
