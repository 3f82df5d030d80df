"""How a model wants to be talked to: its chat template, its sampling defaults, its way of thinking aloud.

All of it is in the GGUF's metadata. Templates are Jinja, written for the `transformers` library, and come
with the file from strangers, so they run in Jinja's sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast

from qnext.errors import ModelError
from qnext.models.header import ModelHeader
from qnext.models.messages import template_messages
from qnext.models.tool_calls import Tool

if TYPE_CHECKING:
    import jinja2

ChatMessage = Mapping[str, Any]
"""A message in OpenAI's form: `role` (system, user, assistant, tool), `content` (a text or parts of type
`text`), and for an assistant's `reasoning_content` and `tool_calls`."""

MOST_RENDERED = 16 << 20
"""Characters of a prompt: more than any context holds, and less than would fill the memory."""

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

    def render(
        self,
        messages: Sequence[ChatMessage],
        /,
        *,
        tools: Sequence[Tool] | None = None,
        enable_thinking: bool | None = None,
        **variables: object,
    ) -> str:
        """The prompt for these messages, up to where the assistant speaks. Raises ModelError.

        `variables` are the template's own (clients' `chat_template_kwargs`); unknown ones have no effect.
        """
        given: dict[str, object] = {"add_generation_prompt": True, **variables}
        if enable_thinking is not None:
            given["enable_thinking"] = enable_thinking
        given |= {
            "messages": template_messages(messages, self.source),
            "tools": list(tools) if tools else None,
            "bos_token": self.bos,
            "eos_token": self.eos,
        }
        with _explained():
            pieces, length = [], 0
            for piece in _compiled(self.source)[0].generate(given):
                pieces.append(piece)
                length += len(piece)
                if length > MOST_RENDERED:
                    raise ValueError(f"it writes more than {MOST_RENDERED:,} characters")
            return "".join(pieces)

    @property
    def variables(self) -> frozenset[str]:
        """Names that the template takes from outside. Raises ModelError when it is no template."""
        with _explained():
            return _compiled(self.source)[1]

    @property
    def takes_tools(self) -> bool:
        """Whether the template shows tools to the model."""
        return "tools" in self.variables

    @property
    def takes_thinking_switch(self) -> bool:
        """Whether `enable_thinking` means something to the template."""
        return "enable_thinking" in self.variables

    def message_boundaries(self, rendered: str) -> list[int]:
        """Character offsets behind the end of each message in a rendered prompt, in order.

        Prompts of one conversation mostly agree up to one of these, so they are worth a state checkpoint. A
        message that quotes the marker adds offsets that are merely of no use. Empty when the template
        marks no ends.
        """
        marker = _end_marker(self)
        return [found.end() for found in re.finditer(re.escape(marker), rendered)] if marker else []


@lru_cache(maxsize=8)
def _compiled(source: str) -> tuple[jinja2.Template, frozenset[str]]:
    """The template and the names it takes from outside. Raises jinja2.TemplateError."""
    from jinja2 import meta, nodes
    from jinja2.ext import Extension
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` of transformers marks what is trained on; here it means nothing."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = _strftime_now
    environment.filters["tojson"] = _to_json
    names = meta.find_undeclared_variables(environment.parse(source))
    return environment.from_string(source), frozenset(names)


@contextmanager
def _explained() -> Iterator[None]:
    """Whatever a template raises as one ModelError."""
    import jinja2

    try:
        yield
    except (jinja2.TemplateError, *_TEMPLATE_FAULTS) as error:
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise ModelError(
            f"the model's chat template cannot be used: {why}",
            hint="Try --raw to send the prompt as it is, without a template.",
        ) from error


@lru_cache(maxsize=8)
def _end_marker(template: ChatTemplate) -> str:
    """What the template writes behind a user's message; empty when it writes nothing to go by."""
    probe = "8c0e4f"
    try:
        said = template.render([{"role": "user", "content": probe}], add_generation_prompt=False)
    except ModelError:
        return ""
    marker = said.rpartition(probe)[2]
    return marker if marker.strip() else ""


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
