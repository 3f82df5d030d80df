"""A conversation with a running model: history, template, sampling, thinking told from speech, statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qnext.models.chat import ChatMessage, ChatTemplate, ThinkingSplitter
from qnext.pipeline.running import RunningModel

PieceKind = Literal["prefill", "thinking", "text"]


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer as it streams: text, thinking, or prefill progress (`done` of `total` tokens)."""

    kind: PieceKind
    text: str = ""
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class Turn:
    """One finished answer with its counts and times (ns).

    `prompt_tokens` counts the whole conversation, of which `cached_tokens` were still in the context and
    cost nothing. The first generated token comes out of the prefill, so `decodes` is what `decode_ns` was
    spent on.
    """

    text: str
    thinking: str
    prompt_tokens: int
    cached_tokens: int
    generated: int
    decodes: int
    prefill_ns: int
    decode_ns: int
    stop_reason: str

    @property
    def prefill_tps(self) -> float | None:
        """Prompt tokens evaluated per second; tokens found in the cache are not counted."""
        fresh = self.prompt_tokens - self.cached_tokens
        return fresh * 1e9 / self.prefill_ns if fresh and self.prefill_ns else None

    @property
    def decode_tps(self) -> float | None:
        """Tokens decoded per second."""
        return self.decodes * 1e9 / self.decode_ns if self.decodes and self.decode_ns else None


class Conversation:
    """History and settings of one chat. `template` None sends the text as it is."""

    def __init__(
        self,
        model: RunningModel,
        template: ChatTemplate | None,
        sampling: dict[str, float],
        *,
        system: str | None = None,
        max_tokens: int = 4096,
    ) -> None:
        self._model = model
        self._template = template
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._opening: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        self.messages: list[ChatMessage] = list(self._opening)
        self.turns: list[Turn] = []

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._opening)

    def say(self, text: str) -> Iterator[Piece]:
        """Send `text`; yields the answer as it streams and adds the finished `Turn` to `turns`.

        The message joins the history only with its answer: after an error or an interruption nothing is
        half there and the same text can be sent again.
        """
        asked: list[ChatMessage] = [*self.messages, {"role": "user", "content": text}]
        prompt = text if self._template is None else self._template.render(asked)
        splitter = ThinkingSplitter(prompt)
        said, thought = "", ""
        for event in self._model.generate(prompt, max_tokens=self._max_tokens, sampling=self._sampling):
            if event["event"] == "prefill":
                yield Piece("prefill", done=int(str(event["done"])), total=int(str(event["total"])))
                continue
            last = event["event"] == "done"
            for thinking, piece in splitter.finish() if last else splitter.feed(str(event.get("text", ""))):
                if thinking:
                    thought += piece
                else:
                    said += piece
                yield Piece("thinking" if thinking else "text", piece)
            if last:
                counts = {name: int(str(event[name])) for name in _COUNTS}
                self.turns.append(
                    Turn(said.strip(), thought.strip(), stop_reason=str(event["stop_reason"]), **counts)
                )
        self.messages = [*asked, {"role": "assistant", "content": said.strip()}]


_COUNTS = ("prompt_tokens", "cached_tokens", "generated", "decodes", "prefill_ns", "decode_ns")
