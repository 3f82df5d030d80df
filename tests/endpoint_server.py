"""A server on loopback that speaks the OpenAI API, well or badly, with known times between its tokens.

Raw bytes over asyncio streams in a thread: every fault of a real server can be made exactly. What it sent and
when is in `log`, on the clock that the client uses too.
"""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

EXTRAS = ("ignore_eos", "min_tokens", "cache_prompt")


@dataclass
class Asked:
    """One request: `prompt` is its text, `sent_ns` when each chunk with text left."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    arrived_ns: int
    sent_ns: list[int] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        messages = self.body.get("messages")
        return messages[0]["content"] if messages else self.body["prompt"]


@dataclass
class Manner:
    """How the server behaves. Times in seconds. `fault` is given the answer's number, from 1 on.

    It names what to do wrong: cut, garbage, not-object, hang, stall, error-event, html, json, redirect, or a
    number (HTTP status).
    """

    first_s: float = 0.0
    gap_s: float = 0.0
    tokens_per_chunk: int = 1
    apis: tuple[str, ...] = ("chat", "completions")
    models: tuple[str, ...] | None = ("tiny",)
    takes_extras: bool = True
    takes_stream_options: bool = True
    counts: bool = True
    tokenizes: bool = False
    words_of_template: int = 7
    tokens_per_word: int = 1
    cached: int = 0
    ends_after: int | None = None
    text_field: str = "content"
    done_line: bool = True
    key: str | None = None
    # Said to everything instead of HTTP.
    banner: bytes | None = None
    retry_after: str | None = "0"
    fault: Callable[[int], str | int | None] = lambda number: None


class EndpointServer:
    """Use as a context manager. `url` is the address up to /v1; `log` has every request."""

    def __init__(self, manner: Manner | None = None) -> None:
        self.manner = manner or Manner()
        self.log: list[Asked] = []
        self.most_at_once = 0
        self._at_once = 0
        self._answers = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def asks(self) -> list[Asked]:
        """The requests for answers."""
        return [one for one in self.log if one.path.endswith("completions")]

    def __enter__(self) -> EndpointServer:
        self._thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 22)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result(5)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(5)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    async def _stop(self) -> None:
        self._server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            asked = await self._read(reader)
            if self.manner.banner is not None:
                writer.write(self.manner.banner)
                return await writer.drain()
            self.log.append(asked)
            await self._reply(asked, writer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> Asked:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        method, path, _ = head[0].split(" ")
        pairs = (line.split(": ", 1) for line in head[1:] if line)
        headers = {name.lower(): value for name, value in pairs}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        return Asked(method, path, headers, json.loads(raw) if raw else {}, time.perf_counter_ns())

    async def _reply(self, asked: Asked, writer: asyncio.StreamWriter) -> None:
        manner = self.manner
        if manner.key is not None and asked.headers.get("authorization") != f"Bearer {manner.key}":
            return _json(writer, 401, {"error": {"message": "Invalid API Key"}})
        if asked.path == "/v1/models" and manner.models is not None:
            return _json(writer, 200, {"object": "list", "data": [{"id": name} for name in manner.models]})
        if asked.path == "/tokenize" and manner.tokenizes:
            count = len(asked.body["content"].split()) * manner.tokens_per_word
            return _json(writer, 200, {"tokens": list(range(count))})
        api = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}.get(asked.path)
        if api is None or api not in manner.apis:
            return _json(writer, 404, {"error": {"message": "File Not Found"}})
        if not manner.takes_extras and any(name in asked.body for name in EXTRAS):
            return _json(writer, 422, {"detail": "extra fields not permitted"})
        if not manner.takes_stream_options and "stream_options" in asked.body:
            return _json(writer, 400, {"error": "unknown field stream_options"})
        self._answers += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self._answer(asked, api, manner.fault(self._answers), writer)
        finally:
            self._at_once -= 1
        return None

    async def _answer(
        self, asked: Asked, api: str, fault: str | int | None, writer: asyncio.StreamWriter
    ) -> None:
        manner = self.manner
        if isinstance(fault, int):
            headers = {"Retry-After": manner.retry_after} if manner.retry_after and fault == 429 else {}
            return _json(writer, fault, {"error": {"message": f"told to say {fault}"}}, headers)
        if fault == "hang":
            await asyncio.sleep(60)
        if fault == "html":
            return _send(writer, 200, b"<html>hello</html>", "text/html")
        if fault == "json":
            return _json(writer, 200, {"choices": [{"message": {"content": "all at once"}}]})
        if fault == "redirect":
            return _send(writer, 302, b"", "text/html", {"Location": "http://203.0.113.9/v1"})
        writer.write(
            b"HTTP/1.1 200 OK\r\nServer: faulty/1\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
        )
        if api == "chat":
            _event(writer, {"choices": [{"index": 0, "delta": {"role": "assistant", "content": None}}]})
        await self._stream(asked, api, fault, writer)
        return None

    async def _stream(
        self, asked: Asked, api: str, fault: str | int | None, writer: asyncio.StreamWriter
    ) -> None:
        manner = self.manner
        total = asked.body["max_tokens"]
        if not asked.body.get("ignore_eos") and manner.ends_after is not None:
            total = min(total, manner.ends_after)
        due, left, number = asked.arrived_ns / 1e9 + manner.first_s, total, 0
        while left > 0:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            now = min(left, 1 if number == 0 else manner.tokens_per_chunk)
            if fault in ("cut", "stall", "garbage", "not-object", "error-event") and number == 2:
                return await _go_wrong(str(fault), writer)
            text = " word" * now
            piece = {"delta": {manner.text_field: text}} if api == "chat" else {"text": text}
            asked.sent_ns.append(time.perf_counter_ns())
            _event(writer, {"model": "tiny", "choices": [{"index": 0, **piece, "finish_reason": None}]})
            await writer.drain()
            left, number, due = left - now, number + 1, due + manner.gap_s
        _event(writer, {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]})
        if manner.counts and asked.body.get("stream_options"):
            _event(writer, {"choices": [], "usage": self._usage(asked.prompt, total)})
        if manner.done_line:
            _chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        return None

    def _usage(self, prompt: str, total: int) -> dict[str, Any]:
        tokens = len(prompt.split()) * self.manner.tokens_per_word + self.manner.words_of_template
        return {
            "prompt_tokens": tokens,
            "completion_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.manner.cached},
        }


async def _go_wrong(fault: str, writer: asyncio.StreamWriter) -> None:
    if fault == "stall":
        await asyncio.sleep(60)
    elif fault == "garbage":
        _chunk(writer, b'data: {"choices": [{\xff\x00\n\n')
    elif fault == "not-object":
        _chunk(writer, b"data: 17\n\n")
    elif fault == "error-event":
        _event(writer, {"error": {"message": "the slot was lost", "code": 500}})
    await writer.drain()


def _json(
    writer: asyncio.StreamWriter, status: int, value: object, headers: dict[str, str] | None = None
) -> None:
    _send(writer, status, json.dumps(value).encode(), "application/json", headers)


def _send(
    writer: asyncio.StreamWriter, status: int, body: bytes, kind: str, headers: dict[str, str] | None = None
) -> None:
    lines = {"Content-Type": kind, "Content-Length": str(len(body)), "Connection": "close", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    writer.write(f"HTTP/1.1 {status} Said\r\n{head}\r\n".encode() + body)


def _event(writer: asyncio.StreamWriter, value: object) -> None:
    _chunk(writer, f"data: {json.dumps(value)}\n\n".encode())


def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
