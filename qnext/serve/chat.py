"""`/v1/chat/completions`: messages in; thinking, text and tool calls out, whole or as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from qnext.models.answer import Answer, AnswerEvent, AnswerParser, Thought, gather_answer
from qnext.models.tool_calls import CallArguments, CallBegun, Said, Warned
from qnext.pipeline.serve_values import Ended, Piece, ServedModel
from qnext.serve.body import StrictRoute
from qnext.serve.chunks import Chunks, finish_reason, timings, usage
from qnext.serve.conversation import Conversation, ThoughtTags, make_prompt, read_messages
from qnext.serve.errors import ApiError
from qnext.serve.generating import Server
from qnext.serve.info import count_tokens
from qnext.serve.jobs import make_job, read_limit
from qnext.serve.logprobs import TokenTexts, chat_logprob
from qnext.serve.openapi import answers
from qnext.serve.schemas import ChatRequest
from qnext.serve.stream import DONE, EventStream, error_event, while_connected


def make_routes(server: Server, texts: TokenTexts) -> APIRouter:
    """The routes of chats."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/chat/completions", include_in_schema=False)
    @router.post("/v1/chat/completions", tags=["OpenAI"], **answers("chat.completion"))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        work = _Chat(server, server.model(), body, texts, await texts.thought_tags())
        if body.stream:
            return EventStream(work.stream(), error_event)
        return await while_connected(request, work.collect())

    @router.post("/chat/completions/input_tokens", include_in_schema=False)
    @router.post("/v1/chat/completions/input_tokens", tags=["OpenAI"], **answers("count", streams=False))
    async def count(body: ChatRequest) -> Response:
        """How many tokens the prompt of this request has."""
        model = server.model()
        prompt = make_prompt(model, _read_conversation(body))
        counted = await count_tokens(server, model, prompt.text)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": counted})

    @router.post("/apply-template", tags=["Server"], **answers("prompt", streams=False))
    async def apply_template(body: ChatRequest) -> Response:
        """The prompt of this request as the model would get it."""
        return JSONResponse({"prompt": make_prompt(server.model(), _read_conversation(body)).text})

    return router


@dataclass(slots=True)
class _Choice:
    """One answer while it comes: what reads it, and what is not told yet."""

    parser: AnswerParser
    called: bool = False
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    parts: list[AnswerEvent] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


class _Chat:
    """One request: its jobs, and how their events become an answer."""

    def __init__(
        self,
        server: Server,
        model: ServedModel,
        asked: ChatRequest,
        texts: TokenTexts,
        tags: ThoughtTags,
    ) -> None:
        self.server, self.asked, self.texts = server, asked, texts
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        self.prompt = prompt = make_prompt(model, _read_conversation(asked), tags)
        n = asked.n or 1
        self.choices = [_Choice(prompt.parser()) for _ in range(n)]
        limit = read_limit(
            ("max_completion_tokens", asked.max_completion_tokens), ("max_tokens", asked.max_tokens)
        )
        logprobs = max(asked.top_logprobs or 0, 1) if asked.logprobs else None
        self.jobs = [
            make_job(server, model, asked, choice, prompt=prompt, limit=limit, logprobs=logprobs)
            for choice in range(n)
        ]
        self.tell_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self.chunks = Chunks("chat.completion", model, tell_usage=bool(asked.stream) and self.tell_usage)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Events of a streamed answer: the role first, then what comes, the reason of the end, the counts."""
        ends: list[Ended] = []
        opened: set[int] = set()
        choice_chunk, choices = self.chunks.choice, self.choices
        async with aclosing(self.server.generate(self.jobs)) as events:
            async for index, happened in events:
                choice = choices[index]
                if index not in opened:
                    opened.add(index)
                    yield choice_chunk(index, '"delta": {"role": "assistant", "content": ""}')
                if type(happened) is Piece:
                    if self.asked.logprobs:
                        await self._add_logprob(choice, happened)
                    for part in choice.parser.feed(happened.text):
                        if (delta := _delta(part, choice)) is not None:
                            yield choice_chunk(index, delta, self._take_logprobs(choice))
                elif isinstance(happened, Ended):
                    cut_off = self.prompt.cut_off(happened)
                    for part in (*choice.parser.feed(cut_off), *choice.parser.finish()):
                        if (delta := _delta(part, choice)) is not None:
                            yield choice_chunk(index, delta, self._take_logprobs(choice))
                    ends.append(happened)
                    reason = finish_reason(happened, called=choice.called)
                    last = choice_chunk(index, '"delta": {}', self._take_logprobs(choice), reason)
                    if len(self.jobs) == 1 and not self.tell_usage:
                        last = self.chunks.with_member(last, "timings", timings(happened))
                    if choice.warnings:
                        last = self.chunks.with_member(last, "warnings", choice.warnings)
                    yield last
        if self.tell_usage:
            extra: dict[str, Any] = {"usage": usage(ends)}
            if len(ends) == 1:
                extra["timings"] = timings(ends[0])
            yield self.chunks.last(extra)
        yield DONE

    async def collect(self) -> Response:
        """The whole answer."""
        ends: dict[int, Ended] = {}
        async with aclosing(self.server.generate(self.jobs)) as events:
            async for index, happened in events:
                choice = self.choices[index]
                if type(happened) is Piece:
                    if self.asked.logprobs:
                        await self._add_logprob(choice, happened)
                    choice.parts.extend(choice.parser.feed(happened.text))
                elif isinstance(happened, Ended):
                    choice.parts.extend(choice.parser.feed(self.prompt.cut_off(happened)))
                    choice.parts.extend(choice.parser.finish())
                    ends[index] = happened
        told = []
        warnings: list[str] = []
        for index, choice in enumerate(self.choices):
            answer = gather_answer(choice.parts)
            warnings.extend(answer.warnings)
            told.append(
                {
                    "index": index,
                    "message": _message(answer),
                    "logprobs": {"content": choice.logprobs, "refusal": None}
                    if self.asked.logprobs
                    else None,
                    "finish_reason": finish_reason(ends[index], called=bool(answer.calls)),
                }
            )
        order = [ends[index] for index in range(len(self.jobs))]
        extra = {"warnings": warnings} if warnings else {}
        return Response(self.chunks.whole(told, order, usage(order), extra), media_type="application/json")

    def _take_logprobs(self, choice: _Choice) -> str:
        """What is not told yet of the tokens' probabilities, as JSON."""
        if not choice.logprobs:
            return "null"
        told, choice.logprobs = choice.logprobs, []
        return json.dumps({"content": told, "refusal": None})

    async def _add_logprob(self, choice: _Choice, piece: Piece) -> None:
        if piece.token is not None:
            data = await self.texts.of(piece)
            choice.logprobs.append(chat_logprob(piece, data, self.asked.top_logprobs or 0))


def _read_conversation(asked: ChatRequest) -> Conversation:
    thinking = asked.enable_thinking
    if thinking is None and asked.reasoning_effort is not None:
        thinking = asked.reasoning_effort not in ("none", "minimal")
    choice = asked.tool_choice or "auto"
    return Conversation(
        messages=read_messages(asked.messages),
        tools=[tool.model_dump(exclude_none=True) for tool in asked.tools or ()],
        choice=choice if isinstance(choice, str) else "required",
        named=None if isinstance(choice, str) else choice.function.name,
        thinking=thinking,
        thought_tokens=_read_thought_tokens(asked),
        variables=asked.chat_template_kwargs or {},
        response_format=asked.response_format.model_dump(by_alias=True, exclude_none=True)
        if asked.response_format
        else None,
        grammar=asked.grammar,
        parallel=asked.parallel_tool_calls is not False,
    )


def _read_thought_tokens(asked: ChatRequest) -> int | None:
    """The first limit of thinking that is given, by Qwen's name or llama-server's; -1 is none."""
    for value in (asked.thinking_budget, asked.reasoning_budget_tokens, asked.thinking_budget_tokens):
        if value is not None:
            return None if value < 0 else value
    return None


def _delta(part: AnswerEvent, choice: _Choice) -> str | None:
    """The `delta` of one part of the answer as JSON, None for what has none."""
    if isinstance(part, Said):
        return f'"delta": {{"content": {json.dumps(part.text)}}}'
    if isinstance(part, Thought):
        return f'"delta": {{"reasoning_content": {json.dumps(part.text)}}}'
    if isinstance(part, CallArguments):
        call: dict[str, Any] = {"index": part.index, "function": {"arguments": part.text}}
        return f'"delta": {{"tool_calls": [{json.dumps(call)}]}}'
    if isinstance(part, CallBegun):
        choice.called = True
        function = {"name": part.name, "arguments": ""}
        call = {"index": part.index, "id": part.id, "type": "function", "function": function}
        return f'"delta": {{"tool_calls": [{json.dumps(call)}]}}'
    if isinstance(part, Warned):
        choice.warnings.append(part.message)
    return None


def _message(answer: Answer) -> dict[str, Any]:
    content = None if answer.calls and not answer.content else answer.content
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message
