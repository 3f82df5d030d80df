"""What a race knows after each outcome: what ran, what failed, what is loaded, how fast each arm may be."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from math import exp
from statistics import NormalDist
from typing import TYPE_CHECKING

from qnext.bench.knob_model import Belief, KnobModel, Seen
from qnext.bench.race_values import (
    DEADLY,
    Arm,
    Outcome,
    Rung,
    Standing,
    Status,
    Step,
    StepTimes,
    excluded_arms,
)

if TYPE_CHECKING:
    from qnext.bench.knob_model import Array

WORLDS = 256
SHORT_SHARE = 1 / 6
"""Time of a short step over a full one, as long as none was measured."""
NOISY_TRIES = 2
CERTAIN = 1.96


class Knowledge:
    """Arms by index throughout. `excluded` maps an arm that is not to be run to (word, reason).

    `loaded` are groups in memory, of which there may be several within `room` bytes, until one died beside
    another (`crowded`); `company` those that are to be there together now. Loads that replace a dead engine
    are `reloads`. With `guess` the levels of arms that died speak against others.
    """

    def __init__(self, arms: Sequence[Arm], *, seconds: float, seed: int, room: int, guess: bool) -> None:
        self.arms, self.room = tuple(arms), room
        self.spent_s, self.loads, self.reloads = 0.0, 0, 0
        self.history: list[tuple[Step, Outcome]] = []
        self.ran: set[int] = set()
        self.excluded: dict[int, tuple[str, str]] = {}
        self.loaded: tuple[str, ...] = ()
        self.company: tuple[str, ...] = ()
        self.crowded = False
        self.seconds, self._seed, self._guess = seconds, seed, guess
        self._times = StepTimes()
        self._model = KnobModel([arm.knobs for arm in arms], [arm.predicted_s for arm in arms])
        self._seen: list[Seen] = []
        self._moment = 0
        self._failed: dict[int, Status] = {}
        self._thoughts: tuple[int, Belief, Array] | None = None

    def learn(self, index: int, step: Step, outcome: Outcome) -> None:
        """Take note of what came of a step with arm `index`."""
        second = self.history and self.history[-1][0].partner == step.arm
        self._moment = step.number - 1 if second else step.number
        died = self.history and self.history[-1][1].status in DEADLY
        if step.load and died and step.group == self.history[-1][0].group:
            self.reloads += 1
        elif step.load:
            self.loads += 1 + (step.also is not None)
        if step.load:
            also = [arm.group for arm in self.arms if arm.name == step.also]
            self.loaded = (*(group for group in self.loaded if group in step.keep), step.group, *also)
        self.history.append((step, outcome))
        self._times.add(step, outcome)
        self.spent_s += outcome.seconds
        if len(self.loaded) > 1 and outcome.status in ("out-of-memory", *DEADLY):
            # It may have died of the other model in memory: tried again alone before it counts as a failure.
            self.crowded, self.loaded = True, ()
            return
        self.loaded = () if outcome.status in DEADLY else self.loaded
        known = len(self.ran), len(self._failed)
        if outcome.turn_ns is not None and outcome.status == "ok":
            self.ran.add(index)
            if step.rung == "short":
                now, moment = self.spent_s / self.seconds, self._moment
                self._seen.append(Seen(index, outcome.turn_ns / 1e9, now, moment))
        elif outcome.status != "noisy" or self._too_noisy(index):
            self._failed[index] = outcome.status
        if known != (len(self.ran), len(self._failed)):
            self.excluded = excluded_arms(self.arms, self._failed, self.ran, guess=self._guess)

    def tried(self) -> set[int]:
        """Arms that were measured or failed."""
        return self.ran | set(self._failed)

    def load_seconds(self) -> float:
        """What a load takes; 0 as long as there was none."""
        return self._times.load()

    def usual_seconds(self, index: int, rung: Rung) -> float:
        """What a step with the arm takes, as far as known; never with a load."""
        known = self._times.usual(self.arms[index].name, rung)
        if known is not None:
            return known
        return exp(self.think()[0].mean[index]) * (1 if rung == "full" else SHORT_SHARE)

    def fits(self, *groups: str) -> bool:
        """Whether these models have room in memory at once."""
        largest = {
            group: max(arm.host_bytes for arm in self.arms if arm.group == group) for group in {*groups}
        }
        return not self.crowded and 0 < sum(largest.values()) <= self.room

    def can_pair(self, one: int, other: int) -> bool:
        """Whether two arms run, each on a loaded model of its own: neither is likely to end the other."""
        groups = {self.arms[one].group, self.arms[other].group}
        return len(groups) == 2 and groups <= {*self.loaded} and {one, other} <= self.ran

    def measure(
        self, members: Sequence[int], rung: Rung
    ) -> Generator[tuple[int, Rung, int | None], Outcome, dict[int, Outcome]]:
        """A step with each of these arms, at once where there are two that can be; what came of them."""
        told: dict[int, Outcome] = {}
        paired, crowded = len(members) == 2 and self.can_pair(*members), self.crowded
        for place, index in enumerate(members):
            if index not in self.excluded and crowded == self.crowded:
                told[index] = yield index, rung, members[1] if paired and place == 0 else None
        return told

    def live(self) -> list[int]:
        """Arms that may be run."""
        return [i for i in range(len(self.arms)) if i not in self.excluded]

    def leader(self) -> int | None:
        """The best of those that ran, by all that was measured."""
        belief, _ = self.think()
        return min((i for i in self.live() if i in self.ran), key=lambda i: belief.mean[i], default=None)

    def think(self) -> tuple[Belief, Array]:
        """The belief after the last outcome, and worlds drawn from it, in which excluded arms never end."""
        now = len(self.history)
        if self._thoughts is None or self._thoughts[0] != now:
            belief = self._model.believe(self._seen)
            self._thoughts = (now, belief, belief.draws(WORLDS, (self._seed, now)))
            self._thoughts[2][:, list(self.excluded)] = float("inf")
        return self._thoughts[1:]

    def chance_of(self, group: str) -> float:
        """That the fastest arm of all is in this group."""
        _, worlds = self.think()
        return float(sum(self.arms[int(i)].group == group for i in worlds.argmin(axis=1)) / WORLDS)

    def chance_faster(self, one: int, other: int) -> float:
        """That arm `one` takes less time than `other`, by everything measured."""
        off, spread = self.think()[0].difference(one, other)
        return NormalDist().cdf(-off / max(spread, 1e-6))

    def loss(self) -> float:
        """Expected share of time lost if the best known arm were taken now."""
        leader = self.leader()
        _, worlds = self.think()
        return float("inf") if leader is None else float((worlds[:, leader] - worlds.min(axis=1)).mean())

    def most_promising(self, groups: Sequence[str], count: int, always: set[str]) -> list[str]:
        """`count` of the groups in their order: those in `always`, then the likeliest to hold the fastest."""
        ranked = sorted(groups, key=lambda group: (group not in always, -self.chance_of(group)))
        return [group for group in groups if group in ranked[:count]]

    def _too_noisy(self, index: int) -> bool:
        arm = self.arms[index]
        noisy = [step for step, outcome in self.history if (step.arm, outcome.status) == (arm.name, "noisy")]
        return not arm.baseline and len(noisy) >= NOISY_TRIES

    def standing(self, index: int, best: int | None) -> Standing:
        """Where the arm stands beside the arm `best`."""
        name = self.arms[index].name
        measured = sum((step.arm, outcome.status) == (name, "ok") for step, outcome in self.history)
        if index in self.excluded or best is None:
            word, because = self.excluded.get(index, ("not-reached", "nothing ran"))
            return Standing(name, word, because, measured, None)
        off, spread = self.think()[0].difference(index, best)
        ratio = (exp(off - CERTAIN * spread), exp(off), exp(off + CERTAIN * spread))
        slower = off > CERTAIN * spread
        size = f"{ratio[1] - 1:+.0%} time against the winner, {ratio[0] - 1:+.0%} at best"
        if index == best:
            return Standing(name, "winner", "", measured, ratio)
        if measured:
            return Standing(name, "slower" if slower else "contender", size, measured, ratio)
        return Standing(name, "cannot-win" if slower else "not-reached", size, 0, ratio)
