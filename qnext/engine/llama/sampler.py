"""Chooses tokens for one sequence from its logits, by the shortest way to the same result.

llama_sampler_sample copies the whole vocabulary into 12-byte records before it looks at them (a quarter of a
millisecond for 151,936 tokens). The most probable token alone is found in the logits themselves, and where
only the best k count, only those near the best one are copied. A grammar is costly to ask about every token,
so the chosen token is checked first, and only if it is not allowed, all of them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qnext.engine.llama.batch import Tokens
from qnext.engine.llama.binding import llama
from qnext.engine.llama.sampling import Sampling, serving_chain

Logits = NDArray[np.float32]
"""One value per token of the vocabulary."""

_RECORD = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""`llama_token_data` of llama.h."""

_NEAR = 8.0
"""Logits this far below the best one are tried first; where they are too few, all are taken."""


LEAST = -9999.0
"""The log-probability of what cannot be: JSON has no infinity."""


class GrammarError(ValueError):
    """The grammar cannot be read."""


class DeadEnd(Exception):
    """The grammar allows no token any more."""


class Candidates:
    """Room for one record per token, shared by all sequences: only one is sampled at a time."""

    def __init__(self, vocabulary: int) -> None:
        self._ids = np.arange(vocabulary, dtype=np.int32)
        self._records = np.zeros(vocabulary, _RECORD)
        lib = llama()
        self._struct: Any = lib.llama_token_data_array()
        self._pointer = self._records.ctypes.data_as(ctypes.POINTER(lib.llama_token_data))
        self.reference = ctypes.byref(self._struct)

    def _reset(self, count: int) -> None:
        self._struct.data = self._pointer
        self._struct.size, self._struct.selected, self._struct.sorted = count, -1, False

    def take_all(self, logits: Logits) -> None:
        """Every token is a candidate."""
        self._records["id"] = self._ids
        self._records["logit"] = logits
        self._reset(len(logits))

    def take_best(self, logits: Logits, count: int) -> None:
        """At least the `count` most probable tokens are candidates."""
        near = np.flatnonzero(logits > logits.max() - _NEAR)
        if len(near) < count:
            self.take_all(logits)
            return
        self._records["id"][: len(near)] = near
        self._records["logit"][: len(near)] = logits[near]
        self._reset(len(near))

    def take_one(self, token: int) -> None:
        """Only `token` is a candidate."""
        self._records[0] = (token, 0.0, 0.0)
        self._reset(1)

    @property
    def selected(self) -> int:
        """The token that a chain has chosen."""
        return int(self._struct.data[self._struct.selected].id)

    @property
    def any_is_allowed(self) -> bool:
        """Whether any logit is finite."""
        return bool((self._records["logit"][: self._struct.size] > -np.inf).any())

    @property
    def first_is_allowed(self) -> bool:
        """Whether the first candidate's logit is finite."""
        return bool(self._records[0]["logit"] > -np.inf)


class Grammar:
    """A GBNF grammar and how far the text has come in it. Raises GrammarError when `text` cannot be read.

    A token that is not allowed must not be accepted: llama.cpp ends the process then.
    """

    def __init__(self, vocab: Any, text: str, candidates: Candidates) -> None:
        raw = text.encode(errors="replace")
        if not raw.strip() or b"\0" in raw:
            raise GrammarError("the grammar is empty")
        self._candidates = candidates
        self._handle = llama().llama_sampler_init_grammar(vocab, raw, b"root")
        if not self._handle:
            raise GrammarError("llama.cpp cannot read the grammar (GBNF with a rule named root)")

    def allows(self, token: int) -> bool:
        """Whether `token` may come next."""
        self._candidates.take_one(token)
        self.restrict()
        return self._candidates.first_is_allowed

    def restrict(self) -> None:
        """Rule out the candidates that may not come next."""
        llama().llama_sampler_apply(self._handle, self._candidates.reference)

    def accept(self, token: int) -> None:
        """`token`, which is allowed, comes next."""
        llama().llama_sampler_accept(self._handle, token)

    def free(self) -> None:
        """Give the memory back."""
        llama().llama_sampler_free(self._handle)
        self._handle = None


class Sampler:
    """Chooses the tokens of one sequence. `prompt` counts for the penalties. Free it after use.

    With `triggers` the grammar sleeps until one of these tokens is said, which is then its first.
    """

    def __init__(
        self,
        sampling: Sampling,
        candidates: Candidates,
        prompt: Tokens,
        *,
        vocabulary: int,
        grammar: Grammar | None = None,
        triggers: Collection[int] = (),
    ) -> None:
        self._candidates = candidates
        self._grammar = grammar
        self._triggers = frozenset(triggers)
        self._awake = grammar is not None and not self._triggers
        self._plain = sampling.temperature <= 0 and not sampling.penalises and not sampling.logit_bias
        self._best = 0
        if sampling.temperature > 0 and sampling.top_k > 0 and sampling.only_lowers:
            self._best = sampling.top_k + (sampling.repeat_last_n if sampling.penalises else 0)
        self._chain = serving_chain(sampling, vocabulary=vocabulary)
        if sampling.penalises:
            for token in prompt[-sampling.repeat_last_n :].tolist():
                llama().llama_sampler_accept(self._chain, token)

    def choose(self, logits: Logits) -> int:
        """The next token. Raises DeadEnd when the grammar allows none."""
        if self._plain:
            token = int(logits.argmax())
        elif self._best:
            self._candidates.take_best(logits, self._best)
            token = self._apply()
        else:
            self._candidates.take_all(logits)
            token = self._apply()
        if self._grammar is not None:
            token = self._obey(token, logits)
        if not self._plain:
            llama().llama_sampler_accept(self._chain, token)
        return token

    def accept(self, token: int) -> None:
        """`token` is said without having been chosen. A grammar in force that forbids it overlooks it."""
        grammar = self._grammar
        if grammar is not None and (self._awake or token in self._triggers) and grammar.allows(token):
            self._awake = True
            grammar.accept(token)
        if not self._plain:
            llama().llama_sampler_accept(self._chain, token)

    def _apply(self) -> int:
        llama().llama_sampler_apply(self._chain, self._candidates.reference)
        return self._candidates.selected

    def _obey(self, token: int, logits: Logits) -> int:
        grammar = self._grammar
        assert grammar is not None
        if not self._awake:
            if token in self._triggers and grammar.allows(token):
                self._awake = True
                grammar.accept(token)
            return token
        if not grammar.allows(token):
            self._candidates.take_all(logits)
            grammar.restrict()
            if not self._candidates.any_is_allowed:
                raise DeadEnd
            token = self._apply()
            if not grammar.allows(token):
                raise DeadEnd
        grammar.accept(token)
        return token

    def free(self) -> None:
        """Give the memory of chain and grammar back."""
        llama().llama_sampler_free(self._chain)
        if self._grammar is not None:
            self._grammar.free()
        self._chain = self._grammar = None


def log_probabilities(logits: Logits, token: int, top: int) -> tuple[float, list[tuple[int, float]]]:
    """Natural log-probabilities before any sampler: of `token`, and of the `top` most probable tokens."""
    peak = logits.max()
    total = float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))
    best: list[tuple[int, float]] = []
    if top > 0:
        count = min(top, len(logits))
        near = np.argpartition(logits, len(logits) - count)[-count:]
        order = near[np.lexsort((near, -logits[near]))]
        best = [(int(index), max(LEAST, float(logits[index]) - total)) for index in order]
    return max(LEAST, float(logits[token]) - total), best
