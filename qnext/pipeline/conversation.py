"""A conversation with a running model: history, template, sampling, thinking told from speech, statistics."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal

from qnext.errors import EngineError
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
        self.cut_off = False

    def reset(self) -> None:
        """Forget everything but the system prompt."""
        self.messages = list(self._opening)

    def say(self, text: str) -> Generator[Piece, None, None]:
        """Send `text`; yields the answer as it streams and adds the finished `Turn` to `turns`.

        The message joins the history with its answer. Stopped on the way (Ctrl-C, or the iterator closed),
        it joins with as much of the answer as was said, and `cut_off` is true; if none was, and after an
        error, the history stays as it was and the same text can be sent again. Raises ContextFullError when
        the conversation would outgrow the context.
        """
        self.cut_off = False
        asked: list[ChatMessage] = [*self.messages, {"role": "user", "content": text}]
        prompt = text if self._template is None else self._template.render(asked)
        self._require_room(prompt)
        splitter = ThinkingSplitter(prompt)
        said: dict[bool, str] = {True: "", False: ""}
        try:
            for event in self._model.generate(prompt, max_tokens=self._max_tokens, sampling=self._sampling):
                if event["event"] == "prefill":
                    yield Piece("prefill", done=int(str(event["done"])), total=int(str(event["total"])))
                    continue
                last = event["event"] == "done"
                pieces = splitter.finish() if last else splitter.feed(str(event.get("text", "")))
                for thinking, piece in pieces:
                    # The template's own line breaks around thinking are no part of what is said.
                    piece = piece if said[thinking] else piece.lstrip()
                    said[thinking] += piece
                    if piece:
                        yield Piece("thinking" if thinking else "text", piece)
                if last:
                    counts = {name: int(str(event[name])) for name in _COUNTS}
                    stop = str(event["stop_reason"])
                    self.turns.append(
                        Turn(said[False].strip(), said[True].strip(), stop_reason=stop, **counts)
                    )
        except (KeyboardInterrupt, GeneratorExit):
            self.cut_off = bool(said[False].strip())
            if self.cut_off:
                self._remember(asked, said[False])
            raise
        self._remember(asked, said[False])

    def _remember(self, asked: list[ChatMessage], answer: str) -> None:
        self.messages = [*asked, {"role": "assistant", "content": answer.strip()}]

    def _require_room(self, prompt: str) -> None:
        """Raise ContextFullError unless the prompt and at least one token of an answer have room."""
        room = int(str(self._model.opened.facts["context_per_sequence"]))
        # A token is at least a byte in every vocabulary, but for special ones that are written out longer.
        if len(prompt.encode(errors="replace")) < room:
            return
        needed = len(self._model.session.tokenize(prompt))
        if needed >= room:
            slots = int(str(self._model.opened.facts["context"])) // room
            earlier = len(self.messages) > len(self._opening)
            raise ContextFullError(
                f"{'with this message the conversation' if earlier else 'the prompt'} is {needed:,} tokens "
                f"long, and the context has room for {room:,}",
                hint=(
                    "Send something shorter, start afresh with /reset, or " if earlier else "Shorten it, or "
                )
                + f"start qnext with more room: --ctx-size {_roomier(needed) * slots}",
            )


class ContextFullError(EngineError):
    """The conversation does not fit the context. Nothing was evaluated and nothing forgotten."""


def _roomier(tokens: int) -> int:
    """A slot's context for `tokens` and an answer: the next power of two at least a half larger."""
    return 1 << (tokens * 3 // 2).bit_length()


_COUNTS = ("prompt_tokens", "cached_tokens", "generated", "decodes", "prefill_ns", "decode_ns")
