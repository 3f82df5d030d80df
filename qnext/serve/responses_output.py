"""The output items of a response and the events that tell them: reasoning, a message, calls of functions.

One item is open at a time. Every event has a running number; the JSON around a delta of text is made once per
item.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator
from typing import Any

from qnext.models.answer import AnswerEvent, Thought
from qnext.models.tool_calls import CallArguments, CallBegun, CallEnded, Said


class Output:
    """Takes the parts of an answer; `items` is what they have become."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._number = -1
        self._kind = ""
        self._text: list[str] = []
        self._delta_head = ""

    def event(self, kind: str, data: dict[str, Any]) -> bytes:
        """One event with the next number."""
        self._number += 1
        told = {"type": kind, "sequence_number": self._number} | data
        return f"event: {kind}\ndata: {json.dumps(told)}\n\n".encode()

    def take(self, part: AnswerEvent) -> Iterator[bytes]:
        """The events of one part."""
        if isinstance(part, Said):
            if self._kind != "message":
                yield from self._open_text("message")
            yield self._delta(part.text)
        elif isinstance(part, Thought):
            if self._kind != "reasoning":
                yield from self._open_text("reasoning")
            yield self._delta(part.text)
        elif isinstance(part, CallBegun):
            item = {"id": _id("fc"), "type": "function_call", "status": "in_progress"}
            yield from self._open(item | {"call_id": part.id, "name": part.name, "arguments": ""})
            self._set_head("response.function_call_arguments.delta", {"item_id": self.items[-1]["id"]})
        elif isinstance(part, CallArguments):
            yield self._delta(part.text)
        elif isinstance(part, CallEnded):
            yield from self.close()

    def close(self, status: str = "completed") -> Iterator[bytes]:
        """End the open item. `status` incomplete for one that the limit of tokens cut off."""
        if not self._kind:
            return
        kind, self._kind = self._kind, ""
        item, text = self.items[-1], "".join(self._text)
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        item["status"] = status
        if kind == "function_call":
            item["arguments"] = text
            done = place | {"arguments": text, "name": item["name"]}
            yield self.event("response.function_call_arguments.done", done)
        else:
            part = _part(kind, text)
            item["content"] = [part]
            name = "output_text" if kind == "message" else "reasoning_text"
            told = place | {"content_index": 0, "text": text}
            if kind == "message":
                told["logprobs"] = []
            yield self.event(f"response.{name}.done", told)
            yield self.event("response.content_part.done", place | {"content_index": 0, "part": part})
        index = {"output_index": len(self.items) - 1}
        yield self.event("response.output_item.done", index | {"item": item})

    def _open_text(self, kind: str) -> Iterator[bytes]:
        item: dict[str, Any] = {"type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            item |= {"id": _id("msg"), "role": "assistant"}
        else:
            item |= {"id": _id("rs"), "summary": []}
        yield from self._open(item)
        place = {"item_id": item["id"], "output_index": len(self.items) - 1, "content_index": 0}
        yield self.event("response.content_part.added", place | {"part": _part(kind, "")})
        if kind == "message":
            self._set_head("response.output_text.delta", place | {"logprobs": []})
        else:
            self._set_head("response.reasoning_text.delta", place)

    def _open(self, item: dict[str, Any]) -> Iterator[bytes]:
        yield from self.close()
        self.items.append(item)
        self._kind, self._text = item["type"], []
        index = {"output_index": len(self.items) - 1}
        yield self.event("response.output_item.added", index | {"item": item})

    def _set_head(self, kind: str, place: dict[str, Any]) -> None:
        told = {"type": kind, "output_index": len(self.items) - 1} | place
        self._delta_head = f'event: {kind}\ndata: {json.dumps(told)[:-1]}, "delta": '

    def _delta(self, text: str) -> bytes:
        self._text.append(text)
        self._number += 1
        told = f'{self._delta_head}{json.dumps(text)}, "sequence_number": {self._number}}}\n\n'
        return told.encode()


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "message":
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "reasoning_text", "text": text}


def _id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_urlsafe(18)}"
