"""A client of the serving loop for tests: it submits, listens, and remembers what it has heard."""

from __future__ import annotations

import itertools
import queue
from typing import cast

from qnext.engine.protocol import Message
from qnext.engine.serving import ServingEngine
from qnext.engine.session import EngineSession
from qnext.errors import EngineError
from qnext.plan.values import Placement

SLOTS = 8
CPU = Placement(
    threads=1, threads_batch=1, context=2048 * SLOTS, parallel=SLOTS, outputs_max=SLOTS, ubatch=64
)
QUESTION = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"
GREEDY = {"temperature": 0}


def talk(*turns: str) -> str:
    """A conversation in the demo's template, waiting for the next answer."""
    parts = []
    for index, turn in enumerate(turns):
        role = "assistant" if index % 2 else "user"
        parts.append(f"<|im_start|>{role}\n{turn}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


class Client:
    """A serving engine on `session`, started, and what it has said so far."""

    def __init__(self, session: EngineSession, *, cache_bytes: int = 64 << 20, **options: float) -> None:
        self.engine = ServingEngine(session)
        self.events: queue.Queue[Message | EngineError] = queue.Queue()
        self.log: list[Message] = []
        self._ids = itertools.count(1)
        self.engine.start(self.events.put, self.events.put, cache_bytes=cache_bytes, **options)

    def submit(self, text: str | None = QUESTION, **options: object) -> int:
        identity = next(self._ids)
        sampling = options.pop("sampling", GREEDY)
        self.engine.submit({"id": identity, "text": text, "sampling": sampling, **options})
        return identity

    def next(self, timeout: float = 60) -> Message:
        event = self.events.get(timeout=timeout)
        if isinstance(event, EngineError):
            raise event
        self.log.append(event)
        return event

    def until(self, kind: str, identity: int | None = None) -> Message:
        """The first event of that kind (for that request), from those heard already or to come."""
        for event in self.log:
            if event["event"] == kind and identity in (None, event.get("id")):
                return event
        while True:
            event = self.next()
            if event["event"] == kind and identity in (None, event.get("id")):
                return event

    def steps(self, identity: int) -> list[list[object]]:
        return [
            entry
            for event in self.log
            if event["event"] == "step"
            for entry in event["out"]
            if entry[0] == identity
        ]

    def finish(self, identity: int) -> tuple[str, Message]:
        ended = self.until("ended", identity)
        return "".join(entry[1] for entry in self.steps(identity)) + str(ended["text"]), ended

    def ask(self, text: str | None = QUESTION, **options: object) -> tuple[str, Message]:
        return self.finish(self.submit(text, **options))

    def tokens(self, text: str) -> list[int]:
        """The token ids of `text`."""
        identity = next(self._ids)
        self.engine.tokenize(identity, text)
        return cast("list[int]", self.until("tokens", identity)["tokens"])

    def state(self) -> Message:
        identity = next(self._ids)
        self.engine.ask_state(identity)
        return self.until("state", identity)
