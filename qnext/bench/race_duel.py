"""The duel at the end of a race: the one challenger against the baselines, on fresh pairs.

Fresh, since an arm picked as the best of many looks better than it is. The challenger wins by a verdict of
"faster"; or, where the pairs are too few for one, when everything measured together makes it BELIEVED likely
to be faster and the pairs do not speak against it: then it is the better choice, and is not called faster.
Rounds between two models that cannot be loaded at once go there and back, which cancels what drifts with
time; each look at the pairs spends its part of the chance to call an equal arm faster (Bonferroni,
one-sided), so looking often finds nothing that is not there. Without time for a duel the baseline wins.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from statistics import median

from qnext.bench.race_knowledge import Knowledge
from qnext.bench.race_values import Rung, Script
from qnext.bench.verdict import SMALLEST_EFFECT, Verdict, compare_paired

DUEL_ROUNDS = 4
FEWEST_PAIRS, MOST_PAIRS = 8, 60
FEWEST_SHORT, FULL_PAIRS = 2, 2
BELIEVED = 0.9


class Duel:
    """Arms by index. `winner` is the `challenger` or `against`, the best baseline; all None before `run`."""

    def __init__(self, known: Knowledge, chance: random.Random, *, confidence: float, max_loads: int) -> None:
        self.winner: int | None = None
        self.challenger: int | None = None
        self.against: int | None = None
        self.verdict: Verdict | None = None
        self._known, self._arms, self._chance = known, known.arms, chance
        self._confidence, self._max_loads = confidence, max_loads

    def seconds_needed(self) -> float:
        """What a duel of the best known arm against the baselines takes, with the fewest pairs."""
        racers = [i for i in self._known.live() if self._arms[i].baseline]
        best = self._known.leader()
        racers += [] if best is None or best in racers else [best]
        return self._round_seconds(racers) + FEWEST_PAIRS * self._step_seconds(racers, "short")

    def run(self) -> Script:
        """The challenger against the baselines on fresh pairs; sets who won."""
        belief, _ = self._known.think()
        baselines = [i for i in self._known.live() if self._arms[i].baseline]
        others = [i for i in self._known.live() if i in self._known.ran and i not in baselines]
        challenger = min(others, key=lambda i: belief.mean[i], default=None)
        racers = baselines + ([] if challenger is None else [challenger])
        measured = [i for i in baselines if i in self._known.ran]
        if measured and challenger is not None:
            likeliest = [min(measured, key=lambda i: belief.mean[i]), challenger]
            if not self._affords(racers) or (self._known.room and len(self._stages(likeliest)) == 1):
                racers = likeliest
        if measured and not self._affords(racers):  # no time to compare: the baseline, as nothing is shown
            self.winner = self.against = min(measured, key=lambda i: belief.mean[i])
            return
        times: dict[int, list[int | None]] = {i: [] for i in racers}
        rounds = self._duel_rounds(racers) if baselines else 0
        for played in range(rounds):
            pairs = self._pairs_affordable(racers, rounds - played)
            if played and pairs < FEWEST_PAIRS:
                break
            rungs: list[Rung] = ["short" for _ in range(max(FEWEST_SHORT, pairs))]
            rungs += ["full"] * (FULL_PAIRS if pairs >= FEWEST_SHORT else 0)
            for stage in self._stages(racers):
                self._known.company = stage
                for rung in rungs:
                    here = [
                        i for i in racers if self._arms[i].group in stage and i not in self._known.excluded
                    ]
                    self._chance.shuffle(here)
                    told = yield from self._known.measure(here, rung)
                    for index in told:
                        times[index].append(told[index].turn_ns if told[index].status == "ok" else None)
                    if self._known.crowded and len(stage) > 1:
                        yield from self.run()
                        return
            racers = [i for i in racers if i not in self._known.excluded and any(times[i])]
            alive = [i for i in racers if self._arms[i].baseline]
            if not alive:
                return
            self.winner = self.against = min(alive, key=lambda i: median(filter(None, times[i])))
            if challenger not in racers or challenger is None:
                return
            racers = [self.against, challenger]
            sides = zip(times[challenger], times[self.against], strict=False)
            both = [(one, two) for one, two in sides if one and two]
            if not both:
                return
            look = 1 - 2 * (1 - self._confidence) / rounds
            self.challenger = challenger
            self.verdict = compare_paired(*zip(*both, strict=True), confidence=look)
            likely = (
                self._known.chance_faster(challenger, self.against) >= BELIEVED and self.verdict.ratio < 1
            )
            self.winner = challenger if likely or self.verdict.word == "faster" else self.against
            if self.verdict.word != "no difference shown" or self.verdict.low > 1 - SMALLEST_EFFECT:
                return

    def _duel_rounds(self, racers: Sequence[int]) -> int:
        """As many as loads and time allow, each with pairs enough to show something; at least one."""
        spare = self._max_loads - self._known.loads - self._loads_for(racers)
        most = DUEL_ROUNDS if len(self._stages(racers)) < 2 else max(1, min(DUEL_ROUNDS, 1 + spare))
        paid = (
            count for count in range(most, 1, -1) if self._pairs_affordable(racers, count) >= FEWEST_PAIRS
        )
        return next(paid, 1)

    def _pairs_affordable(self, racers: Sequence[int], rounds: int) -> int:
        """Short pairs per round that the rest of the budget pays for, full ones and the loads set aside."""
        short = self._step_seconds(racers, "short")
        left = (self._known.seconds - self._known.spent_s) / rounds - self._round_seconds(racers)
        return min(MOST_PAIRS, int(left / short))

    def _affords(self, racers: Sequence[int]) -> bool:
        """Whether there is time to load what the racers need and to measure each a few times."""
        needed = self._loads_for(racers) * self._known.load_seconds()
        needed += FEWEST_SHORT * self._step_seconds(racers, "short")
        return self._known.spent_s + needed <= self._known.seconds

    def _round_seconds(self, racers: Sequence[int]) -> float:
        """What a round of the duel takes beside its short pairs: its full ones and its loads."""
        loads_s = self._loads_for(racers) * self._known.load_seconds()
        return loads_s + FULL_PAIRS * self._step_seconds(racers, "full")

    def _loads_for(self, racers: Sequence[int]) -> int:
        """How many of the racers' models are not in memory."""
        return len({self._arms[i].group for i in racers} - {*self._known.loaded})

    def _step_seconds(self, racers: Sequence[int], rung: Rung) -> float:
        """What a step with each of them takes."""
        return sum(self._known.usual_seconds(i, rung) for i in racers)

    def _stages(self, racers: Sequence[int]) -> list[tuple[str, ...]]:
        """Groups whose racers take their steps mixed: all where they have room at once, else each alone.

        They are in order of placement, from the end that is loaded now.
        """
        groups = [group for _, group in sorted({(self._arms[i].order, self._arms[i].group) for i in racers})]
        if self._known.fits(*groups):
            return [tuple(groups)]
        return [(group,) for group in (groups[::-1] if groups[-1] in self._known.loaded else groups)]
