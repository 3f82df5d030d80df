"""Objects as grammars: properties in the schema's order, optional ones anywhere left out, others behind."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qnext.models.gbnf import GrammarWriter, char_class, literal

_WRITTEN = re.compile(r"\\u[0-9a-f]{4}|\\.|.", re.DOTALL)
"""One character as JSON writes it."""


@dataclass(frozen=True, slots=True)
class Property:
    """A property by name. `rule` is the rule of its value."""

    name: str
    rule: str
    required: bool


def object_grammar(properties: Sequence[Property], extra: str | None, writer: GrammarWriter) -> str:
    """Body of a rule for the object. `extra` is the rule for values of other properties, None for none."""
    pairs = [
        (
            writer.add(f"{literal(json.dumps(each.name, ensure_ascii=False) + ':')} ws {each.rule}"),
            each.required,
        )
        for each in properties
    ]
    tail = ""
    if extra is not None:
        key = "string" if not properties else _other_key([each.name for each in properties], writer)
        other = writer.add(f'{key} ":" ws {extra}')
        tail = f'("," ws {other})*'
    first = next((index for index, (_, required) in enumerate(pairs) if required), None)
    if first is not None:
        # A comma follows each optional pair before the first required one, and precedes each pair behind it.
        before = [f'({pair} "," ws)?' for pair, _ in pairs[:first]]
        behind = [
            f'"," ws {pair}' if required else f'("," ws {pair})?' for pair, required in pairs[first + 1 :]
        ]
        parts = [*before, pairs[first][0], *behind, tail]
        return f'"{{" ws {" ".join(filter(None, parts))} ws "}}"'
    starts = [f"{other} {tail}"] if extra is not None else []
    for pair, _ in reversed(pairs):
        starts.append(f"{pair} {tail}".rstrip())
        tail = writer.add(f'("," ws {pair})? {tail}'.rstrip())
    if not starts:
        return '"{" ws "}"'
    return f'"{{" ws (({" | ".join(reversed(starts))}) ws)? "}}"'


def _other_key(names: Sequence[str], writer: GrammarWriter) -> str:
    """Rule for a property's name that is none of `names`.

    A tree of their letters: a name leaves it by another letter or by ending where none of them does.
    Before it has left it may not use escapes, which could spell one of them in another way.
    """
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for written in _WRITTEN.findall(json.dumps(name, ensure_ascii=False)[1:]):  # with the closing quote
            node = node.setdefault(written, {})
    return writer.add(f'"\\"" {_leave(tree, writer)}')


def _leave(node: dict[str, Any], writer: GrammarWriter) -> str:
    ways = [f"{literal(written)} {_leave(child, writer)}" for written, child in node.items() if child]
    taken = sorted({*(ord(written) for written in node if len(written) == 1), ord('"'), ord("\\"), 0x7F})
    others, start = [], 0x20
    for point in [*(point for point in taken if point >= 0x20), 0xD800]:
        others += [(start, point - 1)] if point > start else []
        start = max(start, point + 1)
    others = [each for each in others if each[0] < 0xD800]
    others.append((0xE000, 0x10FFFF))
    ways.append(f'{char_class(others)} char* "\\""')
    if '"' not in node:
        ways.append('"\\""')
    return writer.add(" | ".join(ways))
