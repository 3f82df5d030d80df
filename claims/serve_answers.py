"""`qnext serve`: what a second turn costs, whether texts are llama-server's, what HTTP and Python cost.

The second turn is measured on a 4-layer true-shape slice of Qwen3-Next-80B-A3B, where state is large and
prompts are slow; texts and overhead on the demo, where a step is so short that everything else shows.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from claims import Figure, claim
from claims._cells import say
from claims._servers import both_servers, our_server
from claims._slice import true_slice
from qnext.bench.prompts import PromptMaker

FIRST_TURN, SECOND_TURN, CHATS = 3000, 50, 3
INTERVAL = 2048
"""Tokens between two copies of a state (`prompt_cache`), at most."""
TEXT_TOKENS, STREAMS = 120, 8
OVERHEAD_TOKENS, OVERHEAD_ROUNDS = 400, 5


@claim(
    "serve-second-turn",
    f"time to the first token of a chat's second turn / of its first of {FIRST_TURN} tokens, 4-layer slice",
    bar="0.2 or less, and no more prefilled than the new tokens and one interval",
    minutes=6,
)
def measure_second_turn() -> Figure:
    maker, ratios, spare = PromptMaker(11), [], []
    with (
        true_slice(4) as (model, home),
        our_server(model, home, slots=1, context=FIRST_TURN + 1096) as (url, _),
    ):
        for _ in range(CHATS):
            words = maker.text(maker.words(round(FIRST_TURN / _tokens_per_word(url, maker))))
            chat = [{"role": "user", "content": words}]
            first = _chat(url, chat, max_tokens=16)
            said = first["choices"][0]["message"]["content"]
            question = {"role": "user", "content": maker.text(maker.words(SECOND_TURN // 2))}
            second = _chat(url, [*chat, {"role": "assistant", "content": said}, question], max_tokens=16)
            before, after = first["timings"], second["timings"]
            new = second["usage"]["prompt_tokens"] - first["usage"]["total_tokens"]
            spare.append(after["prompt_n"] - new)
            ratios.append(after["prompt_ms"] / before["prompt_ms"])
            say(
                f"first {before['prompt_n']} tokens in {before['prompt_ms']:.0f} ms, second"
                f" {after['prompt_n']} of {second['usage']['prompt_tokens']} in {after['prompt_ms']:.0f} ms,"
                f" {new} new"
            )
    worst = max(ratios)
    detail = f"{CHATS} chats; evaluated beyond the new tokens: {', '.join(map(str, spare))}"
    return Figure(worst, "x time", worst <= 0.2 and max(spare) <= INTERVAL, detail)


@claim(
    "serve-same-text",
    "greedy texts of the demo that differ: alone, 8 at once, and from llama-server's",
    bar="0",
    minutes=2,
)
def measure_same_text() -> Figure:
    prompts = [f"{word} {'and then ' * n}" for n, word in enumerate(["Once", "Why", "The", "Hello"] * 4)]

    def ask(url: str, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": TEXT_TOKENS, "temperature": 0, "ignore_eos": True}
        return str(_post(f"{url}/completions", body)["choices"][0]["text"])

    with (
        _demo() as (model, home),
        both_servers(model, home, slots=STREAMS, context=1024) as (theirs, ours),
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        alone = [ask(ours, prompt) for prompt in prompts]
        other = [ask(theirs, prompt) for prompt in prompts]
        crowd = list(pool.map(lambda prompt: ask(ours, prompt), prompts))
    different = sum(one != two for one, two in zip(alone, crowd, strict=True))
    foreign = sum(one != two for one, two in zip(alone, other, strict=True))
    detail = (
        f"{len(prompts)} prompts of {TEXT_TOKENS} tokens: {different} differ 8 at once, {foreign} from"
        f" llama-server's; {len(set(alone))} different texts"
    )
    return Figure(different + foreign, "texts", different + foreign == 0, detail)


@claim(
    "serve-overhead",
    "time per token at 8 streams outside of llama_decode: sampling, scheduling, bridge, HTTP",
    bar="under 0.5 ms",
    minutes=1,
)
def measure_overhead() -> Figure:
    body = {"prompt": "Once", "max_tokens": OVERHEAD_TOKENS, "temperature": 0, "ignore_eos": True}
    rounds = []
    with (
        _demo() as (model, home),
        our_server(model, home, slots=STREAMS, context=1024) as (url, _),
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        for _ in range(OVERHEAD_ROUNDS):
            native, began = _native_seconds(url), time.monotonic()
            answers = list(pool.map(lambda _: _stream(f"{url}/v1/completions", body), range(STREAMS)))
            spent = time.monotonic() - began - (_native_seconds(url) - native)
            assert all(pieces >= OVERHEAD_TOKENS // 2 for pieces in answers), answers
            rounds.append(1000 * spent / (STREAMS * OVERHEAD_TOKENS))
    middle = statistics.median(rounds)
    detail = f"{STREAMS} streams of {OVERHEAD_TOKENS} tokens, rounds {min(rounds):.3f}-{max(rounds):.3f} ms"
    return Figure(middle, "ms", middle < 0.5, f"{detail}; the client's own time is in it")


@contextmanager
def _demo() -> Iterator[tuple[Path, Path]]:
    from qnext.models.synth import make_demo

    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        make_demo(Path(folder) / "demo.gguf")
        yield Path(folder) / "demo.gguf", Path(folder)


def _chat(url: str, messages: list[dict[str, str]], *, max_tokens: int) -> Any:
    body = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
    return _post(f"{url}/v1/chat/completions", body)


def _tokens_per_word(url: str, maker: PromptMaker) -> float:
    text = maker.text(maker.words(200))
    return len(_post(f"{url}/tokenize", {"content": text})["tokens"]) / 200


def _request(url: str, body: object) -> urllib.request.Request:
    return urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})


def _post(url: str, body: object) -> Any:
    with urllib.request.urlopen(_request(url, body), timeout=600) as answer:
        return json.load(answer)


def _stream(url: str, body: dict[str, object]) -> int:
    """Events of a streamed answer."""
    with urllib.request.urlopen(_request(url, body | {"stream": True}), timeout=600) as answer:
        return sum(line.startswith(b"data: {") for line in answer)


def _native_seconds(url: str) -> float:
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        found = re.search(r"^qnext:llama_decode_seconds_total (\S+)$", answer.read().decode(), re.MULTILINE)
    assert found is not None
    return float(found[1])
