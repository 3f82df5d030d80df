"""`/v1/completions`: text or tokens continued as they are, without a template."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from qnext.pipeline.serve_values import Begun, Ended, Piece, ServedModel
from qnext.serve.body import StrictRoute
from qnext.serve.chunks import Chunks, finish_reason, timings, usage
from qnext.serve.conversation import Prompt, read_grammar
from qnext.serve.errors import ApiError
from qnext.serve.generating import Server
from qnext.serve.jobs import make_job, read_limit
from qnext.serve.logprobs import CompletionLogprobs, TokenTexts
from qnext.serve.openapi import answers
from qnext.serve.schemas import MOST_CHOICES, CompletionRequest
from qnext.serve.stream import DONE, EventStream, error_event, while_connected

_MOST_ANSWERS = 64


def make_routes(server: Server, texts: TokenTexts) -> APIRouter:
    """The routes of plain completions."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/completions", include_in_schema=False)
    @router.post("/v1/completions", tags=["OpenAI"], **answers("text_completion"))
    async def complete(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt."""
        model = server.model()
        work = _Completion(server, model, body, texts)
        if body.stream:
            return EventStream(work.stream(), error_event)
        return await while_connected(request, work.collect())

    return router


class _Completion:
    """One request: its jobs, and how their events become an answer."""

    def __init__(
        self, server: Server, model: ServedModel, asked: CompletionRequest, texts: TokenTexts
    ) -> None:
        if asked.suffix:
            raise ApiError(400, "suffix: this server cannot fill in the middle", param="suffix")
        self.server, self.texts, self.asked = server, texts, asked
        self.n = asked.n or 1
        if asked.best_of is not None and asked.best_of != self.n:
            raise ApiError(400, "best_of: has to be the same as n", param="best_of")
        if asked.echo and asked.logprobs is not None:
            raise ApiError(
                400,
                "echo: probabilities of the prompt's tokens are not kept, so not with logprobs",
                param="echo",
            )
        self.prompts = _read_prompts(asked.prompt)
        if self.n * len(self.prompts) > _MOST_ANSWERS or self.n > MOST_CHOICES:
            raise ApiError(400, f"n: at most {_MOST_ANSWERS} answers per request", param="n")
        self.logprobs = asked.logprobs
        limit = read_limit(("max_tokens", asked.max_tokens), ("n_predict", asked.n_predict))
        grammar = None if asked.grammar is None else read_grammar({"type": "gbnf", "grammar": asked.grammar})
        self.jobs = [
            make_job(
                server,
                model,
                asked,
                choice,
                prompt=Prompt(prompt, grammar=grammar)
                if isinstance(prompt, str)
                else Prompt("", ids=prompt, grammar=grammar),
                limit=limit,
                logprobs=None if asked.logprobs is None else max(asked.logprobs, 1),
            )
            for prompt in self.prompts
            for choice in range(self.n)
        ]
        self.tell_usage = bool(asked.stream_options and asked.stream_options.include_usage)
        self.chunks = Chunks("text_completion", model, tell_usage=bool(asked.stream) and self.tell_usage)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Events of a streamed answer."""
        ends: list[Ended] = []
        probabilities = [CompletionLogprobs() for _ in self.jobs]
        async with aclosing(self.server.generate(self.jobs)) as events:
            async for index, happened in events:
                if type(happened) is Piece:
                    if self.logprobs is not None:
                        await self._add(probabilities[index], happened)
                    if happened.text:
                        yield self._say(index, happened.text, probabilities[index])
                elif isinstance(happened, Begun):
                    if self.asked.echo:
                        yield self._say(index, await self._prompt(index), probabilities[index])
                elif isinstance(happened, Ended):
                    ends.append(happened)
                    told = json.dumps(probabilities[index].take())
                    last = self.chunks.choice(index, '"text": ""', told, finish_reason(happened))
                    if len(self.jobs) == 1:
                        last = self.chunks.with_member(last, "timings", timings(happened))
                    yield last
        if self.tell_usage:
            yield self.chunks.last({"usage": self._usage(ends)})
        yield DONE

    async def collect(self) -> Response:
        """The whole answer."""
        said: list[list[str]] = [[] for _ in self.jobs]
        probabilities = [CompletionLogprobs() for _ in self.jobs]
        ends: dict[int, Ended] = {}
        async with aclosing(self.server.generate(self.jobs)) as events:
            async for index, happened in events:
                if type(happened) is Piece:
                    said[index].append(happened.text)
                    if self.logprobs is not None:
                        await self._add(probabilities[index], happened)
                elif isinstance(happened, Ended):
                    ends[index] = happened
        choices: list[dict[str, Any]] = []
        for index, parts in enumerate(said):
            before = await self._prompt(index) if self.asked.echo else ""
            choices.append(
                {
                    "text": before + "".join(parts),
                    "index": index,
                    "logprobs": probabilities[index].take(),
                    "finish_reason": finish_reason(ends[index]),
                }
            )
        order = [ends[index] for index in range(len(self.jobs))]
        whole = self.chunks.whole(choices, order, self._usage(order), {})
        return Response(whole, media_type="application/json")

    def _say(self, index: int, text: str, probabilities: CompletionLogprobs) -> bytes:
        told = "null" if self.logprobs is None else json.dumps(probabilities.take())
        return self.chunks.choice(index, f'"text": {json.dumps(text)}', told)

    async def _add(self, probabilities: CompletionLogprobs, piece: Piece) -> None:
        if piece.token is not None:
            probabilities.add(piece, await self.texts.of(piece), self.logprobs or 0)

    async def _prompt(self, index: int) -> str:
        prompt = self.prompts[index // self.n]
        return prompt if isinstance(prompt, str) else await self.server.backend.detokenize(prompt)

    def _usage(self, ends: list[Ended]) -> dict[str, Any]:
        """Each prompt counts once, whatever number of choices it has. Order of `ends` is of no matter."""
        told = usage(ends)
        if len(self.prompts) > 1:
            prompt = sum(end.prompt_tokens for end in ends) // self.n
            cached = sum(end.cached_tokens for end in ends) // self.n
            told["prompt_tokens"], told["total_tokens"] = prompt, prompt + told["completion_tokens"]
            told["prompt_tokens_details"] = {"cached_tokens": cached}
        return told


def _read_prompts(prompt: object) -> list[str | list[int]]:
    """The prompts of a request; a list of numbers is one prompt."""
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        return prompt
    assert isinstance(prompt, str | list)
    return [prompt]
