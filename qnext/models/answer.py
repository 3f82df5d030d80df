"""What a streamed answer consists of: reasoning, text and tool calls.

The order of things is the models': thinking comes first and may mention anything, then what is said is read
for tool calls. Qwen's templates put line breaks around thinking and before what is said, and take them off
again when they show an earlier answer, so they are no part of either.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from qnext.models.chat import THINK_CLOSE, ThinkingSplitter
from qnext.models.tool_calls import (
    CallArguments,
    CallBegun,
    CallEnded,
    Said,
    Tool,
    ToolCallParser,
    ToolFormat,
    Warned,
)


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of reasoning."""

    text: str


AnswerEvent = Thought | Said | CallBegun | CallArguments | CallEnded | Warned


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a finished answer. `arguments` is JSON text; unfinished where `finished` is false."""

    id: str
    name: str
    arguments: str
    finished: bool


@dataclass(frozen=True, slots=True)
class Answer:
    """A finished answer."""

    reasoning: str
    content: str
    calls: tuple[Call, ...]
    warnings: tuple[str, ...]


class AnswerParser:
    """Reads one answer. Feed it pieces cut anywhere, then `finish`.

    `prompt` is the rendered prompt or its last characters: it tells whether thinking is already open.
    Without `thinking` tags of thinking are text like any other. `style` is how the model writes calls
    (`tool_format` of its template); calls are only looked for when there are `tools` and a style.
    """

    def __init__(
        self,
        prompt: str,
        *,
        thinking: bool = True,
        tools: Sequence[Tool] = (),
        style: ToolFormat | None = None,
    ) -> None:
        self._splitter = ThinkingSplitter(prompt) if thinking else None
        self._tools = ToolCallParser(tools, style) if tools and style else None
        self._gap = ""  # whitespace that belongs to the text only if text follows
        self._thought = self._said = False
        self._after_thinking = thinking and prompt.rstrip().endswith(THINK_CLOSE)

    def feed(self, text: str) -> Iterator[AnswerEvent]:
        """Events that are certain with this piece."""
        if self._splitter is None:
            yield from self._say(text)
            return
        for thinking, piece in self._splitter.feed(text):
            yield from self._think(piece) if thinking else self._say(piece)

    def finish(self) -> Iterator[AnswerEvent]:
        """Events for what was held back; the answer is over."""
        for thinking, piece in self._splitter.finish() if self._splitter else ():
            yield from self._think(piece) if thinking else self._say(piece)
        if self._gap and not self._after_thinking:
            yield from self._pass_on(self._gap)
        if self._tools:
            yield from self._tools.finish()

    def _think(self, piece: str) -> Iterator[AnswerEvent]:
        if not self._after_thinking:
            self._after_thinking, self._gap = True, ""
        body = piece.rstrip()
        lead = self._gap if self._thought else ""
        if not body:
            self._gap = lead + piece
            return
        yield Thought(lead + body if self._thought else body.lstrip())
        self._thought, self._gap = True, piece[len(body) :]

    def _say(self, piece: str) -> Iterator[AnswerEvent]:
        if self._said:
            yield from self._pass_on(piece)
            return
        body = piece.lstrip()
        if not body:
            self._gap += piece
            return
        yield from self._pass_on(body if self._after_thinking else self._gap + piece)
        self._said, self._gap = True, ""

    def _pass_on(self, text: str) -> Iterator[AnswerEvent]:
        if self._tools:
            yield from self._tools.feed(text)
        elif text:
            yield Said(text)


def gather_answer(events: Iterable[AnswerEvent]) -> Answer:
    """The whole answer of its events, for clients that do not stream."""
    reasoning: list[str] = []
    content: list[str] = []
    warnings: list[str] = []
    begun: list[CallBegun] = []
    arguments: list[list[str]] = []
    ended: dict[int, bool] = {}
    for event in events:
        match event:
            case Thought(text):
                reasoning.append(text)
            case Said(text):
                content.append(text)
            case CallBegun():
                begun.append(event)
                arguments.append([])
            case CallArguments(index, text):
                arguments[index].append(text)
            case CallEnded(index, whole):
                ended[index] = whole
            case Warned(message):
                warnings.append(message)
    calls = tuple(
        Call(call.id, call.name, "".join(parts), ended.get(call.index, False))
        for call, parts in zip(begun, arguments, strict=True)
    )
    return Answer("".join(reasoning), "".join(content), calls, tuple(warnings))
