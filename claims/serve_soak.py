"""Twenty thousand requests of all kinds to `qnext serve demo`: wrong answers, slots left busy, memory.

What the demo says is known: a chat's answer is the beginning of its sentence, as long as was asked for. Some
clients go away in the middle of an answer, some send what has no meaning; each must end as it should and
leave nothing behind. Memory is that of the server and its engine, less the prompt cache, whose size is the
plan's and which fills up by design.
"""

from __future__ import annotations

import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from claims import Figure, claim
from claims._cells import say
from claims._servers import our_server

if TYPE_CHECKING:
    import httpx2

REQUESTS, WORKERS, SLOTS, CONTEXT = 20_000, 16, 8, 1024
DROPPED, MALFORMED = 0.10, 0.05
WARM = 0.2
"""Memory counts from this share of the requests on."""
GROWTH = 1.05

_LONG = "why? " * (CONTEXT * 2)
_MALFORMED: tuple[tuple[bytes, str], ...] = tuple(
    (body if isinstance(body, bytes) else json.dumps(body).encode(), name)
    for name, body in {
        "no JSON": b'{"messages": [',
        "no text at all": b"\xff\xfe\x00",
        "no messages": {"messages": []},
        "a number for a text": {"messages": [{"role": "user", "content": 5}]},
        "a role of no template": {"messages": [{"role": "king", "content": "x"}]},
        "an image": {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        "a temperature below zero": {"messages": [{"role": "user", "content": "x"}], "temperature": -1},
        "too many choices": {"messages": [{"role": "user", "content": "x"}], "n": 5000},
        "a grammar that is none": {"messages": [{"role": "user", "content": "x"}], "grammar": "root ::= ("},
        "longer than the context": {"messages": [{"role": "user", "content": _LONG}]},
    }.items()
)


@dataclass(slots=True)
class _Soak:
    """What has been seen. `wrong` are answers that are not what they should be, with why."""

    url: str
    sentence: str
    left: int = REQUESTS
    kinds: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def judge(self, holds: bool, why: str) -> None:
        if not holds:
            self.wrong.append(why)
            say(f"wrong: {why}")


@claim(
    "serve-soak",
    f"wrong answers and slots left busy in {REQUESTS:,} requests, 10 % dropped, 5 % malformed",
    bar="0, and memory within 5 %",
    minutes=15,
)
def measure_soak() -> Figure:
    from qnext.models.synth import DEMO_SENTENCE, make_demo

    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        make_demo(Path(folder) / "demo.gguf")
        home, flags = Path(folder), ("-t", "1", "-tb", "1")  # the clients need a core, too
        with our_server(home / "demo.gguf", home, slots=SLOTS, context=CONTEXT, flags=flags) as (url, pid):
            soak = _Soak(url, DEMO_SENTENCE)
            began = time.monotonic()
            busy = asyncio.run(_run(soak, pid))
            spent = time.monotonic() - began
    least, most = soak.memory[0], max(soak.memory)
    flat = most <= GROWTH * least
    detail = (
        f"{len(soak.wrong)} wrong, {busy} slots busy, memory {least / 2**20:.0f} to {most / 2**20:.0f} MiB"
        f" ({most / least:.3f} x), {spent:.0f} s; {dict(soak.kinds.most_common())}"
    )
    return Figure(len(soak.wrong) + busy, "faults", not soak.wrong and not busy and flat, detail)


async def _run(soak: _Soak, pid: int) -> int:
    """Ask everything; the slots that are busy a moment later."""
    import httpx2

    async with httpx2.AsyncClient(timeout=120, trust_env=False) as client:
        chance = random.Random(5)
        workers = [
            asyncio.create_task(_work(soak, client, random.Random(chance.random()))) for _ in range(WORKERS)
        ]
        total = soak.left
        step, told = total // 50, total
        while not all(worker.done() for worker in workers):
            await asyncio.sleep(0.05)
            if told - soak.left >= step:
                told = soak.left
                if soak.left <= (1 - WARM) * total:
                    soak.memory.append(await _memory(soak, client, pid))
                say(f"{total - soak.left} requests, {len(soak.wrong)} wrong, {soak.memory[-1:]} bytes")
        for worker in workers:
            worker.result()
        await asyncio.sleep(2)
        slots = (await client.get(f"{soak.url}/slots")).json()
        return sum(bool(slot["is_processing"]) for slot in slots)


async def _work(soak: _Soak, client: httpx2.AsyncClient, chance: random.Random) -> None:
    while soak.left > 0:
        soak.left -= 1
        kind = chance.random()
        if kind < MALFORMED:
            await _ask_nonsense(soak, client, chance)
        elif kind < MALFORMED + DROPPED:
            await _leave(soak, client, chance)
        else:
            await _ask(soak, client, chance)


def _chat(chance: random.Random) -> dict[str, Any]:
    """A conversation of one to three turns, of any length that leaves room for the answer."""
    turns = chance.choice((1, 1, 1, 1, 1, 3))
    most = 300 if turns == 1 and chance.random() < 0.05 else 25
    messages = [
        {
            "role": "assistant" if turn % 2 else "user",
            "content": " ".join(chance.choices(("why", "how", "what", "me"), k=chance.randint(1, most))),
        }
        for turn in range(turns)
    ]
    asked: dict[str, Any] = {"messages": messages, "temperature": 0}
    if chance.random() < 0.85:
        asked["max_tokens"] = chance.randint(1, 20)
    return asked


async def _ask(soak: _Soak, client: httpx2.AsyncClient, chance: random.Random) -> None:
    asked = _chat(chance)
    streamed = chance.random() < 0.5
    answer = await client.post(f"{soak.url}/v1/chat/completions", json=asked | {"stream": streamed})
    soak.kinds["streamed" if streamed else "whole"] += 1
    if answer.status_code != 200:
        soak.judge(False, f"status {answer.status_code}: {answer.text[:200]}")
        return
    if streamed:
        lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
        choices = [json.loads(line)["choices"][0] for line in lines]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        reason, ended = choices[-1]["finish_reason"], answer.text.endswith("data: [DONE]\n\n")
        soak.judge(ended, "a stream without its end")
    else:
        choice = answer.json()["choices"][0]
        text, reason = choice["message"]["content"], choice["finish_reason"]
    whole = text == soak.sentence and reason == "stop"
    begun = soak.sentence.startswith(text) and reason == "length" and "max_tokens" in asked
    soak.judge(whole or begun, f"'{text[:80]}' ended by {reason}")


async def _leave(soak: _Soak, client: httpx2.AsyncClient, chance: random.Random) -> None:
    asked = _chat(chance) | {"stream": True, "ignore_eos": True}
    asked.pop("max_tokens", None)
    patience = chance.randint(0, 6)
    async with client.stream("POST", f"{soak.url}/v1/chat/completions", json=asked) as answer:
        soak.judge(answer.status_code == 200, f"status {answer.status_code} of a stream")
        async for _ in answer.aiter_bytes():
            patience -= 1
            if patience < 0:
                break
    soak.kinds["dropped"] += 1


async def _ask_nonsense(soak: _Soak, client: httpx2.AsyncClient, chance: random.Random) -> None:
    body, name = chance.choice(_MALFORMED)
    headers = {"Content-Type": "application/json"}
    answer = await client.post(f"{soak.url}/v1/chat/completions", content=body, headers=headers)
    message = answer.json().get("error", {}).get("message")
    soak.judge(
        answer.status_code == 400 and bool(message), f"{name}: {answer.status_code} {answer.text[:200]}"
    )
    soak.kinds["malformed"] += 1


async def _memory(soak: _Soak, client: httpx2.AsyncClient, pid: int) -> int:
    """Resident bytes of the server and its engine without the prompt cache."""
    import psutil

    server = psutil.Process(pid)
    resident = sum(one.memory_info().rss for one in (server, *server.children(recursive=True)))
    text = (await client.get(f"{soak.url}/metrics")).text
    line = next(line for line in text.splitlines() if line.startswith("qnext:prompt_cache_bytes "))
    return int(resident - float(line.split()[1]))
