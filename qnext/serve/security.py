"""Who may call: keys, foreign web pages, sizes. Plain ASGI, so that it costs nothing per token.

A server on loopback is still reachable from every web page its user opens: by a cross-site request, or by a
name that first resolves to the page's server and then to 127.0.0.1 (DNS rebinding). The first carries an
`Origin`, the second a `Host` that is not loopback; both are refused. Where there are keys, a page would need
one, so neither is looked at: such a server may have names of its own, behind a proxy for example.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qnext.serve.errors import ApiError, error_response
from qnext.serve.settings import ServeSettings

OPEN_PATHS = ("/", "/health", "/v1/health")
"""Answered without a key: whether the server is up, and the page (which asks for the key itself)."""

OPEN_FOLDER = "/page/"

BODY_WAIT_S = 60.0
"""For the next piece of a body; who sends none keeps a connection for nothing."""

MOST_HEADERS, MOST_HEADER_BYTES = 100, 32_768


class Guard:
    """Refuses what `settings` do not allow before the application sees it."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._keys = tuple(_digest(key.encode()) for key in settings.api_keys)
        self._most_bytes = settings.body_limit_bytes
        self._origins = frozenset(origin.rstrip("/").lower() for origin in settings.cors_origins)
        self._loopback = is_loopback(settings.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = self._check(scope)
            limited = self._limit(headers, receive)
        except ApiError as error:
            await error_response(error, scope["path"])(scope, receive, send)
            return
        await self._app(scope, limited, send)

    def _check(self, scope: Scope) -> dict[bytes, bytes]:
        raw: list[tuple[bytes, bytes]] = scope["headers"]
        if len(raw) > MOST_HEADERS or sum(len(name) + len(value) for name, value in raw) > MOST_HEADER_BYTES:
            raise ApiError(431, "the headers are too large", code="headers_too_large", close=True)
        headers = dict(raw)
        path: str = scope["path"]
        if not self._keys:
            self._check_page(headers)
        elif path not in OPEN_PATHS and not path.startswith(OPEN_FOLDER):
            self._check_key(headers)
        return headers

    def _check_page(self, headers: dict[bytes, bytes]) -> None:
        """Raises ApiError for a request that a foreign page makes."""
        host = headers.get(b"host", b"").decode("latin-1").lower()
        if self._loopback and host and not is_loopback(_name_of(host)):
            raise ApiError(
                403,
                "this server answers only under a name of this machine's loopback, such as 127.0.0.1, "
                "as long as it has no key",
                code="host_not_allowed",
            )
        if b"origin" not in headers or "*" in self._origins:
            return
        origin = headers[b"origin"].decode("latin-1").lower().rstrip("/")
        if origin not in self._origins and not (host and origin in (f"http://{host}", f"https://{host}")):
            raise ApiError(
                403, "web pages of other origins may not use this server", code="origin_not_allowed"
            )

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        digest = _digest(given.strip())
        found = [hmac.compare_digest(digest, key) for key in self._keys]  # all of them, whichever it is
        if not any(found):
            told = "the API key is not one of this server's" if given else "this server needs an API key"
            raise ApiError(401, f"{told} (Authorization: Bearer KEY)", code="invalid_api_key")

    def _limit(self, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """`receive` that refuses a body over the limit, stated or not, as soon as it is known."""
        stated = headers.get(b"content-length", b"0")
        if not stated.isdigit() or int(stated[:20]) > self._most_bytes:
            raise self._too_large()
        read, whole = 0, False

        async def limited() -> Message:
            nonlocal read, whole
            if whole:  # from here on only the client's leaving is waited for
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), BODY_WAIT_S)
            except TimeoutError:
                raise ApiError(408, "the body did not come", code="timeout", close=True) from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if read > self._most_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is over the limit of {self._most_bytes} bytes",
            code="request_too_large",
            close=True,
        )


def is_loopback(name: str) -> bool:
    """Whether `name`, an address or a host's name without port, means this machine alone."""
    name = name.strip("[]").lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return False


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, so that comparing tells nothing of it."""
    return hashlib.sha256(key).digest()
