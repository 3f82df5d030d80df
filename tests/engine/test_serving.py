"""Many texts at once on one engine: the answers are those of each alone, and nothing waits for nobody."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from qnext.engine.session import EngineSession
from qnext.errors import EngineError
from qnext.models.synth import DEMO_SENTENCE
from tests.serving_client import CPU, QUESTION, SLOTS, Client, talk

pytestmark = pytest.mark.engine


def test_greedy_text_is_the_same_alone_in_company_and_from_generate(
    session: EngineSession, demo_model: Path
) -> None:
    generated = "".join(
        str(event["text"])
        for event in session.generate(QUESTION, max_tokens=60, sampling={})
        if event["event"] == "token"
    )
    assert generated == DEMO_SENTENCE
    client = Client(session)
    alone, ended = client.ask()
    assert alone == generated and ended["reason"] == "eos"
    many = [
        client.submit(f"<|im_start|>user\nQuestion {n}<|im_end|>\n<|im_start|>assistant\n") for n in range(20)
    ]
    for identity in many:
        text, ended = client.finish(identity)
        assert text == generated and ended["reason"] == "eos"
    assert client.engine.stop()
    assert session.tokenize("a"), "the session is free again"


def test_thinking_is_closed_when_its_budget_is_spent(client: Client) -> None:
    plain, _ = client.ask()
    closing = client.tokens("</think>")
    thought = {"budget": 5, "opening": [], "closing": closing}
    text, ended = client.ask(thought=thought, max_tokens=5 + len(closing) + 3)
    before, _, after = text.partition("</think>")
    assert before and plain.startswith(before) and after
    assert ended["generated"] == 5 + len(closing) + 3
    other, _ = client.ask(thought={**thought, "opening": closing})
    assert other == plain, "thinking that was never opened has no end"


def test_an_answer_does_not_end_before_min_tokens_unless_a_grammar_ends_it(client: Client) -> None:
    plain, ended = client.ask()
    assert ended["reason"] == "eos"
    length = ended["generated"]
    text, ended = client.ask(min_tokens=length + 5, max_tokens=length + 20)
    assert ended["generated"] >= length + 5 and text.startswith(plain) and len(text) > len(plain)
    text, ended = client.ask(min_tokens=50, grammar='root ::= "yes"')
    assert (text, ended["reason"]) == ("yes", "eos")


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


def test_a_request_waits_for_a_slot_and_a_dropped_one_frees_its_own_within_a_step(
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
    whole = "naïve 日本 😀"
    ids = client.tokens(whole)
    client.engine.detokenize(1001, ids)
    assert client.until("text", 1001)["text"] == whole
    bytes_of_one = client.tokens("😀")
    assert len(bytes_of_one) > 1, "the demo spells it byte by byte"
    identity = client.submit(max_tokens=2 * len(bytes_of_one), ignore_eos=True, grammar='root ::= "😀" root')
    text, _ = client.finish(identity)
    assert text == "😀😀"
    shown = [entry[1] for entry in client.steps(identity)]
    assert set(shown) == {"", "😀"}


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
    client = Client(session)
    identity = client.submit(ignore_eos=True)
    client.until("step")
    assert client.engine.stop()
    assert client.until("ended", identity)["reason"] == "dropped"
    assert client.engine.totals is not None
    assert client.events.empty()
    with pytest.raises(EngineError, match="stopped"):
        client.submit()
    assert session.tokenize("a"), "the session is free again"


def test_a_killed_child_is_told_once_and_explained(demo_model: Path) -> None:
    with EngineSession() as session:
        session.open(str(demo_model), CPU)
        client = Client(session)
        client.submit(ignore_eos=True)
        client.until("step")
        os.kill(session.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match=r"killed from outside .* while serving"):
            client.until("nothing")
        with pytest.raises(EngineError, match="killed"):
            client.submit()


def test_silence_counts_only_while_something_is_asked(demo_model: Path) -> None:
    with EngineSession(silence_limit_s=0.5) as session:
        session.open(str(demo_model), CPU)
        client = Client(session)
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
        client = Client(session)
        many = [client.submit(talk("why? " * 150), ignore_eos=True, max_tokens=200) for _ in range(4)]
        reasons = [client.until("ended", identity)["reason"] for identity in many]
        assert reasons[0] == "length" and "context" in reasons
        assert client.ask()[0] == DEMO_SENTENCE
        assert client.engine.stop()
