"""Messages as OpenAI's clients send them, made into what chat templates expect.

Templates are written for `transformers`: content is one text, arguments of calls are objects, and a key
without a value is not there at all (many test only whether it is defined).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from qnext.errors import ModelError

_TEXT_PARTS = ("text", "input_text", "output_text")


def template_messages(messages: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """`messages` for the template with this source. Raises ModelError for content that is not text.

    Calls' arguments stay the text they came as where the template takes text, so that a call is shown to the
    model as it wrote it; elsewhere they become objects. The role "developer" is "system" to a template
    that does not know it.
    """
    as_text = re.search(r"arguments is (?:not )?string", source) and not re.search(
        r"arguments\s*\|\s*items", source
    )
    developer = "developer" if "developer" in source else "system"
    ready = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None}
        kept["content"] = _text_of(message.get("content"))
        if kept.get("role") == "developer":
            kept["role"] = developer
        if kept.get("tool_calls"):
            kept["tool_calls"] = [_call(call, bool(as_text)) for call in kept["tool_calls"]]
        else:
            kept.pop("tool_calls", None)
        ready.append(kept)
    return ready


def _text_of(content: Any) -> str:
    """One text of a message's content: parts are joined by line breaks."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise _not_text(type(content).__name__)
    return "\n".join(_text_of_part(part) for part in content)


def _text_of_part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    text = part.get("text") if kind in _TEXT_PARTS else None
    if not isinstance(text, str):
        raise _not_text(str(kind))
    return text


def _not_text(kind: str) -> ModelError:
    return ModelError(
        f"a message has content of type {kind[:40]!r}, and the model reads only text",
        hint="Send the content as a string, or as parts of type 'text'.",
    )


def _call(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    """A call with its arguments in the wanted form. Text that is no object is kept under one name, since
    templates go through arguments by name: the client shows the model a call that had broken off.
    """
    function = call.get("function")
    if isinstance(function, Mapping):
        return {**call, "function": _call(function, as_text)}
    arguments = call.get("arguments")
    if not isinstance(arguments, str) or as_text:
        return {**call, "arguments": {} if arguments is None else arguments}
    try:
        value = json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        value = None
    return {**call, "arguments": value if isinstance(value, dict) else {"arguments": arguments}}
