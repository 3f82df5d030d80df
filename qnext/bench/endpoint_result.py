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

from qnext.bench.endpoint import CountSource, Exchange, Level, LevelStatus, spread, tokens_per_chunk

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
    by_level = [
        (level.concurrency, exchange_warnings(level.exchanges, result.prompt, result.generate))
        for level in result.levels
    ]
    return (
        *source_warnings(result.prompt_source, result.output_source),
        *level_warnings(by_level, result.concurrency),
    )


def source_warnings(prompt: CountSource, output: CountSource) -> list[str]:
    """Who counted the tokens, where it was not the server's usage."""
    return [
        f"{name} tokens are counted {_SOURCES[source]}, not by the server's usage."
        for name, source in (("Prompt", prompt), ("Output", output))
        if source != "usage"
    ]


def level_warnings(by_level: Sequence[tuple[int, Sequence[str]]], asked: Sequence[int]) -> list[str]:
    """What is said of levels, (clients, sentences) each, once per sentence; and which were not reached."""
    said: dict[str, list[int]] = {}
    for clients, texts in by_level:
        for text in texts:
            said.setdefault(text, []).append(clients)
    found = [f"{_clients(counts)}: {text}" for text, counts in said.items()]
    missing = asked[len(by_level) :]
    return [*found, f"Not measured after that: {_clients(missing)}."] if missing else found


def _clients(counts: Sequence[int]) -> str:
    return f"{', '.join(map(str, counts))} client{'' if tuple(counts) == (1,) else 's'}"


_SOURCES = {"usage": "by usage", "tokenize": "by the server's /tokenize", "estimate": "by our estimate"}


def exchange_warnings(exchanges: Sequence[Exchange], prompt: int, generate: int) -> list[str]:
    """What is odd about requests of so many tokens to a server: failures, waits, caches, lengths, chunks."""
    found = []
    good = [one for one in exchanges if one.status == "ok"]
    failed = [one for one in exchanges if one.status != "ok"]
    if failed:
        kinds = Counter(one.status for one in failed)
        words = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        found.append(
            f"{len(failed)} of {len(exchanges)} requests failed ({words}); the first: {failed[0].error}."
        )
    waits = sum(one.rate_limited for one in exchanges)
    if waits:
        found.append(f"the server asked to wait (429) {waits} times, so it had fewer clients than stated.")
    cached = [one for one in good if one.cached_tokens]
    if cached:
        most = max(one.cached_tokens or 0 for one in cached)
        found.append(
            f"CONFOUNDED: up to {most} prompt tokens came from the server's cache; "
            "turn its prefix cache off to compare prefill."
        )
    begun = spread([one.prompt_tokens for one in good if one.prompt_tokens])
    if begun and abs(begun.median / prompt - 1) > _LENGTH_TOLERANCE:
        found.append(f"the prompts had {_range(begun.low, begun.high)} tokens, not {prompt}.")
    ended = spread([one.output_tokens for one in good if one.output_tokens])
    if ended and (ended.low < generate or ended.high > generate):
        found.append(
            f"the answers had {_range(ended.low, ended.high)} tokens, not {generate}: "
            "the server ends them when it likes."
        )
    grouped = tokens_per_chunk(good)
    if grouped and grouped > _GROUPING_TOLERANCE:
        found.append(f"the server sends {grouped:.1f} tokens per chunk; gaps lie between chunks.")
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
        "exchanges": exchanges_to_list(level.exchanges, level.started_ns),
    }


def exchanges_to_list(exchanges: Sequence[Exchange], started_ns: int) -> list[dict[str, Any]]:
    """The raw exchanges as JSON values; their times count from `started_ns`."""
    return [
        {
            **asdict(one),
            "sent_ns": one.sent_ns - started_ns,
            "ended_ns": one.ended_ns - started_ns,
            "arrivals_ns": [arrival - started_ns for arrival in one.arrivals_ns],
        }
        for one in exchanges
    ]
