"""Many texts at once on one engine: the answers are those of each alone, and nothing waits for nobody."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
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


def test_every_token_of_a_step_comes_in_one_frame(client: Client) -> None:
    many = [client.submit(max_tokens=12, ignore_eos=True) for _ in range(SLOTS)]
    for identity in many:
        _, ended = client.finish(identity)
        assert (ended["reason"], ended["generated"]) == ("length", 12)
    steps = [event["out"] for event in client.log if event["event"] == "step"]
    assert max(len(step) for step in steps) == SLOTS
    assert len(steps) < 12 + SLOTS
    slots = {event["slot"] for event in client.log if event["event"] == "begun"}
    assert slots == set(range(SLOTS))


def test_a_request_waits_for_a_free_slot_and_a_dropped_one_frees_its_own_within_a_step(
    client: Client,
) -> None:
    endless = [client.submit(ignore_eos=True) for _ in range(SLOTS)]
    waiting = client.submit(max_tokens=3)
    client.until("begun", endless[-1])
    assert client.state()["queued"] == 1
    client.engine.drop(endless[3])
    ended = client.until("ended", endless[3])
    assert ended["reason"] == "dropped"
    begun = client.until("begun", waiting)
    between = client.log[client.log.index(ended) : client.log.index(begun)]
    assert sum(event["event"] == "step" for event in between) <= 1
    assert begun["slot"] == client.until("begun", endless[3])["slot"] and begun["queued_ns"] > 0
    assert client.finish(waiting)[1]["generated"] == 3
    for identity in endless:
        client.engine.drop(identity)
        assert client.until("ended", identity)["reason"] == "dropped"
    assert all(slot["id"] is None for slot in client.state()["slots"])


def test_a_request_dropped_in_the_queue_never_begins(client: Client) -> None:
    endless = [client.submit(ignore_eos=True) for _ in range(SLOTS)]
    waiting = client.submit()
    client.engine.drop(waiting)
    ended = client.until("ended", waiting)
    assert (ended["reason"], ended["generated"], ended["prefill_ns"]) == ("dropped", 0, 0)
    for identity in endless:
        client.engine.drop(identity)
    for identity in endless:
        client.until("ended", identity)
    assert not any(event["event"] == "begun" and event["id"] == waiting for event in client.log)


def test_a_long_prompt_does_not_stall_a_running_text(client: Client) -> None:
    running = client.submit(ignore_eos=True, max_tokens=200)
    client.until("step")
    long = client.submit("<|im_start|>user\n" + "why? " * 450 + "<|im_end|>\n", max_tokens=1)
    begun = client.until("begun", long)
    assert begun["prompt_tokens"] > 900
    ended = client.until("ended", long)
    between = client.log[client.log.index(begun) : client.log.index(ended)]
    tokens = sum(
        entry[0] == running for event in between if event["event"] == "step" for entry in event["out"]
    )
    assert tokens >= begun["prompt_tokens"] // 64, "one token for every ubatch of the prompt at least"
    client.engine.drop(running)
    client.until("ended", running)


def test_a_short_prompt_is_not_held_up_by_a_long_one(client: Client) -> None:
    long = client.submit("<|im_start|>user\n" + "why? " * 450 + "<|im_end|>\n", max_tokens=1)
    client.until("begun", long)
    short = client.submit(max_tokens=1)
    client.until("ended", long)
    kinds = [event["id"] for event in client.log if event["event"] == "ended"]
    assert kinds == [short, long]


# --- prompts that share their beginning -----------------------------------------------------------------


def talk(*turns: str) -> str:
    parts = []
    for index, turn in enumerate(turns):
        role = "assistant" if index % 2 else "user"
        parts.append(f"<|im_start|>{role}\n{turn}<|im_end|>\n")
    return "".join(parts) + "<|im_start|>assistant\n"


LONG = "What can you do for me? " * 60


def test_the_second_turn_evaluates_only_what_is_new(client: Client) -> None:
    answer, first = client.ask(talk(LONG))
    assert answer == DEMO_SENTENCE and first["cached_tokens"] == 0
    answer, second = client.ask(talk(LONG, answer, "And what else?"))
    assert answer == DEMO_SENTENCE
    assert second["cached_tokens"] == first["prompt_tokens"] + first["generated"] - 1


def test_a_turn_whose_last_answer_has_changed_goes_back_to_the_end_of_the_question(client: Client) -> None:
    _, first = client.ask(talk(LONG))
    answer, second = client.ask(talk(LONG, "Something else.", "And what else?"))
    assert answer == DEMO_SENTENCE
    opening = first["prompt_tokens"] - second["cached_tokens"]
    assert 0 < opening < 8, "all but the words that open the answer"


def test_a_conversation_comes_back_after_others_have_taken_its_slot(client: Client) -> None:
    answer, first = client.ask(talk(LONG))
    others = [client.submit(talk(f"Number {n}. " * 60), max_tokens=2) for n in range(2 * SLOTS)]
    for other in others:
        client.finish(other)
    answer, second = client.ask(talk(LONG, answer, "And what else?"))
    assert answer == DEMO_SENTENCE
    assert second["cached_tokens"] == first["prompt_tokens"] + first["generated"] - 1
    state = client.state()
    assert 0 < state["cache"]["bytes"] <= state["cache"]["budget_bytes"]
    assert state["cache"]["entries"] > SLOTS


def test_copies_stay_within_their_budget(session: EngineSession) -> None:
    engine = ServingEngine(session)
    client = Client(engine)
    budget = 3 << 20
    engine.start(client.events.put, client.events.put, cache_bytes=budget)
    for n in range(2 * SLOTS):
        client.finish(client.submit(talk(f"Number {n}. " * 60), max_tokens=2))
    cache = client.state()["cache"]
    assert 0 < cache["bytes"] <= budget
    assert engine.stop()


def test_a_prompt_that_is_not_to_be_cached_is_evaluated_whole(client: Client) -> None:
    client.ask(talk(LONG))
    _, again = client.ask(talk(LONG), cache=False)
    assert again["cached_tokens"] == 0


# --- ends -----------------------------------------------------------------------------------------------


def test_a_stop_string_ends_the_answer_across_tokens(client: Client) -> None:
    text, ended = client.ask(stop=["built-in demo", "never"])
    assert text == DEMO_SENTENCE.split("built-in demo")[0]
    assert (ended["reason"], ended["stop_text"]) == ("stop", "built-in demo")


def test_a_text_ends_with_its_context(client: Client) -> None:
    limit = 2048
    text, ended = client.ask(talk("why? " * 1000), ignore_eos=True)
    assert ended["reason"] == "context" and text
    assert ended["prompt_tokens"] + ended["generated"] == limit + 1


def test_a_deadline_ends_a_running_text_and_one_in_the_queue(client: Client) -> None:
    many = [client.submit(ignore_eos=True, deadline_s=0.2) for _ in range(SLOTS + 1)]
    for identity in many:
        assert client.until("ended", identity)["reason"] == "deadline"


def test_characters_are_never_split_between_tokens(client: Client) -> None:
    tokens = client.engine
    tokens.tokenize(1000, "naïve 日本 😀")
    ids = client.until("tokens", 1000)["tokens"]
    client.engine.detokenize(1001, ids)
    assert client.until("text", 1001)["text"] == "naïve 日本 😀"
    byte_bias = {str(ids[-1]): 100.0}
    text, _ = client.ask(max_tokens=3, ignore_eos=True, sampling={"temperature": 0, "logit_bias": byte_bias})
    assert text == "�" * 3 or "\ufffd" in text


# --- sampling -------------------------------------------------------------------------------------------

WILD = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_a_seed_repeats_its_text_and_another_seed_says_something_else(client: Client) -> None:
    def text(**sampling: object) -> str:
        return client.ask(max_tokens=20, ignore_eos=True, sampling={**WILD, **sampling})[0]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, top_k=5, temperature=5.0) == text(seed=1, top_k=5, temperature=5.0)


def test_a_bias_forbids_and_forces_tokens(client: Client) -> None:
    client.engine.tokenize(1000, "Hello")
    (hello,) = client.until("tokens", 1000)["tokens"]
    text, _ = client.ask(max_tokens=1, sampling={"temperature": 0, "logit_bias": {str(hello): -100}})
    assert text != "Hello"
    text, _ = client.ask(max_tokens=4, sampling={"temperature": 0, "logit_bias": {str(hello): 100}})
    assert text == "Hello" * 4


def test_penalties_count_what_was_said_and_the_prompt(client: Client) -> None:
    sampling = {"temperature": 0, "presence_penalty": 100.0}
    client.submit()
    said = [
        entry[2] for entry in client.steps(client.submit(max_tokens=40, ignore_eos=True, sampling=sampling))
    ]
    identity = client.submit(max_tokens=40, ignore_eos=True, sampling=sampling)
    client.finish(identity)
    said = [entry[2] for entry in client.steps(identity)]
    assert len(set(said)) == len(said) == 40
    plain, _ = client.ask(talk("Hello"), max_tokens=1)
    other, _ = client.ask(talk("Hello"), max_tokens=1, sampling={"temperature": 0, "frequency_penalty": 100})
    assert plain == "Hello" != other


def test_log_probabilities_are_of_the_model_and_name_the_best(client: Client) -> None:
    identity = client.submit(max_tokens=2, logprobs=3)
    client.finish(identity)
    for _, text, token, own, top, piece in client.steps(identity):
        assert [entry[0] for entry in top][0] == token and top[0][2] == own <= 0
        assert len(top) == 3 and top[0][2] >= top[1][2] >= top[2][2]
        assert piece.encode("latin-1").decode() == text
    identity = client.submit(max_tokens=1, logprobs=0)
    client.finish(identity)
    assert client.steps(identity)[0][4] == []


# --- grammar --------------------------------------------------------------------------------------------


def test_a_grammar_restricts_the_text_greedy_and_drawn(client: Client) -> None:
    grammar = 'root ::= "yes" | "no" ("!" "?"){2}'
    for sampling in (GREEDY, {**WILD, "seed": 7}, {"seed": 3, "presence_penalty": 1.0}):
        text, ended = client.ask(grammar=grammar, sampling=sampling)
        assert text in ("yes", "no!?!?") and ended["reason"] == "eos"


def test_a_grammar_wakes_with_its_trigger(client: Client) -> None:
    client.engine.tokenize(1000, "Hello")
    (hello,) = client.until("tokens", 1000)["tokens"]
    text, ended = client.ask(grammar='root ::= "Hello" " you"', grammar_lazy=[hello])
    assert text == "Hello you" and ended["reason"] == "eos"
    client.engine.tokenize(1001, "zzz")
    never = client.until("tokens", 1001)["tokens"][0]
    assert client.ask(grammar='root ::= "x"', grammar_lazy=[never])[0] == DEMO_SENTENCE


def test_a_grammar_goes_on_when_the_end_is_ignored(client: Client) -> None:
    _, ended = client.ask(grammar='root ::= "yes"', ignore_eos=True, max_tokens=8)
    assert ended["reason"] in ("length", "error")
    assert client.ask()[0] == DEMO_SENTENCE


# --- refusals -------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[dict[str, object], str]] = {
    "no prompt": ({"text": None}, "invalid"),
    "both prompts": ({"tokens": [1]}, "invalid"),
    "empty": ({"text": ""}, "empty"),
    "too long": ({"text": "why? " * 3000}, "context_full"),
    "token that is not there": ({"text": None, "tokens": [10**9]}, "invalid"),
    "token of half a number": ({"text": None, "tokens": [1.5]}, "invalid"),
    "negative token": ({"text": None, "tokens": [-1]}, "invalid"),
    "no tokens": ({"text": None, "tokens": []}, "empty"),
    "sampling": ({"sampling": [1]}, "invalid"),
    "temperature": ({"sampling": {"temperature": "hot"}}, "invalid"),
    "not a number": ({"sampling": {"top_p": float("nan")}}, "invalid"),
    "repeat penalty of nothing": ({"sampling": {"repeat_penalty": 0}}, "invalid"),
    "unknown option": ({"sampling": {"top_q": 1}}, "invalid"),
    "bias": ({"sampling": {"logit_bias": {"999999999": 1}}}, "invalid"),
    "stop": ({"stop": "x"}, "invalid"),
    "max_tokens": ({"max_tokens": 0}, "invalid"),
    "deadline": ({"deadline_s": "soon"}, "invalid"),
    "grammar": ({"grammar": "root := ("}, "grammar"),
    "grammar without a root": ({"grammar": 'x ::= "a"'}, "grammar"),
    "grammar that leads nowhere": ({"grammar": "root ::= other"}, "grammar"),
    "grammar that turns in circles": ({"grammar": 'root ::= root "a"'}, "grammar"),
    "unknown field": ({"best_of": 3}, "invalid"),
    "boundaries": ({"boundaries": [-1]}, "invalid"),
    "logprobs": ({"logprobs": 10**6}, "invalid"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_has_no_meaning_is_refused_and_the_loop_goes_on(client: Client, name: str) -> None:
    options, kind = WRONG[name]
    identity = client.submit(**options)
    refused = client.until("refused", identity)
    assert refused["kind"] == kind and refused["message"]
    if kind == "context_full":
        assert refused["prompt_tokens"] > refused["context"] == 2048
    assert client.ask(max_tokens=1)[0] == "Hello"


def test_an_id_under_way_is_not_taken_twice(client: Client) -> None:
    identity = client.submit(ignore_eos=True)
    client.engine.submit({"id": identity, "text": "a"})
    assert "under way" in str(client.until("refused", identity)["message"])
    client.engine.drop(identity)
    assert client.until("ended", identity)["reason"] == "dropped"


# --- counts and ends of the engine ----------------------------------------------------------------------


def test_totals_add_up(client: Client) -> None:
    many = [client.submit(talk("why? " * n), max_tokens=5 + n) for n in range(1, 12)]
    ended = [client.finish(identity)[1] for identity in many]
    state = client.state()
    totals = state["totals"]
    assert totals["generated"] == sum(int(str(event["generated"])) for event in ended)
    cached = sum(event["cached_tokens"] for event in ended)
    assert totals["cached_tokens"] == cached
    assert totals["prompt_tokens"] == sum(event["prompt_tokens"] for event in ended) - cached
    assert totals["steps"] <= totals["busy_slots_sum"] <= SLOTS * totals["steps"]
    assert totals["prompt_ns"] > 0 and totals["decode_ns"] > 0
    assert len(state["slots"]) == SLOTS


def test_stop_ends_what_is_under_way_and_tells_the_totals(session: EngineSession) -> None:
    engine = ServingEngine(session)
    client = Client(engine)
    engine.start(client.events.put, client.events.put)
    identity = client.submit(ignore_eos=True)
    client.until("step")
    assert engine.stop()
    assert client.until("ended", identity)["reason"] == "dropped"
    assert engine.totals is not None
    assert client.events.empty()


def test_a_killed_child_is_told_once_and_explained(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        engine = ServingEngine(session)
        client = Client(engine)
        engine.start(client.events.put, client.events.put)
        client.submit(ignore_eos=True)
        client.until("step")
        os.kill(session.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="killed from outside.*serving"):
            client.until("nothing")
        with pytest.raises(EngineError, match="killed"):
            client.submit()


def test_silence_counts_only_while_something_is_asked(demo_model: Path) -> None:
    with EngineSession(silence_limit_s=0.5) as session:
        session.open(str(demo_model), CPU)
        engine = ServingEngine(session)
        client = Client(engine)
        engine.start(client.events.put, client.events.put)
        client.ask()
        time.sleep(0.8)
        assert client.ask()[0] == DEMO_SENTENCE
        os.kill(session.pid, signal.SIGSTOP)
        client.submit()
        with pytest.raises(EngineError, match="no sign of life"):
            client.until("nothing")


def test_the_context_that_all_share_is_given_to_those_who_came_first(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), replace(CPU, context=1024, parallel=4, kv_unified=True))
        engine = ServingEngine(session)
        client = Client(engine)
        engine.start(client.events.put, client.events.put)
        many = [client.submit(talk("why? " * 150), ignore_eos=True, max_tokens=200) for _ in range(4)]
        reasons = [client.until("ended", identity)["reason"] for identity in many]
        assert reasons[0] == "length" and "context" in reasons
        assert client.ask()[0] == DEMO_SENTENCE
        assert engine.stop()
