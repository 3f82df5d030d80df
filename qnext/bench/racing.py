"""The search of a sweep: which configuration to measure next, when to stop, who won. No clock, no engine.

A race has two parts. **Exploring** measures a few tokens per step, in blocks of shuffled arms: the baseline
where it is loaded, the best known arm, and challengers, each drawn with the chance that it is the fastest
(Thompson 1933). A model of knob effects (`knob_model`) turns every measurement into news about all arms, so
arms that cannot win are never measured and contenders often. A model is loaded once on the way up through the
placements, and the most promising ones once more on the way down, which cancels what drifts with time. The
**duel** then compares the one challenger with the baselines on fresh pairs, since an arm picked as the best
of many looks better than it is. It wins by a verdict of "faster"; or, where the pairs are too few for one,
when everything measured together makes it BELIEVED likely to be faster and the pairs do not speak against it:
then it is the better choice, and is not called faster. Rounds of a duel between two loaded models go there
and back for the same reason as above; each look at the pairs spends its part of the chance to call an equal
arm faster (Bonferroni, one-sided), so looking often finds nothing that is not there.

All that happens is a function of the seed and the outcomes, written as one generator. A race is therefore
resumed by telling it its old outcomes again. Optimiser libraries were looked at: Optuna's samplers propose
points without knowing loads, pairs or budgets, its rank-test pruner needs SciPy and compares in fixed order;
scikit-optimize is archived. What is left to take from them is linear algebra, which NumPy has.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import asdict
from math import exp
from statistics import NormalDist, median
from typing import TYPE_CHECKING, Any

from qnext.bench.knob_model import Belief, KnobModel, Seen
from qnext.bench.race_values import (
    DEADLY,
    Arm,
    Outcome,
    Result,
    Rung,
    Standing,
    Status,
    Step,
    StepTimes,
    excluded_arms,
)
from qnext.bench.verdict import SMALLEST_EFFECT, Verdict, compare_paired
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.bench.knob_model import Array

MAX_LOADS = 10
GROUPS_TRIED = 5
DUEL_LOADS = 4
EXPLORE_SHARES = (0.45, 0.7)
"""Of the time: what exploring gets at least and at most, as the duel needs the rest."""
WAY_UP_SHARE = 0.35
CHALLENGERS = 4
WORLDS = 256
CHANCE_WORTH_A_LOAD = 0.02
LOSS_NOT_WORTH_TIME = 0.0005
DUEL_ROUNDS = 4
FEWEST_PAIRS, MOST_PAIRS = 8, 60
FEWEST_SHORT, FULL_PAIRS = 2, 2
SHORT_SHARE = 1 / 6
"""Time of a short step over a full one, as long as none was measured."""
NOISY_TRIES = 2
SETTINGS = ("seconds", "cells", "seed", "confidence", "max_loads", "cover")
CERTAIN = 1.96
BELIEVED = 0.9

_Script = Generator[tuple[int, Rung], Outcome, None]


class Race:
    """`while (step := race.next()) is not None: race.observe(step, measure(step))`, then `race.result()`.

    `seconds` is the budget, loads included; the last step may exceed it. `cells` limits how many different
    arms are measured. At most `max_loads` models are loaded, besides those that replace a dead engine. With
    `cover` every arm that may be loaded is measured once, as far as the time to explore goes.
    Raises ValueError unless arms have different names and one of them is a baseline.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        *,
        seconds: float,
        cells: int | None = None,
        seed: int = 0,
        confidence: float = 0.95,
        max_loads: int = MAX_LOADS,
        cover: bool = False,
    ) -> None:
        if not any(arm.baseline for arm in arms) or len({arm.name for arm in arms}) < len(arms):
            raise ValueError("arms need different names and a baseline among them")
        self.arms = tuple(arms)
        self.seconds, self.cells, self.seed = seconds, cells, seed
        self.confidence, self.max_loads, self.cover = confidence, max_loads, cover
        self.spent_s, self.loads, self.reloads = 0.0, 0, 0
        self._times = StepTimes()
        self._chance = random.Random(seed)
        self._model = KnobModel([arm.knobs for arm in arms], [arm.predicted_s for arm in arms])
        self._history: list[tuple[Step, Outcome]] = []
        self._group: str | None = None
        self._seen: list[Seen] = []
        self._ran: set[int] = set()
        self._failed: dict[int, Status] = {}
        self._excluded: dict[int, tuple[str, str]] = {}
        self._thoughts: tuple[int, Belief, Array] | None = None
        self._winner: int | None = None
        self._challenger: int | None = None
        self._against: int | None = None
        self._verdict: Verdict | None = None
        self._script = self._run()
        self._wanted: tuple[int, Rung] | None = next(self._script, None)

    def next(self) -> Step | None:
        """What to measure now; None when the race is over. Asking again gives the same."""
        if self._wanted is None:
            return None
        index, rung = self._wanted
        arm = self.arms[index]
        return Step(len(self._history), arm.name, arm.group, rung, arm.group != self._group)

    def observe(self, step: Step, outcome: Outcome) -> None:
        """Tell what came of the step that `next` named. Raises ValueError for any other step."""
        if step != self.next() or self._wanted is None:
            raise ValueError(f"{step} was not asked for")
        index, rung = self._wanted
        died = self._history and self._history[-1][1].status in DEADLY
        if step.load and died and step.group == self._history[-1][0].group:
            self.reloads += 1
        elif step.load:
            self.loads += 1
        self._history.append((step, outcome))
        self._times.add(step, outcome)
        self._group = None if outcome.status in DEADLY else step.group
        self.spent_s += outcome.seconds
        known = len(self._ran), len(self._failed)
        if outcome.turn_ns is not None and outcome.status == "ok":
            self._ran.add(index)
            if rung == "short":
                self._seen.append(Seen(index, outcome.turn_ns / 1e9, self.spent_s / self.seconds))
        elif outcome.status != "noisy" or self._too_noisy(index):
            self._failed[index] = outcome.status
        if known != (len(self._ran), len(self._failed)):
            self._excluded = excluded_arms(self.arms, self._failed, self._ran, guess=not self.cover)
        try:
            self._wanted = self._script.send(outcome)
        except StopIteration:
            self._wanted = None

    def state(self) -> dict[str, Any]:
        """All that `restore` needs beside the arms, as JSON can hold it."""
        outcomes = [
            {"arm": step.arm, "rung": step.rung, **asdict(outcome)} for step, outcome in self._history
        ]
        return {**{name: getattr(self, name) for name in SETTINGS}, "outcomes": outcomes}

    @classmethod
    def restore(cls, arms: Sequence[Arm], state: Mapping[str, Any]) -> Race:
        """The race as it was. The engine is gone, so load the next step's group whatever `load` says.

        Raises UsageError when these arms would have asked for other steps than the recorded ones.
        """
        race = cls(arms, **{name: state[name] for name in SETTINGS})
        for told in state["outcomes"]:
            step = race.next()
            if step is None or (step.arm, step.rung) != (told["arm"], told["rung"]):
                raise UsageError(
                    "The recorded sweep does not belong to these settings: it went another way.",
                    hint="Start it anew, without --resume.",
                )
            race.observe(step, Outcome(told["status"], told["turn_ns"], told["seconds"]))
        return race

    def result(self) -> Result:
        """How the race stands; final once `next` gives None."""
        belief, _ = self._think()
        best = self._winner if self._winner is not None else self._leader()
        standings = tuple(self._standing(i, best, belief) for i in range(len(self.arms)))

        def name(index: int | None) -> str | None:
            return None if index is None else self.arms[index].name

        likely = None
        if self._challenger is not None and self._against is not None:
            likely = self._chance_faster(self._challenger, self._against)
        names = name(best), name(self._challenger), name(self._against)
        return Result(*names, self._verdict, standings, likely)

    def _run(self) -> _Script:
        home = {arm.group for arm in self.arms if arm.baseline}
        groups = [group for _, group in sorted({(arm.order, arm.group) for arm in self.arms})]
        tried = self.max_loads - DUEL_LOADS if self.cover else GROUPS_TRIED
        groups = self._most_promising(groups, tried, home)
        for place, group in enumerate(groups):
            explore = self._explore_seconds()
            loads = 1 + sum(other in home for other in groups[place + 1 :])
            if (
                place
                and not self.cover
                and group not in home
                and self.spent_s + loads * self._times.load() > explore
            ):
                continue
            left = (explore if self.cover else WAY_UP_SHARE * explore) - self.spent_s
            until = self.spent_s + left / (len(groups) - place)
            if self.cover:
                yield from self._each(group, until)
            else:
                yield from self._visit(group, until, at_least=1)
        room = self.max_loads - DUEL_LOADS - self.loads + 1
        groups = self._most_promising(groups[::-1], max(1, room), set())
        for place, group in enumerate(groups):
            chances = [self._chance_of(one) for one in groups[place:]]
            left = self._explore_seconds() - self.spent_s
            paid = group == self._group or left > self._times.load()
            if paid and chances[0] >= CHANCE_WORTH_A_LOAD:
                share = chances[0] / sum(chances)
                yield from self._visit(group, self.spent_s + share * left, at_least=0)
        yield from self._duel()

    def _visit(self, group: str, until: float, at_least: int) -> _Script:
        """Blocks in one loaded model until the time is used or nothing there is worth measuring."""
        blocks = 0
        while blocks < at_least or (self.spent_s < until and self._loss() > LOSS_NOT_WORTH_TIME):
            block = self._block(group)
            if not block:
                return
            for index in block:
                if index not in self._excluded:
                    yield index, "short"
            blocks += 1

    def _each(self, group: str, until: float) -> _Script:
        """Every arm of a group once, in an order drawn, until the time is used; a few in any case."""
        block = [i for i in self._live() if self.arms[i].group == group]
        self._chance.shuffle(block)
        block.sort(key=lambda i: not self.arms[i].baseline)
        for place, index in enumerate(block):
            in_time = place <= CHALLENGERS or self.spent_s < until
            wanted = self.arms[index].baseline or (in_time and self._room(set()) != 0)
            if wanted and index not in self._excluded:
                yield index, "short"

    def _room(self, block: set[int]) -> int | None:
        """How many arms that never ran the limit of cells leaves, `block` taken off; None without a limit."""
        if self.cells is None:
            return None
        return max(0, self.cells - len(self._ran | set(self._failed) | block))

    def _block(self, group: str) -> list[int]:
        """The baselines here, the best known, and challengers by their chance to be the fastest; shuffled."""
        live = [i for i in self._live() if self.arms[i].group == group]
        block = [i for i in live if self.arms[i].baseline]
        if not live or (
            self._chance_of(group) < CHANCE_WORTH_A_LOAD and (not block or set(block) <= self._ran)
        ):
            return []
        belief, worlds = self._think()
        picks = [min(live, key=lambda i: belief.mean[i]), *(live[k] for k in worlds[:, live].argmin(axis=1))]
        size = len(block) + 1 + CHALLENGERS
        for pick in picks:
            if pick not in block and len(block) < size and (pick in self._ran or self._room(set(block)) != 0):
                block.append(pick)
        self._chance.shuffle(block)
        return block

    def _duel(self) -> _Script:
        """The challenger against the baselines on fresh pairs; sets who won."""
        belief, _ = self._think()
        baselines = [i for i in self._live() if self.arms[i].baseline]
        others = [i for i in self._live() if i in self._ran and i not in baselines]
        challenger = min(others, key=lambda i: belief.mean[i], default=None)
        racers = baselines + ([] if challenger is None else [challenger])
        times: dict[int, list[int | None]] = {i: [] for i in racers}
        rounds = self._duel_rounds(racers) if baselines else 0
        for played in range(rounds):
            pairs = self._pairs_affordable(racers, rounds - played)
            if played and pairs < FEWEST_PAIRS:
                break
            rungs: list[Rung] = ["short" for _ in range(max(FEWEST_SHORT, pairs))]
            rungs += ["full"] * (FULL_PAIRS if pairs >= FEWEST_SHORT else 0)
            for group in self._there_and_back(racers):
                for rung in rungs:
                    here = [i for i in racers if self.arms[i].group == group and i not in self._excluded]
                    self._chance.shuffle(here)
                    for index in here:
                        outcome = yield index, rung
                        times[index].append(outcome.turn_ns if outcome.status == "ok" else None)
            racers = [i for i in racers if i not in self._excluded and any(times[i])]
            alive = [i for i in racers if self.arms[i].baseline]
            if not alive:
                return
            self._winner = self._against = min(alive, key=lambda i: median(filter(None, times[i])))
            if challenger not in racers or challenger is None:
                return
            racers = [self._against, challenger]
            sides = zip(times[challenger], times[self._against], strict=False)
            both = [(one, two) for one, two in sides if one and two]
            if not both:
                return
            look = 1 - 2 * (1 - self.confidence) / rounds
            self._challenger = challenger
            self._verdict = compare_paired(*zip(*both, strict=True), confidence=look)
            likely = self._chance_faster(challenger, self._against) >= BELIEVED and self._verdict.ratio < 1
            self._winner = challenger if likely or self._verdict.word == "faster" else self._against
            if self._verdict.word != "no difference shown" or self._verdict.low > 1 - SMALLEST_EFFECT:
                return

    def _duel_rounds(self, racers: Sequence[int]) -> int:
        """As many as loads and time allow, each with pairs enough to show something; at least one."""
        groups = {self.arms[i].group for i in racers}
        spare = self.max_loads - self.loads - len(groups - {self._group})
        most = DUEL_ROUNDS if len(groups) < 2 else max(1, min(DUEL_ROUNDS, 1 + spare))
        paid = (
            count for count in range(most, 1, -1) if self._pairs_affordable(racers, count) >= FEWEST_PAIRS
        )
        return next(paid, 1)

    def _pairs_affordable(self, racers: Sequence[int], rounds: int) -> int:
        """Short pairs per round that the rest of the budget pays for, full ones and the loads set aside."""
        short = sum(self._usual_seconds(i, "short") for i in racers)
        left = (self.seconds - self.spent_s) / rounds - self._round_seconds(racers)
        return min(MOST_PAIRS, int(left / short))

    def _round_seconds(self, racers: Sequence[int]) -> float:
        """What a round of the duel takes beside its short pairs: its full ones and its loads."""
        loads = len({self.arms[i].group for i in racers} - {self._group})
        return loads * self._times.load() + FULL_PAIRS * sum(self._usual_seconds(i, "full") for i in racers)

    def _explore_seconds(self) -> float:
        """When exploring ends, so that a duel of the best against the baselines still has its time."""
        racers = [i for i in self._live() if self.arms[i].baseline]
        best = self._leader()
        racers += [] if best is None or best in racers else [best]
        short = sum(self._usual_seconds(i, "short") for i in racers)
        duel = self._round_seconds(racers) + FEWEST_PAIRS * short
        least, most = (share * self.seconds for share in EXPLORE_SHARES)
        return min(most, max(least, self.seconds - duel))

    def _usual_seconds(self, index: int, rung: Rung) -> float:
        known = self._times.usual(self.arms[index].name, rung)
        if known is not None:
            return known
        return exp(self._think()[0].mean[index]) * (1 if rung == "full" else SHORT_SHARE)

    def _there_and_back(self, racers: Sequence[int]) -> list[str]:
        """The racers' groups in order of placement, from the end that is loaded now."""
        groups = [group for _, group in sorted({(self.arms[i].order, self.arms[i].group) for i in racers})]
        return groups[::-1] if self._group == groups[-1] else groups

    def _live(self) -> list[int]:
        return [i for i in range(len(self.arms)) if i not in self._excluded]

    def _leader(self) -> int | None:
        belief, _ = self._think()
        return min((i for i in self._live() if i in self._ran), key=lambda i: belief.mean[i], default=None)

    def _think(self) -> tuple[Belief, Array]:
        """The belief after the last outcome, and worlds drawn from it, in which excluded arms never end."""
        now = len(self._history)
        if self._thoughts is None or self._thoughts[0] != now:
            belief = self._model.believe(self._seen)
            self._thoughts = (now, belief, belief.draws(WORLDS, (self.seed, now)))
            self._thoughts[2][:, list(self._excluded)] = float("inf")
        return self._thoughts[1:]

    def _chance_of(self, group: str) -> float:
        """That the fastest arm of all is in this group."""
        _, worlds = self._think()
        return float(sum(self.arms[int(i)].group == group for i in worlds.argmin(axis=1)) / WORLDS)

    def _chance_faster(self, one: int, other: int) -> float:
        """That arm `one` takes less time than `other`, by everything measured."""
        off, spread = self._think()[0].difference(one, other)
        return NormalDist().cdf(-off / max(spread, 1e-6))

    def _loss(self) -> float:
        """Expected share of time lost if the best known arm were taken now."""
        leader = self._leader()
        _, worlds = self._think()
        return float("inf") if leader is None else float((worlds[:, leader] - worlds.min(axis=1)).mean())

    def _most_promising(self, groups: Sequence[str], count: int, always: set[str]) -> list[str]:
        ranked = sorted(groups, key=lambda group: (group not in always, -self._chance_of(group)))
        return [group for group in groups if group in ranked[:count]]

    def _too_noisy(self, index: int) -> bool:
        arm = self.arms[index]
        noisy = [step for step, outcome in self._history if (step.arm, outcome.status) == (arm.name, "noisy")]
        return not arm.baseline and len(noisy) >= NOISY_TRIES

    def _standing(self, index: int, best: int | None, belief: Belief) -> Standing:
        name = self.arms[index].name
        measured = sum((step.arm, outcome.status) == (name, "ok") for step, outcome in self._history)
        if index in self._excluded or best is None:
            word, because = self._excluded.get(index, ("not-reached", "nothing ran"))
            return Standing(name, word, because, measured, None)
        off, spread = belief.difference(index, best)
        ratio = (exp(off - CERTAIN * spread), exp(off), exp(off + CERTAIN * spread))
        slower = off > CERTAIN * spread
        size = f"{ratio[1] - 1:+.0%} time against the winner, {ratio[0] - 1:+.0%} at best"
        if index == best:
            return Standing(name, "winner", "", measured, ratio)
        if measured:
            return Standing(name, "slower" if slower else "contender", size, measured, ratio)
        return Standing(name, "cannot-win" if slower else "not-reached", size, 0, ratio)
