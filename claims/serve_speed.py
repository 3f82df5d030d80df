"""`qnext serve` beside llama-server: throughput, time to first token, stalls, second turns, equal text.

Both serve a 4-layer true-shape slice of Qwen3-Next-80B-A3B with the same planned flags and the same native
libraries, both are loaded at once and asked in turns, the order drawn (`qnext bench run --url A --url B`).
Ratios are qnext's figure over llama-server's.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

from claims import Figure, claim
from claims._cells import say
from claims._servers import both_servers
from claims._slice import true_slice
from qnext.bench.endpoint import Exchange
from qnext.bench.endpoint_pair import Metric, PairLevel
from qnext.bench.prompts import PromptMaker
from qnext.pipeline.endpoint_client import EndpointClient
from qnext.pipeline.endpoint_load import EndpointTask
from qnext.pipeline.endpoint_pair import PairTask, PairWatch, measure_pair

LAYERS, SLOTS, CONTEXT = 4, 8, 2560
ROUNDS = 8
PLAIN_ROUNDS, PLAIN_TOKENS = 8, 48
STALL_ROUNDS, STALL_PROMPT, STREAM_TOKENS = 5, 2000, 220


@claim(
    "serve-throughput",
    "output tokens per second at 1, 2, 4 and 8 clients, short prompts: qnext / llama-server",
    bar="0.97 or more at each",
    minutes=12,
)
def measure_throughput() -> Figure:
    levels = _pair(prompt=32, generate=48, clients=(1, 2, 4, 8), rounds=ROUNDS)
    ratios = [level.comparisons["output_tps"].ratio for level in levels]
    return Figure(min(ratios), "x", len(ratios) == 4 and min(ratios) >= 0.97, _said(levels, "output_tps"))


@claim(
    "serve-throughput-plain",
    "the same by a client of the standard library only: threads, urllib, tokens as the servers count them",
    bar="0.97 or more at each",
    minutes=15,
)
def measure_throughput_plainly() -> Figure:
    chance, maker = random.Random(13), PromptMaker(13)
    ratios: dict[int, list[float]] = {}
    with _servers() as urls, ThreadPoolExecutor(SLOTS) as pool:
        for clients in (1, 2, 4, 8):
            for played in range(PLAIN_ROUNDS + 1):
                prompts = [maker.text(maker.words(24)) for _ in range(clients)]
                speeds = [0.0, 0.0]
                for side in chance.sample((0, 1), 2):
                    began = time.monotonic()
                    tokens = sum(pool.map(partial(_tokens_of, urls[side]), prompts))
                    speeds[side] = tokens / (time.monotonic() - began)
                if played:  # the first one warms up
                    ratios.setdefault(clients, []).append(speeds[1] / speeds[0])
            say(f"{clients} clients: {ratios[clients]}")
    middles = {clients: statistics.median(found) for clients, found in ratios.items()}
    words = ", ".join(
        f"{clients} clients {middles[clients]:.3f} ({min(found):.3f}-{max(found):.3f})"
        for clients, found in ratios.items()
    )
    least = min(middles.values())
    return Figure(least, "x", least >= 0.97, f"medians of {PLAIN_ROUNDS} pairs; {words}")


def _tokens_of(url: str, prompt: str) -> int:
    """Tokens of one streamed answer, by the count at its end."""
    body = {
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": PLAIN_TOKENS,
        "temperature": 0,
        "stream": True,
        "ignore_eos": True,
        "cache_prompt": False,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        chunks = [json.loads(line[6:]) for line in answer if line.startswith(b"data: {")]
    return int(chunks[-1]["usage"]["completion_tokens"])


@claim(
    "serve-first-token",
    "time to first token at 1 and 8 clients, prompts of 250 and 2,000 tokens: qnext / llama-server",
    bar="1.05 or less at each",
    minutes=20,
)
def measure_first_token() -> Figure:
    found, words = [], []
    for prompt, rounds in ((250, ROUNDS), (2000, 2)):
        levels = _pair(prompt=prompt, generate=4, clients=(1, 8), rounds=rounds)
        found += [level.comparisons["ttft"].ratio for level in levels]
        words.append(f"{prompt} tokens: {_said(levels, 'ttft')}")
    return Figure(max(found), "x time", len(found) == 4 and max(found) <= 1.05, "; ".join(words))


@claim(
    "serve-stall",
    "longest gap of a running stream while a prompt of 2,000 tokens arrives: qnext / llama-server",
    bar="1.5 or less",
    minutes=8,
)
def measure_stall() -> Figure:
    with _servers() as urls:
        gaps = asyncio.run(_stalls(urls))
    theirs, ours = (statistics.median(side) for side in gaps)
    words = "; ".join(
        f"{name} {min(side):.2f}-{max(side):.2f} s"
        for name, side in zip(("llama-server", "qnext"), gaps, strict=True)
    )
    return Figure(ours / theirs, "x time", ours <= 1.5 * theirs, f"medians of {STALL_ROUNDS} rounds; {words}")


def _pair(*, prompt: int, generate: int, clients: tuple[int, ...], rounds: int) -> tuple[PairLevel, ...]:
    with _servers() as (theirs, ours):
        task = EndpointTask(
            theirs, concurrency=clients, prompt=prompt, generate=generate, repetitions=rounds, deadline_s=600
        )
        watch = PairWatch(on_level=lambda level: say(f"{level.concurrency} clients: {level.medians}"))
        return measure_pair(PairTask(task, ours), watch).levels


@contextmanager
def _servers() -> Iterator[tuple[str, str]]:
    with (
        true_slice(LAYERS, copies=3) as (model, home),
        both_servers(model, home, slots=SLOTS, context=CONTEXT) as urls,
    ):
        yield urls


def _said(levels: tuple[PairLevel, ...], metric: Metric) -> str:
    return ", ".join(
        f"{level.concurrency} clients {one.ratio:.3f} ({one.low:.3f}-{one.high:.3f}, {one.pairs} pairs)"
        for level in levels
        if (one := level.comparisons.get(metric)) is not None
    )


async def _stalls(urls: tuple[str, str]) -> tuple[list[float], list[float]]:
    """Seconds: the longest gap of each server's stream after the long prompt was sent, round by round."""
    gaps: tuple[list[float], list[float]] = ([], [])
    chance, maker = random.Random(7), PromptMaker(7)
    clients = [EndpointClient(url, model=None, api_key=None, deadline_s=600) for url in urls]
    for client in clients:
        await client.__aenter__()
    probe = await clients[0].ask(maker.text(maker.words(100)), 1)
    words = round(STALL_PROMPT * 100 / (probe.exchange.prompt_tokens or 100))
    for _ in range(STALL_ROUNDS):
        for side in chance.sample((0, 1), 2):
            gaps[side].append(await _stall(clients[side], maker, words))
        say(f"stalls: {gaps}")
    for client in clients:
        await client.__aexit__()
    return gaps


async def _stall(client: EndpointClient, maker: PromptMaker, words: int) -> float:
    stream = asyncio.create_task(client.ask(maker.text(maker.words(12)), STREAM_TOKENS))
    await asyncio.sleep(2.0)
    long = await client.ask(maker.text(maker.words(words)), 1)
    answer = await stream
    assert long.exchange.status == answer.exchange.status == "ok", (long.exchange, answer.exchange)
    return _longest_gap(answer.exchange, long.exchange.sent_ns, long.exchange.ended_ns)


def _longest_gap(one: Exchange, begin_ns: int, end_ns: int) -> float:
    times = one.arrivals_ns
    gaps = [b - a for a, b in pairwise(times) if b > begin_ns and a < end_ns]
    return max(gaps) / 1e9
