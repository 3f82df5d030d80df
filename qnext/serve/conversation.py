"""From messages and tools to the prompt, whatever API they came by."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from qnext.errors import ModelError
from qnext.pipeline.serve_values import ServedModel
from qnext.serve.errors import ApiError
from qnext.serve.schemas import ChatMessage, ContentPart

_ROLES = {"developer": "system", "function": "tool"}


@dataclass(frozen=True, slots=True)
class Conversation:
    """`messages` and `tools` in the template's own form (OpenAI's, arguments of calls as objects)."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] = field(default_factory=list)
    variables: dict[str, Any] = field(default_factory=dict)


def read_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a template. Raises ApiError for parts that are not text."""
    return [_read_message(message, index) for index, message in enumerate(messages)]


def render_prompt(model: ServedModel, conversation: Conversation) -> str:
    """The prompt's text. Raises ApiError: without a template there is no chat, and templates refuse some
    orders.
    """
    if model.template is None:
        raise ApiError(
            400, "the model's file has no chat template: use /v1/completions", code="no_chat_template"
        )
    variables = dict(conversation.variables)
    if conversation.tools:
        variables["tools"] = conversation.tools
    try:
        return model.template.render(list(conversation.messages), **variables)
    except ModelError as error:
        raise ApiError(400, error.message, param="messages", code="invalid_value") from error


def join_parts(content: str | list[ContentPart] | None, place: str) -> str:
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


def read_arguments(text: str) -> Any:
    """Arguments of a call as an object where they are one: templates go through them by name."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text


def _read_message(message: ChatMessage, index: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": join_parts(message.content, f"messages[{index}].content"),
    }
    if message.role == "assistant":
        if message.reasoning_content:
            found["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            found["tool_calls"] = [
                {
                    "id": call.id or "",
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": read_arguments(call.function.arguments),
                    },
                }
                for call in message.tool_calls
            ]
    elif message.content is None:
        raise ApiError(
            400, f"messages[{index}].content: a text is required", param=f"messages[{index}].content"
        )
    if message.name is not None:
        found["name"] = message.name
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found
