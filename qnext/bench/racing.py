"""The search of a sweep: which configuration to measure next, when to stop, who won. No clock, no engine.

A race has two parts. **Exploring** measures a few tokens per step, in blocks of shuffled arms: the baseline
where it is loaded, the best known arm, and challengers, each drawn with the chance that it is the fastest
(Thompson 1933). A model of knob effects (`knob_model`) turns every measurement into news about all arms, so
arms that cannot win are never measured and contenders often. A model is loaded once on the way up through the
placements, and the most promising ones once more on the way down, which cancels what drifts with time. Where
two models have `room` in memory at once, arms of one are measured together with arms of the other, so that
what slows the machine falls on both: first with the first baseline's, then those of the two most promising.
The **duel** (`race_duel`) then compares the one challenger with the baselines on fresh pairs.

All that happens is a function of the seed and the outcomes, written as one generator. A race is therefore
resumed by telling it its old outcomes again. Optimiser libraries were looked at: Optuna's samplers propose
points without knowing loads, pairs or budgets, its rank-test pruner needs SciPy and compares in fixed order;
scikit-optimize is archived. What is left to take from them is linear algebra, which NumPy has.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from qnext.bench.race_duel import Duel
from qnext.bench.race_knowledge import Knowledge
from qnext.bench.race_values import Arm, Outcome, Result, Script, Step
from qnext.errors import UsageError

MAX_LOADS = 10
GROUPS_TRIED = 5
DUEL_LOADS = 4
EXPLORE_SHARES = (0.45, 0.7)
"""Of the time: what exploring gets at least and at most, as the duel needs the rest."""
WAY_UP_SHARE = 0.35
CHALLENGERS, CHALLENGERS_IN_HASTE = 4, 1
CHANCE_WORTH_A_LOAD = 0.02
LOSS_NOT_WORTH_TIME = 0.0005
SETTINGS = ("seconds", "cells", "seed", "confidence", "max_loads", "cover", "room")


class Race:
    """`while (step := race.next()) is not None: race.observe(step, measure(step))`, then `race.result()`.

    `seconds` is the budget, loads included; the last step may exceed it. `cells` limits how many different
    arms are measured. At most `max_loads` models are loaded, besides those that replace a dead engine. With
    `cover` every arm that may be loaded is measured once, as far as the time to explore goes. `room` is how
    many bytes models loaded at once may take; with 0 there is never more than one.
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
        room: int = 0,
    ) -> None:
        if not any(arm.baseline for arm in arms) or len({arm.name for arm in arms}) < len(arms):
            raise ValueError("arms need different names and a baseline among them")
        self.arms = tuple(arms)
        self.seconds, self.cells, self.seed = seconds, cells, seed
        self.confidence, self.max_loads, self.cover, self.room = confidence, max_loads, cover, room
        self._chance = random.Random(seed)
        self._known = Knowledge(arms, seconds=seconds, seed=seed, room=room, guess=not cover)
        self._duel = Duel(self._known, self._chance, confidence=confidence, max_loads=max_loads)
        self._script = self._run()
        self._wanted = next(self._script, None)

    @property
    def spent_s(self) -> float:
        """Seconds of all steps."""
        return self._known.spent_s

    @property
    def loads(self) -> int:
        """Models loaded, but for those that replaced a dead engine."""
        return self._known.loads

    @property
    def reloads(self) -> int:
        """Models loaded to replace a dead engine."""
        return self._known.reloads

    def next(self) -> Step | None:
        """What to measure now; None when the race is over. Asking again gives the same."""
        if self._wanted is None:
            return None
        index, rung, partner = self._wanted
        arm = self.arms[index]
        known = self._known
        keep = known.company if arm.group in known.company and not known.crowded else (arm.group,)
        beside = None if partner is None else self.arms[partner].name
        load = arm.group not in known.loaded
        also = self._also(arm.group) if load else None
        return Step(len(known.history), arm.name, arm.group, rung, load, keep, beside, also)

    def _also(self, group: str) -> str | None:
        """The likeliest arm of another model that is to be in memory with `group`, and is not."""
        known = self._known
        if known.crowded or group not in known.company:
            return None
        belief, _ = known.think()
        absent = {*known.company} - {group, *known.loaded}
        arms = [i for i in known.live() if self.arms[i].group in absent]
        return self.arms[min(arms, key=lambda i: belief.mean[i])].name if arms else None

    def observe(self, step: Step, outcome: Outcome) -> None:
        """Tell what came of the step that `next` named. Raises ValueError for any other step."""
        if step != self.next() or self._wanted is None:
            raise ValueError(f"{step} was not asked for")
        self._known.learn(self._wanted[0], step, outcome)
        try:
            self._wanted = self._script.send(outcome)
        except StopIteration:
            self._wanted = None

    def state(self) -> dict[str, Any]:
        """All that `restore` needs beside the arms, as JSON can hold it."""
        outcomes = [
            {"arm": step.arm, "rung": step.rung, **asdict(outcome)} for step, outcome in self._known.history
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
        best = self._duel.winner if self._duel.winner is not None else self._known.leader()
        standings = tuple(self._known.standing(i, best) for i in range(len(self.arms)))

        def name(index: int | None) -> str | None:
            return None if index is None else self.arms[index].name

        likely = None
        if self._duel.challenger is not None and self._duel.against is not None:
            likely = self._known.chance_faster(self._duel.challenger, self._duel.against)
        names = name(best), name(self._duel.challenger), name(self._duel.against)
        return Result(*names, self._duel.verdict, standings, likely)

    def _run(self) -> Script:
        home = {arm.group for arm in self.arms if arm.baseline}
        anchor = next(arm.group for arm in self.arms if arm.baseline)
        groups = [group for _, group in sorted({(arm.order, arm.group) for arm in self.arms})]
        tried = self.max_loads - DUEL_LOADS if self.cover else GROUPS_TRIED
        groups = self._known.most_promising(groups, tried, home)
        if self.room:  # what goes beside the anchor comes after it, the likeliest of them last: it stays
            groups.sort(
                key=lambda group: (
                    self._known.fits(anchor, group),
                    group != anchor,
                    self._known.chance_of(group),
                )
            )
        for place, group in enumerate(groups):
            explore, later = self._explore_seconds(), groups[place + 1 :]
            # With room the likelier ones come later: their loads are not given away.
            loads = 1 + sum(one in home or bool(self.room) for one in later)
            if (
                place
                and not self.cover
                and group not in home
                and group not in self._known.loaded
                and self._known.spent_s + loads * self._known.load_seconds() > explore
            ):
                continue
            left = (explore if self.cover else WAY_UP_SHARE * explore) - self._known.spent_s
            until = self._known.spent_s + left / (len(groups) - place)
            if self.cover:
                yield from self._each(group, until)
            elif group == anchor and later and self._known.fits(anchor, later[0]):
                yield from self._open_two(anchor, later[0])
            else:
                yield from self._visit((group,), until, at_least=1, beside=anchor)
        if self.room and not self.cover:
            yield from self._visit_pairs()
            yield from self._duel.run()
            return
        room = self.max_loads - DUEL_LOADS - self._known.loads + 1
        groups = self._known.most_promising(groups[::-1], max(1, room), set())
        for place, group in enumerate(groups):
            chances = [self._known.chance_of(one) for one in groups[place:]]
            left = self._explore_seconds() - self._known.spent_s
            paid = group in self._known.loaded or left > self._known.load_seconds()
            if paid and chances[0] >= CHANCE_WORTH_A_LOAD:
                share = chances[0] / sum(chances)
                yield from self._visit((group,), self._known.spent_s + share * left, at_least=0)
        yield from self._duel.run()

    def _open_two(self, anchor: str, other: str) -> Script:
        """Load both models, and measure the baselines of the first, which others are then measured with."""
        self._known.company = anchor, other
        here = [i for i in self._known.live() if self.arms[i].baseline and self.arms[i].group == anchor]
        for index in here:
            yield from self._known.measure((index,), "short")

    def _visit_pairs(self) -> Script:
        """The two most promising models that have room at once; chosen anew at half the time."""
        known = self._known
        for share in (0.5, 1.0):
            groups = sorted({arm.group for arm in self.arms}, key=lambda group: -known.chance_of(group))
            pair = [group for group in groups if group == groups[0] or known.fits(groups[0], group)][:2]
            pair = [group for group in pair if known.chance_of(group) >= CHANCE_WORTH_A_LOAD]
            loads = len({*pair} - {*known.loaded})
            left = self._explore_seconds() - known.spent_s
            allowed = known.loads + loads <= self.max_loads - DUEL_LOADS + 1
            if allowed and left > loads * known.load_seconds():
                yield from self._visit(tuple(pair), known.spent_s + share * left, at_least=0)

    def _visit(
        self, groups: tuple[str, ...], until: float, at_least: int, beside: str | None = None
    ) -> Script:
        """Blocks in loaded models until the time is used or nothing there is worth measuring.

        The baselines of the group `beside` are measured with each of them where both models have room.
        """
        reference: list[int] = []
        self._known.company = groups
        if beside is not None and beside not in groups and self._known.fits(beside, *groups):
            live = self._known.live()
            reference = [i for i in live if self.arms[i].baseline and self.arms[i].group == beside]
            self._known.company = (*groups, beside) if reference else groups
        blocks = 0
        while blocks < at_least or (self._known.spent_s < until and self._known.loss() > LOSS_NOT_WORTH_TIME):
            block = self._block(groups, CHALLENGERS if self._known.spent_s < until else CHALLENGERS_IN_HASTE)
            if not block:
                return
            crowded = self._known.crowded
            if reference and not crowded:
                block = [member for index in block for member in (index, *reference)]
            for members in self._matched(block):
                if crowded == self._known.crowded:
                    yield from self._known.measure(members, "short")
            blocks += 1

    def _matched(self, block: Sequence[int]) -> list[tuple[int, ...]]:
        """The arms of a block in their order, each with one of another loaded model where there is one."""
        found: list[tuple[int, ...]] = []
        left = list(block)
        while left:
            one = left.pop(0)
            other = next((i for i in left if self._known.can_pair(one, i)), None)
            if other is not None:
                left.remove(other)
            found.append((one,) if other is None else (one, other))
        return found

    def _each(self, group: str, until: float) -> Script:
        """Every arm of a group once, in an order drawn, until the time is used; a few in any case."""
        block = [i for i in self._known.live() if self.arms[i].group == group]
        self._chance.shuffle(block)
        block.sort(key=lambda i: not self.arms[i].baseline)
        for place, index in enumerate(block):
            in_time = place <= CHALLENGERS or self._known.spent_s < until
            wanted = self.arms[index].baseline or (in_time and self._room(set()) != 0)
            if wanted and index not in self._known.excluded:
                yield index, "short", None

    def _room(self, block: set[int]) -> int | None:
        """How many arms that never ran the limit of cells leaves, `block` taken off; None without a limit."""
        if self.cells is None:
            return None
        return max(0, self.cells - len(self._known.tried() | block))

    def _block(self, groups: tuple[str, ...], challengers: int) -> list[int]:
        """The baselines here, the best known, and challengers by their chance to be the fastest; shuffled."""
        if self._known.crowded:
            groups = groups[:1]
        live = [i for i in self._known.live() if self.arms[i].group in groups]
        block = [i for i in live if self.arms[i].baseline]
        worth = any(self._known.chance_of(group) >= CHANCE_WORTH_A_LOAD for group in groups)
        if not live or (not worth and (not block or set(block) <= self._known.ran)):
            return []
        belief, worlds = self._known.think()
        picks = [min(live, key=lambda i: belief.mean[i]), *(live[k] for k in worlds[:, live].argmin(axis=1))]
        size = len(block) + 1 + challengers
        for pick in picks:
            if (
                pick not in block
                and len(block) < size
                and (pick in self._known.ran or self._room(set(block)) != 0)
            ):
                block.append(pick)
        self._chance.shuffle(block)
        return block

    def _explore_seconds(self) -> float:
        """When exploring ends, so that a duel of the best against the baselines still has its time."""
        least, most = (share * self.seconds for share in EXPLORE_SHARES)
        return min(most, max(least, self.seconds - self._duel.seconds_needed()))
