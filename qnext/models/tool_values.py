"""What the text of a `<parameter=…>` means, by the tool's JSON schema.

Qwen3-Coder writes strings as they are and everything else as JSON, so only the schema tells `5` from `"5"`.
Its chat template shows earlier calls through Jinja's `string` filter, that is `True` and `None`, which the
model then imitates. A parameter whose type is not stated is a string.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_NAMES: Mapping[type, frozenset[str]] = {
    bool: frozenset({"boolean"}),
    int: frozenset({"integer", "number"}),
    float: frozenset({"number"}),
    str: frozenset({"string"}),
    list: frozenset({"array"}),
    dict: frozenset({"object"}),
    type(None): frozenset({"null"}),
}
_PYTHON_WORDS = {"true": "true", "false": "false", "null": "null", "none": "null"}
_DEEPEST = 32


def value_types(parameters: object, key: str) -> frozenset[str]:
    """JSON types that the schema allows for parameter `key`; empty when it does not say."""
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    schema = properties.get(key) if isinstance(properties, Mapping) else None
    return frozenset(_types(schema, parameters, _DEEPEST, set()))


def json_value(text: str, types: frozenset[str]) -> tuple[str, bool]:
    """JSON text of a value and whether it is of one of `types`; what is not becomes a string."""
    bare = text.strip()
    word = _PYTHON_WORDS.get(bare.lower()) if len(bare) <= 5 else None
    literal = word or bare
    try:
        value = json.loads(literal, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = text
    names = _NAMES[type(value)]
    if isinstance(value, float) and value.is_integer():
        names = names | {"integer"}
    if not isinstance(value, str) and names & types:
        return literal, True
    return json.dumps(text, ensure_ascii=False), "string" in types


def _types(schema: object, root: object, depth: int, seen: set[str]) -> set[str]:
    """`seen` holds the references already followed: schemas may refer to themselves, many times over."""
    if not isinstance(schema, Mapping) or not depth:
        return set()
    stated = schema.get("type")
    found = {name for name in _listed(stated) or [stated] if isinstance(name, str)}
    values = _listed(schema.get("enum")) or ([schema["const"]] if "const" in schema else [])
    found = found or {name for value in values for name in _NAMES.get(type(value), ())}
    if schema.get("nullable") is True:
        found.add("null")
    for keyword in ("anyOf", "oneOf", "allOf"):
        for branch in _listed(schema.get(keyword)):
            found |= _types(branch, root, depth - 1, seen)
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/") and reference not in seen:
        seen.add(reference)
        target: Any = root
        for step in reference[2:].split("/"):
            target = target.get(step) if isinstance(target, Mapping) else None
        found |= _types(target, root, depth - 1, seen)
    return found


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")
