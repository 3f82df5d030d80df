"""Anthropic's `/v1/messages`: the same answers as chats, told as blocks."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from qnext.models.answer import Answer, AnswerEvent, Thought, gather_answer
from qnext.models.tool_calls import CallArguments, CallBegun, CallEnded, Said
from qnext.pipeline.serve_values import Begun, Ended, ServedModel
from qnext.serve.answering import read_answer
from qnext.serve.body import StrictRoute
from qnext.serve.conversation import ThoughtTags, make_prompt
from qnext.serve.errors import ApiError
from qnext.serve.generating import Server
from qnext.serve.info import count_tokens
from qnext.serve.jobs import make_job, read_limit
from qnext.serve.logprobs import TokenTexts
from qnext.serve.messages_input import CountRequest, MessagesRequest, read_conversation
from qnext.serve.openapi import ANTHROPIC_ERROR_SCHEMA, answers
from qnext.serve.stream import EventStream, while_connected

_PATH = "/v1/messages"


def make_routes(server: Server, texts: TokenTexts) -> APIRouter:
    """The routes of Anthropic's API."""
    router = APIRouter(route_class=StrictRoute)

    @router.post(_PATH, tags=["Anthropic"], **answers("message", errors=ANTHROPIC_ERROR_SCHEMA))
    async def create(body: MessagesRequest, request: Request) -> Response:
        """Answer the last turn."""
        work = _Message(server, server.model(), body, await texts.thought_tags())
        if body.stream:
            return EventStream(work.stream(), error_event)
        return await while_connected(request, work.collect())

    @router.post(
        _PATH + "/count_tokens",
        tags=["Anthropic"],
        **answers("count", streams=False, errors=ANTHROPIC_ERROR_SCHEMA),
    )
    async def count(body: CountRequest) -> Response:
        """How many tokens the prompt of this request has."""
        model = server.model()
        prompt = make_prompt(model, read_conversation(body))
        return JSONResponse({"input_tokens": await count_tokens(server, model, prompt.text)})

    return router


def error_event(error: ApiError) -> bytes:
    """The end of a stream that failed."""
    return b"event: error\ndata: " + error.body(_PATH) + b"\n\n"


class _Message:
    """One request."""

    def __init__(self, server: Server, model: ServedModel, asked: MessagesRequest, tags: ThoughtTags) -> None:
        self.server = server
        prompt = make_prompt(model, read_conversation(asked), tags)
        limit = read_limit(("max_tokens", asked.max_tokens))
        self.job = make_job(server, model, asked.sampling(), prompt=prompt, limit=limit)
        self.prompt = prompt
        self.head: dict[str, Any] = {
            "id": "msg_" + secrets.token_urlsafe(18),
            "type": "message",
            "role": "assistant",
            "model": model.name,
        }

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Events of a streamed message."""
        blocks = _Blocks()
        async with aclosing(read_answer(self.server, self.job, self.prompt)) as parts:
            async for part in parts:
                if isinstance(part, Begun):
                    counts = _usage(part.prompt_tokens, part.cached_tokens, 0)
                    empty: dict[str, Any] = {
                        "content": [],
                        "stop_reason": None,
                        "stop_sequence": None,
                        "usage": counts,
                    }
                    yield _event("message_start", {"message": self.head | empty})
                    yield _event("ping", {})
                elif isinstance(part, Ended):
                    for event in blocks.close():
                        yield event
                    counts = _usage(part.prompt_tokens, part.cached_tokens, part.generated)
                    delta = _stop(part, called=blocks.called)
                    yield _event("message_delta", {"delta": delta, "usage": counts})
                    yield _event("message_stop", {})
                else:
                    for event in blocks.tell(part):
                        yield event

    async def collect(self) -> Response:
        """The whole message."""
        parts: list[AnswerEvent] = []
        ended: Ended | None = None
        async with aclosing(read_answer(self.server, self.job, self.prompt)) as events:
            async for part in events:
                if isinstance(part, Ended):
                    ended = part
                elif not isinstance(part, Begun):
                    parts.append(part)
        assert ended is not None
        answer = gather_answer(parts)
        told = self.head | {"content": _content(answer)} | _stop(ended, called=bool(answer.calls))
        told["usage"] = _usage(ended.prompt_tokens, ended.cached_tokens, ended.generated)
        return Response(json.dumps(told), media_type="application/json")


class _Blocks:
    """Blocks of a stream: one is open at a time, and its kind changes with what comes."""

    def __init__(self) -> None:
        self._index = -1
        self._open = ""
        self._delta_head = b""
        self.called = False

    def tell(self, part: AnswerEvent) -> Iterator[bytes]:
        """The events of one part."""
        if isinstance(part, Said):
            if self._open != "text":
                yield from self._begin("text", {"type": "text", "text": ""}, "text_delta", "text")
            yield self._delta_head + json.dumps(part.text).encode() + b"}}\n\n"
        elif isinstance(part, Thought):
            if self._open != "thinking":
                empty = {"type": "thinking", "thinking": "", "signature": ""}
                yield from self._begin("thinking", empty, "thinking_delta", "thinking")
            yield self._delta_head + json.dumps(part.text).encode() + b"}}\n\n"
        elif isinstance(part, CallBegun):
            self.called = True
            block: dict[str, Any] = {"type": "tool_use", "id": part.id, "name": part.name, "input": {}}
            yield from self._begin("tool_use", block, "input_json_delta", "partial_json")
        elif isinstance(part, CallArguments):
            yield self._delta_head + json.dumps(part.text).encode() + b"}}\n\n"
        elif isinstance(part, CallEnded):
            yield from self.close()

    def close(self) -> Iterator[bytes]:
        """End the block that is open."""
        if self._open:
            if self._open == "thinking":
                delta = {"type": "signature_delta", "signature": ""}
                yield _event("content_block_delta", {"index": self._index, "delta": delta})
            self._open = ""
            yield _event("content_block_stop", {"index": self._index})

    def _begin(self, kind: str, block: dict[str, Any], delta: str, member: str) -> Iterator[bytes]:
        yield from self.close()
        self._index, self._open = self._index + 1, kind
        yield _event("content_block_start", {"index": self._index, "content_block": block})
        self._delta_head = (
            f'event: content_block_delta\ndata: {{"type": "content_block_delta", "index": {self._index}, '
            f'"delta": {{"type": "{delta}", "{member}": '
        ).encode()


def _content(answer: Answer) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = []
    if answer.reasoning:
        content.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.content:
        content.append({"type": "text", "text": answer.content})
    for call in answer.calls:
        content.append(
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _input(call.arguments)}
        )
    return content


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments; of one that broke off nothing, so that no half is taken for the whole."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _stop(ended: Ended, *, called: bool) -> dict[str, Any]:
    if ended.reason in ("length", "context"):
        return {"stop_reason": "max_tokens", "stop_sequence": None}
    if called:
        return {"stop_reason": "tool_use", "stop_sequence": None}
    reason = "stop_sequence" if ended.reason == "stop" else "end_turn"
    return {"stop_reason": reason, "stop_sequence": ended.stop_text if reason == "stop_sequence" else None}


def _usage(prompt: int, cached: int, generated: int) -> dict[str, int]:
    return {
        "input_tokens": prompt - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": generated,
    }


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind} | data)}\n\n".encode()
