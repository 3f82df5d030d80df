"""The port and the HTTP server on it; this module owns uvicorn.

The socket is bound before anything is loaded, so that a port in use costs nobody a minute, and so that
whatever answers on it afterwards is this process. Signals are ours, not uvicorn's: it would end the process
by them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import http.client
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType

import uvicorn
from fastapi import FastAPI

from qnext.errors import UsageError
from qnext.serve.security import MOST_HEADER_BYTES, is_loopback

SERVER_NAME = "qnext"
"""What the Server header says."""
KEEP_ALIVE_S = 75
"""Clients keep connections and use them again without a look; most give them up after 60 s."""
_ASK_LIMIT_S = 1.0
_END_MARGIN_S = 5
_BACKLOG = 1024


def bind(host: str, port: int, *, has_key: bool) -> socket.socket:
    """A socket on `host`, bound but not listening yet. Port 0 takes a free one.

    Raises UsageError for an address that is not this machine's, for one that others can reach where there is
    no key, and for a port in use, saying by whom.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:
        raise UsageError(f"'{host}' is no address of this machine", hint="Try --host 127.0.0.1.") from error
    family, kind, protocol, _, address = found[0]
    if not has_key and not is_loopback(str(address[0])):
        raise UsageError(
            f"on {host} everybody who can reach this machine could use the model: there is no key",
            hint="Set one in the environment (export QNEXT_API_KEY=…), or leave out --host.",
        )
    bound = socket.socket(family, kind, protocol)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # Windows, where SO_REUSEADDR would share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        else:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _refusal(host, port, error) from error
    return bound


def address_of(bound: socket.socket) -> str:
    """`http://127.0.0.1:8080` of a bound socket, as a client on this machine would write it."""
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if host == "0.0.0.0" else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal(host: str, port: int, error: OSError) -> UsageError:
    if error.errno == errno.EADDRINUSE:
        who = who_answers("127.0.0.1" if host in ("0.0.0.0", "") else host, port)
        if who == SERVER_NAME:
            return UsageError(
                f"port {port} is taken: another qnext serve answers there",
                hint=f"Use that one, end it, or give another port: --port {port + 1}",
            )
        named = f", which calls itself {who}," if who else ""
        return UsageError(
            f"port {port} is taken by another program{named} and that is not qnext",
            hint=f"Give another port: --port {port + 1}",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return UsageError(f"port {port} may not be opened by this user", hint="Take one from 1024 on.")
    return UsageError(
        f"cannot listen on {host}, port {port}: {error.strerror or error}", hint="Try --host 127.0.0.1."
    )


def who_answers(host: str, port: int) -> str | None:
    """What the HTTP server on a port calls itself in a few words; None where it says nothing."""
    connection = http.client.HTTPConnection(host, port, timeout=_ASK_LIMIT_S)
    try:
        connection.request("GET", "/health")
        name = connection.getresponse().headers.get("Server", "")
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    return name[:40] if name and name.isprintable() else None


class HttpServer:
    """`app` on a bound socket, which listens from here on. `run` serves until a signal or `stop`.

    Raises UsageError when another program has taken the port meanwhile.
    """

    def __init__(self, app: FastAPI, bound: socket.socket, grace_s: float) -> None:
        try:
            bound.listen(_BACKLOG)
        except OSError as error:  # somebody else was faster, after both had bound it
            host, port = bound.getsockname()[:2]
            raise _refusal(host, port, error) from error
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

        A second signal ends it without waiting. `signal` is then the first one's number.
        """
        loop = asyncio.get_running_loop()
        draining: asyncio.Future[None] | None = None

        def handle(number: int, _: FrameType | None) -> None:
            if self.signal is not None:
                self._server.force_exit = True
                if draining is not None:
                    loop.call_soon_threadsafe(draining.cancel)
            self.signal = self.signal or number
            loop.call_soon_threadsafe(self._stop.set)

        with _signals(handle):
            serving = asyncio.ensure_future(self._server.serve(sockets=[self._bound]))
            asked = asyncio.ensure_future(self._stop.wait())
            await asyncio.wait((serving, asked), return_when=asyncio.FIRST_COMPLETED)
            asked.cancel()
            self._server.should_exit = True
            draining = asyncio.ensure_future(drain(self._grace_s))
            await asyncio.wait((serving, draining))
            serving.result()


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
