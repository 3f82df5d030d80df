"""Bodies of Anthropic's `/v1/messages`, and how they become a conversation in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from qnext.serve.conversation import Conversation
from qnext.serve.errors import ApiError
from qnext.serve.schemas import MOST_STOPS, MOST_TOOLS, Count, Json, Name, SamplingFields, StopText, Strict


class Block(Strict):
    """A part of a message: `text`, `thinking`, `tool_use` or `tool_result`. Others are refused by name."""

    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: Json | None = None
    tool_use_id: str | None = None
    content: str | list[Block] | None = None


class Message(Strict):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class MessagesTool(Strict):
    """A tool of the client. Anthropic's own tools, which have a `type`, are not here."""

    name: Name
    type: str | None = None
    description: str | None = None
    input_schema: Json | None = None


class MessagesToolChoice(Strict):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Strict):
    """Whether to think aloud, where the model's template can switch it, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None


class CountRequest(Strict):
    """Body of `/v1/messages/count_tokens`."""

    model: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: Annotated[list[MessagesTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None


class MessagesRequest(CountRequest):
    """Body of `/v1/messages`."""

    max_tokens: Count | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Count | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None

    def sampling(self) -> SamplingFields:
        """The fields that all APIs share."""
        return SamplingFields(
            temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, stop=self.stop_sequences or None
        )


def read_conversation(asked: CountRequest) -> Conversation:
    """The conversation in OpenAI's form. Raises ApiError for what a text model cannot read."""
    messages: list[dict[str, Any]] = []
    if asked.system:
        messages.append({"role": "system", "content": _join(asked.system, "system")})
    for index, message in enumerate(asked.messages):
        place = f"messages[{index}].content"
        if isinstance(message.content, str):
            messages.append({"role": message.role, "content": message.content})
        elif message.role == "assistant":
            messages.append(_read_assistant(message.content, place))
        else:
            messages.extend(_read_user(message.role, message.content, place))
    choice = asked.tool_choice
    kind = choice.type if choice else "auto"
    return Conversation(
        messages=messages,
        tools=[_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(asked.tools or ())],
        choice={"any": "required", "tool": "required"}.get(kind, kind),
        parallel=not (choice and choice.disable_parallel_tool_use),
        named=choice.name if choice and kind == "tool" else None,
        thinking=None if asked.thinking is None else asked.thinking.type != "disabled",
        thought_tokens=asked.thinking.budget_tokens if asked.thinking else None,
    )


def _read_assistant(blocks: Sequence[Block], place: str) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for index, block in enumerate(blocks):
        if block.type == "thinking":
            thoughts.append(block.thinking or "")
        elif block.type == "tool_use":
            if not block.name:
                raise _missing(f"{place}[{index}].name")
            function = {"name": block.name, "arguments": json.dumps(block.input or {}, ensure_ascii=False)}
            calls.append({"id": block.id or "", "type": "function", "function": function})
        elif block.type != "redacted_thinking":
            texts.append(_text_of(block, f"{place}[{index}]"))
    found: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        found["reasoning_content"] = "\n".join(thoughts)
    if calls:
        found["tool_calls"] = calls
    return found


def _read_user(role: str, blocks: Sequence[Block], place: str) -> list[dict[str, Any]]:
    """Results of tools are messages of their own in OpenAI's form; the text around them stays one."""
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    for index, block in enumerate(blocks):
        if block.type == "tool_result":
            content = _join(block.content or "", f"{place}[{index}].content")
            found.append({"role": "tool", "tool_call_id": block.tool_use_id or "", "content": content})
        else:
            texts.append(_text_of(block, f"{place}[{index}]"))
    if texts or not found:
        found.append({"role": role, "content": "\n".join(texts)})
    return found


def _join(content: str | Sequence[Block], place: str) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(_text_of(block, f"{place}[{index}]") for index, block in enumerate(content))


def _text_of(block: Block, place: str) -> str:
    if block.type != "text":
        raise ApiError(
            400, f"{place}: this model reads only text, not blocks of type {block.type[:40]!r}", param=place
        )
    if block.text is None:
        raise _missing(f"{place}.text")
    return block.text


def _read_tool(tool: MessagesTool, place: str) -> dict[str, Any]:
    if tool.input_schema is None:
        if tool.type not in (None, "custom"):
            raise ApiError(400, f"{place}: there is no tool of type {tool.type[:40]!r} here", param=place)
        raise _missing(f"{place}.input_schema")
    function = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}


def _missing(place: str) -> ApiError:
    return ApiError(400, f"{place}: Field required", param=place, code="invalid_value")
