"""OpenAI's `/v1/responses`: text and function tools, whole or as events. Nothing is stored."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from qnext.models.answer import Thought
from qnext.pipeline.serve_values import Begun, Ended, ServedModel
from qnext.serve.answering import read_answer
from qnext.serve.body import StrictRoute
from qnext.serve.conversation import ThoughtTags, make_prompt
from qnext.serve.errors import ApiError
from qnext.serve.generating import Server
from qnext.serve.info import count_tokens
from qnext.serve.jobs import make_job, read_limit
from qnext.serve.logprobs import TokenTexts
from qnext.serve.openapi import answers
from qnext.serve.responses_input import ResponsesRequest, read_conversation
from qnext.serve.responses_output import Output
from qnext.serve.stream import EventStream, while_connected


def make_routes(server: Server, texts: TokenTexts) -> APIRouter:
    """The routes of responses."""
    router = APIRouter(route_class=StrictRoute)

    @router.post("/responses", include_in_schema=False)
    @router.post("/v1/responses", tags=["OpenAI"], **answers("response"))
    async def create(body: ResponsesRequest, request: Request) -> Response:
        """Answer an input."""
        work = _Responding(server, server.model(), body, await texts.thought_tags())
        if body.stream:
            return EventStream(work.stream(), work.error_event)
        return await while_connected(request, work.collect())

    @router.post("/responses/input_tokens", include_in_schema=False)
    @router.post("/v1/responses/input_tokens", tags=["OpenAI"], **answers("count", streams=False))
    async def count(body: ResponsesRequest) -> Response:
        """How many tokens the prompt of this request has."""
        model = server.model()
        prompt = make_prompt(model, read_conversation(body))
        counted = await count_tokens(server, model, prompt.text)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": counted})

    return router


class _Responding:
    """One request."""

    def __init__(
        self, server: Server, model: ServedModel, asked: ResponsesRequest, tags: ThoughtTags
    ) -> None:
        self.server, self.output = server, Output()
        self.thought = 0
        prompt = make_prompt(model, read_conversation(asked), tags)
        limit = read_limit(("max_output_tokens", asked.max_output_tokens))
        self.job = make_job(server, model, asked.sampling(), prompt=prompt, limit=limit)
        self.prompt = prompt
        self.response = _describe(asked, model, self.job.sampling)

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Events of a streamed response."""
        output = self.output
        async with aclosing(read_answer(self.server, self.job, self.prompt)) as parts:
            async for part in parts:
                if isinstance(part, Begun):
                    yield output.event("response.created", {"response": self.response})
                    yield output.event("response.in_progress", {"response": self.response})
                elif isinstance(part, Ended):
                    for event in output.close(_status(part)):
                        yield event
                    self._finish(part)
                    yield output.event(f"response.{_status(part)}", {"response": self.response})
                else:
                    self.thought += isinstance(part, Thought)
                    for event in output.take(part):
                        yield event

    async def collect(self) -> Response:
        """The whole response."""
        async for _ in self.stream():
            pass
        return Response(json.dumps(self.response), media_type="application/json")

    def error_event(self, error: ApiError) -> bytes:
        """The end of a stream that failed."""
        told = {"code": error.code or "server_error", "message": error.detail, "param": error.param}
        return self.output.event("error", told)

    def _finish(self, ended: Ended) -> None:
        cut = _status(ended) == "incomplete"
        self.response |= {
            "status": _status(ended),
            "completed_at": None if cut else int(time.time()),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": self.output.items,
            "usage": {
                "input_tokens": ended.prompt_tokens,
                "input_tokens_details": {"cached_tokens": ended.cached_tokens},
                "output_tokens": ended.generated,
                "output_tokens_details": {"reasoning_tokens": min(self.thought, ended.generated)},
                "total_tokens": ended.prompt_tokens + ended.generated,
            },
        }


def _status(ended: Ended) -> str:
    return "incomplete" if ended.reason in ("length", "context") else "completed"


def _describe(asked: ResponsesRequest, model: ServedModel, sampling: Any) -> dict[str, Any]:
    """The response before it has said anything."""
    told = asked.model_dump(
        by_alias=True,
        include={
            "instructions",
            "max_output_tokens",
            "metadata",
            "tools",
            "tool_choice",
            "text",
            "reasoning",
        },
        exclude_none=True,
    )
    usual: dict[str, Any] = {
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "tools": [],
        "tool_choice": "auto",
        "text": {"format": {"type": "text"}},
        "reasoning": {"effort": None, "summary": None},
    }
    return (
        {
            "id": "resp_" + secrets.token_urlsafe(18),
            "object": "response",
            "created_at": int(time.time()),
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": model.name,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": sampling.get("temperature"),
            "top_p": sampling.get("top_p"),
            "truncation": "disabled",
            "usage": None,
        }
        | usual
        | told
    )
