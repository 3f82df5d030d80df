"""The HTTP server on a bound port; this module owns uvicorn. Signals are ours: uvicorn's end the process."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qnext.serve.port import SERVER_NAME, refusal
from qnext.serve.security import MOST_HEADER_BYTES

KEEP_ALIVE_S = 75
"""Clients keep connections and use them again without a look; most give them up after 60 s."""
_END_MARGIN_S = 5
_BACKLOG = 1024


class HttpServer:
    """`app` on a bound socket, which listens from here on. `run` serves until a signal or `stop`.

    Raises UsageError when another program has taken the port meanwhile.
    """

    def __init__(self, app: FastAPI, bound: socket.socket, grace_s: float) -> None:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:  # somebody else was faster, after both had bound it
            host, port = bound.getsockname()[:2]
            raise refusal(host, port, error) from error
        self._bound, self._grace_s = bound, grace_s
        self._stop = asyncio.Event()
        self._server = _Server(
            uvicorn.Config(
                app,
                loop="asyncio",
                http="h11",
                ws="none",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                headers=[("Server", SERVER_NAME)],
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=int(grace_s) + _END_MARGIN_S,
                h11_max_incomplete_event_size=2 * MOST_HEADER_BYTES,
            )
        )
        self.signal: int | None = None

    def stop(self) -> None:
        """End as after SIGTERM. Belongs to the event loop."""
        self._stop.set()

    async def run(self, drain: Callable[[float], Awaitable[None]]) -> None:
        """Serve; then take no new connections, let `drain` finish what runs, and close.

        `drain(0)` ends what runs at once: a second signal asks for it. After a third nothing is waited for.
        `signal` is then the first one's number.
        """
        loop = asyncio.get_running_loop()
        signals: list[int] = []
        hurry = asyncio.Event()

        def handle(number: int, _: FrameType | None) -> None:
            signals.append(number)
            self.signal = signals[0]
            loop.call_soon_threadsafe((self._stop if len(signals) == 1 else hurry).set)
            if len(signals) > 2:
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # of what is cut off now
                self._server.force_exit = True

        with _signals(handle):
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._bound]))
            stopped = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
            self._server.should_exit = True
            draining = asyncio.ensure_future(drain(self._grace_s))
            hurried = asyncio.ensure_future(hurry.wait())
            await asyncio.wait((draining, hurried), return_when=asyncio.FIRST_COMPLETED)
            if not draining.done():
                draining.cancel()
                await drain(0)
            for waiter in (stopped, hurried):
                waiter.cancel()
            await serving


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are `HttpServer.run`'s."""
        yield


@contextlib.contextmanager
def _signals(handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
