"""Probabilities of tokens as OpenAI tells them: chat's `content` list, and the four lists of completions."""

from __future__ import annotations

from typing import Any

from qnext.models.chat import THINK_CLOSE, THINK_OPEN
from qnext.pipeline.serve_values import Backend, Piece
from qnext.serve.conversation import ThoughtTags


class TokenTexts:
    """Bytes of tokens, asked of the engine at most once each and only for those that no list names."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[int, bytes] = {}
        self._tags: ThoughtTags | None = None

    async def of(self, piece: Piece) -> bytes:
        """The bytes of the token of `piece`."""
        assert piece.token is not None
        for token, data, _ in piece.top or ():
            if token == piece.token:
                return data
        if piece.token not in self._known:
            self._known[piece.token] = (await self._backend.detokenize([piece.token])).encode()
        return self._known[piece.token]

    async def thought_tags(self) -> ThoughtTags:
        """The tokens around thinking. Raises Unavailable."""
        if self._tags is None:
            opening, closing = [await self._backend.tokenize(tag) for tag in (THINK_OPEN, THINK_CLOSE)]
            self._tags = ThoughtTags(tuple(opening), tuple(closing))
        return self._tags


def chat_logprob(piece: Piece, data: bytes, count: int) -> dict[str, Any]:
    """One entry of chat's `logprobs.content`; `count` alternatives."""
    return _named(data, piece.logprob) | {
        "top_logprobs": [_named(other, logprob) for _, other, logprob in (piece.top or ())[:count]]
    }


class CompletionLogprobs:
    """The lists of `/v1/completions`, filled token by token. `offset`: characters before the first token."""

    def __init__(self, offset: int = 0) -> None:
        self.offset = offset
        self._clear()

    def add(self, piece: Piece, data: bytes, count: int) -> None:
        """Add a token."""
        text = data.decode(errors="replace")
        self._tokens.append(text)
        self._logprobs.append(piece.logprob)
        self._top.append(
            {other.decode(errors="replace"): value for _, other, value in (piece.top or ())[:count]}
        )
        self._offsets.append(self.offset)
        self.offset += len(text)

    def take(self) -> dict[str, Any] | None:
        """The lists since the last time, None without a token."""
        if not self._tokens:
            return None
        told = {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._top,
            "text_offset": self._offsets,
        }
        self._clear()
        return told

    def _clear(self) -> None:
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._top: list[dict[str, float]] = []
        self._offsets: list[int] = []


def _named(data: bytes, logprob: float | None) -> dict[str, Any]:
    # Zero probability is minus infinity, which JSON does not have; OpenAI writes -9999 for it.
    value = -9999.0 if logprob is None else max(logprob, -9999.0)
    return {"token": data.decode(errors="replace"), "logprob": value, "bytes": list(data)}
