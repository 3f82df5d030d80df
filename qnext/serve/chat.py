"""`/v1/chat/completions`: messages in; thinking, text and tool calls out, whole or as they come."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qnext.pipeline.serve_values import Ended, Job, Piece, ServedModel
from qnext.serve.body import StrictRoute
from qnext.serve.chunks import Chunks, finish_reason, timings, usage
from qnext.serve.conversation import Conversation, read_messages, render_prompt
from qnext.serve.errors import ApiError
from qnext.serve.generating import Server
from qnext.serve.jobs import read_limit, read_sampling, read_stops
from qnext.serve.logprobs import TokenTexts, chat_logprob
from qnext.serve.openapi import answers
from qnext.serve.reading import AnswerReader, CallArguments, CallBegun, Part, Said, Thought
from qnext.serve.schemas import ChatRequest
from qnext.serve.stream import DONE, EventStream, error_event, while_connected


def make_routes(server: Server, texts: TokenTexts) -> APIRouter:
    """The routes of chats."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/chat/completions", include_in_schema=False)
    @router.post("/v1/chat/completions", tags=["OpenAI"], **answers("chat.completion"))
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer the last message of a conversation."""
        work = _Chat(server, server.model(), body, texts)
        if body.stream:
            return EventStream(work.stream(), error_event)
        return await while_connected(request, work.collect())

    return router


@dataclass(slots=True)
class _Choice:
    """One answer while it comes: what reads it, and what is not told yet."""

    reader: AnswerReader
    called: bool = False
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    thought: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def keep(self, parts: Iterable[Part]) -> None:
        """Add parts to what is kept for an answer that is told whole."""
        for part in parts:
            if isinstance(part, Said):
                self.said.append(part.text)
            elif isinstance(part, Thought):
                self.thought.append(part.text)
            elif isinstance(part, CallBegun):
                function = {"name": part.name, "arguments": ""}
                self.calls.append({"id": part.id, "type": "function", "function": function})
            elif isinstance(part, CallArguments):
                self.calls[part.index]["function"]["arguments"] += part.text


class _Chat:
    """One request: its jobs, and how their events become an answer."""

    def __init__(self, server: Server, model: ServedModel, asked: ChatRequest, texts: TokenTexts) -> None:
        self.server, self.asked, self.texts = server, asked, texts
        if asked.top_logprobs is not None and not asked.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", param="top_logprobs")
        tools = [] if asked.tool_choice == "none" else list(asked.tools or ())
        described = [tool.model_dump(exclude_none=True) for tool in tools]
        variables = dict(asked.chat_template_kwargs or {})
        if asked.enable_thinking is not None:
            variables["enable_thinking"] = asked.enable_thinking
        prompt = render_prompt(model, Conversation(read_messages(asked.messages), described, variables))
        n = asked.n or 1
        self.choices = [_Choice(AnswerReader(prompt, described)) for _ in range(n)]
        limit = read_limit(
            ("max_completion_tokens", asked.max_completion_tokens), ("max_tokens", asked.max_tokens)
        )
        self.jobs = [
            Job(
                text=prompt,
                max_tokens=limit,
                sampling=read_sampling(asked, model, choice),
                stop=read_stops(asked),
                ignore_eos=bool(asked.ignore_eos),
                logprobs=max(asked.top_logprobs or 0, 1) if asked.logprobs else None,
                grammar=asked.grammar,
                deadline_s=server.settings.deadline_s,
                cache=asked.cache_prompt is not False,
            )
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
                    for part in choice.reader.feed(happened.text):
                        yield self._tell(index, choice, part)
                elif isinstance(happened, Ended):
                    for part in choice.reader.finish():
                        yield self._tell(index, choice, part)
                    ends.append(happened)
                    reason = finish_reason(happened, called=choice.called)
                    last = choice_chunk(index, '"delta": {}', self._take_logprobs(choice), reason)
                    alone = len(self.jobs) == 1 and not self.tell_usage
                    yield self.chunks.with_timings(last, timings(happened)) if alone else last
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
                    choice.keep(choice.reader.feed(happened.text))
                elif isinstance(happened, Ended):
                    choice.keep(choice.reader.finish())
                    ends[index] = happened
        told = [
            {
                "index": index,
                "message": _message(choice),
                "logprobs": {"content": choice.logprobs, "refusal": None} if self.asked.logprobs else None,
                "finish_reason": finish_reason(ends[index], called=bool(choice.calls)),
            }
            for index, choice in enumerate(self.choices)
        ]
        order = [ends[index] for index in range(len(self.jobs))]
        return Response(self.chunks.whole(told, order), media_type="application/json")

    def _tell(self, index: int, choice: _Choice, part: Part) -> bytes:
        """The chunk of one part of the answer."""
        if isinstance(part, Said):
            delta = f'"delta": {{"content": {json.dumps(part.text)}}}'
        elif isinstance(part, Thought):
            delta = f'"delta": {{"reasoning_content": {json.dumps(part.text)}}}'
        elif isinstance(part, CallBegun):
            choice.called = True
            function = {"name": part.name, "arguments": ""}
            call = {"index": part.index, "id": part.id, "type": "function", "function": function}
            delta = f'"delta": {{"tool_calls": [{json.dumps(call)}]}}'
        else:
            call = {"index": part.index, "function": {"arguments": part.text}}
            delta = f'"delta": {{"tool_calls": [{json.dumps(call)}]}}'
        return self.chunks.choice(index, delta, self._take_logprobs(choice))

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


def _message(choice: _Choice) -> dict[str, Any]:
    said = "".join(choice.said)
    message: dict[str, Any] = {"role": "assistant", "content": None if choice.calls and not said else said}
    if choice.thought:
        message["reasoning_content"] = "".join(choice.thought)
    if choice.calls:
        message["tool_calls"] = choice.calls
    return message
