"""What a request to the serving loop may say, checked before anything native sees it.

A bad request must never end the loop that serves the others, and some bad values end the process: a token id
outside the vocabulary, half a number. So everything is checked here, and refused with words and numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from qnext.engine.llama.batch import Tokens
from qnext.engine.llama.binding import EngineFailure
from qnext.engine.llama.sampling import Sampling, read_sampling
from qnext.engine.llama.thought import ThoughtBudget
from qnext.engine.llama.vocabulary import Vocabulary
from qnext.engine.protocol import Message

MAX_LOGPROBS = 100
MAX_STOPS = 64


class Refused(Exception):
    """A request that is not taken. `kind` is for programs, `numbers` go into the answer."""

    def __init__(self, kind: str, message: str, **numbers: int) -> None:
        super().__init__(message)
        self.kind = kind
        self.numbers = numbers


@dataclass(frozen=True, slots=True)
class Submission:
    """One text to be continued. `boundaries` are positions in `tokens` where messages end, rising.

    It does not end by itself before `min_tokens`, or with `ignore_eos` at all, unless a grammar ends it.
    """

    id: int
    tokens: Tokens
    max_tokens: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    min_tokens: int
    logprobs: int | None
    grammar: str | None
    grammar_triggers: tuple[int, ...]
    deadline_s: float | None
    boundaries: tuple[int, ...]
    cache: bool
    thought: ThoughtBudget | None


_FIELDS = frozenset({"op", *Submission.__dataclass_fields__, "text", "grammar_lazy"} - {"grammar_triggers"})


def read_submission(message: Message, vocabulary: Vocabulary, limit: int) -> Submission:
    """The submission in `message` for sequences of at most `limit` tokens. Raises Refused."""
    if unknown := sorted(set(message) - _FIELDS):
        raise Refused("invalid", f"there is no option '{unknown[0]}'")
    identity = message.get("id")
    if isinstance(identity, bool) or not isinstance(identity, int):
        raise Refused("invalid", "id has to be a whole number")
    tokens = _read_prompt(message, vocabulary)
    if not len(tokens):
        raise Refused("empty", "the prompt is empty")
    if len(tokens) > limit:
        raise Refused(
            "context_full",
            f"the prompt is {len(tokens)} tokens long, the context {limit}",
            prompt_tokens=len(tokens),
            context=limit,
        )
    sampling = message.get("sampling")
    if sampling is not None and not isinstance(sampling, dict):
        raise Refused("invalid", "sampling has to be an object")
    try:
        chosen = read_sampling(sampling or {}, vocabulary=vocabulary.size, context=limit)
    except ValueError as error:
        raise Refused("invalid", str(error)) from error
    grammar = message.get("grammar")
    if grammar is not None and not isinstance(grammar, str):
        raise Refused("invalid", "grammar has to be text")
    triggers = _whole_numbers(message, "grammar_lazy", vocabulary.size - 1)
    if triggers and grammar is None:
        raise Refused("invalid", "grammar_lazy needs a grammar")
    boundaries = (
        message_starts(tokens, vocabulary)
        if message.get("boundaries") is None
        else _whole_numbers(message, "boundaries", len(tokens))
    )
    return Submission(
        id=identity,
        tokens=tokens,
        max_tokens=_whole_number(message, "max_tokens", 1, 2**31 - 1),
        sampling=chosen,
        stop=_read_stops(message),
        ignore_eos=_truth(message, "ignore_eos", False),
        min_tokens=_whole_number(message, "min_tokens", 0, 2**31 - 1) or 0,
        logprobs=_whole_number(message, "logprobs", 0, MAX_LOGPROBS),
        grammar=grammar,
        grammar_triggers=triggers,
        deadline_s=_read_deadline(message),
        boundaries=tuple(sorted(set(boundaries))),
        cache=_truth(message, "cache", True),
        thought=_read_thought(message, vocabulary),
    )


def message_starts(tokens: Tokens, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Positions where chat messages end and the next begins, where that can be seen in the tokens.

    Templates open every message with the same control token (`<|im_start|>`); a prompt that begins with one
    is taken for a chat, a beginning-of-sequence token does not count.
    """
    first = 1 if int(tokens[0]) == vocabulary.bos and len(tokens) > 1 else 0
    opening = int(tokens[first])
    if not vocabulary.is_control(opening):
        return ()
    return tuple(int(position) for position in np.flatnonzero(tokens == opening) if position > first)


def _read_prompt(message: Message, vocabulary: Vocabulary) -> Tokens:
    tokens, text = message.get("tokens"), message.get("text")
    if (tokens is None) == (text is None):
        raise Refused("invalid", "either tokens or text has to be given")
    if text is not None:
        if not isinstance(text, str):
            raise Refused("invalid", "text has to be text")
        try:
            found = vocabulary.tokenize(text, special=True, add_bos=vocabulary.adds_bos_to(text))
        except EngineFailure as error:
            raise Refused(error.kind, str(error)) from error
        return np.array(found, np.int32)
    return checked_tokens(tokens, vocabulary)


def checked_tokens(tokens: object, vocabulary: Vocabulary) -> Tokens:
    """Token ids of the vocabulary from JSON. Raises Refused."""
    if not isinstance(tokens, list) or any(type(token) is not int for token in tokens):
        raise Refused("invalid", "tokens has to be a list of whole numbers")
    wrong = next((token for token in tokens if not 0 <= token < vocabulary.size), None)
    if wrong is not None:
        raise Refused("invalid", f"there is no token {wrong}: the vocabulary has {vocabulary.size} tokens")
    return np.array(tokens, np.int32)


def _read_stops(message: Message) -> tuple[str, ...]:
    stops: Any = message.get("stop")
    if stops is None:
        return ()
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refused("invalid", "stop has to be a list of texts")
    if len(stops) > MAX_STOPS:
        raise Refused("invalid", f"stop has {len(stops)} texts, more than {MAX_STOPS}")
    return tuple(stop for stop in stops if stop)


def _read_thought(message: Message, vocabulary: Vocabulary) -> ThoughtBudget | None:
    thought = message.get("thought")
    if thought is None:
        return None
    if not isinstance(thought, dict) or set(thought) != {"budget", "opening", "closing"}:
        raise Refused("invalid", "thought has to have budget, opening and closing")
    budget = _whole_number(thought, "budget", 0, 2**31 - 1)
    closing = _whole_numbers(thought, "closing", vocabulary.size - 1)
    if budget is None or not closing:
        raise Refused("invalid", "thought needs a budget and tokens that close it")
    return ThoughtBudget(budget, _whole_numbers(thought, "opening", vocabulary.size - 1), closing)


def _read_deadline(message: Message) -> float | None:
    value = message.get("deadline_s")
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise Refused("invalid", "deadline_s has to be a number of seconds")
    return float(value)


def _truth(message: Message, name: str, default: bool) -> bool:
    value = message.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Refused("invalid", f"{name} has to be true or false")
    return value


def _whole_number(message: Message, name: str, low: int, high: int) -> int | None:
    value = message.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused("invalid", f"{name} has to be a whole number from {low} to {high}")
    return value


def _whole_numbers(message: Message, name: str, high: int) -> tuple[int, ...]:
    values: Any = message.get(name)
    if values is None:
        return ()
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise Refused("invalid", f"{name} has to be a list of whole numbers")
    if any(not 0 <= value <= high for value in values):
        raise Refused("invalid", f"{name} has to hold numbers from 0 to {high}")
    return tuple(values)
