"""What was measured of two servers in one run: JSON of schema `qnext.endpoint-pair/1`, what to say with it.

The first server is the baseline: every ratio is the second's figure over the first's (`bench.endpoint_pair`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qnext.bench.endpoint import CountSource
from qnext.bench.endpoint_pair import (
    FEWEST_PAIRS,
    METRICS,
    SIDES,
    PairLevel,
    PairStatus,
    Round,
    gone,
    round_figures,
    unequal_tokens,
)
from qnext.bench.endpoint_result import (
    EndpointServer,
    exchange_warnings,
    exchanges_to_list,
    level_warnings,
    source_warnings,
)
from qnext.bench.verdict import CONFIDENCE

SCHEMA = "qnext.endpoint-pair/1"


@dataclass(frozen=True, slots=True)
class PairSide:
    """One of the two servers, how its tokens were counted, and the times of a trivial request to it."""

    server: EndpointServer
    prompt_source: CountSource
    output_source: CountSource
    round_trip_ns: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairResult:
    """`prompt` and `generate` are the tokens asked for, `repetitions` the rounds of each level.

    `seed` makes the same prompts and the same order again. `sides[0]` is the baseline.
    """

    when: str
    sides: tuple[PairSide, PairSide]
    prompt: int
    generate: int
    repetitions: int
    concurrency: tuple[int, ...]
    seed: int
    levels: tuple[PairLevel, ...]

    @property
    def status(self) -> PairStatus:
        """The worst of the levels'. A failed or stopped one is the last."""
        found = {level.status for level in self.levels}
        worst: tuple[PairStatus, ...] = ("failed", "stopped", "incomplete", "confounded")
        return next((status for status in worst if status in found), "ok")


def few_pairs_words(pairs: int) -> str | None:
    """Why so few pairs can show nothing; None where they are enough."""
    if pairs >= FEWEST_PAIRS:
        return None
    have = f"{pairs} pair{'' if pairs == 1 else 's'}"
    return (
        f"{have} of rounds cannot show a difference at {100 * CONFIDENCE:g} %, "
        f"however large it is: {FEWEST_PAIRS} can."
    )


def pair_warnings(result: PairResult) -> tuple[str, ...]:
    """What a reader has to know to believe the figures, in whole sentences."""
    sources = [
        f"{name}: {text}"
        for name, side in zip(SIDES, result.sides, strict=True)
        for text in source_warnings(side.prompt_source, side.output_source)
    ]
    by_level = [(level.concurrency, _level_warnings(level, result)) for level in result.levels]
    return (*sources, *level_warnings(by_level, result.concurrency))


def _level_warnings(level: PairLevel, result: PairResult) -> list[str]:
    found = [
        f"{name}: {text}"
        for number, name in enumerate(SIDES)
        for text in exchange_warnings(level.exchanges(number), result.prompt, result.generate)
    ]
    for what, (first, second) in unequal_tokens(level.pairs).items():
        found.append(
            f"CONFOUNDED: the {what} had {first:.0f} tokens on the first, {second:.0f} on the second."
        )
    dropped = len(level.rounds) - len(level.pairs)
    if dropped:
        found.append(f"{dropped} of {len(level.rounds)} rounds are no pair and left out of the comparison.")
    lost = gone(level.rounds)
    if lost:
        found.append(
            f"the {lost[0]} server no longer answers ({lost[1].error}): "
            f"ended after {len(level.rounds)} of {result.repetitions} rounds."
        )
    few = few_pairs_words(len(level.pairs))
    return [*found, few] if few else found


def pair_to_dict(result: PairResult) -> dict[str, Any]:
    """The result as JSON values. All times in nanoseconds; those of exchanges count from their level's start.

    Keys: schema, status, when, servers [first, second], asked {prompt, generate, repetitions, concurrency},
    seed, counts [{prompt, output}, …], round_trip_ns [[…], […]], levels, warnings.
    A level: concurrency, status, stopped_by (first, second or null), pairs, rounds, comparisons {ttft, gap,
    per_token, output_tps: each {ratio, low, high, confidence, p_value, pairs, word} or null; ratio is second
    over first, word says what the second is}, medians {first, second: {ttft_ns, gap_ns, per_token_ns,
    output_tps}}. A round: order (who went first), pair (whether it is compared), first and second, each
    {figures (null where the round is no pair), exchanges}.
    """
    return {
        "schema": SCHEMA,
        "status": result.status,
        "when": result.when,
        "servers": [asdict(side.server) for side in result.sides],
        "asked": {
            "prompt": result.prompt,
            "generate": result.generate,
            "repetitions": result.repetitions,
            "concurrency": list(result.concurrency),
        },
        "seed": result.seed,
        "counts": [{"prompt": side.prompt_source, "output": side.output_source} for side in result.sides],
        "round_trip_ns": [list(side.round_trip_ns) for side in result.sides],
        "levels": [_level_to_dict(level) for level in result.levels],
        "warnings": list(pair_warnings(result)),
    }


def _level_to_dict(level: PairLevel) -> dict[str, Any]:
    verdicts = {metric: level.comparisons.get(metric) for metric in METRICS}
    return {
        "concurrency": level.concurrency,
        "status": level.status,
        "stopped_by": level.stopped_by,
        "pairs": len(level.pairs),
        "comparisons": {metric: found and asdict(found) for metric, found in verdicts.items()},
        "medians": {side: asdict(found) for side, found in zip(SIDES, level.medians, strict=True)},
        "rounds": _rounds(level.rounds, level.started_ns),
    }


def _rounds(rounds: Sequence[Round], started_ns: int) -> list[dict[str, Any]]:
    return [
        {
            "order": [SIDES[done.begun_by], SIDES[1 - done.begun_by]],
            "pair": done.is_pair,
            **{
                side: {
                    "figures": asdict(round_figures(seen)) if done.is_pair else None,
                    "exchanges": exchanges_to_list(seen, started_ns),
                }
                for side, seen in zip(SIDES, done.sides, strict=True)
            },
        }
        for done in rounds
    ]
