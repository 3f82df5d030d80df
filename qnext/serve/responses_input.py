"""Bodies of OpenAI's `/v1/responses`, and how they become a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from qnext.serve.conversation import Conversation, join_parts
from qnext.serve.errors import ApiError
from qnext.serve.schemas import MOST_TOOLS, ContentPart, Count, Json, SamplingFields, Strict


class Item(Strict):
    """Something said before: a `message`, `function_call`, `function_call_output` or `reasoning`."""

    type: str | None = None
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[ContentPart] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[ContentPart] | None = None


class ResponsesTool(Strict):
    """A function; tools that OpenAI runs itself are refused by name."""

    type: str
    name: str | None = None
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class ResponsesToolChoice(Strict):
    """A choice of one function."""

    type: str
    name: str | None = None


class TextFormat(Strict):
    """`text`, `json_object`, or `json_schema` with its schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    """How the text is written."""

    format: TextFormat | None = None


class Reasoning(Strict):
    """`effort` none and minimal switch thinking off where the template can."""

    effort: str | None = None


class ResponsesRequest(Strict):
    """Body of `/v1/responses`. Nothing is stored, so every request brings the whole conversation."""

    model: str | None = None
    input: str | Annotated[list[Item], Field(min_length=1)]
    instructions: str | None = None
    stream: bool | None = None
    max_output_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    text: TextOptions | None = None
    tools: Annotated[list[ResponsesTool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    metadata: Json | None = None
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None

    def sampling(self) -> SamplingFields:
        """The fields that all APIs share."""
        return SamplingFields(temperature=self.temperature, top_p=self.top_p)


def read_conversation(asked: ResponsesRequest) -> Conversation:
    """The conversation. Raises ApiError for what needs a store or a tool of OpenAI's."""
    for name in ("previous_response_id", "conversation", "background"):
        if getattr(asked, name):
            raise ApiError(
                400, f"{name}: this server stores nothing; send the whole conversation as input", param=name
            )
    messages: list[dict[str, Any]] = []
    if asked.instructions:
        messages.append({"role": "system", "content": asked.instructions})
    if isinstance(asked.input, str):
        messages.append({"role": "user", "content": asked.input})
    else:
        messages.extend(_read_items(asked.input))
    if all(message["role"] == "system" for message in messages):
        raise ApiError(400, "input: there is nothing to answer", param="input")
    choice, named = _read_choice(asked.tool_choice)
    effort = asked.reasoning.effort if asked.reasoning else None
    return Conversation(
        messages=messages,
        tools=[_read_tool(tool, f"tools[{index}]") for index, tool in enumerate(asked.tools or ())],
        choice=choice,
        named=named,
        thinking=None if effort is None else effort not in ("none", "minimal"),
        parallel=asked.parallel_tool_calls is not False,
        response_format=_read_format(asked.text),
    )


def _read_items(items: Sequence[Item]) -> list[dict[str, Any]]:
    """Messages of items: reasoning, text and calls of one turn are several items but one message."""
    found: list[dict[str, Any]] = []
    for index, item in enumerate(items):
        place = f"input[{index}]"
        kind = item.type or "message"
        if kind == "function_call_output":
            text = join_parts(_required(item.output, f"{place}.output"), f"{place}.output")
            call = _required(item.call_id, f"{place}.call_id")
            found.append({"role": "tool", "tool_call_id": call, "content": text})
        elif kind == "function_call":
            name = _required(item.name, f"{place}.name")
            function = {"name": name, "arguments": item.arguments or "{}"}
            call = {"id": item.call_id or "", "type": "function", "function": function}
            _turn(found).setdefault("tool_calls", []).append(call)
        elif kind == "reasoning":
            if isinstance(item.content, list):
                text = "".join(part.text or "" for part in item.content if part.type == "reasoning_text")
                if text:
                    _turn(found, new=True)["reasoning_content"] = text
        elif kind == "message":
            role = _required(item.role, f"{place}.role")
            text = join_parts(_required(item.content, f"{place}.content"), f"{place}.content")
            if role == "assistant" and (turn := _turn(found))["content"] == "" and "tool_calls" not in turn:
                turn["content"] = text
            else:
                found.append({"role": role, "content": text})
        else:
            raise ApiError(
                400, f"{place}: items of type {kind[:40]!r} are not known here", param=f"{place}.type"
            )
    return found


def _turn(found: list[dict[str, Any]], *, new: bool = False) -> dict[str, Any]:
    """The assistant's message that is being put together, a new one where there is none."""
    if new or not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": ""})
    return found[-1]


def _read_tool(tool: ResponsesTool, place: str) -> dict[str, Any]:
    if tool.type != "function":
        raise ApiError(
            400, f"{place}: there is no tool of type {tool.type[:40]!r} here", param=f"{place}.type"
        )
    function: dict[str, Any] = {"name": _required(tool.name, f"{place}.name")}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.parameters is not None:
        function["parameters"] = tool.parameters
    return {"type": "function", "function": function}


def _read_choice(choice: str | ResponsesToolChoice | None) -> tuple[str, str | None]:
    if choice is None or isinstance(choice, str):
        return choice or "auto", None
    if choice.type != "function":
        raise ApiError(400, "tool_choice: only functions can be chosen", param="tool_choice.type")
    return "required", _required(choice.name, "tool_choice.name")


def _read_format(text: TextOptions | None) -> dict[str, Any] | None:
    if text is None or text.format is None:
        return None
    return text.format.model_dump(by_alias=True, exclude_none=True)


def _required(value: Any, place: str) -> Any:
    if value is None:
        raise ApiError(400, f"{place}: Field required", param=place, code="invalid_value")
    return value
