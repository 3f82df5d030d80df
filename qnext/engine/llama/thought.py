"""Ends thinking that has become too long: the tokens that close it are said in the model's stead."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ThoughtBudget:
    """At most `budget` tokens between `opening` and `closing`. No opening: the prompt has opened it."""

    budget: int
    opening: tuple[int, ...]
    closing: tuple[int, ...]


class ThoughtLimit:
    """Follows one answer: ask `forced` before each token is chosen, and tell `note` what it came to."""

    def __init__(self, asked: ThoughtBudget) -> None:
        self._asked = asked
        self._latest: deque[int] = deque(maxlen=max(len(asked.opening), len(asked.closing)))
        self._waiting, self._thinking = bool(asked.opening), not asked.opening
        self._left = asked.budget
        self._closed = 0

    def forced(self) -> int | None:
        """The token that has to come next; None where the model is free to choose."""
        return self._asked.closing[self._closed] if self._thinking and self._left <= 0 else None

    def note(self, token: int) -> None:
        """`token` has been said."""
        self._latest.append(token)
        if self._waiting and self._ends_with(self._asked.opening):
            self._waiting, self._thinking = False, True
            self._latest.clear()
        elif self._thinking:
            self._closed += self._left <= 0
            self._left -= 1
            self._thinking = not self._ends_with(self._asked.closing)

    def _ends_with(self, tag: tuple[int, ...]) -> bool:
        return tuple(self._latest)[-len(tag) :] == tag
