"""What the chunks of a streamed answer say about a server's speed. Pure arithmetic on arrival times.

A client sees when text arrives, not when a token is made, and a server may put several tokens into one
chunk (speculative decoding, or a busy server that gathers). So tokens are the server's own count (`usage`)
and never the number of chunks; what lies between two chunks is called a gap, what a reader waits, and the
time per token is `(last - first) / (tokens - 1)` beside it. With one token per chunk both are the same.

Clients work in a closed loop: each sends its next request when its last one has ended. While all of them are
busy the server bears the stated concurrency; once the first client has done its share it bears less. The
throughput of all clients together is therefore taken from the start to that moment only, the steady part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Literal

ExchangeStatus = Literal[
    "ok",
    "refused",
    "rate-limited",
    "server-error",
    "cut",
    "garbage",
    "hung",
    "unreachable",
    "foreign-server",
]
LevelStatus = Literal["ok", "confounded", "incomplete", "failed"]
CountSource = Literal["usage", "tokenize", "estimate"]

PERCENTILES = (0.95, 0.99)


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and what came back. Times are of one clock that never jumps (`time.perf_counter_ns`).

    `arrivals_ns` has an entry for every chunk that held text, thought (`reasoning_content`) or a tool call;
    chunks that only announce a role or a count are none. `cached_tokens` are those of the prompt that the
    server says it did not compute. `rate_limited` is how often the server asked to wait (429) before.
    `server_timings` is what llama-server measured itself, if it is one.
    """

    client: int
    status: ExchangeStatus
    sent_ns: int
    ended_ns: int
    arrivals_ns: tuple[int, ...] = ()
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    http_status: int | None = None
    rate_limited: int = 0
    error: str | None = None
    server_timings: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Spread:
    """`median` of `count` values, the lowest and the highest. A percentile is None where the values cannot
    tell it: p95 needs 20 of them, p99 needs 100."""

    median: float
    low: float
    high: float
    p95: float | None
    p99: float | None
    count: int


@dataclass(frozen=True, slots=True)
class Level:
    """All requests with `concurrency` clients at once. Times in nanoseconds, speeds in tokens per second.

    `ttft_ns`, `prefill_tps`, `decode_tps` and `per_token_ns` have a value per request, `gap_ns` one per pair
    of chunks. `input_tps` and `output_tps` are of all clients together over the `steady_ns` in which all of
    them were busy. `tokens_per_chunk` is None where no tokens were counted.
    """

    concurrency: int
    status: LevelStatus
    started_ns: int
    exchanges: tuple[Exchange, ...]
    prompt_tokens: Spread | None
    output_tokens: Spread | None
    ttft_ns: Spread | None
    gap_ns: Spread | None
    per_token_ns: Spread | None
    prefill_tps: Spread | None
    decode_tps: Spread | None
    tokens_per_chunk: float | None
    steady_ns: int
    input_tps: float | None
    output_tps: float | None

    @property
    def succeeded(self) -> tuple[Exchange, ...]:
        """The requests whose answer came whole; only these are in the figures."""
        return tuple(one for one in self.exchanges if one.status == "ok")

    @property
    def failed(self) -> tuple[Exchange, ...]:
        """The others."""
        return tuple(one for one in self.exchanges if one.status != "ok")


def spread(values: Sequence[float]) -> Spread | None:
    """Median, range and percentiles; None without values."""
    if not values:
        return None
    p95, p99 = (quantile(values, share) if len(values) >= 1 / (1 - share) else None for share in PERCENTILES)
    return Spread(median(values), min(values), max(values), p95, p99, len(values))


def quantile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, straight between neighbours (numpy's default method)."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * share
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def first_token_ns(one: Exchange) -> int:
    """From sending to the first text or thought. The exchange has arrivals."""
    return one.arrivals_ns[0] - one.sent_ns


def gaps_ns(one: Exchange) -> list[int]:
    """Times between neighbouring chunks."""
    return [later - earlier for earlier, later in zip(one.arrivals_ns[:-1], one.arrivals_ns[1:], strict=True)]


def prefill_tps(one: Exchange, round_trip_ns: int) -> float | None:
    """Prompt tokens that were computed, over the time to the first token less that of a trivial request.

    None where the prompt was not counted, all of it was cached, or the time is not above a round trip.
    """
    time_ns = first_token_ns(one) - round_trip_ns
    fresh = (one.prompt_tokens or 0) - (one.cached_tokens or 0)
    return fresh * 1e9 / time_ns if fresh > 0 and time_ns > 0 else None


def per_token_ns(one: Exchange) -> float | None:
    """`(last - first) / (tokens - 1)`; None with fewer than two tokens or everything in one chunk.

    It takes the first chunk to hold one token, as servers send it: they hurry with the first.
    """
    tokens = one.output_tokens or 0
    time_ns = one.arrivals_ns[-1] - one.arrivals_ns[0]
    return time_ns / (tokens - 1) if tokens > 1 and time_ns > 0 else None


def tokens_per_chunk(exchanges: Sequence[Exchange]) -> float | None:
    """Of all answers whose tokens were counted; None without one."""
    counted = [(one.output_tokens, len(one.arrivals_ns)) for one in exchanges if one.output_tokens]
    chunks = sum(chunks for _, chunks in counted)
    return sum(tokens for tokens, _ in counted) / chunks if chunks else None


def steady_end_ns(exchanges: Sequence[Exchange]) -> int:
    """When the first client had done all of its requests. Raises ValueError without exchanges."""
    last: dict[int, int] = {}
    for one in exchanges:
        last[one.client] = max(last.get(one.client, 0), one.ended_ns)
    return min(last.values())


def tokens_until(exchanges: Sequence[Exchange], end_ns: int) -> tuple[float, float]:
    """(prompt tokens, output tokens) of whole answers that the server had worked off by `end_ns`.

    A prompt counts by the part of its time to the first token that lies before; an answer by the share of
    its chunks that had arrived.
    """
    read = written = 0.0
    for one in exchanges:
        if one.status != "ok" or one.sent_ns >= end_ns:
            continue
        fresh = (one.prompt_tokens or 0) - (one.cached_tokens or 0)
        read += fresh * min(1.0, (end_ns - one.sent_ns) / max(1, first_token_ns(one)))
        arrived = sum(1 for arrival in one.arrivals_ns if arrival <= end_ns)
        written += (one.output_tokens or 0) * arrived / len(one.arrivals_ns)
    return read, written


def make_level(concurrency: int, started_ns: int, exchanges: Sequence[Exchange], round_trip_ns: int) -> Level:
    """The figures of all requests that `concurrency` clients made from `started_ns` on; at least one each."""
    good = [one for one in exchanges if one.status == "ok"]
    steady_ns = steady_end_ns(exchanges) - started_ns
    read, written = tokens_until(exchanges, started_ns + steady_ns)
    prefills = [tps for one in good if (tps := prefill_tps(one, round_trip_ns)) is not None]
    per_token = [time for one in good if (time := per_token_ns(one)) is not None]
    return Level(
        concurrency=concurrency,
        status=_level_status(good, len(exchanges)),
        started_ns=started_ns,
        exchanges=tuple(exchanges),
        prompt_tokens=spread([one.prompt_tokens for one in good if one.prompt_tokens]),
        output_tokens=spread([one.output_tokens for one in good if one.output_tokens]),
        ttft_ns=spread([first_token_ns(one) for one in good]),
        gap_ns=spread([gap for one in good for gap in gaps_ns(one)]),
        per_token_ns=spread(per_token),
        prefill_tps=spread(prefills),
        decode_tps=spread([1e9 / time for time in per_token]),
        tokens_per_chunk=tokens_per_chunk(good),
        steady_ns=steady_ns,
        input_tps=read * 1e9 / steady_ns if read and steady_ns > 0 else None,
        output_tps=written * 1e9 / steady_ns if written and steady_ns > 0 else None,
    )


def _level_status(good: Sequence[Exchange], total: int) -> LevelStatus:
    if not good:
        return "failed"
    if len(good) < total:
        return "incomplete"
    return "confounded" if any(one.cached_tokens for one in good) else "ok"
