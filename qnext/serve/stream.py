"""Server-sent events, and noticing that a client went away.

An answer's task is cancelled when its client is gone; that closes the generators below it, and the engine
frees the slot within a step. While nothing comes, a comment goes out now and then, so that proxies and
clients see a long prefill as work and not as a dead connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qnext.pipeline.serve_values import Refused, Unavailable
from qnext.serve.errors import ApiError, explain_absence, explain_refusal

T = TypeVar("T")

PING_S = 15.0
STUCK_PINGS = 8
"""Two minutes in which a client takes nothing of what is ready for it: it counts as gone."""
PING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"

_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
GONE = 499
"""What the log shows for a client that did not wait; nobody receives it."""


class EventStream(Response):
    """Events as bytes, whole ones. An error before the first is an ordinary error answer, one after it an
    event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        on_error: Callable[[ApiError], bytes],
        *,
        ping_s: float = PING_S,
    ) -> None:
        super().__init__(None, 200, _HEADERS)
        del self.headers["content-length"]
        self._events, self._on_error, self._ping_s = events, on_error, ping_s
        self._started = self._quiet = self._sending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the end of the answer or of the connection."""
        writer = asyncio.create_task(self._write(send))
        gone = asyncio.create_task(_until_gone(receive))
        stuck = 0
        try:
            while not (writer.done() or gone.done()) and stuck < STUCK_PINGS:
                self._quiet = True
                await asyncio.wait((writer, gone), timeout=self._ping_s, return_when=asyncio.FIRST_COMPLETED)
                stuck = stuck + 1 if self._quiet and self._sending else 0
                if self._quiet and not (self._sending or writer.done() or gone.done()):
                    await self._send(send, PING)
            if writer.done():
                writer.result()
        finally:
            await _end(writer, gone)

    async def _write(self, send: Send) -> None:
        try:
            async with aclosing(self._events):  # cancelled while it sends, the answer has to be closed too
                async for event in self._events:
                    await self._send(send, event)
        except (ApiError, Refused, Unavailable) as error:
            if not self._started:
                raise
            await self._send(send, self._on_error(explain(error)))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, data: bytes) -> None:
        self._quiet, self._sending = False, True
        if not self._started:
            self._started = True
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending = False


def event(data: bytes) -> bytes:
    """One event of this JSON."""
    return b"data: " + data + b"\n\n"


def error_event(error: ApiError) -> bytes:
    """The end of an OpenAI stream that failed."""
    return event(error.body())


def explain(error: ApiError | Refused | Unavailable) -> ApiError:
    """Any of the expected failures as what the client is told."""
    if isinstance(error, Refused):
        return explain_refusal(error)
    return explain_absence(error) if isinstance(error, Unavailable) else error


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | Response:
    """The result of `work`, which is cancelled when the client goes away first."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_until_gone(request.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else Response(status_code=GONE)
    finally:
        await _end(task, gone)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _end(*tasks: asyncio.Task[Any]) -> None:
    """Cancel what still runs, and wait until its generators are closed."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
