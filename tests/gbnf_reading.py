"""A small reader of GBNF for tests: does a text match, and what may a grammar write?"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r'\s*(?:(?P<literal>"(?:\\.|[^"\\])*")|(?P<klass>\[(?:\\.|[^\]\\])*\])|(?P<name>[a-zA-Z0-9-]+)'
    r"|(?P<count>\{\d+(?:,\d*)?\})|(?P<sign>[()|*+?]))"
)
_ESCAPE = re.compile(r"\\(x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[tnr\\\"\[\]-])|([^\\])", re.DOTALL)


@dataclass(eq=False)
class Node:
    """kind: text, class, name, all (in a row), one (of them), times."""

    kind: str
    parts: list[Node] = field(default_factory=list)
    text: str = ""
    ranges: list[tuple[int, int]] = field(default_factory=list)
    negated: bool = False
    least: int = 1
    most: int | None = 1
    height: int = 10**6


class Grammar:
    """Read from GBNF as llama.cpp's parser reads it, with its limit on repetitions."""

    def __init__(self, text: str) -> None:
        self.rules: dict[str, Node] = {}
        self._nodes: list[Node] = []
        for line in text.splitlines():
            name, arrow, body = line.partition(" ::= ")
            assert arrow and re.fullmatch(r"[a-zA-Z0-9-]+", name), line
            self._tokens = self._split(body)
            self._at = 0
            self.rules[name] = self._one()
            assert self._at == len(self._tokens), line
        for node in self._nodes:
            assert node.kind != "name" or node.text in self.rules, f"no rule {node.text}"
        self._measure()

    def matches(self, text: str) -> bool:
        self._seen: dict[tuple[int, int], frozenset[int]] = {}
        self._input = text
        return len(text) in self._ends(self.rules["root"], 0)

    def write(self, rng: random.Random, budget: int = 12) -> str:
        return self._write(self.rules["root"], rng, budget)

    def _split(self, body: str) -> list[tuple[str, str]]:
        tokens, at = [], 0
        while at < len(body.rstrip()):
            found = _TOKEN.match(body, at)
            assert found and found.lastgroup, body[at:]
            tokens.append((found.lastgroup, found.group(found.lastgroup)))
            at = found.end()
        return tokens

    def _node(self, kind: str, **fields: object) -> Node:
        node = Node(kind, **fields)  # type: ignore[arg-type]
        self._nodes.append(node)
        return node

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _one(self) -> Node:
        ways = [self._all()]
        while self._peek() == "|":
            self._at += 1
            ways.append(self._all())
        return self._node("one", parts=ways) if len(ways) > 1 else ways[0]

    def _all(self) -> Node:
        parts: list[Node] = []
        while self._at < len(self._tokens) and self._peek() not in ("|", ")"):
            kind, text = self._tokens[self._at]
            self._at += 1
            if kind == "literal":
                points = [_point(found) for found in _ESCAPE.finditer(text[1:-1])]
                parts.append(self._node("text", text="".join(map(chr, points))))
            elif kind == "klass":
                parts.append(self._class(text[1:-1]))
            elif kind == "name":
                parts.append(self._node("name", text=text))
            elif text == "(":
                parts.append(self._one())
                assert self._peek() == ")"
                self._at += 1
            else:
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(text) or _counts(text)
                assert least <= 2000 and (most or 0) <= 2000
                parts.append(self._node("times", parts=[parts.pop()], least=least, most=most))
        return self._node("all", parts=parts)

    def _class(self, text: str) -> Node:
        negated = text.startswith("^")
        found = list(_ESCAPE.finditer(text[negated:]))
        ranges, at = [], 0
        while at < len(found):
            low = high = _point(found[at])
            if at + 2 < len(found) and found[at + 1].group() == "-":
                high = _point(found[at + 2])
                at += 2
            assert low <= high
            ranges.append((low, high))
            at += 1
        assert ranges
        return self._node("class", ranges=ranges, negated=negated)

    def _ends(self, node: Node, start: int) -> frozenset[int]:
        key = (id(node), start)
        if key not in self._seen:
            self._seen[key] = frozenset()  # left recursion would end here, and fail
            self._seen[key] = frozenset(self._find_ends(node, start))
        return self._seen[key]

    def _find_ends(self, node: Node, start: int) -> set[int]:
        if node.kind == "text":
            return {start + len(node.text)} if self._input.startswith(node.text, start) else set()
        if node.kind == "class":
            if start >= len(self._input):
                return set()
            point = ord(self._input[start])
            inside = any(low <= point <= high for low, high in node.ranges)
            return {start + 1} if inside != node.negated else set()
        if node.kind == "name":
            return set(self._ends(self.rules[node.text], start))
        if node.kind == "one":
            return {end for part in node.parts for end in self._ends(part, start)}
        ends = {start}
        if node.kind == "all":
            for part in node.parts:
                ends = {end for middle in ends for end in self._ends(part, middle)}
            return ends
        found = set(ends) if not node.least else set()
        for count in range(1, (len(self._input) + 1 if node.most is None else node.most) + 1):
            ends = {end for middle in ends for end in self._ends(node.parts[0], middle)}
            if not ends or (count > node.least and ends <= found):
                break
            found |= ends if count >= node.least else set()
        return found

    def _measure(self) -> None:
        """`height`: the least nesting of rules that a node needs."""
        changed = True
        while changed:
            changed = False
            for node in self._nodes:
                heights = [part.height for part in node.parts]
                if node.kind == "name":
                    height = self.rules[node.text].height + 1
                elif node.kind == "one":
                    height = min(heights)
                elif node.kind == "times":
                    height = heights[0] if node.least else 0
                else:
                    height = max(heights, default=0)
                if height < node.height:
                    node.height, changed = height, True

    def _write(self, node: Node, rng: random.Random, budget: int) -> str:
        if node.kind == "text":
            return node.text
        if node.kind == "class":
            return _draw(node, rng)
        if node.kind == "name":
            return self._write(self.rules[node.text], rng, budget - 1)
        if node.kind == "one":
            low = min(part.height for part in node.parts)
            ways = [part for part in node.parts if part.height <= max(budget, low)]
            return self._write(rng.choice(ways), rng, budget)
        if node.kind == "all":
            return "".join(self._write(part, rng, budget) for part in node.parts)
        most = node.least + 3 if node.most is None else min(node.most, node.least + 3)
        if node.parts[0].height > budget:
            most = node.least
        return "".join(self._write(node.parts[0], rng, budget) for _ in range(rng.randint(node.least, most)))


def _point(found: re.Match[str]) -> int:
    escape, plain = found.groups()
    if plain:
        return ord(plain)
    return (
        int(escape[1:], 16)
        if escape[0] in "xuU"
        else ord({"t": "\t", "n": "\n", "r": "\r"}.get(escape, escape))
    )


def _counts(text: str) -> tuple[int, int | None]:
    low, comma, high = text[1:-1].partition(",")
    return int(low), (int(high) if high else None) if comma else int(low)


def _draw(node: Node, rng: random.Random) -> str:
    if not node.negated:
        low, high = rng.choice(node.ranges)
        return chr(rng.choice([low, high, rng.randint(low, high), rng.randint(low, min(high, low + 99))]))
    while True:
        point = rng.choice([rng.randint(0x20, 0x7E), 0xE9, 0x1F327])
        if not any(low <= point <= high for low, high in node.ranges):
            return chr(point)
