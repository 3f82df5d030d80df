"""Interim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qnext.models.chat import ThinkingSplitter


@dataclass(frozen=True, slots=True)
class Thought:
    text: str


@dataclass(frozen=True, slots=True)
class Said:
    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    index: int
    text: str


Part = Thought | Said | CallBegun | CallArguments


class AnswerReader:
    def __init__(self, prompt: str, tools: Sequence[Any]) -> None:
        self._split = ThinkingSplitter(prompt)

    def feed(self, text: str) -> Iterator[Part]:
        for thinking, piece in self._split.feed(text):
            yield Thought(piece) if thinking else Said(piece)

    def finish(self) -> Iterator[Part]:
        for thinking, piece in self._split.finish():
            yield Thought(piece) if thinking else Said(piece)
