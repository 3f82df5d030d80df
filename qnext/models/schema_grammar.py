"""JSON schemas as grammars: whatever the grammar lets a model write is valid for the schema.

The other way round it is narrower where that helps a model: properties come in the schema's order; those the
schema does not name are only written where it says `additionalProperties`, or names none, and likewise items
behind `prefixItems`; numbers have at most 16 digits; years are 1000 to 2999. `oneOf` is taken as `anyOf`, and
unknown formats as notes, as JSON schema has it. A keyword that cannot be enforced is an error: a client that
asks for it relies on it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import ceil, floor
from typing import Any

from qnext.errors import UsageError
from qnext.models.gbnf import MOST_REPEATS, GrammarWriter, literal
from qnext.models.number_grammar import integer_grammar, number_grammar
from qnext.models.object_grammar import Property, object_grammar
from qnext.models.pattern_grammar import pattern_grammar
from qnext.models.schema_merge import demands, flatten, follow, merge, refuse

_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "boolean": (),
    "null": (),
}
_KNOWN = {"$ref", "allOf", "anyOf", "oneOf", "enum", "const", "type", "nullable"}.union(*_KEYWORDS.values())
_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_MOST_SCHEMAS = 5_000

_DAY = {
    31: '("0" [1-9] | [12] [0-9] | "3" [01])',
    30: '("0" [1-9] | [12] [0-9] | "30")',
    28: '("0" [1-9] | "1" [0-9] | "2" [0-8])',
}
_DATE = (
    '[12] [0-9]{3} "-" (("0" [13578] | "1" [02]) "-" ' + _DAY[31] + ' | ("0" [469] | "11") "-" ' + _DAY[30]
) + f' | "02-" {_DAY[28]})'
_HOUR = '([01] [0-9] | "2" [0-3]) ":" [0-5] [0-9]'
_TIME = f'{_HOUR} ":" [0-5] [0-9] ("." [0-9]{{1,6}})? ("Z" | [+\\-] {_HOUR})'
_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f'{_DATE} "T" {_TIME}',
    "uuid": 'hex{8} "-" hex{4} "-" hex{4} "-" hex{4} "-" hex{12}',
}


def schema_grammar(schema: object) -> str:
    """GBNF for JSON that is valid for `schema`. Raises UsageError naming what cannot be enforced."""
    try:
        return _Converter(schema).grammar()
    except RecursionError as error:
        raise UsageError("the schema is nested too deeply", hint="Make it flatter.") from error


class _Converter:
    def __init__(self, root: object) -> None:
        self._root = root
        self._writer = GrammarWriter()
        self._references: dict[str, str] = {}
        self._schemas = 0

    def grammar(self) -> str:
        return self._writer.text(self._visit(self._root, "#", frozenset()))

    def _visit(self, schema: Any, path: str, entered: frozenset[str]) -> str:
        """Name of a rule for `schema`. `entered` are references under way with nothing written since."""
        self._schemas += 1
        if self._schemas > _MOST_SCHEMAS:
            raise UsageError(
                f"the schema has more than {_MOST_SCHEMAS:,} parts", hint="Ask for less at once."
            )
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if isinstance(reference, str) and len(demands(schema)) == 1:
            return self._reference(reference, path, entered)
        whole = flatten(schema, self._root, path)
        if whole is False:
            raise refuse("false", path, "allows nothing")
        if whole is True or not whole:
            return "value"
        for keyword in whole:
            if keyword not in _KNOWN:
                raise refuse(keyword, path)
        for keyword in ("anyOf", "oneOf"):
            if keyword in whole:
                return self._any_of(keyword, whole, path, entered)
        if whole.pop("nullable", False) is True:
            return self._writer.add(f"{self._visit(whole, path, entered)} | null")
        if "enum" in whole or "const" in whole:
            return self._values(whole, path)
        types = _types(whole, path)
        return self._writer.add(" | ".join(self._writer.add(self._of_type(t, whole, path)) for t in types))

    def _reference(self, reference: str, path: str, entered: frozenset[str]) -> str:
        target = follow(reference, self._root, path)
        if reference in entered:
            raise refuse("$ref", path, "refers to itself without end")
        if reference not in self._references:
            name = self._references[reference] = self._writer.reserve()
            self._writer.define(name, self._visit(target, reference, entered | {reference}))
        return self._references[reference]

    def _any_of(self, keyword: str, schema: dict[str, Any], path: str, entered: frozenset[str]) -> str:
        branches = schema.pop(keyword)
        if not branches:
            raise refuse(keyword, path, "allows nothing")
        names = []
        for index, branch in enumerate(branches):
            place = f"{path}/{keyword}/{index}"
            whole = merge(schema, flatten(branch, self._root, place), place) if schema else branch
            names.append(self._visit(whole, place, entered))
        return self._writer.add(" | ".join(dict.fromkeys(names)))

    def _values(self, schema: dict[str, Any], path: str) -> str:
        values = schema.get("enum", [schema.get("const")])
        if "const" in schema:
            values = [value for value in values if _same(value, schema["const"])]
        for keyword in schema.keys() - {"enum", "const", "type"}:
            raise refuse(keyword, path, "cannot be enforced beside enum or const")
        if "type" in schema:
            types = _types(schema, path)
            values = [value for value in values if any(_is_of(value, name) for name in types)]
        if not values:
            raise refuse("enum" if "enum" in schema else "const", path, "allows nothing")
        return self._writer.add(
            " | ".join(literal(json.dumps(value, ensure_ascii=False)) for value in values)
        )

    def _of_type(self, name: str, schema: dict[str, Any], path: str) -> str:
        asked = {key: schema[key] for key in _KEYWORDS[name] if key in schema}
        if not asked:
            return name
        if name == "object":
            return self._object(asked, path)
        if name == "array":
            return self._array(asked, path)
        if name == "string":
            return f'"\\"" ({self._text(asked, path)}) "\\""'
        return self._number(name, asked, path)

    def _object(self, asked: dict[str, Any], path: str) -> str:
        named, required = asked.get("properties", {}), asked.get("required", [])
        more = asked.get("additionalProperties", not named and not required)
        unnamed = [name for name in required if name not in named]
        if unnamed and more is False and "additionalProperties" in asked:
            raise refuse("required", path, f"asks for {unnamed[0][:80]!r}, which is not allowed")
        properties = [
            Property(name, self._visit(part, f"{path}/properties/{name}", frozenset()), name in required)
            for name, part in {**named, **dict.fromkeys(unnamed, more or True)}.items()
            if part is not False or name in required
        ]
        place = f"{path}/additionalProperties"
        extra = None if more is False else self._visit(more, place, frozenset())
        return object_grammar(properties, extra, self._writer)

    def _array(self, asked: dict[str, Any], path: str) -> str:
        least, most = self._counts(asked, "minItems", "maxItems", path)
        first = asked.get("prefixItems", [])
        items = asked.get("items", not first)
        if items is False:
            most = len(first) if most is None else min(most, len(first))
        if most is not None and least > most:
            raise refuse("minItems", path, f"is {least}, and at most {most} items can be")
        writer, rest = self._writer, ""
        if most is None or most > len(first):
            item = self._visit(items, f"{path}/items", frozenset())
            if not first:
                following = writer.repeat(
                    writer.add(f'"," ws {item}'), max(0, least - 1), None if most is None else most - 1
                )
                rest = f"{item} {following}"
            else:
                left = None if most is None else most - len(first)
                rest = writer.repeat(writer.add(f'"," ws {item}'), max(0, least - len(first)), left)
        for index in range(len(first) - 1 if most is None else min(most, len(first)) - 1, -1, -1):
            item = self._visit(first[index], f"{path}/prefixItems/{index}", frozenset())
            rest = f'"," ws {item} {rest}' if index else f"{item} {rest}"
            if index and index >= least:
                rest = f"({rest})?"
        if not rest.strip():
            return '"[" ws "]"'
        return f'"[" ws ({rest} ws)? "]"' if not least else f'"[" ws {rest} ws "]"'

    def _text(self, asked: dict[str, Any], path: str) -> str:
        if "pattern" in asked or asked.get("format") in _FORMATS:
            used = "pattern" if "pattern" in asked else "format"
            for keyword in ("minLength", "maxLength", "format"):
                if keyword in asked and keyword != used:
                    raise refuse(keyword, path, f"cannot be enforced beside {used}")
            if used == "format":
                return _FORMATS[asked["format"]]
            return pattern_grammar(asked["pattern"], self._writer, path)
        least, most = self._counts(asked, "minLength", "maxLength", path)
        if most is not None and least > most:
            raise refuse("minLength", path, f"is {least}, and maxLength {most}")
        return self._writer.repeat("char", least, most) or '""'

    def _counts(self, asked: dict[str, Any], low: str, high: str, path: str) -> tuple[int, int | None]:
        for keyword in (low, high):
            value = asked.get(keyword, 0)
            if not _is_of(value, "integer") or value < 0 or (keyword == low and value > MOST_REPEATS):
                raise refuse(keyword, path, f"cannot be {str(value)[:40]}")
        return int(asked.get(low, 0)), int(asked[high]) if high in asked else None

    def _number(self, name: str, asked: dict[str, Any], path: str) -> str:
        for keyword, value in asked.items():
            whole = (
                _is_of(value, "number") and abs(value) < 1e300 and (name == "integer" or value == int(value))
            )
            if not whole:
                raise refuse(
                    keyword, path, f"cannot be {str(value)[:40]}: only whole numbers can be enforced"
                )
        least, most = asked.get("minimum"), asked.get("maximum")
        over, under = asked.get("exclusiveMinimum"), asked.get("exclusiveMaximum")
        if name == "integer":
            lows = [ceil(least)] if least is not None else []
            highs = [floor(most)] if most is not None else []
            low = max(lows + ([floor(over) + 1] if over is not None else []), default=None)
            high = min(highs + ([ceil(under) - 1] if under is not None else []), default=None)
            if low is not None and high is not None and low > high:
                raise refuse("minimum", path, "leaves no integer below the maximum")
            return integer_grammar(low, high)
        above = over is not None and (least is None or over >= least)
        below = under is not None and (most is None or under <= most)
        low, high = over if above else least, under if below else most
        if low is not None and high is not None and (low > high or (low == high and (above or below))):
            raise refuse("minimum", path, "leaves no number below the maximum")
        return number_grammar(
            None if low is None else int(low), None if high is None else int(high), above=above, below=below
        )


def _types(schema: Mapping[str, Any], path: str) -> list[str]:
    """The types of a schema; without any, those that its keywords speak about."""
    stated = schema.get("type")
    if stated is None:
        spoken = [name for name, keywords in _KEYWORDS.items() if any(key in schema for key in keywords)]
        return [name for name in spoken if name != "integer"]
    names = [stated] if isinstance(stated, str) else stated
    if not isinstance(names, list) or not names or any(name not in _KEYWORDS for name in names):
        raise refuse("type", path, f"cannot be {str(stated)[:40]}")
    return [name for name in dict.fromkeys(names) if name != "integer" or "number" not in names]


def _is_of(value: object, name: str) -> bool:
    if isinstance(value, bool) and name != "boolean":
        return False
    if name == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[name])


def _same(one: object, two: object) -> bool:
    return one == two and isinstance(one, bool) == isinstance(two, bool)
