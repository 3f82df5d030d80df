"""Two servers compared round by round: what a round says of each, and what all rounds say of the two. Pure.

In a round all clients ask one server at once, then the other one; which goes first is drawn for each round.
So a round is one pair for `bench.verdict`, however the machine drifts between rounds. One figure per round
and server, since requests of the same moment are not independent of each other: as many pairs as rounds.

Ratios are the second server's figure over the first's, as the baseline comes first. For times under 1 means
that the second takes less time; for tokens per second over 1 means that it makes more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, log2
from random import Random
from statistics import median
from typing import Literal

from qnext.bench.endpoint import Exchange, first_token_ns, gaps_ns, per_token_ns
from qnext.bench.verdict import CONFIDENCE, Verdict, compare_paired

Side = Literal["first", "second"]
Metric = Literal["ttft", "gap", "per_token", "output_tps"]
PairStatus = Literal["ok", "confounded", "incomplete", "stopped", "failed"]

SIDES: tuple[Side, Side] = ("first", "second")
METRICS: dict[Metric, str] = {
    "ttft": "ttft_ns",
    "gap": "gap_ns",
    "per_token": "per_token_ns",
    "output_tps": "output_tps",
}
"""Each metric's field of `Figures`."""
FEWEST_PAIRS = ceil(log2(2 / (1 - CONFIDENCE)))
"""With fewer the signed-rank test's smallest p-value, 2 / 2**pairs, is above what the confidence asks: 8."""

_GONE = ("hung", "unreachable")
_LENGTH_TOLERANCE = 0.02


@dataclass(frozen=True, slots=True)
class Round:
    """What the clients saw of both servers: `sides[0]` is the first server's. `begun_by`, 0 or 1, began."""

    begun_by: int
    sides: tuple[tuple[Exchange, ...], tuple[Exchange, ...]]

    @property
    def is_pair(self) -> bool:
        """Whether both servers bore the stated clients and answered all: no failure and no wait (429)."""
        seen = [one for side in self.sides for one in side]
        return all(self.sides) and all(one.status == "ok" and not one.rate_limited for one in seen)


@dataclass(frozen=True, slots=True)
class Figures:
    """One server's figures; `output_tps` is tokens per second of all clients together.

    None where the answers cannot tell it: no gap in a single chunk, no time per token with one token.
    """

    ttft_ns: float | None = None
    gap_ns: float | None = None
    per_token_ns: float | None = None
    output_tps: float | None = None


@dataclass(frozen=True, slots=True)
class PairLevel:
    """All rounds with `concurrency` clients, from `started_ns` on.

    `comparisons` has those metrics that both servers have a figure of in some pair; `medians` are over the
    rounds that are pairs. `stopped_by` names the server that no longer answered and so ended the level.
    """

    concurrency: int
    status: PairStatus
    started_ns: int
    rounds: tuple[Round, ...]
    stopped_by: Side | None
    comparisons: Mapping[Metric, Verdict]
    medians: tuple[Figures, Figures]

    @property
    def pairs(self) -> tuple[Round, ...]:
        """The rounds that are compared."""
        return tuple(one for one in self.rounds if one.is_pair)

    def exchanges(self, side: int) -> tuple[Exchange, ...]:
        """All requests to one of the servers, 0 or 1."""
        return tuple(one for done in self.rounds for one in done.sides[side])


def draw_order(seed: int, concurrency: int, rounds: int) -> tuple[int, ...]:
    """Which server begins each round, 0 or 1: fair coins, and the same ones for the same seed."""
    coins = Random(f"{seed} {concurrency}")
    return tuple(coins.randrange(2) for _ in range(rounds))


def round_figures(exchanges: Sequence[Exchange]) -> Figures:
    """Figures of the answers that all clients got from one server in one round; every one of them whole.

    Time to first token and time per token are the median client's, the gap is the longest of all. Speed is
    of all answers over the time from the first request sent to the last chunk.
    """
    per_token = [time for one in exchanges if (time := per_token_ns(one)) is not None]
    gaps = [gap for one in exchanges for gap in gaps_ns(one)]
    tokens = sum(one.output_tokens or 0 for one in exchanges)
    time_ns = max(one.arrivals_ns[-1] for one in exchanges) - min(one.sent_ns for one in exchanges)
    return Figures(
        ttft_ns=median(first_token_ns(one) for one in exchanges),
        gap_ns=max(gaps, default=0) or None,
        per_token_ns=median(per_token) if per_token else None,
        output_tps=tokens * 1e9 / time_ns if tokens and time_ns > 0 else None,
    )


def gone(rounds: Sequence[Round]) -> tuple[Side, Exchange] | None:
    """The server that the last round found hanging or gone, and the request that did."""
    for side, exchanges in zip(SIDES, rounds[-1].sides if rounds else (), strict=False):
        for one in exchanges:
            if one.status in _GONE:
                return side, one
    return None


def make_pair_level(concurrency: int, started_ns: int, rounds: Sequence[Round], asked: int) -> PairLevel:
    """The figures of what was done of `asked` rounds; a round not done has no place in `rounds`."""
    found = [tuple(round_figures(side) for side in one.sides) for one in rounds if one.is_pair]
    comparisons: dict[Metric, Verdict] = {}
    for metric, field in METRICS.items():
        both = [(getattr(one[0], field), getattr(one[1], field)) for one in found]
        both = [pair for pair in both if None not in pair]
        if both:
            comparisons[metric] = _compare(metric, both)
    lost = gone(rounds)
    return PairLevel(
        concurrency=concurrency,
        status=_level_status(rounds, asked, stopped=lost is not None),
        started_ns=started_ns,
        rounds=tuple(rounds),
        stopped_by=lost[0] if lost else None,
        comparisons=comparisons,
        medians=(_medians([one[0] for one in found]), _medians([one[1] for one in found])),
    )


def _compare(metric: Metric, pairs: Sequence[tuple[float, float]]) -> Verdict:
    """The word is the second server's; the ratio its figure over the first's, of speeds too."""
    if metric != "output_tps":
        return compare_paired([second for _, second in pairs], [first for first, _ in pairs])
    times = compare_paired([1 / second for _, second in pairs], [1 / first for first, _ in pairs])
    return replace(times, ratio=1 / times.ratio, low=1 / times.high, high=1 / times.low)


def _medians(found: Sequence[Figures]) -> Figures:
    known = {
        field: [value for one in found if (value := getattr(one, field)) is not None]
        for field in METRICS.values()
    }
    return Figures(**{field: median(values) for field, values in known.items() if values})


def _level_status(rounds: Sequence[Round], asked: int, *, stopped: bool) -> PairStatus:
    pairs = [one for one in rounds if one.is_pair]
    if not pairs:
        return "failed"
    if stopped:
        return "stopped"
    if len(pairs) < asked:
        return "incomplete"
    cached = any(one.cached_tokens for done in pairs for side in done.sides for one in side)
    return "confounded" if cached or unequal_tokens(pairs) else "ok"


def unequal_tokens(pairs: Sequence[Round]) -> dict[str, tuple[float, float]]:
    """{"prompts" or "answers": median tokens of both servers} where they differ by more than 2 %."""
    found = {}
    for name, field in (("prompts", "prompt_tokens"), ("answers", "output_tokens")):
        counts = [[getattr(one, field) or 0 for done in pairs for one in done.sides[side]] for side in (0, 1)]
        first, second = (float(median(known)) if known else 0.0 for known in counts)
        if abs(first - second) > _LENGTH_TOLERANCE * max(first, second):
            found[name] = (first, second)
    return found
