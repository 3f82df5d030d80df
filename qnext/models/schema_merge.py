"""JSON schemas put into one: references followed, `allOf` and neighbouring keywords joined.

A grammar can say "one of these" but not "all of these at once", so what must hold together is made one
schema before it becomes a grammar.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from qnext.errors import UsageError

Schema = Mapping[str, Any]

_NOTES = frozenset(
    (
        *("title", "description", "default", "examples", "example", "deprecated", "readOnly", "writeOnly"),
        *("$schema", "$id", "$comment", "$defs", "definitions", "discriminator"),
        *("contentMediaType", "contentEncoding"),
    )
)
_NUMBERS = (int, float)
_SHAPES: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"), _NUMBERS),
    **dict.fromkeys(("minLength", "maxLength", "minItems", "maxItems"), _NUMBERS),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "enum", "required", "prefixItems"), (list,)),
    **dict.fromkeys(("items", "additionalProperties"), (dict, bool)),
    **dict.fromkeys(("$ref", "pattern", "format"), (str,)),
    "properties": (dict,),
    "type": (str, list),
    "nullable": (bool,),
}
_GREATEST = ("minimum", "exclusiveMinimum", "minLength", "minItems")
_LEAST = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")


def refuse(keyword: str, path: str, why: str = "is not supported") -> UsageError:
    """The error for a keyword that cannot be enforced."""
    return UsageError(
        f"the schema's {keyword!r} at {path} {why}",
        hint="Leave it out of the schema, and check it in the answer.",
    )


def demands(schema: Schema) -> dict[str, Any]:
    """The keywords that demand something of a value. Notes about it are left out."""
    return {key: value for key, value in schema.items() if key not in _NOTES and not key.startswith("x-")}


def follow(reference: str, root: Any, path: str) -> Any:
    """What a `$ref` into the same schema means."""
    if not reference.startswith("#"):
        raise refuse("$ref", path, "does not point into the schema itself")
    target = root
    for step in unquote(reference[1:]).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(target, Mapping) and name in target:
            target = target[name]
        elif isinstance(target, list) and name.isdecimal() and int(name) < len(target):
            target = target[int(name)]
        else:
            raise refuse("$ref", path, f"points to nothing: {reference[:80]}")
    return target


def flatten(schema: Any, root: Any, path: str, seen: frozenset[str] = frozenset()) -> dict[str, Any] | bool:
    """One schema without `$ref` and `allOf` at its top."""
    if isinstance(schema, bool):
        return schema
    if not isinstance(schema, Mapping):
        raise UsageError(f"the schema at {path} is neither an object nor true or false", hint="Mend it.")
    asked = demands(schema)
    for keyword, value in asked.items():
        names = value if keyword in ("required", "type") and isinstance(value, list) else []
        if not isinstance(value, _SHAPES.get(keyword, object)) or not all(isinstance(n, str) for n in names):
            raise refuse(keyword, path, f"cannot be {str(value)[:40]}")
    reference, parts = asked.pop("$ref", None), asked.pop("allOf", [])
    joined: dict[str, Any] | bool = asked
    if reference is not None:
        if reference in seen:
            raise refuse("$ref", path, "refers to itself without end")
        target = follow(reference, root, path)
        joined = merge(flatten(target, root, path, seen | {reference}), joined, path)
    for part in parts:
        joined = merge(joined, flatten(part, root, path, seen), path)
    return joined


def merge(one: dict[str, Any] | bool, two: dict[str, Any] | bool, path: str) -> dict[str, Any] | bool:
    """A schema that demands what both do. Raises UsageError where that cannot be said in one."""
    if isinstance(one, bool) or isinstance(two, bool):
        other = two if isinstance(one, bool) else one
        return False if one is False or two is False else other
    for closed, other in ((one, two), (two, one)):
        foreign = set(other.get("properties", ())) - set(closed.get("properties", ()))
        if closed.get("additionalProperties") is False and foreign:
            raise refuse("additionalProperties", path, f"forbids {min(foreign)[:80]!r}, which allOf asks for")
    merged = dict(one)
    for key, value in two.items():
        merged[key] = _both(key, one[key], value, path) if key in one else value
    return merged


def _both(key: str, one: Any, two: Any, path: str) -> Any:
    if one == two and type(one) is type(two):
        return one
    if key in _GREATEST:
        return max(one, two)
    if key in _LEAST:
        return min(one, two)
    if key == "required":
        return [*one, *(name for name in two if name not in one)]
    if key == "properties":
        shared = {name: {"allOf": [one[name], two[name]]} for name in one if name in two}
        return {**one, **two, **shared}
    if key == "items" or (key == "additionalProperties" and False not in (one, two)):
        return {"allOf": [one, two]}
    if key == "additionalProperties":
        return False
    if key == "enum":
        return [value for value in one if value in two]
    if key == "type":
        return _types(one, two, path)
    raise refuse(key, path, "is asked for twice, differently, by schemas that must both hold")


def _types(one: Any, two: Any, path: str) -> list[str]:
    first, second = ([types] if isinstance(types, str) else list(types) for types in (one, two))
    shared = [name for name in first if name in second]
    shared += ["integer"] if {"integer", "number"} <= {*first, *second} and "integer" not in shared else []
    if not shared:
        raise refuse("type", path, "is asked for twice, differently, by schemas that must both hold")
    return shared
