"""Many texts at once on one engine: the answers are those of each alone, and nothing waits for nobody."""

from __future__ import annotations

import itertools
import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from qnext.engine.protocol import Message
from qnext.engine.serving import ServingEngine
from qnext.engine.session import EngineSession
from qnext.errors import EngineError
from qnext.models.synth import DEMO_SENTENCE
from qnext.plan.values import Placement

pytestmark = pytest.mark.engine

SLOTS = 8
CPU = Placement(
    threads=1, threads_batch=1, context=2048 * SLOTS, parallel=SLOTS, outputs_max=SLOTS, ubatch=64
)
QUESTION = "<|im_start|>user\nWhat can you do?<|im_end|>\n<|im_start|>assistant\n"
GREEDY = {"temperature": 0}


class Client:
    """A serving engine and what it has said so far, by request."""

    def __init__(self, engine: ServingEngine) -> None:
        self.engine = engine
        self.events: queue.Queue[Message | EngineError] = queue.Queue()
        self.log: list[Message] = []
        self._ids = itertools.count(1)

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

    def steps(self, identity: int) -> list[list]:
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

    def state(self) -> Message:
        identity = next(self._ids)
        self.engine.ask_state(identity)
        return self.until("state", identity)


@pytest.fixture(scope="module")
def session(demo_model: Path) -> Iterator[EngineSession]:
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        yield session


@pytest.fixture
def client(session: EngineSession) -> Iterator[Client]:
    """A loop of its own for every test, so that no test finds another's prompts."""
    engine = ServingEngine(session)
    client = Client(engine)
    engine.start(client.events.put, client.events.put, cache_bytes=64 << 20)
    yield client
    assert engine.stop()


def test_greedy_text_is_the_same_alone_in_company_and_from_generate(
    session: EngineSession, demo_model: Path
) -> None:
    generated = "".join(
        str(event["text"])
        for event in session.generate(QUESTION, max_tokens=60, sampling={})
        if event["event"] == "token"
    )
    assert generated == DEMO_SENTENCE
    engine = ServingEngine(session)
    client = Client(engine)
    engine.start(client.events.put, client.events.put)
    alone, ended = client.ask()
    assert alone == generated and ended["reason"] == "eos"
    many = [
        client.submit(f"<|im_start|>user\nQuestion {n}<|im_end|>\n<|im_start|>assistant\n") for n in range(20)
    ]
    for identity in many:
        text, ended = client.finish(identity)
        assert text == generated and ended["reason"] == "eos"
    assert engine.stop()
    assert session.tokenize("a"), "the session is free again"
