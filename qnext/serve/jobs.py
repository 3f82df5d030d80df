"""From the fields of a request to what the engine is asked: limits, sampling, stop strings."""

from __future__ import annotations

from typing import Any

from qnext.pipeline.serve_values import Job, ServedModel
from qnext.serve.conversation import Prompt
from qnext.serve.errors import ApiError
from qnext.serve.generating import Server
from qnext.serve.schemas import SamplingFields

_SEEDS = 2**32
_PLAIN = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "repeat_last_n",
)


def make_job(
    server: Server,
    model: ServedModel,
    asked: SamplingFields,
    choice: int = 0,
    *,
    prompt: Prompt,
    limit: int | None = None,
    logprobs: int | None = None,
) -> Job:
    """The job of one choice. Raises ApiError."""
    return Job(
        text=prompt.text if prompt.ids is None else None,
        tokens=None if prompt.ids is None else tuple(prompt.ids),
        max_tokens=limit,
        sampling=read_sampling(asked, model, choice),
        stop=(*read_stops(asked), *prompt.stop),
        ignore_eos=bool(asked.ignore_eos),
        min_tokens=asked.min_tokens or 0,
        logprobs=logprobs,
        grammar=prompt.grammar,
        grammar_after=prompt.grammar_after,
        deadline_s=server.settings.deadline_s,
        cache=asked.cache_prompt is not False,
        thought=prompt.thought,
    )


def read_sampling(asked: SamplingFields, model: ServedModel, choice: int) -> dict[str, Any]:
    """Sampling of the engine for this choice: what is asked over the model's defaults. Raises ApiError.

    A seed counts up by choice: `n` answers from one seed would be one answer `n` times.
    """
    sampling: dict[str, Any] = dict(model.sampling)
    for name in _PLAIN:
        value = getattr(asked, name)
        if value is not None:
            sampling[name] = value
    if asked.repeat_penalty is None and asked.repetition_penalty is not None:
        sampling["repeat_penalty"] = asked.repetition_penalty
    if asked.seed is not None and asked.seed != -1:
        sampling["seed"] = (asked.seed + choice) % _SEEDS
    if asked.logit_bias:
        sampling["logit_bias"] = _read_bias(asked.logit_bias, model.vocabulary)
    return sampling


def read_limit(*fields: tuple[str, int | None]) -> int | None:
    """The first limit of tokens that is given; -1 is none. Raises ApiError for 0."""
    for name, value in fields:
        if value is not None:
            if value == 0:
                raise ApiError(400, f"{name}: has to be at least 1, or -1 for no limit", param=name)
            return None if value < 0 else value
    return None


def read_stops(asked: SamplingFields) -> tuple[str, ...]:
    """Stop strings, without repeats and, as clients send them, empty ones."""
    given = [asked.stop] if isinstance(asked.stop, str) else asked.stop or ()
    return tuple(dict.fromkeys(stop for stop in given if stop))


def _read_bias(asked: dict[str, float], vocabulary: int) -> dict[str, float]:
    for token in asked:
        if not (token.isascii() and token.isdigit() and len(token) < 11 and int(token) < vocabulary):
            raise ApiError(
                400,
                f"logit_bias: keys are token ids from 0 to {vocabulary - 1}, written as text",
                param="logit_bias",
                code="invalid_value",
            )
    return asked
