"""The serving loop: requests of the parent come in, events of many texts go out, until the parent says stop.

Requests are read between steps; without work the loop sleeps until one comes. A request that has no meaning
is refused with words and never ends the loop. The steps themselves are `batching`'s.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from qnext.engine.llama.batching import Batcher
from qnext.engine.llama.binding import EngineFailure
from qnext.engine.llama.context import Context
from qnext.engine.llama.job import Job
from qnext.engine.llama.sampler import Candidates, Grammar, GrammarError, Sampler
from qnext.engine.llama.signals import Signals
from qnext.engine.llama.submission import Refused, Submission, checked_tokens, read_submission
from qnext.engine.llama.text import TextStream
from qnext.engine.llama.thought import ThoughtLimit
from qnext.engine.llama.vocabulary import Vocabulary
from qnext.engine.protocol import Message

_IDLE_CHECK_S = 0.5
"""A cancel does not come through the inbox: an idle loop looks for one this often."""

STALL_S = 3.0
"""How long a chunk of a new prompt may hold up running texts, about."""


class Serving:
    """The loop over one `context`. `inbox` gets the parent's requests, `signals.stream` takes the answers."""

    def __init__(
        self,
        context: Context,
        vocabulary: Vocabulary,
        signals: Signals,
        inbox: queue.Queue[Message],
        *,
        model: Any,
        cache_bytes: int = 0,
        stall_s: float = STALL_S,
    ) -> None:
        self._context = context
        self._vocabulary = vocabulary
        self._signals = signals
        self._inbox = inbox
        self._candidates = Candidates(vocabulary.size)
        self._batcher = Batcher(
            context,
            vocabulary,
            signals,
            model=model,
            cache_bytes=cache_bytes,
            stall_s=stall_s,
        )
        self._stopped = False

    def run(self) -> dict[str, Any]:
        """Serve until `stop`. Raises Cancelled, and EngineFailure when the context is of no more use."""
        self._context.memory.clear()
        self._signals.stream("serving")
        try:
            while not self._stopped:
                self._read_requests()
                if self._batcher.work:
                    self._batcher.step()
            for job in list(self._batcher.jobs()):
                self._batcher.end(job, "dropped", message="the server stops")
        finally:
            for job in self._batcher.jobs():
                job.sampler.free()
            self._context.memory.clear()
        return {"totals": asdict(self._batcher.totals)}

    # --- requests -------------------------------------------------------------------------------------

    def _read_requests(self) -> None:
        """Take every request that has come; wait for one if there is nothing else to do."""
        self._signals.check()
        while not self._stopped:
            try:
                if self._batcher.work:
                    message = self._inbox.get_nowait()
                else:
                    message = self._inbox.get(timeout=_IDLE_CHECK_S)
            except queue.Empty:
                if self._batcher.work:
                    return
                self._signals.check()
                continue
            try:
                self._handle(message)
            except Refused as refusal:
                self._signals.stream(
                    "refused",
                    id=message.get("id"),
                    kind=refusal.kind,
                    message=str(refusal),
                    **refusal.numbers,
                )

    def _handle(self, message: Message) -> None:
        operations: dict[object, Callable[[Message], None]] = {
            "submit": self._submit,
            "drop": self._drop,
            "tokenize": self._tokenize,
            "detokenize": self._detokenize,
            "state": self._tell_state,
            "stop": self._stop,
        }
        operation = operations.get(message.get("op"))
        if operation is None:
            raise Refused("invalid", f"'{message.get('op')}' means nothing while serving")
        operation(message)

    def _stop(self, _message: Message) -> None:
        self._stopped = True

    def _submit(self, message: Message) -> None:
        asked = read_submission(message, self._vocabulary, self._context.limit)
        if any(job.asked.id == asked.id for job in self._batcher.jobs()):
            raise Refused("invalid", f"request {asked.id} is under way already")
        thought = ThoughtLimit(asked.thought) if asked.thought else None
        self._batcher.add(Job(asked, self._sampler(asked), TextStream(asked.stop), thought))

    def _sampler(self, asked: Submission) -> Sampler:
        grammar = None
        if asked.grammar is not None:
            try:
                grammar = Grammar(self._vocabulary.handle, asked.grammar, self._candidates)
            except GrammarError as error:
                raise Refused("grammar", str(error)) from error
        return Sampler(
            asked.sampling,
            self._candidates,
            asked.tokens,
            vocabulary=self._vocabulary.size,
            grammar=grammar,
            triggers=asked.grammar_triggers,
        )

    def _drop(self, message: Message) -> None:
        for job in list(self._batcher.jobs()):
            if job.asked.id == message.get("id"):
                self._batcher.end(job, "dropped")

    def _tokenize(self, message: Message) -> None:
        text = message.get("text")
        if not isinstance(text, str):
            raise Refused("invalid", "text has to be text")
        special, add_bos = message.get("special", True) is True, message.get("add_bos") is True
        try:
            tokens = self._vocabulary.tokenize(text, special=special, add_bos=add_bos)
        except EngineFailure as error:
            raise Refused(error.kind, str(error)) from error
        self._signals.stream("tokens", id=message.get("id"), tokens=tokens)

    def _detokenize(self, message: Message) -> None:
        tokens = checked_tokens(message.get("tokens"), self._vocabulary)
        text = b"".join(self._vocabulary.piece(token, special=True) for token in tokens.tolist())
        self._signals.stream("text", id=message.get("id"), text=text.decode(errors="replace"))

    def _tell_state(self, message: Message) -> None:
        self._signals.stream("state", id=message.get("id"), **self._batcher.state())
