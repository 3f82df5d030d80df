"""For tests of the HTTP side where the engine plays no role: a backend that answers from a list."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import httpx2
from fastapi import FastAPI

from qnext.models.chat import ChatTemplate
from qnext.pipeline.serve_values import Begun, Ended, Job, Piece, ServedModel, Status
from qnext.serve.app import make_app
from qnext.serve.settings import ServeSettings

TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class ListBackend:
    """Says `pieces`; `hold` keeps every answer waiting until it is set."""

    def __init__(self, pieces: Sequence[str] = ("Hel", "lo")) -> None:
        self.pieces, self.status = pieces, Status("ok", 1.0)
        self.model = ServedModel(
            "demo", 1, 100, 2, 50, "", "", ChatTemplate(TEMPLATE), {"temperature": 0.5}, {}, ("one",), "b1"
        )
        self.jobs: list[Job] = []
        self.ended = Ended("eos", 3, 1, len(pieces), 2_000_000, 4_000_000, 0)
        self.open = 0
        self.hold: asyncio.Event | None = None
        self.failure: Exception | None = None
        self.fails_after: Exception | None = None

    async def generate(self, job: Job) -> AsyncGenerator[Begun | Piece | Ended, None]:
        self.jobs.append(job)
        if self.failure:
            raise self.failure
        self.open += 1
        try:
            yield Begun(3, 1, 0)
            if self.hold:
                await self.hold.wait()
            for number, text in enumerate(self.pieces):
                yield Piece(text, number, -0.5, ((number, text.encode(), -0.5), (9, b"\xff", -3.0)))
            if self.fails_after:
                raise self.fails_after
            yield self.ended
        finally:
            self.open -= 1

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        return list(range(len(text)))

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return "".join(chr(97 + token) for token in tokens)

    async def state(self) -> Mapping[str, Any]:
        slots = [{"slot": 0, "id": 7, "prompt": 3, "done": 3, "generated": 1, "cached": 1}]
        return {"slots": slots, "totals": {"steps": 4, "busy_slots_sum": 6}, "cache": {"bytes": 5}}


@lru_cache(maxsize=1)
def usual_app() -> FastAPI:
    """A server for tests that look at one answer only: making one takes longer than asking it."""
    return make_app(ListBackend(), ServeSettings())


def client(backend: ListBackend | None, **settings: Any) -> httpx2.AsyncClient:
    """A client of a server over `backend`; the usual server where neither it nor settings are given."""
    fresh = backend is not None or settings
    app = make_app(backend or ListBackend(), ServeSettings(**settings)) if fresh else usual_app()
    return httpx2.AsyncClient(
        transport=httpx2.ASGITransport(app=app, raise_app_exceptions=False), base_url="http://127.0.0.1"
    )


def post(path: str, body: Any = None, *, backend: ListBackend | None = None, **more: Any) -> httpx2.Response:
    """One request; `raw`, `headers`, settings."""
    raw, headers = more.pop("raw", None), more.pop("headers", {})

    async def ask() -> httpx2.Response:
        async with client(backend, **more) as http:
            content = raw if raw is not None else json.dumps(body).encode()
            return await http.post(
                path, content=content, headers={"Content-Type": "application/json"} | headers
            )

    return asyncio.run(ask())


def get(
    path: str, backend: ListBackend | None = None, headers: Any = None, **settings: Any
) -> httpx2.Response:
    async def ask() -> httpx2.Response:
        async with client(backend, **settings) as http:
            return await http.get(path, headers=headers)

    return asyncio.run(ask())


def events(answer: httpx2.Response) -> list[Any]:
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line[6:]) for line in lines[:-1]]


def check_error(answer: httpx2.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    told = answer.json()
    assert set(told) == {"error"} and set(told["error"]) == {"message", "type", "param", "code"}
    return dict(told["error"])
