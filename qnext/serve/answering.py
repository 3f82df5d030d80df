"""One answer as parts, for the APIs that have no choices and no probabilities."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from qnext.models.answer import AnswerEvent
from qnext.pipeline.serve_values import Begun, Ended, Job, Piece
from qnext.serve.conversation import Prompt
from qnext.serve.generating import Server

Part = Begun | AnswerEvent | Ended


async def read_answer(server: Server, job: Job, prompt: Prompt) -> AsyncGenerator[Part, None]:
    """That it has begun, its parts, its end. Raises ApiError, Refused, Unavailable."""
    parser = prompt.parser()
    async with aclosing(server.generate([job])) as events:
        async for _, event in events:
            if type(event) is Piece:
                for part in parser.feed(event.text):
                    yield part
                continue
            if isinstance(event, Ended):
                for part in (*parser.feed(prompt.cut_off(event)), *parser.finish()):
                    yield part
            yield event  # type: ignore[misc]
