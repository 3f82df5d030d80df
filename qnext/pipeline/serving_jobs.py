"""The jobs of a server, between the event loop that asks and the engine's thread that answers.

A decode step of all sequences comes as one message and crosses over with one `call_soon_threadsafe`; in the
loop it is dealt out to a queue per job. Everything but `deliver` belongs to the loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, cast

from qnext.engine.protocol import Message
from qnext.engine.serving import ServingEngine
from qnext.errors import EngineError
from qnext.pipeline.serve_values import Begun, EndReason, Job, Piece, Refused, Unavailable
from qnext.pipeline.serve_values import Ended as End
from qnext.pipeline.serving_blame import Suspects

logger = logging.getLogger(__name__)

Answer = Begun | Piece | End | Refused | Unavailable


@dataclass(slots=True, eq=False)
class Running:
    """A job that is with `engine`, waiting or in a slot, and what came of it that nobody has taken yet."""

    number: int
    job: Job
    engine: ServingEngine
    begun: bool = False
    answers: asyncio.Queue[Answer] = field(default_factory=asyncio.Queue)


@dataclass(slots=True, eq=False)
class _Question:
    """Something asked of the engine that has one answer."""

    engine: ServingEngine
    reply: asyncio.Future[Message]


class Jobs:
    """All jobs and questions that have no end yet, by number."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._running: dict[int, Running] = {}
        self._questions: dict[int, _Question] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self.suspects = Suspects()

    def __len__(self) -> int:
        return len(self._running)

    def submit(self, engine: ServingEngine, job: Job) -> Running:
        """Give a job to the engine."""
        self._loop = asyncio.get_running_loop()
        running = Running(next(self._numbers), job, engine)
        with _engine_here():
            engine.submit(_submission(running.number, job))
        self._running[running.number] = running
        return running

    def drop(self, running: Running) -> None:
        """Nobody wants the answer any more; nothing happens where it has ended."""
        if self._running.pop(running.number, None) is not None:
            running.engine.drop(running.number)

    async def ask(self, engine: ServingEngine, question: Callable[[int], None]) -> Message:
        """Put a question to the engine under a number of its own, and wait for the answer.

        Raises Refused, and Unavailable when the engine ends meanwhile.
        """
        self._loop = asyncio.get_running_loop()
        number = next(self._numbers)
        reply: asyncio.Future[Message] = self._loop.create_future()
        self._questions[number] = _Question(engine, reply)
        try:
            with _engine_here():
                question(number)
            return await reply
        finally:
            self._questions.pop(number, None)

    def deliver(self, message: Message) -> None:
        """A message of the engine. Called in its thread."""
        self.call(self._deal, message)

    def call(self, action: Callable[..., None], *arguments: object) -> None:
        """Have `action` done in the loop's thread, from another; nothing where nobody has asked anything."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            if self._loop is not None:
                self._loop.call_soon_threadsafe(action, *arguments)

    def engine_died(self, engine: ServingEngine, error: EngineError, retry_after_s: float) -> None:
        """End everything that was with `engine`, naming a job that was there at an earlier death too."""
        lost = [running for running in self._running.values() if running.engine is engine]
        again = self.suspects.add(error, [running.job for running in lost if running.begun])
        for running in lost:
            why = f"{error.message}; it starts again"
            if running.job in again:
                why += "; it died once before while it worked on this very request"
            self._end(running, Unavailable(why, retry_after_s))
        if again:
            numbers = ", ".join(str(running.number) for running in lost if running.job in again)
            logger.warning("the engine has now died twice with the same request (job %s)", numbers)
        for question in self._questions.values():
            if question.engine is engine and not question.reply.done():
                question.reply.set_exception(Unavailable(f"{error.message}; it starts again", retry_after_s))

    def end_all(self, why: Unavailable) -> None:
        """Take every job from the engine and end it with `why`."""
        for running in list(self._running.values()):
            running.engine.drop(running.number)
            self._end(running, why)

    def _end(self, running: Running, answer: Answer) -> None:
        self._running.pop(running.number, None)
        running.answers.put_nowait(answer)

    def _deal(self, message: Message) -> None:
        event = message["event"]
        if event == "step":
            for number, text, token, logprob, top, *_ in cast("list[list[Any]]", message["out"]):
                running = self._running.get(number)
                if running is not None:
                    running.answers.put_nowait(Piece(text, token, logprob, _top(top)))
            return
        number = cast(int, message.get("id"))
        if event in ("tokens", "text", "state"):
            question = self._questions.get(number)
            if question is not None and not question.reply.done():
                question.reply.set_result(message)
            return
        if event == "refused" and (question := self._questions.get(number)) is not None:
            if not question.reply.done():
                question.reply.set_exception(_refused(message))
            return
        running = self._running.get(number)
        if running is None:
            return
        if event == "begun":
            running.begun = True
            counts = (cast(int, message[name]) for name in ("prompt_tokens", "cached_tokens", "queued_ns"))
            running.answers.put_nowait(Begun(*counts))
        elif event == "refused":
            self._end(running, _refused(message))
        elif event == "ended":
            if rest := cast(str, message["text"]):
                running.answers.put_nowait(Piece(rest, None))
            end = _end(message)
            self._end(running, end)
            logger.info("%s", _said(number, end))


@contextlib.contextmanager
def _engine_here() -> Iterator[None]:
    """An engine that has died a moment ago, before anybody could say so, is none."""
    try:
        yield
    except EngineError as error:
        raise Unavailable(f"{error.message}; it starts again", 1.0) from error


def _submission(number: int, job: Job) -> Message:
    return {
        "id": number,
        "text": job.text,
        "tokens": None if job.tokens is None else list(job.tokens),
        "max_tokens": job.max_tokens,
        "sampling": dict(job.sampling),
        "stop": list(job.stop),
        "ignore_eos": job.ignore_eos,
        "min_tokens": job.min_tokens,
        "logprobs": job.logprobs,
        "grammar": job.grammar,
        "grammar_lazy": list(job.grammar_after) or None,
        "deadline_s": job.deadline_s,
        "boundaries": list(job.boundaries) or None,  # None: the engine looks for messages itself
        "cache": job.cache,
        "thought": asdict(job.thought) if job.thought else None,
    }


def _top(told: list[tuple[int, str, float]] | None) -> tuple[tuple[int, bytes, float], ...] | None:
    if told is None:
        return None
    return tuple((token, text.encode("latin-1"), logprob) for token, text, logprob in told)


def _end(message: Message) -> End:
    said = cast("dict[str, Any]", message)
    return End(
        reason=cast(EndReason, said["reason"]),
        prompt_tokens=said["prompt_tokens"],
        cached_tokens=said["cached_tokens"],
        generated=said["generated"],
        prefill_ns=said["prefill_ns"],
        decode_ns=said["decode_ns"],
        queued_ns=said["queued_ns"],
        stop_text=said.get("stop_text"),
        message=said.get("message"),
    )


def _refused(message: Message) -> Refused:
    numbers = {
        name: value
        for name, value in message.items()
        if isinstance(value, int) and name not in ("id", "mark")
    }
    return Refused(str(message["kind"]), str(message["message"]), numbers)


def _said(number: int, end: End) -> str:
    """A finished job for the log: counts and speeds, nothing of what was said."""
    read = end.prompt_tokens - end.cached_tokens
    parts = [
        f"job {number}: {end.reason}",
        f"prompt {end.prompt_tokens} ({end.cached_tokens} cached){_speed(read, end.prefill_ns)}",
        f"answer {end.generated}{_speed(end.generated - 1, end.decode_ns)}",
        f"waited {end.queued_ns / 1e6:.0f} ms",
    ]
    return ", ".join(parts)


def _speed(tokens: int, ns: int) -> str:
    return f" at {tokens * 1e9 / ns:.1f} t/s" if tokens > 0 and ns > 0 else ""
