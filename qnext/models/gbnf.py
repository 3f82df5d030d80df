"""Writing grammars in llama.cpp's GBNF: literals, character classes, repetitions, rules by name.

What llama.cpp's parser (`src/llama-grammar.cpp`) makes necessary: names are letters, digits and dashes; a
repetition may not unfold into more than 2,000 rules, and an upper bound above that is silently no bound, so
long ones are written in chunks; a repeated item that may be empty is left recursion and refused.
"""

from __future__ import annotations

from collections.abc import Sequence

Ranges = Sequence[tuple[int, int]]
"""Code points, from first to last, each range inclusive."""

_CHUNK = 500
MOST_REPEATS = 1_000_000
"""Above this an upper bound is none: no context holds more."""

_SHARED = {
    "ws": r'(" " | "\n" [ \t]{0,32})?',
    "hex": "[0-9a-fA-F]",
    "char": r'[^"\\\x00-\x1F\x7F] | "\\" (["\\/bfnrt] | "u" (plain | pair-of-halves))',
    "plain": "[0-9a-cA-CefEF] hex{3} | [dD] [0-7] hex{2}",
    # Half of a surrogate pair is no text, and would break what reads the answer.
    "pair-of-halves": r'[dD] [89abAB] hex{2} "\\u" [dD] [c-fC-F] hex{2}',
    "string": r'"\"" char* "\""',
    "integer": '"0" | "-"? [1-9] [0-9]{0,15}',
    "number": r'"-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]{1,16})? ([eE] [-+]? [0-9]{1,2})?',
    "boolean": '"true" | "false"',
    "null": '"null"',
    "value": "object | array | string | number | boolean | null",
    "pair": 'string ":" ws value',
    "object": '"{" ws (pair ("," ws pair)* ws)? "}"',
    "array": '"[" ws (value ("," ws value)* ws)? "]"',
}
"""JSON itself. White space is bounded: a model that only writes line breaks would never end."""


def literal(text: str) -> str:
    """This text and nothing else."""
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}
    return '"' + "".join(escapes.get(c) or (c if c >= " " else f"\\x{ord(c):02X}") for c in text) + '"'


def char_class(ranges: Ranges) -> str:
    """One character of these ranges."""
    parts = (_code(a) if a == b else f"{_code(a)}-{_code(b)}" for a, b in ranges)
    return f"[{''.join(parts)}]"


def _code(point: int) -> str:
    if point < 0x80 and chr(point).isalnum():
        return chr(point)
    if point < 0x100:
        return f"\\x{point:02X}"
    return f"\\u{point:04X}" if point < 0x10000 else f"\\U{point:08X}"


class GrammarWriter:
    """Rules under construction. JSON's own (`value`, `string`, `ws`, …) may be named in any of them."""

    def __init__(self) -> None:
        self._rules: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def add(self, body: str) -> str:
        """Name of a rule with this body; equal bodies share one."""
        if body in _SHARED or body in self._rules:
            return body
        if body not in self._names:
            self._names[body] = self.reserve()
            self._rules[self._names[body]] = body
        return self._names[body]

    def reserve(self) -> str:
        """A name to refer to before its rule is known."""
        name = f"r{len(self._rules)}"
        self._rules[name] = ""
        return name

    def define(self, name: str, body: str) -> None:
        """The rule of a reserved name."""
        self._rules[name] = body

    def repeat(self, item: str, least: int, most: int | None) -> str:
        """`item`, a rule's name or one character class, repeated; "" for no times at all.

        `item` must not be empty itself. `least` is at most MOST_REPEATS.
        """
        bounded = most is not None and most <= MOST_REPEATS
        more = self._up_to(item, most - least) if bounded and most is not None else f"{item}*"
        return " ".join(filter(None, (self._exactly(item, least), more)))

    def _exactly(self, item: str, count: int) -> str:
        if count <= 1:
            return item * count
        chunks, rest = divmod(count, _CHUNK) if count > _CHUNK else (0, count)
        parts = [f"{self.add(f'{item}{{{_CHUNK}}}')}{{{chunks}}}" if chunks else ""]
        parts.append(f"{item}{{{rest}}}" if rest else "")
        return " ".join(filter(None, parts))

    def _up_to(self, item: str, count: int) -> str:
        if count <= _CHUNK:
            return f"{item}{{0,{count}}}" if count else ""
        chunks, rest = divmod(count, _CHUNK)
        chunk = self.add(f"{item}{{{_CHUNK}}}")
        return (
            f"({chunk}{{0,{chunks - 1}}} {item}{{0,{_CHUNK - 1}}} | {self._exactly(item, chunks * _CHUNK)}"
            f"{f' {item}{{0,{rest}}}' if rest else ''})"
        )

    def text(self, root: str) -> str:
        """The whole grammar, with those of JSON's rules that it uses."""
        import re

        rules = {"root": root, **self._rules}
        todo = list(rules.values())
        while todo:
            for name in re.findall(
                r"[a-z-]+", re.sub(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]', " ", todo.pop())
            ):
                if name in _SHARED and name not in rules:
                    rules[name] = _SHARED[name]
                    todo.append(_SHARED[name])
        return "".join(f"{name} ::= {body}\n" for name, body in rules.items())
