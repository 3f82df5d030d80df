"""What passes between the HTTP side of `qnext serve` and what runs the model: jobs in, pieces of answers out.

The HTTP side knows a model only through `Backend`. Nothing in here knows HTTP, and nothing the engine.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from qnext.models.chat import ChatTemplate

State = Literal["loading", "ok", "restarting", "failed"]
EndReason = Literal["eos", "stop", "length", "context", "dropped", "deadline", "error"]


@dataclass(frozen=True, slots=True)
class ThoughtBudget:
    """At most `budget` tokens of thinking, then `closing` is said. No `opening`: the prompt has opened it."""

    budget: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to make, of `text` or of `tokens`.

    `max_tokens` None: up to the end of the slot's context. Before `min_tokens` the model cannot end it, with
    `ignore_eos` never. `sampling` as `qnext.engine.serving` takes it.
    `grammar` is GBNF, in force from the start or, with `grammar_after`, after the first of these tokens;
    `logprobs` how many alternatives to tell of each token, 0 for the token's own.
    `boundaries` are positions in tokens at which the state of the prompt is worth keeping.
    """

    text: str | None = None
    tokens: tuple[int, ...] | None = None
    max_tokens: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: str | None = None
    grammar_after: tuple[int, ...] = ()
    deadline_s: float | None = None
    boundaries: tuple[int, ...] = ()
    cache: bool = True
    thought: ThoughtBudget | None = None


@dataclass(frozen=True, slots=True)
class Begun:
    """A slot has taken the job: from here on it is neither refused nor waiting. Comes before any piece."""

    prompt_tokens: int
    cached_tokens: int
    queued_ns: int


@dataclass(frozen=True, slots=True)
class Piece:
    """A token, and the text that it made certain: maybe none, maybe more than its own.

    `logprob` is its natural logarithm of probability, `top` the likeliest as (token, bytes, logprob).
    """

    text: str
    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, bytes, float], ...] | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """The end of an answer. `generated` counts tokens, the end token included; times in nanoseconds."""

    reason: EndReason
    prompt_tokens: int
    cached_tokens: int
    generated: int
    prefill_ns: int
    decode_ns: int
    queued_ns: int
    stop_text: str | None = None
    message: str | None = None


class Refused(Exception):
    """A job that the engine does not begin. `kind`: context_full, empty, grammar, bad; `numbers` explain."""

    def __init__(self, kind: str, message: str, numbers: Mapping[str, int] | None = None) -> None:
        super().__init__(message)
        self.kind, self.message, self.numbers = kind, message, dict(numbers or {})


class Unavailable(Exception):
    """No model answers now: it loads, starts again, or has failed for good (`retry_after_s` None)."""

    def __init__(self, why: str, retry_after_s: float | None) -> None:
        super().__init__(why)
        self.why, self.retry_after_s = why, retry_after_s


@dataclass(frozen=True, slots=True)
class Status:
    """How the model stands. `progress` is the share loaded, 0 to 1; `why` explains what is not `ok`."""

    state: State
    progress: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The model behind a server. `created` in seconds of Unix time; `context` tokens per slot.

    `plan` is the JSON of the active plan, `words` the same in a few sentences, `engine` the build in words.
    """

    name: str
    created: int
    context: int
    slots: int
    vocabulary: int
    bos: str
    eos: str
    template: ChatTemplate | None
    sampling: Mapping[str, float]
    plan: Mapping[str, Any]
    words: tuple[str, ...]
    engine: str


class Backend(Protocol):
    """What runs a model. Every method but the properties belongs to the event loop's thread."""

    @property
    def status(self) -> Status:
        """How it stands now."""

    @property
    def model(self) -> ServedModel | None:
        """What is served; None until it is known."""

    def generate(self, job: Job) -> AsyncGenerator[Begun | Piece | Ended, None]:
        """That it has begun, the pieces of the answer, its end; closing it early frees the slot.

        Raises Refused or Unavailable before it begins, Unavailable when the engine dies in between.
        """

    async def tokenize(self, text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        """Token ids of `text`. Raises Unavailable."""

    async def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`. Raises Unavailable."""

    async def state(self) -> Mapping[str, Any]:
        """Slots, queue, prompt cache and totals as the engine tells them (`qnext.engine.serving`)."""
