"""Prompts that share their beginning with what was evaluated before: only what is new costs time."""

from __future__ import annotations

import pytest

from qnext.engine.session import EngineSession
from qnext.models.synth import DEMO_SENTENCE
from tests.serving_client import SLOTS, Client, talk

pytestmark = pytest.mark.engine

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
    budget = 3 << 20
    client = Client(session, cache_bytes=budget)
    for n in range(2 * SLOTS):
        client.finish(client.submit(talk(f"Number {n}. " * 60), max_tokens=2))
    cache = client.state()["cache"]
    assert 0 < cache["bytes"] <= budget
    assert client.engine.stop()


def test_a_prompt_that_is_not_to_be_cached_is_evaluated_whole(client: Client) -> None:
    client.ask(talk(LONG))
    _, again = client.ask(talk(LONG), cache=False)
    assert again["cached_tokens"] == 0
