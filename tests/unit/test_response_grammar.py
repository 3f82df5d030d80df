"""What a schema's grammar lets a model write is valid for the schema, and what is valid can be written.

Both ways are tried with random schemas of the subset, a small reader of GBNF and a small validator.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import uuid
from collections.abc import Callable, Mapping
from datetime import date, datetime, time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.errors import UsageError
from qnext.models.number_grammar import integer_grammar, number_grammar
from qnext.models.response_grammar import response_grammar
from qnext.models.schema_grammar import schema_grammar
from tests.gbnf_reading import Grammar

PATTERNS = {
    "^[a-z]{2,4}$": ["ab", "abcd"],
    r"^\d{3}-\d{4}$": ["123-4567"],
    r"^(\+|00)?[1-9]\d*$": ["+12", "0049", "7"],
    "a|b": ["a", "xbx"],
    r'^"[^"\\]*"$': ['""', '"é 🌧"'],
    r"^[\w.-]+@(?:[a-z]+\.)+[a-z]{2,}$": ["a.b-c@d.ef"],
    r"^.\n?$": ["x", "x\n"],
    "": ["", 'any "text"\\'],
    r"^[^a-y\s]*?$": ["", "zZ9"],
    r"^\u0041\x42[\]\-^]$": ["AB]", "AB-", "AB^"],
}
_TYPES: Mapping[str, Any] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
_FORMATS: Mapping[str, Callable[[str], object]] = {
    "date": date.fromisoformat,
    "date-time": datetime.fromisoformat,
    "uuid": uuid.UUID,
}


def _valid(value: Any, schema: Any, root: Any) -> bool:
    """The rules of JSON schema for the subset, read plainly."""
    if isinstance(schema, bool):
        return schema
    if value is None and schema.get("nullable"):
        return True
    checks = [_holds(key, wanted, value, schema, root) for key, wanted in schema.items()]
    return all(checks)


def _holds(key: str, wanted: Any, value: Any, schema: Mapping[str, Any], root: Any) -> bool:
    is_text, is_list, is_object = isinstance(value, str), isinstance(value, list), isinstance(value, dict)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    match key:
        case "type":
            names = [wanted] if isinstance(wanted, str) else wanted
            return any(
                isinstance(value, _TYPES[name]) and isinstance(value, bool) == (name == "boolean")
                for name in names
            )
        case "enum":
            return any(value == each and type(value) is type(each) for each in wanted)
        case "const":
            return bool(value == wanted and type(value) is type(wanted))
        case "$ref":
            target = root
            for step in wanted.split("/")[1:]:
                target = target[step]
            return _valid(value, target, root)
        case "anyOf":
            return any(_valid(value, each, root) for each in wanted)
        case "allOf":
            return all(_valid(value, each, root) for each in wanted)
        case "minLength":
            return not is_text or len(value) >= wanted
        case "maxLength":
            return not is_text or len(value) <= wanted
        case "pattern":
            return not is_text or re.search(wanted, value) is not None
        case "format":
            return not is_text or _is_written(_FORMATS[wanted], value)
        case "minimum":
            return not is_number or value >= wanted
        case "maximum":
            return not is_number or value <= wanted
        case "exclusiveMinimum":
            return not is_number or value > wanted
        case "exclusiveMaximum":
            return not is_number or value < wanted
        case "minItems":
            return not is_list or len(value) >= wanted
        case "maxItems":
            return not is_list or len(value) <= wanted
        case "items":
            rest = value[len(schema.get("prefixItems", [])) :] if is_list else []
            return all(_valid(each, wanted, root) for each in rest)
        case "prefixItems":
            return not is_list or all(_valid(e, s, root) for e, s in zip(value, wanted, strict=False))
        case "required":
            return not is_object or all(name in value for name in wanted)
        case "properties":
            return not is_object or all(_valid(value[n], s, root) for n, s in wanted.items() if n in value)
        case "additionalProperties":
            known = schema.get("properties", {})
            return not is_object or all(_valid(v, wanted, root) for n, v in value.items() if n not in known)
    assert key in ("$defs", "title", "description", "default", "nullable")
    return True


def _is_written(read: Callable[[str], object], text: str) -> bool:
    try:
        read(text)
    except ValueError:
        return False
    return True


def _bounds(low: str, high: str, least: int, most: int) -> st.SearchStrategy[dict[str, Any]]:
    pairs = st.lists(st.integers(least, most), min_size=2, max_size=2).map(sorted)
    return st.builds(
        lambda pair, keys: {key: value for key, value in zip((low, high), pair, strict=True) if key in keys},
        pairs,
        st.sets(st.sampled_from([low, high])),
    )


LEAVES = st.one_of(
    _bounds("minLength", "maxLength", 0, 6).map(lambda b: {"type": "string", **b}),
    st.sampled_from([{"type": "string", "pattern": each} for each in PATTERNS]),
    st.sampled_from([{"type": "string", "format": each} for each in _FORMATS]),
    _bounds("minimum", "maximum", -1200, 12000).map(lambda b: {"type": "integer", **b}),
    _bounds("minimum", "maximum", -30, 30).map(lambda b: {"type": "number", **b}),
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": ["integer", "null"], "minimum": 1},
            {"enum": ["a", 'b"\\\n', 1, 2.5, None, True, [1], {"a": "é"}]},
            {"type": "string", "enum": ["x", "y"]},
            {"const": "fixed"},
            {"type": "number", "exclusiveMinimum": -1, "exclusiveMaximum": 1},
            {"type": "integer", "exclusiveMinimum": 7, "maximum": 8},
            {"title": "Anything"},
            {"type": "object"},
            {"type": "array"},
        ]
    ),
)
NAMES = st.sampled_from(["a", "ab", "b", "name", "é", 'q"', "back\\slash"])


@st.composite
def _objects(draw: st.DrawFn, children: st.SearchStrategy[Any]) -> dict[str, Any]:
    properties = draw(st.dictionaries(NAMES, children, max_size=4))
    schema: dict[str, Any] = {"type": "object", "properties": properties}
    if properties:
        schema["required"] = draw(st.lists(st.sampled_from(sorted(properties)), unique=True))
    more = draw(st.one_of(st.none(), st.booleans(), children))
    return schema if more is None else {**schema, "additionalProperties": more}


def _nested(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    arrays = st.builds(
        lambda b, item: {"type": "array", "items": item, **b}, _bounds("minItems", "maxItems", 0, 4), children
    )
    tuples = st.builds(
        lambda first, more, least: {
            "type": "array",
            "prefixItems": first,
            "items": more,
            "minItems": min(least, len(first)),
        },
        st.lists(children, min_size=1, max_size=3),
        st.one_of(st.just(False), children),
        st.integers(0, 3),
    )
    either = st.lists(children, min_size=1, max_size=3).map(lambda branches: {"anyOf": branches})
    return st.one_of(_objects(children), arrays, tuples, either)


SCHEMAS = st.recursive(LEAVES, _nested, max_leaves=6)


def _instance(schema: Any, rng: random.Random) -> Any:
    """A random value that is valid for `schema` and in the order of its properties."""
    if "anyOf" in schema:
        return _instance(rng.choice(schema["anyOf"]), rng)
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "const" in schema:
        return schema["const"]
    kinds = schema.get("type", ["string", "null", "boolean"])
    kind = rng.choice(kinds) if isinstance(kinds, list) else kinds
    match kind:
        case "null":
            return None
        case "boolean":
            return rng.random() < 0.5
        case "integer":
            least = schema.get(
                "minimum", schema.get("exclusiveMinimum", schema.get("maximum", 0) - 9 - 1) + 1
            )
            return rng.randint(least, schema.get("maximum", least + 10 ** rng.randint(0, 12)))
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", schema.get("maximum", 1) - 40))
            high = schema.get("maximum", schema.get("exclusiveMaximum", low + 40))
            if "exclusiveMinimum" in schema:
                return rng.choice([-0.5, 0, 0.125, 0.999])
            return rng.choice([low, high, float(high), round(rng.uniform(low, high), 6)])
        case "string":
            if "pattern" in schema:
                return rng.choice(PATTERNS[schema["pattern"]])
            if "format" in schema:
                texts = {
                    "date": "2024-12-31",
                    "date-time": "1999-02-28T23:59:59.5+05:30",
                    "uuid": str(uuid.uuid4()),
                }
                return texts[schema["format"]]
            size = rng.randint(
                schema.get("minLength", 0), schema.get("maxLength", schema.get("minLength", 0) + 5)
            )
            return "".join(rng.choice('ab"\\\n/é🌧 {}') for _ in range(size))
        case "array":
            first = schema.get("prefixItems", [])
            most = schema.get("maxItems", schema.get("minItems", 0) + len(first) + 2)
            most = min(most, len(first)) if schema.get("items", not first) is False else most
            kinds = [*first, *[schema.get("items", {})] * most]
            return [_instance(kinds[at], rng) for at in range(rng.randint(schema.get("minItems", 0), most))]
    named = {
        name: _instance(part, rng)
        for name, part in schema.get("properties", {}).items()
        if name in schema.get("required", []) or rng.random() < 0.5
    }
    more = schema.get("additionalProperties", not schema.get("properties"))
    if more is False or rng.random() < 0.5:
        return named
    others = {name: _instance({} if more is True else more, rng) for name in ("abc", "", "nam", "z\n")}
    return {**named, **others}


@settings(max_examples=30)
@given(SCHEMAS, st.integers(0, 2**32))
def test_what_is_valid_can_be_written(schema: Any, seed: int) -> None:
    rng = random.Random(seed)
    grammar = Grammar(schema_grammar(schema))
    for options in ({}, {"separators": (",", ":")}, {"indent": 2}):
        value = _instance(schema, rng)
        assert _valid(value, schema, schema)
        if options and '"enum"' in json.dumps(schema):
            continue  # a value of an enum is only written in one way
        assert grammar.matches(json.dumps(value, ensure_ascii=False, **options)), (value, options)


@settings(max_examples=30)
@given(SCHEMAS, st.integers(0, 2**32))
def test_what_can_be_written_is_valid(schema: Any, seed: int) -> None:
    grammar = Grammar(schema_grammar(schema))
    for text in (grammar.write(random.Random(seed + each)) for each in range(6)):
        assert grammar.matches(text)
        assert _valid(json.loads(text), schema, schema), text


TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#"}}},
    "required": ["name", "children"],
    "additionalProperties": False,
}
PYDANTIC = {
    "$defs": {
        "Step": {
            "properties": {"explanation": {"type": "string"}, "output": {"type": "string", "default": ""}},
            "required": ["explanation"],
            "title": "Step",
            "type": "object",
        },
        "Node": {"anyOf": [{"$ref": "#/$defs/Step"}, {"type": "null"}]},
    },
    "properties": {
        "steps": {"items": {"$ref": "#/$defs/Step"}, "title": "Steps", "type": "array"},
        "last": {"$ref": "#/$defs/Node", "description": "where it ends"},
        "pair": {
            "type": "array",
            "prefixItems": [{"type": "integer"}, {"type": "string"}],
            "minItems": 2,
            "maxItems": 2,
        },
    },
    "required": ["steps", "last"],
    "title": "Answer",
    "type": "object",
}
BOTH = {
    "allOf": [
        {"properties": {"a": {"type": "number", "minimum": 2}}, "required": ["a"]},
        {"properties": {"a": {"type": "integer", "maximum": 3}, "b": {"type": "null"}}, "required": ["b"]},
    ],
    "type": "object",
}
EXAMPLES = [
    (TREE, ['{"name": "a", "children": [{"name": "b", "children": []}]}'], ['{"name": "a"}', "{}"]),
    (
        PYDANTIC,
        [
            '{"steps":[{"explanation":"x","output":"y"}],"last":null}',
            '{"steps": [], "last": null, "pair": [1, ""]}',
        ],
        ['{"steps": []}', '{"steps": [{}], "last": null}', '{"steps": [], "last": null, "pair": [1]}'],
    ),
    (
        BOTH,
        ['{"a": 2, "b": null}', '{"a":3,"b":null}'],
        ['{"a": 2.5, "b": null}', '{"a": 2}', '{"a":4,"b":null}'],
    ),
    (
        {"type": "string", "maxLength": 1700, "minLength": 600},
        ['"' + "x" * 600 + '"', '"' + "é" * 1499 + '"', '"' + "x" * 1700 + '"'],
        ['"' + "x" * 599 + '"', '"' + "x" * 1701 + '"'],
    ),
    (
        {"type": "string", "format": "date-time"},
        ['"2024-02-28T00:00:00Z"', '"2024-06-30T23:59:59.123456-11:00"'],
        ['"2024-02-30T00:00:00Z"', '"2024-06-31T00:00:00Z"', '"2024-06-30T24:00:00Z"', '"2024-06-30"'],
    ),
    (
        {"type": "object", "properties": {"a": {"type": "null"}}},
        ["{}", "{ }", '{"a":null}'],
        ['{"b":1}', '{"a":1}'],
    ),
    ({"type": "string", "nullable": True}, ["null", '"x"'], ["1"]),
    ({"minimum": 3, "type": "integer"}, ["3", "9999999999999999"], ["2", "-3", "03", "99999999999999999"]),
    (
        {"type": "string"},
        ['"\\u00e9\\n"', '"\\ud83c\\udf27"', '"/"'],
        ['"\\ud800"', '"\\ud83cx"', '"\\udf27"', '"\n"', '"\\x"', '"'],
    ),
    ({"required": ["a"], "type": "object"}, ['{"a": [1]}'], ["{}", '{"b": 1}']),
    ({"type": "object", "properties": {}}, ["{}", '{"any": {"thing": 1}}'], ["[]"]),
    (True, ['{"a": [1, "b", null]}', "-0.5e+10"], ["", "nul", "[1,]", "01"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), EXAMPLES)
def test_schemas_as_clients_send_them(schema: Any, good: list[str], bad: list[str]) -> None:
    grammar = Grammar(schema_grammar(schema))
    assert [text for text in good if not grammar.matches(text)] == []
    assert [text for text in bad if grammar.matches(text)] == []
    for seed in range(20):
        assert _valid(json.loads(grammar.write(random.Random(seed))), schema, schema)


@settings(max_examples=30)
@given(st.integers(-3000, 3000), st.integers(0, 3000), st.integers(-4000, 7000))
def test_bounds_of_integers_are_exact(low: int, span: int, value: int) -> None:
    for least, most in ((low, low + span), (low, None), (None, low)):
        grammar = _numbers(integer_grammar(least, most))
        for number in {value, low, low - 1, low + 1, low + span, low + span + 1}:
            inside = (least is None or number >= least) and (most is None or number <= most)
            assert grammar.matches(str(number)) == inside, (least, most, number)


@settings(max_examples=30)
@given(st.integers(-12, 120), st.integers(1, 120), st.booleans(), st.booleans(), st.integers(-300, 3000))
def test_bounds_of_numbers_are_exact(low: int, span: int, above: bool, below: bool, tenths: int) -> None:
    for least, most in ((low, low + span), (low, None), (None, low)):
        grammar = _numbers(number_grammar(least, most, above=above, below=below))
        for number in {tenths / 10, low - 0.1, float(low), low + 0.1, low + span - 0.1, float(low + span)}:
            over = least is None or (number > least if above else number >= least)
            under = most is None or (number < most if below else number <= most)
            if number or not (above or below):
                assert grammar.matches(f"{number:.1f}") == (over and under), (least, most, number)


def _numbers(body: str) -> Grammar:
    from qnext.models.gbnf import GrammarWriter

    return Grammar(GrammarWriter().text(body))


@pytest.mark.parametrize(("pattern", "texts"), PATTERNS.items())
def test_patterns_match_what_they_should(pattern: str, texts: list[str]) -> None:
    grammar = Grammar(schema_grammar({"type": "string", "pattern": pattern}))
    assert [text for text in texts if not grammar.matches(json.dumps(text, ensure_ascii=False))] == []
    for seed in range(30):
        text = json.loads(grammar.write(random.Random(seed)))
        assert re.search(pattern, text), text


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "array", "uniqueItems": True}, "'uniqueItems' at #"),
        ({"properties": {"a": {"items": {"multipleOf": 2}}}}, "'multipleOf' at #/properties/a/items"),
        ({"not": {}}, "'not' at #"),
        ({"if": {}, "then": {}}, "'if'"),
        ({"patternProperties": {}}, "'patternProperties'"),
        ({"type": "number", "minimum": 0.5}, "only whole numbers"),
        ({"type": "integer", "minimum": 5, "maximum": 4}, "leaves no integer"),
        ({"type": "string", "pattern": "^(?=a)"}, r"pattern at # cannot be enforced"),
        ({"type": "string", "pattern": r"(a)\1"}, "pattern"),
        ({"type": "string", "pattern": "(a*)*"}, "may be empty"),
        ({"type": "string", "pattern": "(a"}, "without an end"),
        ({"type": "string", "pattern": "[b-a]"}, "range"),
        (
            {"type": "string", "pattern": "a", "minLength": 3},
            "'minLength' at # cannot be enforced beside pattern",
        ),
        ({"$ref": "https://example.org/schema"}, "does not point into the schema"),
        ({"$ref": "#/$defs/none"}, "points to nothing"),
        ({"$ref": "#"}, "without end"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}, "without end"),
        ({"anyOf": [{"$ref": "#"}, {"type": "null"}], "type": "null"}, "without end|too deeply|more than"),
        ({"properties": {"a": False}, "required": ["a"]}, "allows nothing"),
        ({"required": ["a"], "additionalProperties": False}, "not allowed"),
        ({"allOf": [{"type": "string"}, {"type": "null"}]}, "'type'"),
        (
            {"allOf": [{"properties": {"a": {}}, "additionalProperties": False}, {"properties": {"b": {}}}]},
            "forbids 'b'",
        ),
        ({"type": "text"}, "cannot be text"),
        ({"enum": []}, "allows nothing"),
        ({"enum": ["a"], "type": "null"}, "allows nothing"),
        ({"minLength": -1}, "cannot be -1"),
        ({"minItems": "2"}, "cannot be 2"),
        ({"properties": []}, "'properties'"),
        ({"required": [1]}, "'required'"),
        ({"properties": {"a": 3}}, "at #/properties/a"),
        (3, "at #"),
    ],
)
def test_what_cannot_be_enforced_is_said_to_be(schema: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        schema_grammar(schema)
    assert caught.value.hint


def test_a_schema_without_bounds_is_refused_in_time() -> None:
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    with pytest.raises(UsageError):
        schema_grammar(deep)
    wide = {
        "$defs": {
            f"d{n}": {"properties": {k: {"$ref": f"#/$defs/d{n + 1}", "minItems": 1} for k in "ab"}}
            for n in range(40)
        }
    }
    wide["$defs"]["d40"] = {}
    with pytest.raises(UsageError, match="parts"):
        schema_grammar({**wide, "$ref": "#/$defs/d0"})


SOME_KEYWORDS = ["type", "items", "properties", "required", "enum", "anyOf", "allOf", "$ref", "minimum"]
SOME_KEYWORDS += [
    "additionalProperties",
    "pattern",
    "format",
    "minLength",
    "maxItems",
    "prefixItems",
    "nullable",
]


@settings(max_examples=30)
@given(
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.sampled_from(["string", "#", "a", "^a("])),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(SOME_KEYWORDS),
                inner,
                max_size=4,
            ),
        ),
        max_leaves=12,
    )
)
def test_any_nonsense_is_a_grammar_or_one_explained_error(schema: Any) -> None:
    with contextlib.suppress(UsageError):
        Grammar(schema_grammar(schema))


def test_forms_of_response_format() -> None:
    assert response_grammar(None) is None
    assert response_grammar({"type": "text"}) is None
    anything = Grammar(response_grammar({"type": "json_object"}) or "")
    assert anything.matches('{"a": {"b": [1, "x", null, -1.5e3]}}') and not anything.matches("[1]")
    schema = {"type": "integer", "minimum": 1, "maximum": 5}
    forms: list[dict[str, Any]] = [
        {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}},
        {"type": "json_schema", "name": "n", "schema": schema},
        {"type": "json_object", "schema": schema},
    ]
    assert {response_grammar(form) for form in forms} == {schema_grammar(schema)}
    own = 'root ::= "yes" | "no"'
    assert response_grammar({"type": "grammar", "grammar": own}) == own
    refused: list[dict[str, Any]] = [
        {"type": "xml"},
        {},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": 3},
        {"type": "grammar", "grammar": "a ::= b"},
        {"type": "gbnf", "grammar": own + " " * 300_000},
    ]
    for form in refused:
        with pytest.raises(UsageError):
            response_grammar(form)


def test_a_time_of_day_is_one() -> None:
    grammar = Grammar(schema_grammar({"type": "string", "format": "time"}))
    for seed in range(20):
        assert time.fromisoformat(json.loads(grammar.write(random.Random(seed))))
