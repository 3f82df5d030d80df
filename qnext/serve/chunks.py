"""JSON of OpenAI's answers. What goes out per token is put together by hand: one `json.dumps` of the new
text.

A chunk's beginning is the same for all chunks of an answer, so it is made once.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from typing import Any

from qnext.pipeline.serve_values import Ended, ServedModel

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


def finish_reason(ended: Ended, *, called: bool = False) -> str:
    """OpenAI's word for the end; a slot that is full is a length too."""
    reason = _FINISH[ended.reason]
    return "tool_calls" if called and reason == "stop" else reason


def usage(ends: Sequence[Ended]) -> dict[str, Any]:
    """Counts of a request. Choices of one prompt share its tokens, so these count once."""
    prompt = max(ended.prompt_tokens for ended in ends)
    return usage_of(prompt, max(ended.cached_tokens for ended in ends), sum(end.generated for end in ends))


def usage_of(prompt: int, cached: int, generated: int) -> dict[str, Any]:
    """OpenAI's `usage`."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings(ended: Ended) -> dict[str, Any]:
    """llama-server's `timings`: milliseconds and tokens per second; rates of nothing are null."""
    read = ended.prompt_tokens - ended.cached_tokens
    prompt_ms, predicted_ms = ended.prefill_ns / 1e6, ended.decode_ns / 1e6
    return {
        "cache_n": ended.cached_tokens,
        "prompt_n": read,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / read if read else None,
        "prompt_per_second": 1e3 * read / prompt_ms if prompt_ms else None,
        "predicted_n": ended.generated,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / ended.generated if ended.generated else None,
        "predicted_per_second": 1e3 * ended.generated / predicted_ms if predicted_ms else None,
        "queued_ms": ended.queued_ns / 1e6,
    }


class Chunks:
    """Chunks of one answer, or the whole answer. `kind`: `chat.completion` or `text_completion`."""

    def __init__(self, kind: str, model: ServedModel, *, tell_usage: bool = False) -> None:
        prefix = "chatcmpl-" if kind.startswith("chat") else "cmpl-"
        self.head = {
            "id": prefix + secrets.token_urlsafe(18),
            "object": kind,
            "created": int(time.time()),
            "model": model.name,
            "system_fingerprint": model.engine or None,
        }
        chunk = self.head | {"object": "chat.completion.chunk" if kind.startswith("chat") else kind}
        self._chunk_head = b"data: " + json.dumps(chunk)[:-1].encode() + b', "choices": ['
        self._tail = b'], "usage": null}\n\n' if tell_usage else b"]}\n\n"

    def choice(self, index: int, said: str, logprobs: str = "null", finish: str | None = None) -> bytes:
        """A chunk with `said`, a member of the choice such as `"delta": {…}`, as JSON."""
        ended = f'"{finish}"' if finish else "null"
        body = f'{{"index": {index}, {said}, "logprobs": {logprobs}, "finish_reason": {ended}}}'
        return self._chunk_head + body.encode() + self._tail

    def last(self, extra: dict[str, Any]) -> bytes:
        """A chunk without choices: `usage`, `timings`."""
        return self._chunk_head + b"], " + json.dumps(extra)[1:].encode() + b"\n\n"

    def with_member(self, chunk: bytes, name: str, value: Any) -> bytes:
        """The same chunk with one more member."""
        return chunk[:-3] + f', "{name}": {json.dumps(value)}}}\n\n'.encode()

    def whole(
        self,
        choices: list[dict[str, Any]],
        ends: Sequence[Ended],
        counts: dict[str, Any],
        extra: dict[str, Any],
    ) -> bytes:
        """The answer to a request that does not stream."""
        answer: dict[str, Any] = self.head | {"choices": choices, "usage": counts} | extra
        if len(ends) == 1:
            answer["timings"] = timings(ends[0])
        return json.dumps(answer).encode()
