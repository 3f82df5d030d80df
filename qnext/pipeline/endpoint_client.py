"""One request to an OpenAI-compatible server, timed: what is sent, what comes back, every way it can fail.

Only this machine is addressed (`check_address`): a load test aimed elsewhere is an attack. So redirects are
not followed and proxies of the environment are not used. Every request has a connection of its own: servers
close idle ones when they like, and a request caught by that would look like a failure of the server.

Optional fields are sent to those servers that take them (`Dialect`): `ignore_eos` and `min_tokens` make an
answer as long as asked (llama-server knows the first, vLLM and SGLang both), `cache_prompt: false` keeps
llama-server from using what an earlier prompt left in the slot. Sampling is greedy: the cheapest, and the
same for all.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from qnext.bench.endpoint import Exchange, ExchangeStatus
from qnext.bench.stream import AnswerReading, Failure, message_in, short
from qnext.errors import UsageError

if TYPE_CHECKING:
    import httpx2

MOST_WAITS = 5
"""How often a 429 is obeyed before the request counts as failed."""

_MOST_ERROR_BYTES = 65_536


@dataclass(frozen=True, slots=True)
class Dialect:
    """What the server takes: `chat/completions` or `completions`, the optional fields, a count at the end."""

    api: Literal["chat", "completions"] = "chat"
    extras: bool = True
    usage: bool = True

    def body(self, model: str | None, prompt: str, most_tokens: int) -> bytes:
        """The JSON of one streamed request."""
        asked: dict[str, Any] = {"stream": True, "max_tokens": most_tokens, "temperature": 0}
        if model is not None:
            asked["model"] = model
        if self.api == "chat":
            asked["messages"] = [{"role": "user", "content": prompt}]
        else:
            asked["prompt"] = prompt
        if self.usage:
            asked["stream_options"] = {"include_usage": True}
        if self.extras:
            asked |= {"ignore_eos": True, "min_tokens": most_tokens, "cache_prompt": False}
        return json.dumps(asked).encode()


@dataclass(frozen=True, slots=True)
class Answer:
    """An exchange and what is not kept of it: its text (to count tokens where the server does not).

    `model` and `build` are what the chunks say (`model`, `system_fingerprint`).
    """

    exchange: Exchange
    text: str = ""
    model: str | None = None
    build: str | None = None
    retry_after_s: float | None = None


def check_address(url: str) -> str:
    """The base address without a slash at its end. Raises UsageError unless it is HTTP on loopback."""
    import ipaddress

    import httpx2

    example = "Write it like http://127.0.0.1:8080/v1."
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise UsageError(f"'{url}' is not an address: {error}", hint=example) from error
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise UsageError(f"'{url}' is not an HTTP address", hint=example)
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise UsageError(
            "an address with a password, a query or a fragment cannot be measured",
            hint=f"{example} A key goes into an environment variable: --api-key-env NAME.",
        )
    try:
        here = ipaddress.ip_address(parsed.host).is_loopback
    except ValueError:
        here = parsed.host == "localhost" and _is_loopback_name(parsed.host)
    if not here:
        raise UsageError(
            f"{parsed.host} is not this machine's loopback: load tests address only this machine",
            hint="Run qnext where the server runs, and give its address as 127.0.0.1, ::1 or localhost.",
        )
    return url.rstrip("/")


def _is_loopback_name(name: str) -> bool:
    import ipaddress
    import socket

    try:
        found = socket.getaddrinfo(name, None)
    except OSError:
        return False
    return all(ipaddress.ip_address(address[4][0]).is_loopback for address in found)


class EndpointClient:
    """A server's API at `url`, as `check_address` gave it. Use as an asynchronous context manager."""

    def __init__(self, url: str, *, model: str | None, api_key: str | None, deadline_s: float) -> None:
        import httpx2

        self.url, self.model, self.dialect = url, model, Dialect()
        self._deadline_s = deadline_s
        headers = {"Accept-Encoding": "identity", "Connection": "close", "User-Agent": "qnext"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        self._http = httpx2.AsyncClient(
            headers=headers,
            timeout=None,
            verify=url.startswith("https:"),  # reading the machine's certificates takes a tenth of a second
            trust_env=False,
            follow_redirects=False,
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0),
        )

    async def __aenter__(self) -> EndpointClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> tuple[Exchange, Any, str | None]:
        """(exchange, JSON or None, the Server header) of a plain GET below the address."""
        return await self._plain("GET", self.url + path, None)

    async def count_tokens(self, text: str) -> int | None:
        """Tokens of `text` by llama-server's `/tokenize`; None where the server has nothing like it."""
        root = self.url.removesuffix("/v1")
        _, found, _ = await self._plain("POST", f"{root}/tokenize", {"content": text})
        tokens = found.get("tokens") if isinstance(found, dict) else None
        return len(tokens) if isinstance(tokens, list) else None

    async def _plain(self, method: str, url: str, body: Any) -> tuple[Exchange, Any, str | None]:
        sent = time.perf_counter_ns()
        found: Any = None
        software: str | None = None
        failure: Failure | None = None
        status: int | None = None
        try:
            async with (
                asyncio.timeout(self._deadline_s),
                self._http.stream(method, url, json=body) as response,
            ):
                status, software = response.status_code, response.headers.get("server")
                if status != 200:
                    failure = await _refusal(response)
                else:
                    found = json.loads(await response.aread())
        except ValueError:
            failure = "foreign-server", f"it sent {_kind_of(response)} where JSON belongs"
        except (OSError, _request_error()) as error:
            failure = self._translated(error)
        ended = time.perf_counter_ns()
        word, text = failure or ("ok", None)
        return Exchange(0, word, sent, ended, http_status=status, error=text), found, software

    async def ask(self, prompt: str, most_tokens: int, *, client: int = 0) -> Answer:
        """Send one prompt and time its answer. Failures are told in the exchange, never raised.

        A 429 is obeyed and tried again, `MOST_WAITS` times and never for longer than the deadline; the times
        are those of the last try.
        """
        body = self.dialect.body(self.model, prompt, most_tokens)
        waits = 0
        while True:
            answer = await self._attempt(body, client)
            pause = answer.retry_after_s
            if pause is None or waits == MOST_WAITS or pause > self._deadline_s:
                return replace(answer, exchange=replace(answer.exchange, rate_limited=waits))
            waits += 1
            await asyncio.sleep(pause)

    async def _attempt(self, body: bytes, client: int) -> Answer:
        import httpx2

        path = "/chat/completions" if self.dialect.api == "chat" else "/completions"
        reading = AnswerReading()
        status: int | None = None
        failure: Failure | None = None
        retry_after_s: float | None = None
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        sent = time.perf_counter_ns()
        try:
            async with (
                asyncio.timeout(self._deadline_s),
                self._http.stream("POST", self.url + path, content=body, headers=headers) as response,
            ):
                status = response.status_code
                if status != 200:
                    failure = await _refusal(response)
                    retry_after_s = _asked_pause_s(response) if status == 429 else None
                elif _kind_of(response) != "text/event-stream":
                    failure = "foreign-server", f"it sent {_kind_of(response)} where a stream belongs"
                else:
                    async for event in httpx2.EventSource(response):
                        failure = reading.take(event.data, time.perf_counter_ns())
                        if failure or reading.ended:
                            break
        except (OSError, _request_error()) as error:
            failure = self._translated(error)
        if failure is None or (reading.finish_reason and failure[0] in ("cut", "hung")):
            failure = reading.verdict()
        word, text = failure or ("ok", None)
        exchange = Exchange(
            client=client,
            status=word,
            sent_ns=sent,
            ended_ns=time.perf_counter_ns(),
            arrivals_ns=tuple(reading.arrivals_ns),
            prompt_tokens=reading.prompt_tokens,
            cached_tokens=reading.cached_tokens,
            output_tokens=reading.output_tokens,
            finish_reason=reading.finish_reason,
            http_status=status,
            error=text,
            server_timings=reading.timings,
        )
        return Answer(exchange, "".join(reading.text), reading.model, reading.build, retry_after_s)

    def _translated(self, error: Exception) -> Failure:
        import httpx2

        if isinstance(error, TimeoutError):
            return "hung", f"no whole answer within {self._deadline_s:g} s"
        if isinstance(error, httpx2.ConnectError):
            return "unreachable", str(error) or "no connection"
        if isinstance(error, httpx2.SSEError):
            return "garbage", str(error)
        words = str(error)
        if "without sending a response" in words:
            return "cut", "the connection closed without an answer"
        if "closed" in words:
            return "cut", "the connection closed in the middle of the answer"
        if isinstance(error, httpx2.ProtocolError):
            return "foreign-server", f"what it sent is not HTTP: {words}"
        return "cut", "the connection broke"


def _request_error() -> type[Exception]:
    import httpx2

    return httpx2.RequestError


async def _refusal(response: httpx2.Response) -> Failure:
    """The status and words of an answer other than 200."""
    code = response.status_code
    if 300 <= code < 400:
        return "refused", f"it redirects to {short(response.headers.get('location', 'nowhere'))}"
    received = b""
    async for part in response.aiter_bytes():
        received += part
        if len(received) > _MOST_ERROR_BYTES:
            break
    text = received.decode(errors="replace")
    try:
        words = message_in(json.loads(text))
    except ValueError:
        words = short(text)
    kind: ExchangeStatus = "rate-limited" if code == 429 else "server-error" if code >= 500 else "refused"
    return kind, f"HTTP {code}{': ' if words else ''}{words}"


def _asked_pause_s(response: httpx2.Response) -> float:
    """Seconds that Retry-After asks for, as a number or as a date; 1 without a readable one."""
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    asked = response.headers.get("retry-after", "")
    if asked.strip().isdigit():
        return float(asked)
    try:
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 1.0


def _kind_of(response: httpx2.Response) -> str:
    return response.headers.get("content-type", "").partition(";")[0].strip().lower() or "no content type"
