"""The values of a race: what can be tried, what to measure next, what came of it, how it ended.

A failure is a fact about its neighbours, too. `excluded_arms` is that rule: what needs at least as much of
everything as an arm that ran out of memory is not tried; and what killed the engine again and again and
never ran is left alone.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import median
from typing import Literal

from qnext.bench.knob_model import Level
from qnext.bench.verdict import Verdict

Rung = Literal["short", "full"]
Status = Literal["ok", "out-of-memory", "crashed", "hung", "too-slow", "noisy"]
DEADLY = ("crashed", "hung")


@dataclass(frozen=True, slots=True)
class Arm:
    """One configuration. Arms of one `group` share a loaded model; `order` sorts groups by placement.

    `predicted_s` is the time of a turn as (low, mid, high) with 90 % between. `knobs` names every level that
    may matter, placement included. `demands` grow with the memory needed, knob by knob: experts on the GPU,
    ubatch, bytes per cached value. A `baseline` is measured whatever is predicted, and wins unless beaten.
    `host_bytes` is what its model takes of the RAM once loaded.
    """

    name: str
    group: str
    order: int
    knobs: Mapping[str, Level]
    predicted_s: tuple[float, float, float]
    demands: Mapping[str, float] = field(default_factory=dict)
    baseline: bool = False
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Step:
    """Measure `arm` once, a few tokens (`short`) or a turn (`full`).

    `load`: load its group first, at the same time that of the arm `also`, and let go of all loaded groups
    that are not in `keep`. With a `partner`, the arm of the next step, both are loaded and to be measured at
    once, so that whatever slows the machine strikes both; the time of each is its own, `Outcome.seconds` half
    of what both took.
    """

    number: int
    arm: str
    group: str
    rung: Rung
    load: bool
    keep: tuple[str, ...] = ()
    partner: str | None = None
    also: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step gave: the objective's time, from whichever rung, and the seconds that the step took in all.

    `turn_ns` is prompt / prefill speed + generated / decode speed of the stated workload (or what else is to
    be small); None unless `status` is ok.
    """

    status: Status
    turn_ns: int | None
    seconds: float


Script = Generator[tuple[int, Rung, int | None], Outcome, None]
"""What a race wants measured: arm, rung, and the arm of the next step where the two are measured at once."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where an arm ended. `ratio` is its time over the winner's (low, mid, high), by all that was measured.

    `word`: winner, contender (not shown slower), slower, cannot-win (never measured: what was measured of its
    knobs says so), not-reached (never measured, and could win), does-not-fit (needs more than what ran out of
    memory), or the status in which it failed.
    """

    arm: str
    word: str
    because: str
    measured: int
    ratio: tuple[float, float, float] | None


@dataclass(frozen=True, slots=True)
class Result:
    """The end of a race. `verdict` compares the `challenger` with the best baseline, `against`.

    `likely` is the chance, by all that was measured, that the challenger takes less time than `against`.
    `winner` is the challenger where the verdict says faster, or that chance is high and the verdict's ratio
    under 1; else `against`; None when nothing ran.
    """

    winner: str | None
    challenger: str | None
    against: str | None
    verdict: Verdict | None
    standings: tuple[Standing, ...]
    likely: float | None = None


class StepTimes:
    """How long steps take, in seconds, by those that were taken."""

    def __init__(self) -> None:
        self._steps: dict[tuple[str, Rung], list[float]] = {}
        self._loads: list[float] = []

    def add(self, step: Step, outcome: Outcome) -> None:
        """One more step."""
        if not step.load:
            self._steps.setdefault((step.arm, step.rung), []).append(outcome.seconds)
        elif outcome.status == "ok":
            self._loads.append(outcome.seconds)

    def usual(self, arm: str, rung: Rung) -> float | None:
        """Median of the arm's steps without a load, else of all arms'; None as long as there is none."""
        told = self._steps.get((arm, rung)) or self._all(rung)
        return median(told) if told else None

    def load(self) -> float:
        """What a load takes beside the measurement that it was for; 0 as long as there was none."""
        others = self._all("short")
        beside = median(others) if others else 0.0
        return max(0.0, median(self._loads) - beside) if self._loads else 0.0

    def _all(self, wanted: Rung) -> list[float]:
        return [seconds for (_, rung), told in self._steps.items() if rung == wanted for seconds in told]


def excluded_arms(
    arms: Sequence[Arm], failed: Mapping[int, Status], ran: set[int], *, guess: bool = True
) -> dict[int, tuple[str, str]]:
    """(word, reason) for each arm, by index, that failed or that a failure speaks against.

    Without `guess`, and for baselines, dead engines prove nothing: every arm whose memory may do is tried.
    """
    out: dict[int, tuple[str, str]] = {i: (status, "it was tried") for i, status in failed.items()}
    full = [arms[i] for i, status in failed.items() if status == "out-of-memory" and arms[i].demands]
    deadly = _deadly_levels(arms, failed, ran) if guess else set()
    for i, arm in enumerate(arms):
        if i in out or i in ran:
            continue
        for other in full:
            if arm.demands.keys() == other.demands.keys() and all(
                arm.demands[what] >= need for what, need in other.demands.items()
            ):
                out[i] = ("does-not-fit", f"{other.name} needs no more and ran out of memory")
        for levels in deadly:
            if levels <= _levels(arm) and not arm.baseline:
                what = " and ".join(f"{knob} {level}" for knob, level in sorted(levels, key=str))
                out[i] = ("crashed", f"the engine died again and again with {what}, and never ran with it")
    return out


def _deadly_levels(
    arms: Sequence[Arm], failed: Mapping[int, Status], ran: set[int]
) -> set[frozenset[tuple[str, Level]]]:
    """Two levels together in two arms that ended the engine, or one in three, and in none that ran."""
    dead = [_levels(arms[i]) for i, status in failed.items() if status in DEADLY]
    alive = [_levels(arms[i]) for i in ran]
    pairs = {frozenset(two) for one, other in combinations(dead, 2) for two in combinations(one & other, 2)}
    single = {
        frozenset({level}) for three in combinations(dead, 3) for level in frozenset.intersection(*three)
    }
    return {cause for cause in pairs | single if not any(cause <= levels for levels in alive)}


def _levels(arm: Arm) -> frozenset[tuple[str, Level]]:
    return frozenset(arm.knobs.items())
