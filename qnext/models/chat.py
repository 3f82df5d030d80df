"""How a model wants to be talked to: its chat template, its sampling defaults, its way of thinking aloud.

All of it is in the GGUF's metadata. Templates are Jinja, written for the `transformers` library, and come
with the file from strangers, so they run in Jinja's sandbox.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from qnext.errors import ModelError
from qnext.models.header import ModelHeader

ChatMessage = Mapping[str, str]
"""`role` (system, user, assistant) and `content`."""

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"

_SAMPLING_KEYS = {
    "temperature": "general.sampling.temp",
    "top_k": "general.sampling.top_k",
    "top_p": "general.sampling.top_p",
    "min_p": "general.sampling.min_p",
}
_TEMPLATE_FAULTS = (
    TypeError,
    ValueError,
    ArithmeticError,
    LookupError,
    AttributeError,
    RecursionError,
    MemoryError,
)
"""What a template's own expressions may raise: it is a program, and not one of ours."""

_LLAMA_DEFAULTS = {"temperature": 0.8, "top_k": 40.0, "top_p": 0.95, "min_p": 0.05}
"""What llama.cpp samples with when neither the file nor the user says otherwise."""


def sampling_defaults(header: ModelHeader) -> dict[str, float]:
    """Sampling settings of the file, llama.cpp's where it has none. Temperature 0 is greedy."""
    found = {}
    for name, key in _SAMPLING_KEYS.items():
        value = header.metadata.get(key)
        given = isinstance(value, int | float) and not isinstance(value, bool)
        found[name] = float(cast(float, value)) if given else _LLAMA_DEFAULTS[name]
    return found


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The model's template. `bos` and `eos` are the texts of those tokens, which some templates write."""

    source: str
    bos: str = ""
    eos: str = ""

    def render(self, messages: list[ChatMessage], **variables: object) -> str:
        """The prompt for these messages, up to where the assistant speaks. Raises ModelError."""
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = _strftime_now
        environment.filters["tojson"] = _to_json
        try:
            return environment.from_string(self.source).render(
                messages=messages,
                bos_token=self.bos,
                eos_token=self.eos,
                add_generation_prompt=True,
                **variables,
            )
        except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
            why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            raise ModelError(
                f"the model's chat template cannot be used: {why}",
                hint="Try --raw to send the prompt as it is, without a template.",
            ) from error


def chat_template(header: ModelHeader, *, bos: str = "", eos: str = "") -> ChatTemplate | None:
    """The file's template, None when it has none."""
    source = header.metadata.get("tokenizer.chat_template")
    return ChatTemplate(source, bos, eos) if isinstance(source, str) and source else None


class ThinkingSplitter:
    """Splits a stream of text into what is thought (between `<think>` and `</think>`) and what is said.

    A tag may arrive in pieces, so up to its length less one is held back. `prompt` tells whether the template
    opened the thinking itself, as the Thinking models' does. Once something was said, tags are text.
    """

    def __init__(self, prompt: str) -> None:
        self._thinking = prompt.rstrip().endswith(THINK_OPEN)
        self._held = ""
        self._spoken = False

    def feed(self, text: str) -> Iterator[tuple[bool, str]]:
        """Yield (thinking, piece) as far as it is certain."""
        self._held += text
        while self._held:
            tag = THINK_CLOSE if self._thinking else THINK_OPEN
            at = -1 if self._spoken else self._held.find(tag)
            keep = 0 if self._spoken else _overlap(self._held, tag)
            certain = self._held[: at if at >= 0 else len(self._held) - keep]
            if not self._thinking and not self._spoken and certain.strip():
                self._spoken = True
                continue
            if certain:
                yield self._thinking, certain
            self._held = self._held[len(certain) :]
            if at < 0:
                return
            self._held = self._held[len(tag) :]
            self._thinking = not self._thinking

    def finish(self) -> Iterator[tuple[bool, str]]:
        """Yield what was held back."""
        if self._held:
            yield self._thinking, self._held
            self._held = ""


def _overlap(text: str, tag: str) -> int:
    """Length of the longest end of `text` that is a beginning of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _raise(message: str) -> None:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    from datetime import datetime

    return datetime.now().astimezone().strftime(layout)


def _to_json(value: Any, **options: Any) -> str:
    """`tojson` without HTML escapes, as transformers has it."""
    import json

    return json.dumps(value, **{"ensure_ascii": False, **options})
