"""Prompts that share their beginning with what was evaluated before: only what is new costs time."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from qnext.engine.session import EngineSession
from qnext.models.synth import DEMO_SENTENCE
from tests.serving_client import CPU, SLOTS, Client, talk

pytestmark = pytest.mark.engine

LONG = "What can you do for me? " * 45
SYSTEM = "<|im_start|>system\n" + "You can do what I ask for. " * 30 + "<|im_end|>\n"


def test_the_second_turn_evaluates_only_what_is_new(client: Client) -> None:
    answer, first = client.ask(talk(LONG))
    assert answer == DEMO_SENTENCE and first["cached_tokens"] == 0
    assert int(str(first["prompt_tokens"])) > 256
    answer, second = client.ask(talk(LONG, answer, "And what else?"))
    assert answer == DEMO_SENTENCE
    assert second["cached_tokens"] == first["prompt_tokens"] + first["generated"] - 1


def test_a_turn_whose_last_answer_has_changed_goes_back_to_the_end_of_the_question(client: Client) -> None:
    _, first = client.ask(talk(LONG))
    answer, second = client.ask(talk(LONG, "Something else.", "And what else?"))
    assert answer == DEMO_SENTENCE
    opening = first["prompt_tokens"] - second["cached_tokens"]
    assert 0 < opening < 8, "all but the words that open the answer"


def test_boundaries_say_where_to_come_back_to(client: Client) -> None:
    tokens = client.tokens(LONG)
    assert len(tokens) > 290
    client.ask(None, tokens=tokens, boundaries=[270], max_tokens=1)
    _, again = client.ask(None, tokens=[*tokens[:280], *tokens[:5]], max_tokens=1)
    assert again["cached_tokens"] == 270


@pytest.mark.thorough
def test_a_conversation_comes_back_after_others_have_taken_its_slot(client: Client) -> None:
    answer, first = client.ask(talk(LONG))
    others = [client.submit(talk(f"Number {n}. " * 40), max_tokens=2) for n in range(SLOTS + 2)]
    for other in others:
        client.finish(other)
    answer, second = client.ask(talk(LONG, answer, "And what else?"))
    assert answer == DEMO_SENTENCE
    assert second["cached_tokens"] == first["prompt_tokens"] + first["generated"] - 1
    state = client.state()
    assert 0 < state["cache"]["bytes"] <= state["cache"]["budget_bytes"]
    assert state["cache"]["entries"] > SLOTS


@pytest.mark.parametrize("together", [False, True])
def test_texts_under_way_share_what_their_prompts_have_in_common(client: Client, together: bool) -> None:
    first = client.submit(SYSTEM + talk("One"), ignore_eos=True, max_tokens=100)
    if not together:
        client.until("step")
    many = [client.submit(SYSTEM + talk(word)) for word in ("Two", "Three")]
    system = len(client.tokens(SYSTEM))
    for identity in many:
        text, ended = client.finish(identity)
        assert text == DEMO_SENTENCE
        assert system - 64 < ended["cached_tokens"] <= system
    assert client.until("begun", first)["cached_tokens"] == 0
    assert "".join(entry[1] for entry in client.steps(first)).startswith(DEMO_SENTENCE)
    client.finish(first)


def test_without_room_for_copies_nothing_is_kept_but_what_the_slots_hold(session: EngineSession) -> None:
    client = Client(session, cache_bytes=0)
    client.ask(talk(LONG))
    _, other = client.ask(talk(LONG, "Something else.", "And what else?"), max_tokens=1)
    assert other["cached_tokens"] == 0
    assert client.state()["cache"] == {"bytes": 0, "budget_bytes": 0, "entries": 0}
    assert client.engine.stop()


@pytest.mark.thorough
def test_copies_stay_within_their_budget(session: EngineSession) -> None:
    budget = 3 << 20
    client = Client(session, cache_bytes=budget)
    for n in range(SLOTS + 2):
        client.finish(client.submit(talk(f"Number {n}. " * 40), max_tokens=2))
    cache = client.state()["cache"]
    assert 0 < cache["bytes"] <= budget
    assert client.engine.stop()


def test_a_prompt_that_is_not_to_be_cached_is_evaluated_whole(client: Client) -> None:
    client.ask(talk(LONG), max_tokens=1)
    _, again = client.ask(talk(LONG), max_tokens=1, cache=False)
    assert again["cached_tokens"] == 0


_LOGPROBS = """
import json, queue, sys
from qnext.engine.llama.runtime import Runtime
model, placement, rounds = json.loads(sys.argv[1])
inbox, heard = queue.Queue(), {}
def stream(event, **fields):
    for entry in fields.get("out", ()):
        heard.setdefault(entry[0], [0, []])[1].append(entry[3:5])
    if event == "ended":
        heard.setdefault(fields["id"], [0, []])[0] = fields["cached_tokens"]
        waiting.discard(fields["id"])
        if not waiting:
            feed()
def feed():
    messages = rounds.pop(0) if rounds else [{"op": "stop"}]
    waiting.update(message["id"] for message in messages if "id" in message)
    for message in messages:
        inbox.put(message)
waiting = set()
runtime = Runtime(stream, inbox)
runtime.open(model, placement)
feed()
runtime.serve(cache_bytes=64 << 20)
print(json.dumps(heard))
"""


def request(identity: int, text: str, **options: object) -> dict[str, object]:
    sampling = {"temperature": 0}
    return {
        "op": "submit",
        "id": identity,
        "text": text,
        "max_tokens": 3,
        "ignore_eos": True,
        "sampling": sampling,
        "logprobs": 20,
        **options,
    }


@pytest.mark.thorough
@pytest.mark.parametrize("unified", [False, True])
def test_whatever_was_reused_the_probabilities_are_those_of_starting_afresh(
    demo_model: Path, unified: bool
) -> None:
    """The demo's words hardly depend on its state, so the numbers behind them are compared.

    They are the very same where the pieces are, in which a prompt is evaluated: boundaries part it.
    """
    system = 336
    text = SYSTEM + talk("One " * 90)
    changed = SYSTEM + talk("One " * 90, "Else.", "Two")
    parts = {"boundaries": [system, 450]}
    others = [request(n, SYSTEM + talk(f"Number {n} " * 40)) for n in range(10, 22)]
    rounds = [
        [request(1, text, **parts)],
        [request(2, text, **parts)],  # back to the last boundary
        [request(3, changed, **parts)],  # back to it, then on
        others,  # all share the system's words; two more than there are slots
        [request(4, text, **parts)],  # from a copy of the whole
        [request(5, text, **parts), request(6, changed, **parts)],
        [request(9, SYSTEM + talk("Another " * 30), **parts)],
    ]
    heard = {}
    for asked in (rounds, [[request(7, changed, **parts)]]):
        heard |= serve(demo_model, asked, unified=unified)
    cached = {identity: value[0] for identity, value in heard.items()}
    assert cached[1] == cached[7] == 0
    assert cached[2] == cached[3] == cached[4] == 450
    assert all(cached[identity] == system for identity in (9, *range(10, 22)))
    assert heard[2][1] == heard[1][1] == heard[4][1]
    assert heard[3][1] == heard[7][1] != heard[1][1]
    assert heard[9][1] != heard[1][1]


def serve(model: Path, rounds: list[list[dict[str, object]]], *, unified: bool) -> dict[int, list]:
    """What a child of its own says to requests that come in rounds: cached tokens and log-probabilities."""
    placement = asdict(replace(CPU, ubatch=512, kv_unified=unified))
    result = subprocess.run(
        [sys.executable, "-c", _LOGPROBS, json.dumps([str(model), placement, rounds])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return {int(key): value for key, value in json.loads(result.stdout).items()}
