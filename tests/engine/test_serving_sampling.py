"""How tokens are chosen in the serving loop: seeds, biases, penalties, grammars; and what is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from qnext.models.synth import DEMO_SENTENCE
from tests.serving_client import GREEDY, Client, talk

pytestmark = pytest.mark.engine

WILD = {"temperature": 50.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}


def test_a_seed_repeats_its_text_and_another_seed_says_something_else(client: Client) -> None:
    def text(**sampling: object) -> str:
        return client.ask(max_tokens=20, ignore_eos=True, sampling={**WILD, **sampling})[0]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text(seed=1, top_k=5, temperature=5.0) == text(seed=1, top_k=5, temperature=5.0)


def test_a_bias_forbids_and_forces_tokens(client: Client) -> None:
    (hello,) = client.tokens("Hello")
    text, _ = client.ask(max_tokens=1, sampling={"temperature": 0, "logit_bias": {str(hello): -100}})
    assert text != "Hello"
    text, _ = client.ask(max_tokens=4, sampling={"temperature": 0, "logit_bias": {str(hello): 100}})
    assert text == "Hello" * 4


def test_penalties_count_what_was_said_and_the_prompt(client: Client) -> None:
    sampling = {"temperature": 0, "presence_penalty": 100.0}
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
        assert top[0][0] == token and top[0][2] == own <= 0
        assert len(top) == 3 and top[0][2] >= top[1][2] >= top[2][2]
        assert piece.encode("latin-1").decode() == text
    identity = client.submit(max_tokens=1, logprobs=0)
    client.finish(identity)
    assert client.steps(identity)[0][4] == []


_SHORT_WAY = """
import json
import numpy as np
from qnext.engine.llama.sampler import Candidates, Sampler
from qnext.engine.llama.sampling import read_sampling
size = 5000
candidates = Candidates(size)
prompt = np.arange(100, dtype=np.int32)
for options in ({}, {"top_k": 5}, {"presence_penalty": 2, "frequency_penalty": 1}, {"repeat_penalty": 1.3}):
    sampling = read_sampling({**options, "seed": 4, "temperature": 1.5}, vocabulary=size, context=2048)
    short = Sampler(sampling, candidates, prompt, vocabulary=size)
    long = Sampler(sampling, candidates, prompt, vocabulary=size)
    assert short._best
    long._best = 0
    rng = np.random.default_rng(1)
    for spread in (0.01, 1.0, 3.0, 10.0) * 10:
        logits = rng.normal(0, spread, size).astype(np.float32)
        logits[:100] += spread
        assert short.choose(logits) == long.choose(logits), (options, spread)
"""


def test_the_short_way_to_a_token_draws_what_the_long_way_draws() -> None:
    result = subprocess.run([sys.executable, "-c", _SHORT_WAY], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


# --- grammar --------------------------------------------------------------------------------------------


def test_a_grammar_restricts_the_text_greedy_and_drawn(client: Client) -> None:
    grammar = 'root ::= "yes" | "no" ("!" "?"){2}'
    for sampling in (GREEDY, {**WILD, "seed": 7}, {"seed": 3, "presence_penalty": 1.0}):
        text, ended = client.ask(grammar=grammar, sampling=sampling)
        assert text in ("yes", "no!?!?") and ended["reason"] == "eos"


def test_a_grammar_wakes_with_its_trigger(client: Client) -> None:
    (hello,) = client.tokens("Hello")
    text, ended = client.ask(grammar='root ::= "Hello" " you"', grammar_lazy=[hello])
    assert text == "Hello you" and ended["reason"] == "eos"
    never = client.tokens("zzz")[0]
    assert client.ask(grammar='root ::= "x"', grammar_lazy=[never])[0] == DEMO_SENTENCE


def test_a_grammar_ends_an_answer_even_when_the_end_is_ignored(client: Client) -> None:
    text, ended = client.ask(grammar='root ::= "yes"', ignore_eos=True, max_tokens=8)
    assert (text, ended["reason"]) == ("yes", "eos")
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
