"""How streams end: a client that waits, one that leaves, one that does not read."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest

from qnext.pipeline.serve_values import Unavailable
from qnext.serve import security, stream
from qnext.serve.stream import PING, EventStream, error_event
from tests.serve_http import CHAT, ListBackend, check_error, client

Message = dict[str, Any]


async def play(
    events: AsyncGenerator[bytes, None],
    *,
    gone: asyncio.Event | None = None,
    send: Callable[[Message], Awaitable[None]] | None = None,
) -> list[Message]:
    """What a stream sends to a client that leaves when `gone` is set."""
    sent: list[Message] = []

    async def keep(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    answer = EventStream(events, error_event, ping_s=0.01)
    await answer({"type": "http"}, receive, send or keep)  # type: ignore[arg-type]
    return sent


def test_who_waits_for_a_long_prompt_gets_comments_meanwhile() -> None:
    async def slow() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.035)
        yield b"data: 1\n\n"

    sent = asyncio.run(play(slow()))
    bodies = [message["body"] for message in sent[1:]]
    assert sent[0]["status"] == 200 and bodies[0] == PING and bodies[-2:] == [b"data: 1\n\n", b""]
    assert PING.startswith(b":") and PING.endswith(b"\n\n"), "a comment, which clients pass over"


def test_an_error_after_a_comment_is_an_event_because_the_status_is_out() -> None:
    async def fail() -> AsyncGenerator[bytes, None]:
        await asyncio.sleep(0.025)
        raise Unavailable("gone", 1.0)
        yield b""

    sent = asyncio.run(play(fail()))
    assert b'"message": "gone"' in sent[-2]["body"]


def test_the_answer_is_closed_when_its_client_leaves() -> None:
    async def leave() -> list[str]:
        done: list[str] = []
        gone = asyncio.Event()

        async def endless() -> AsyncGenerator[bytes, None]:
            try:
                while True:
                    yield b"data: x\n\n"
                    gone.set()
                    await asyncio.sleep(0.001)
            finally:
                done.append("closed")

        await asyncio.wait_for(play(endless(), gone=gone), 2)
        return done

    assert asyncio.run(leave()) == ["closed"]


def test_a_client_that_takes_nothing_counts_as_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "STUCK_PINGS", 3)

    async def stuck() -> bool:
        closed = False

        async def events() -> AsyncGenerator[bytes, None]:
            nonlocal closed
            try:
                yield b"data: x\n\n"
            finally:
                closed = True

        async def send(message: Message) -> None:
            await asyncio.Event().wait()

        await asyncio.wait_for(play(events(), send=send), 2)
        return closed

    assert asyncio.run(stuck())


def test_a_body_that_does_not_come_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(security, "BODY_WAIT_S", 0.01)

    async def ask() -> Any:
        async def parts() -> AsyncGenerator[bytes, None]:
            yield b'{"messages"'
            await asyncio.sleep(5)

        async with client(ListBackend()) as http:
            return await http.post(
                "/v1/chat/completions", content=parts(), headers={"Content-Type": "application/json"}
            )

    check_error(asyncio.run(ask()), 408)


def test_one_choice_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async def ask() -> tuple[Any, int]:
        backend = ListBackend()
        plain = backend.generate
        calls = 0

        def generate(job: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 2:
                backend.fails_after = Unavailable("died", 1.0)
            return plain(job)

        backend.generate = generate  # type: ignore[method-assign]
        async with client(backend) as http:
            return await http.post("/v1/chat/completions", json=CHAT | {"n": 2}), backend.open

    answer, left = asyncio.run(ask())
    assert check_error(answer, 503)["message"] == "died" and left == 0
