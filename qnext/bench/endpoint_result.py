"""What was measured of an endpoint: JSON of schema `qnext.endpoint/1`, and what to say beside the figures.

The identity of an endpoint is what the server says of itself. It is less than a record's: nobody tells the
digest of a foreign server's model or its placement, so these results are not kept among the records.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from qnext.bench.endpoint import CountSource, Exchange, Level, LevelStatus

SCHEMA = "qnext.endpoint/1"

_LENGTH_TOLERANCE = 0.02
_GROUPING_TOLERANCE = 1.05


@dataclass(frozen=True, slots=True)
class EndpointServer:
    """What answers at `url`: `software` is its Server header, `model` the name that its answers carry,
    `build` its `system_fingerprint` (llama.cpp's build and commit). `api` is `chat` or `completions`.

    `extras` says whether it takes the fields that hold an answer open, `usage` whether it counts tokens.
    """

    url: str
    software: str | None
    model: str | None
    build: str | None
    api: str
    extras: bool
    usage: bool


@dataclass(frozen=True, slots=True)
class EndpointResult:
    """`prompt` and `generate` are the tokens asked for; the levels hold what they came to.

    `seed` makes the same prompts again. `round_trip_ns` are the times of a trivial request, whose median is
    taken off the time to the first token.
    """

    when: str
    server: EndpointServer
    prompt: int
    generate: int
    repetitions: int
    concurrency: tuple[int, ...]
    seed: int
    prompt_source: CountSource
    output_source: CountSource
    round_trip_ns: tuple[int, ...]
    levels: tuple[Level, ...]

    @property
    def status(self) -> LevelStatus:
        """The worst of the levels'; failed too when a level could not be begun."""
        found = {level.status for level in self.levels}
        if len(self.levels) < len(self.concurrency):
            return "failed"
        for status in ("failed", "incomplete", "confounded"):
            if status in found:
                return status
        return "ok"


def display_name(model: str | None) -> str | None:
    """A model's name without the folders of the person who serves it, where the name is a path."""
    if model is None:
        return None
    if model.startswith(("/", "~", "./")):
        return PurePosixPath(model).name
    return PureWindowsPath(model).name if PureWindowsPath(model).drive else model


def result_warnings(result: EndpointResult) -> tuple[str, ...]:
    """What a reader has to know to believe the figures, in whole sentences."""
    found = []
    if result.prompt_source != "usage":
        found.append(
            f"Prompt tokens are counted {_SOURCES[result.prompt_source]}, not by the server's usage."
        )
    if result.output_source != "usage":
        found.append(
            f"Output tokens are counted {_SOURCES[result.output_source]}, not by the server's usage."
        )
    said: dict[str, list[int]] = {}
    for level in result.levels:
        for text in _level_warnings(level, result):
            said.setdefault(text, []).append(level.concurrency)
    found += [f"{_clients(counts)}: {text}" for text, counts in said.items()]
    missing = result.concurrency[len(result.levels) :]
    if missing:
        found.append(f"Not measured after that: {_clients(missing)}.")
    return tuple(found)


def _clients(counts: Sequence[int]) -> str:
    return f"{', '.join(map(str, counts))} client{'' if tuple(counts) == (1,) else 's'}"


_SOURCES = {"usage": "by usage", "tokenize": "by the server's /tokenize", "estimate": "by our estimate"}


def _level_warnings(level: Level, result: EndpointResult) -> list[str]:
    found = []
    good = level.succeeded
    if level.failed:
        kinds = Counter(one.status for one in level.failed)
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        first = level.failed[0].error
        found.append(
            f"{len(level.failed)} of {len(level.exchanges)} requests failed ({words}); the first: {first}."
        )
    waits = sum(one.rate_limited for one in level.exchanges)
    if waits:
        found.append(f"the server asked to wait (429) {waits} times, so it had fewer clients than stated.")
    cached = [one for one in good if one.cached_tokens]
    if cached:
        most = max(one.cached_tokens or 0 for one in cached)
        found.append(
            f"CONFOUNDED: up to {most} prompt tokens came from the server's cache; "
            "turn its prefix cache off to compare prefill."
        )
    if level.prompt_tokens and abs(level.prompt_tokens.median / result.prompt - 1) > _LENGTH_TOLERANCE:
        found.append(
            f"the prompts had {_range(level.prompt_tokens.low, level.prompt_tokens.high)} tokens, "
            f"not {result.prompt}."
        )
    ended = level.output_tokens
    if ended and (ended.low < result.generate or ended.high > result.generate):
        found.append(
            f"the answers had {_range(ended.low, ended.high)} tokens, not {result.generate}: "
            "the server ends them when it likes."
        )
    if level.tokens_per_chunk and level.tokens_per_chunk > _GROUPING_TOLERANCE:
        found.append(
            f"the server sends {level.tokens_per_chunk:.1f} tokens per chunk; gaps lie between chunks."
        )
    return found


def _range(low: float, high: float) -> str:
    return f"{low:.0f}" if low == high else f"{low:.0f} to {high:.0f}"


def result_to_dict(result: EndpointResult) -> dict[str, Any]:
    """The result as JSON values. All times in nanoseconds; those of exchanges count from their level's start.

    Keys: schema, status, when, server {url, software, model, build, api, extras, usage}, asked {prompt,
    generate, repetitions, concurrency}, seed, counts {prompt, output}, round_trip_ns, levels, warnings.
    A level: concurrency, status, requests, failed, rate_limited, the spreads prompt_tokens, output_tokens,
    ttft_ns, gap_ns, per_token_ns, prefill_tps and decode_tps (each {median, low, high, p95, p99, count} or
    null), tokens_per_chunk, total {steady_ns, input_tps, output_tps}, exchanges.
    """
    return {
        "schema": SCHEMA,
        "status": result.status,
        "when": result.when,
        "server": asdict(result.server),
        "asked": {
            "prompt": result.prompt,
            "generate": result.generate,
            "repetitions": result.repetitions,
            "concurrency": list(result.concurrency),
        },
        "seed": result.seed,
        "counts": {"prompt": result.prompt_source, "output": result.output_source},
        "round_trip_ns": list(result.round_trip_ns),
        "levels": [_level_to_dict(level) for level in result.levels],
        "warnings": list(result_warnings(result)),
    }


_SPREADS = (
    "prompt_tokens",
    "output_tokens",
    "ttft_ns",
    "gap_ns",
    "per_token_ns",
    "prefill_tps",
    "decode_tps",
)


def _level_to_dict(level: Level) -> dict[str, Any]:
    spreads = {name: getattr(level, name) for name in _SPREADS}
    return {
        "concurrency": level.concurrency,
        "status": level.status,
        "requests": len(level.exchanges),
        "failed": len(level.failed),
        "rate_limited": sum(one.rate_limited for one in level.exchanges),
        **{name: None if found is None else asdict(found) for name, found in spreads.items()},
        "tokens_per_chunk": level.tokens_per_chunk,
        "total": {
            "steady_ns": level.steady_ns,
            "input_tps": level.input_tps,
            "output_tps": level.output_tps,
        },
        "exchanges": _exchanges(level.exchanges, level.started_ns),
    }


def _exchanges(exchanges: Sequence[Exchange], started_ns: int) -> list[dict[str, Any]]:
    return [
        {
            **asdict(one),
            "sent_ns": one.sent_ns - started_ns,
            "ended_ns": one.ended_ns - started_ns,
            "arrivals_ns": [arrival - started_ns for arrival in one.arrivals_ns],
        }
        for one in exchanges
    ]
