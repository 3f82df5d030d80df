"""What the events of a streamed answer hold, and which answers are none. Pure: text in, values out.

Servers agree on the shape of a chunk and not on its details: thought comes as `reasoning_content`
(llama-server, vLLM) or `reasoning` (newer vLLM, Ollama), an error inside the stream as text or as an object,
the count of tokens in a last chunk without choices or in the one that finishes. Fields of a wrong type count
as missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from qnext.bench.endpoint import ExchangeStatus

Failure = tuple[ExchangeStatus, str]
"""A status other than ok, and what happened in words."""

_TEXT_FIELDS = ("content", "reasoning_content", "reasoning", "text", "refusal")


@dataclass(slots=True)
class AnswerReading:
    """What the chunks of one answer have said so far."""

    arrivals_ns: list[int] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    finish_reason: str | None = None
    model: str | None = None
    build: str | None = None
    timings: dict[str, float] = field(default_factory=dict)
    ended: bool = False

    def take(self, data: str, now_ns: int) -> Failure | None:
        """Note one event; what is wrong with it, if anything is."""
        if data.strip() == "[DONE]":
            self.ended = True
            return None
        try:
            chunk = json.loads(data)
        except ValueError:
            return "garbage", f"an event is not JSON: {short(data)}"
        if not isinstance(chunk, dict):
            return "garbage", f"an event is not an object: {short(data)}"
        if chunk.get("error"):
            return "server-error", message_in(chunk)
        for choice in _dicts(chunk.get("choices"))[:1]:
            delta = choice.get("delta")
            self._take_text(delta if isinstance(delta, dict) else choice, now_ns)
            self.finish_reason = _text(choice.get("finish_reason")) or self.finish_reason
        self._take_counts(chunk)
        return None

    def _take_text(self, delta: dict[str, Any], now_ns: int) -> None:
        found = [text for name in _TEXT_FIELDS if (text := _text(delta.get(name)))]
        if found or delta.get("tool_calls"):
            self.arrivals_ns.append(now_ns)
            self.text += found

    def _take_counts(self, chunk: dict[str, Any]) -> None:
        usage, timings = chunk.get("usage"), chunk.get("timings")
        self.model = _text(chunk.get("model")) or self.model
        self.build = _text(chunk.get("system_fingerprint")) or self.build
        if isinstance(usage, dict):
            self.prompt_tokens = _count(usage.get("prompt_tokens"))
            self.output_tokens = _count(usage.get("completion_tokens"))
            details = usage.get("prompt_tokens_details")
            self.cached_tokens = _count(details.get("cached_tokens")) if isinstance(details, dict) else None
        if isinstance(timings, dict):
            self.timings = {name: v for name, v in timings.items() if isinstance(v, (int, float))}

    def verdict(self) -> Failure | None:
        """What is wrong with an answer whose stream is over, if anything is."""
        if not self.ended and self.finish_reason is None:
            return "cut", f"the stream ended after {len(self.arrivals_ns)} chunks without a finish"
        if not self.arrivals_ns:
            return "garbage", "the answer holds no text"
        return None


def message_in(found: Any) -> str:
    """The message of an error object, in the forms that servers use."""
    while isinstance(found, dict):
        found = next((found[key] for key in ("error", "message", "detail") if found.get(key)), "")
    return short(found if isinstance(found, str) else json.dumps(found))


def short(text: str) -> str:
    """One printable line of at most 200 characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 200 else f"{line[:199]}…"


def _dicts(found: Any) -> list[dict[str, Any]]:
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _text(found: Any) -> str | None:
    return found if isinstance(found, str) and found else None


def _count(found: Any) -> int | None:
    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None
