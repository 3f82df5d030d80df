"""From messages and tools to the prompt, whatever API they came by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qnext.errors import ModelError, UsageError
from qnext.models.answer import AnswerParser
from qnext.models.chat import THINK_OPEN
from qnext.models.response_grammar import response_grammar
from qnext.models.tool_calls import CLOSE, ToolFormat, tool_format
from qnext.pipeline.serve_values import Ended, ServedModel, ThoughtBudget
from qnext.serve.errors import ApiError
from qnext.serve.forcing import call_grammar, either
from qnext.serve.schemas import ChatMessage, ContentPart

_RESERVED = ("messages", "tools", "bos_token", "eos_token")


@dataclass(frozen=True, slots=True)
class ThoughtTags:
    """The tokens of `<think>` and of `</think>`, in many vocabularies one each."""

    opening: tuple[int, ...]
    closing: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """`messages` and `tools` in OpenAI's form. `choice`: auto, none, required, or `named` a function's name.

    `thinking` None leaves it to the template, for at most `thought_tokens`; `variables` are the template's
    own. `grammar` is the client's GBNF; not `parallel`: the answer ends with its first call.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    choice: str = "auto"
    named: str | None = None
    thinking: bool | None = None
    thought_tokens: int | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    response_format: Mapping[str, Any] | None = None
    grammar: str | None = None
    parallel: bool = True


@dataclass(frozen=True, slots=True)
class Prompt:
    """The text, or instead the tokens `ids`, that the model continues, and what it takes to read its answer.

    `grammar_after` and `thought` as in Job. `stop` ends the answer beside the client's own stop strings.
    """

    text: str
    tools: Sequence[Mapping[str, Any]] = ()
    style: ToolFormat | None = None
    grammar: str | None = None
    grammar_after: tuple[int, ...] = ()
    ids: Sequence[int] | None = None
    stop: tuple[str, ...] = ()
    thought: ThoughtBudget | None = None

    def parser(self) -> AnswerParser:
        """A reader for one answer."""
        return AnswerParser(self.text[-256:], tools=self.tools, style=self.style)

    def cut_off(self, ended: Ended) -> str:
        """What `stop` took from the end of an answer and its parser still needs."""
        return ended.stop_text if ended.stop_text is not None and ended.stop_text in self.stop else ""


def make_prompt(model: ServedModel, asked: Conversation, tags: ThoughtTags | None = None) -> Prompt:
    """The prompt of a conversation. Raises ApiError: without a template there is no chat, a template may take
    no tools, and some refuse an order of messages.

    Where the template opens the thinking itself and its end is one token, a grammar holds only after that.
    """
    if model.template is None:
        raise ApiError(
            400, "the model's file has no chat template: use /v1/completions", code="no_chat_template"
        )
    tools = _chosen_tools(asked)
    try:
        style = tool_format(model.template.source) if tools else None
        if tools and (style is None or not model.template.takes_tools):
            raise ApiError(
                400, "tools: the model's chat template takes none", param="tools", code="unsupported_tools"
            )
        variables = {name: value for name, value in asked.variables.items() if name not in _RESERVED}
        thinking = variables.pop("enable_thinking", asked.thinking)
        if thinking is not None and not isinstance(thinking, bool):
            param = "chat_template_kwargs.enable_thinking"
            raise ApiError(400, f"{param}: Input should be a valid boolean", param=param)
        text = model.template.render(
            asked.messages,
            tools=tools,
            enable_thinking=thinking,
            **variables,
        )
    except ModelError as error:
        raise ApiError(400, error.message, param="messages", code="invalid_value") from error
    grammar = _make_grammar(asked, tools, style)
    thinks = text.rstrip().endswith(THINK_OPEN)
    after = tags.closing if grammar and tags and thinks and len(tags.closing) == 1 else ()
    thought = None
    if asked.thought_tokens is not None and tags and (after or not grammar):
        thought = ThoughtBudget(asked.thought_tokens, () if thinks else tags.opening, tags.closing)
    return Prompt(
        text,
        tools,
        style,
        grammar,
        grammar_after=after,
        stop=() if asked.parallel or style is None else (CLOSE,),
        thought=thought,
    )


def read_grammar(response_format: Mapping[str, Any]) -> str | None:
    """The grammar of a `response_format`. Raises ApiError for what cannot be enforced."""
    param = "grammar" if response_format["type"] == "gbnf" else "response_format"
    try:
        return response_grammar(response_format)
    except UsageError as error:
        raise ApiError(400, f"{error.message} {error.hint}", param=param, code="invalid_grammar") from error


def _make_grammar(
    asked: Conversation, tools: Sequence[Mapping[str, Any]], style: ToolFormat | None
) -> str | None:
    if asked.grammar is not None:
        wanted: Mapping[str, Any] | None = {"type": "gbnf", "grammar": asked.grammar}
    else:
        wanted = asked.response_format
    grammar = None if wanted is None else read_grammar(wanted)
    if style is None or (grammar is None and asked.choice != "required"):
        return grammar
    calls = call_grammar(tools, style, parallel=asked.parallel)
    return calls if grammar is None or asked.choice == "required" else either(grammar, calls)


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a template. Raises ApiError for parts that are not text."""
    return [_read_message(message, index) for index, message in enumerate(messages)]


def join_parts(content: str | Sequence[ContentPart] | None, place: str) -> str:
    """The text of a message's content. Raises ApiError for images, audio and the like."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("text", "input_text", "output_text", "refusal") or text is None:
            raise ApiError(
                400,
                f"{place}[{index}]: this model reads only text, not parts of type {part.type[:40]!r}",
                param=f"{place}[{index}].type",
                code="unsupported_content",
            )
        texts.append(text)
    return "\n".join(texts)


def _read_message(message: ChatMessage, index: int) -> dict[str, Any]:
    place = f"messages[{index}].content"
    if message.content is None and message.role != "assistant":
        raise ApiError(400, f"{place}: a text is required", param=place, code="invalid_value")
    found = message.model_dump(exclude_none=True, exclude={"content"})
    found["content"] = join_parts(message.content, place)
    if message.role == "function":
        found["role"] = "tool"
    return found


def _chosen_tools(asked: Conversation) -> list[Mapping[str, Any]]:
    """The tools that the model is shown. Raises ApiError for a choice that is not among them."""
    if asked.choice == "none":
        return []
    if asked.choice == "required" and not asked.tools:
        raise ApiError(400, "tool_choice: there are no tools to call", param="tool_choice")
    if asked.named is None:
        return list(asked.tools)
    found = [tool for tool in asked.tools if tool["function"]["name"] == asked.named]
    if not found:
        raise ApiError(400, "tool_choice: there is no tool of that name", param="tool_choice")
    return found
