"""How the next token is chosen: llama.cpp's samplers in llama.cpp's order, and what may be asked of them.

Values are checked here because llama.cpp takes what it gets: a repeat penalty of 0 divides by it, a token id
outside the vocabulary reads past an array.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qnext.engine.llama.binding import llama

RANDOM_SEED = 0xFFFFFFFF
"""LLAMA_DEFAULT_SEED: another one each time."""

MAX_BIAS = 10_000.0
"""A bias stays finite: a grammar that allows one token must win against a bias on it."""


def sampler_chain(sampling: dict[str, float]) -> Any:
    """Sampler chain in llama.cpp's order; temperature 0 is greedy."""
    lib = llama()
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    add = lib.llama_sampler_chain_add
    temperature = float(sampling.get("temperature", 0.0))
    if temperature <= 0:
        add(chain, lib.llama_sampler_init_greedy())
        return chain
    add(chain, lib.llama_sampler_init_top_k(int(sampling.get("top_k", 40))))
    add(chain, lib.llama_sampler_init_top_p(float(sampling.get("top_p", 0.95)), 1))
    add(chain, lib.llama_sampler_init_min_p(float(sampling.get("min_p", 0.0)), 1))
    add(chain, lib.llama_sampler_init_temp(temperature))
    add(chain, lib.llama_sampler_init_dist(int(sampling.get("seed", RANDOM_SEED))))
    return chain


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request may set; the defaults are llama-server's (`common_params_sampling` of common.h)."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = RANDOM_SEED
    logit_bias: tuple[tuple[int, float], ...] = ()

    @property
    def penalises(self) -> bool:
        """Whether tokens said before count."""
        return self.repeat_last_n > 0 and (
            self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repeat_penalty != 1
        )

    @property
    def only_lowers(self) -> bool:
        """Whether no logit can rise before the best are taken: penalties only lower, and there is no bias."""
        return not self.logit_bias and (
            not self.penalises
            or (self.presence_penalty >= 0 and self.frequency_penalty >= 0 and self.repeat_penalty >= 1)
        )


_RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0.0, 1e6),
    "top_k": (int, -1, 2**31 - 1),
    "top_p": (float, 0.0, 1.0),
    "min_p": (float, 0.0, 1.0),
    "presence_penalty": (float, -100.0, 100.0),
    "frequency_penalty": (float, -100.0, 100.0),
    "repeat_penalty": (float, 0.01, 100.0),
    "repeat_last_n": (int, -1, 2**31 - 1),
    "seed": (int, -1, 2**32 - 1),
}


def read_sampling(fields: Mapping[str, object], *, vocabulary: int, context: int) -> Sampling:
    """A Sampling from JSON. None stands for the default; -1 as `repeat_last_n` for the whole `context`.

    Raises ValueError that says what is wrong, unknown names included.
    """
    values: dict[str, Any] = {}
    for name, value in fields.items():
        if value is None:
            continue
        if name == "logit_bias":
            values[name] = _read_bias(value, vocabulary)
            continue
        if name not in _RANGES:
            raise ValueError(f"there is no sampling option '{name}'")
        values[name] = _read_number(name, value)
    if values.get("repeat_last_n") == -1:
        values["repeat_last_n"] = context
    values["repeat_last_n"] = min(values.get("repeat_last_n", Sampling().repeat_last_n), context)
    if values.get("seed") == -1:
        values["seed"] = RANDOM_SEED
    return Sampling(**values)


def _read_number(name: str, value: object) -> float | int:
    kind, low, high = _RANGES[name]
    whole = isinstance(value, float) and value.is_integer()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} has to be a number")
    if kind is int and not (isinstance(value, int) or whole):
        raise ValueError(f"{name} has to be a whole number")
    if not low <= value <= high:
        raise ValueError(f"{name} has to be between {low:g} and {high:g}")
    return int(value) if kind is int else float(value)


def _read_bias(value: object, vocabulary: int) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise ValueError("logit_bias has to map token ids to numbers")
    pairs = []
    for key, bias in value.items():
        if not (isinstance(key, str) and key.isascii() and key.isdigit() and int(key) < vocabulary):
            raise ValueError(f"logit_bias has no token '{key}': the vocabulary has {vocabulary} tokens")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or math.isnan(bias):
            raise ValueError("logit_bias has to map token ids to numbers")
        pairs.append((int(key), max(-MAX_BIAS, min(MAX_BIAS, float(bias)))))
    return tuple(pairs)


def serving_chain(sampling: Sampling, *, vocabulary: int) -> Any:
    """The chain for `sampling`: bias, penalties, top-k, top-p, min-p, temperature, then the draw.

    The same order as llama-server's default; at temperature 0 the most probable token after penalties.
    """
    lib = llama()
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    add = lib.llama_sampler_chain_add
    if sampling.logit_bias:
        array = (lib.llama_logit_bias * len(sampling.logit_bias))(*sampling.logit_bias)
        add(chain, lib.llama_sampler_init_logit_bias(vocabulary, len(array), array))
    if sampling.penalises:
        add(
            chain,
            lib.llama_sampler_init_penalties(
                vocabulary,
                sampling.repeat_last_n,
                sampling.repeat_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            ),
        )
    if sampling.temperature <= 0:
        add(chain, lib.llama_sampler_init_greedy())
        return chain
    if sampling.top_k > 0:
        add(chain, lib.llama_sampler_init_top_k(sampling.top_k))
    if sampling.top_p < 1:
        add(chain, lib.llama_sampler_init_top_p(sampling.top_p, 1))
    if sampling.min_p > 0:
        add(chain, lib.llama_sampler_init_min_p(sampling.min_p, 1))
    add(chain, lib.llama_sampler_init_temp(sampling.temperature))
    add(chain, lib.llama_sampler_init_dist(sampling.seed))
    return chain
