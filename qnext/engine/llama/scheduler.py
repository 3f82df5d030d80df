"""Which prompts get how many tokens in the next step: pure decisions, to be tried by themselves.

A step evaluates one token of every running text and a chunk of prompts. A chunk is what the others wait for,
but a small one is dear: most experts are read for it all the same. So it is a ubatch, and smaller only where
a ubatch would hold up running texts for longer than `stall_s`. Waiting prompts are taken in their order;
every other chunk goes to the one that is nearest to its end, so that a short prompt is not held up by a long
one, and a long one gets half the speed at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST_SHARE = 8
"""A chunk is not made smaller than this part of a ubatch."""
_MEMORY = 0.5
"""Weight of the latest chunk in the estimate of speed."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A prompt under evaluation: `remaining` tokens, `until_pause` of them before it has to stop once."""

    key: int
    remaining: int
    until_pause: int


class ChunkPolicy:
    """Sizes chunks for steps of at most `ubatch` tokens; told how long they took."""

    def __init__(self, ubatch: int, stall_s: float) -> None:
        self._ubatch = ubatch
        self._stall_s = stall_s
        self._tokens_per_s: float | None = None
        self._turn = 0

    def learn(self, tokens: int, seconds: float) -> None:
        """A step with a chunk of so many `tokens` took `seconds`."""
        if tokens * SMALLEST_SHARE < self._ubatch or seconds <= 0:
            return
        speed = tokens / seconds
        known = self._tokens_per_s
        self._tokens_per_s = speed if known is None else known + _MEMORY * (speed - known)

    def chunk_size(self, running: int) -> int:
        """Prompt tokens that fit into the next step beside `running` texts."""
        size = self._ubatch
        if running and self._tokens_per_s is not None:
            while size * SMALLEST_SHARE > self._ubatch and size / self._tokens_per_s > self._stall_s:
                size //= 2
        return max(1, size - running)

    def share(self, waiting: Sequence[Waiting], running: int) -> list[tuple[int, int]]:
        """(key, tokens) for the next step, from prompts in the order they came.

        One prompt is taken up, and others beside it as far as they end within the chunk.
        """
        if not waiting:
            return []
        self._turn += 1
        room = self.chunk_size(running)
        first = waiting[0] if self._turn % 2 else min(waiting, key=lambda prompt: prompt.remaining)
        taken = [(first.key, min(room, first.until_pause))]
        room -= taken[0][1]
        for prompt in waiting:
            if prompt is not first and prompt.until_pause <= room:
                taken.append((prompt.key, prompt.until_pause))
                room -= prompt.until_pause
        return taken
