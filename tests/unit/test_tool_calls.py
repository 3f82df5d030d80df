"""Tool calls come out the same wherever the stream is cut, and nothing of the text is lost or said twice."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qnext.models.tool_calls import (
    CallArguments,
    CallBegun,
    CallEnded,
    Said,
    ToolCallParser,
    ToolEvent,
    ToolFormat,
    Warned,
    tool_format,
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "exact": {"type": "boolean"},
                "limits": {"type": "array", "items": {"type": "number"}},
                "more": {"type": "object"},
                "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "unit": {"$ref": "#/$defs/Unit"},
                "factor": {"type": ["number", "null"]},
                "untyped": {},
            },
            "$defs": {"Unit": {"enum": ["C", "F", 3]}},
        },
    },
}
WRITE = {"type": "function", "function": {"name": "write_file", "parameters": {"properties": {}}}}
TOOLS = [WEATHER, WRITE]


def _parse(text: str, style: ToolFormat, ends: Iterable[int] = ()) -> list[ToolEvent]:
    parser = ToolCallParser(TOOLS, style)
    events: list[ToolEvent] = []
    start = 0
    for end in [*sorted(min(end, len(text)) for end in ends), len(text)]:
        events += parser.feed(text[start:end])
        start = end
    return [*events, *parser.finish()]


def _joined(events: Sequence[ToolEvent]) -> list[Any]:
    """Events without ids, neighbouring pieces joined."""
    joined: list[Any] = []
    for event in events:
        match event:
            case Said(text):
                entry = ["said", text]
            case CallBegun(index, id, name):
                assert id.startswith("call_") and len(id) > 20
                entry = ["begun", index, name]
            case CallArguments(index, text):
                entry = ["arguments", index, text]
            case CallEnded(index, whole):
                entry = ["ended", index, whole]
            case Warned():
                entry = ["warned"]
        if joined and entry[0] in ("said", "arguments") and joined[-1][:-1] == entry[:-1]:
            joined[-1][-1] += entry[-1]
        else:
            joined.append(entry)
    return joined


def _said(events: Sequence[ToolEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Said))


def _calls(events: Sequence[ToolEvent]) -> list[tuple[str, str]]:
    names = [event.name for event in events if isinstance(event, CallBegun)]
    texts = ["" for _ in names]
    for event in events:
        if isinstance(event, CallArguments):
            texts[event.index] += event.text
    return list(zip(names, texts, strict=True))


def _decoded(events: Sequence[ToolEvent]) -> list[tuple[str, Any]]:
    return [(name, json.loads(text)) for name, text in _calls(events)]


def _warnings(events: Sequence[ToolEvent]) -> list[str]:
    return [event.message for event in events if isinstance(event, Warned)]


def _as_json(name: str, arguments: object) -> str:
    call = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


def _as_xml(name: str, arguments: dict[str, str]) -> str:
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"


TRICKY = {
    "city": 'Zürich "old" {town} \\ 🌧\n</tool_call>\n<tool_call>{"name": "no"}',
    "more": {"a": [{"b": "]}"}, {}], "c": {"d": None}},
}
TWO = f"Let me look.\n{_as_json('get_weather', TRICKY)}\n{_as_json('write_file', {})}"
CODE = 'def f(a):\n    if a < 2 and "x" in {"</b>": 1}:\n        return \'\\n\'\n\n<div class="a">&amp;</div>'
XML = "I will.\n\n" + _as_xml("write_file", {"path": "a b.py", "content": CODE}) + "\n"
XML_TYPED = _as_xml(
    "get_weather",
    {
        "city": "5",
        "days": "5",
        "exact": "True",
        "limits": "[1, 2.5]",
        "more": '{\n  "a": "</x>"\n}',
        "note": "None",
        "unit": "C",
        "factor": "1e3",
        "untyped": "[1]",
    },
)
MALFORMED = [
    ("json", "<tool_call>\n{'name': 1}\n</tool_call>\nok"),
    ("json", '<tool_call>{"nom": "x"}</tool_call>'),
    ("json", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("json", '<tool_call>{"name": "get_weather", "arguments": [1]}</tool_call>'),
    ("json", '<tool_call>{"name": "get_weather", "arguments": "no"}</tool_call> and'),
    ("json", "The tag `<tool_call>` opens a call, </tool_call> ends it."),
    ("json", "<tool_call>" + "\n" * 99 + '{"name": "a", "arguments": {}}'),
    ("json", '<tool_call>{"name": "get_weather'),
    ("json", "<tool_call>"),
    ("json", "a\n<tool_call>\n"),
    ("json", "a <tool_ca"),
    ("json", "[" * 9 + '<tool_call>{"a": ' + "[" * 5000 + "]" * 5000 + "}</tool_call>"),
    ("xml", "<tool_call>\n<function=a b\nc>"),
    ("xml", "<tool_call><function=>x"),
    ("xml", "<tool_call>\n<func"),
    ("xml", "In the text <function=get_weather>"),
    ("xml", "<function=unheard_of>\n</function>"),
]
PARTS = ["<tool_call>", "</tool_call>", "<function=f>", "</function>", "<parameter=a>", "</parameter>"]
PARTS += [
    *'{}"\\[]:<aé \n',
    '{"name": "x", ',
    '"arguments": ',
    '<tool_call>{"name": "x", "arguments": {"a": "',
]
ALL = [("json", TWO), ("xml", XML), ("xml", XML_TYPED), *MALFORMED]


@settings(max_examples=100)
@given(st.sampled_from(ALL), st.lists(st.integers(0, 300), max_size=30))
def test_where_the_stream_is_cut_changes_nothing(case: tuple[ToolFormat, str], ends: list[int]) -> None:
    style, text = case
    assert _joined(_parse(text, style, ends)) == _joined(_parse(text, style))


@pytest.mark.parametrize(("style", "text"), ALL)
def test_one_character_at_a_time_is_no_different(style: ToolFormat, text: str) -> None:
    assert _joined(_parse(text, style, range(len(text)))) == _joined(_parse(text, style))


def test_several_json_calls_in_one_answer() -> None:
    events = _parse(TWO, "json", range(0, 999, 3))
    assert _said(events) == "Let me look."
    assert _decoded(events) == [("get_weather", TRICKY), ("write_file", {})]
    assert _joined(events)[-1] == ["ended", 1, True]
    assert not _warnings(events)
    ids = {event.id for event in events if isinstance(event, CallBegun)}
    assert len(ids) == 2


def test_a_parameters_text_is_kept_to_the_letter() -> None:
    events = _parse(XML, "xml", range(0, 999, 2))
    assert _said(events) == "I will."
    assert _decoded(events) == [("write_file", {"path": "a b.py", "content": CODE})]
    assert not _warnings(events)


def test_only_one_line_break_on_either_side_of_a_parameter_is_layout() -> None:
    for value in ("", "\n", "\n\na\n\n", "  a  ", "\n </parameter \n"):
        assert _decoded(_parse(_as_xml("write_file", {"content": value}), "xml", range(99))) == [
            ("write_file", {"content": value})
        ]
    inline = "<tool_call><function=write_file><parameter=content>a\nb</parameter></function></tool_call>"
    assert _decoded(_parse(inline, "xml")) == [("write_file", {"content": "a\nb"})]


def test_parameters_have_the_types_of_the_tools_schema() -> None:
    events = _parse(XML_TYPED, "xml")
    assert _decoded(events) == [
        (
            "get_weather",
            {
                "city": "5",
                "days": 5,
                "exact": True,
                "limits": [1, 2.5],
                "more": {"a": "</x>"},
                "note": None,
                "unit": "C",
                "factor": 1000.0,
                "untyped": "[1]",
            },
        )
    ]
    assert not _warnings(events)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("days", "five"),
        ("days", "2.5"),
        ("days", "NaN"),
        ("limits", "{}"),
        ("exact", "1"),
        ("more", "{1: 2}"),
    ],
)
def test_a_value_that_is_not_of_its_type_becomes_a_string_with_a_warning(key: str, value: str) -> None:
    events = _parse(_as_xml("get_weather", {key: value}), "xml")
    assert _decoded(events) == [("get_weather", {key: value})]
    assert len(_warnings(events)) == 1


@pytest.mark.parametrize(("style", "text"), MALFORMED)
def test_what_is_no_call_is_passed_on_as_the_text_it_was(style: ToolFormat, text: str) -> None:
    events = _parse(text, style)
    assert _said(events) == text
    assert not _calls(events)
    assert len(_warnings(events)) == text.count("<tool_call>") or style == "xml"


@settings(max_examples=100)
@given(
    st.lists(
        st.sampled_from(PARTS),
        max_size=25,
    ),
    st.sampled_from(["json", "xml"]),
    st.lists(st.integers(0, 120), max_size=12),
)
@example(["<tool_call>", '{"name": "x", ', '"arguments": ', "{", "}", "\n", "a"], "json", [])
def test_any_text_is_taken_apart_alike_and_each_call_ends_once(
    parts: list[str], style: ToolFormat, ends: list[int]
) -> None:
    text = "".join(parts)
    events = _parse(text, style, ends)
    assert _joined(events) == _joined(_parse(text, style))
    begun = [event.index for event in events if isinstance(event, CallBegun)]
    assert begun == [event.index for event in events if isinstance(event, CallEnded)] == [*range(len(begun))]
    if not begun:
        assert _said(events) == text


def test_arguments_stream_before_the_call_is_whole() -> None:
    parser = ToolCallParser(TOOLS)
    list(parser.feed('<tool_call>\n{"name": "get_weather", "arguments": {"city": "Be'))
    assert list(parser.feed("rn, ")) == [CallArguments(0, "rn, ")]
    parser = ToolCallParser(TOOLS, "xml")
    list(parser.feed("<tool_call>\n<function=write_file>\n<parameter=content>\nfor a"))
    assert list(parser.feed(" in b:\n    c <")) == [CallArguments(0, " in b:\\n    c ")]
    assert list(parser.feed(" d")) == [CallArguments(0, "< d")]


def test_text_is_held_back_only_while_it_may_be_a_tag() -> None:
    parser = ToolCallParser(TOOLS)
    assert list(parser.feed("a <")) == [Said("a")]
    assert list(parser.feed("b <tool_")) == [Said(" <b")]
    assert list(parser.feed("box")) == [Said(" <tool_box")]


def test_json_keys_may_come_in_any_order_and_arguments_as_text_or_not_at_all() -> None:
    text = (
        '<tool_call>{"arguments": {"a": "é"}, "name": "write_file"}</tool_call>'
        '<tool_call>{"name": "write_file", "arguments": "{\\"a\\": 1}"}</tool_call>'
        '<tool_call>{"name": "write_file"}</tool_call>'
    )
    events = _parse(text, "json", range(len(text)))
    assert _calls(events) == [("write_file", '{"a": "é"}'), ("write_file", '{"a": 1}'), ("write_file", "{}")]
    assert not _said(events) and not _warnings(events)


def test_a_call_may_lack_its_first_tag_where_it_starts_a_line() -> None:
    body = "<function=write_file>\n<parameter=content>\nx\n</parameter>\n</function>"
    for text in (body, f"Well:\n{body}\n</tool_call>", f"{body}\n"):
        events = _parse(text, "xml", range(len(text)))
        assert _decoded(events) == [("write_file", {"content": "x"})]
        assert _said(events) == ("Well:" if text.startswith("Well") else "")
        assert not _warnings(events)
    assert not _calls(_parse(f"Well: {body}", "xml"))
    assert not _calls(_parse(body, "json"))


@pytest.mark.parametrize(
    ("style", "text", "arguments"),
    [
        ("json", '<tool_call>\n{"name": "write_file", "arguments": {"a": "rm -', '{"a": "rm -'),
        ("json", '<tool_call>{"name": "write_file", "arguments": {"a": 1}', '{"a": 1}'),
        ("json", '<tool_call>{"name": "write_file", "arguments": {"a": x}}</tool_call>', '{"a": x}'),
        ("json", '<tool_call>{"name": "write_file", "arguments": {"a": 1</tool_call>', '{"a": 1'),
        ("json", '<tool_call>{"name": "write_file", "arguments": {"a": "1}\n</tool_call>', '{"a": "1}'),
        ("xml", "<tool_call><function=write_file><parameter=a>\nrm -", '{"a": "rm -'),
        ("xml", "<tool_call><function=get_weather><parameter=days>\n1", '{"days": "1'),
        ("xml", "<tool_call><function=write_file><parameter=a>1</parameter>", '{"a": "1"'),
        ("xml", "<tool_call><function=write_file></tool_call>", "{}"),
    ],
)
def test_a_call_that_breaks_off_keeps_what_it_has_and_warns(
    style: ToolFormat, text: str, arguments: str
) -> None:
    events = _parse(text, style)
    assert _calls(events) == [("write_file" if "write_file" in text else "get_weather", arguments)]
    assert len(_warnings(events)) == 1
    assert not _said(events)
    last = next(event for event in reversed(events) if not isinstance(event, Warned))
    try:
        json.loads(arguments)
    except ValueError:
        assert last == CallEnded(0, whole=False)
    else:
        assert last == CallEnded(0)


def test_what_follows_a_broken_call_is_read_afresh() -> None:
    good = _as_json("write_file", {})
    events = _parse('<tool_call>{"name": "write_file", "arguments": {"a": 1}} so\n' + good, "json")
    assert _decoded(events) == [("write_file", {"a": 1}), ("write_file", {})]
    assert _said(events) == " so"
    missing = "<tool_call>\n<function=write_file>\n<parameter=a>\n1\n</function>\n</tool_call>\n"
    events = _parse(missing + _as_xml("write_file", {"b": "2"}), "xml", range(300))
    assert _decoded(events) == [("write_file", {"a": "1"}), ("write_file", {"b": "2"})]


def test_a_call_of_an_unknown_tool_is_passed_on_with_a_warning() -> None:
    events = _parse(_as_json("rm", {}), "json")
    assert _decoded(events) == [("rm", {})]
    assert "'rm'" in _warnings(events)[0]


def test_types_that_refer_to_themselves_end() -> None:
    schema = {"properties": {"a": {"$ref": "#/properties/a", "anyOf": [{"$ref": "#"}] * 50}}, "anyOf": 3}
    parser = ToolCallParser([{"function": {"name": "f", "parameters": schema}}], "xml")
    events = [*parser.feed(_as_xml("f", {"a": "1"})), *parser.finish()]
    assert _decoded(events) == [("f", {"a": "1"})]


def test_the_way_of_writing_calls_is_read_from_the_template() -> None:
    assert tool_format("{{ '<tool_call>\\n{\"name\": ' ~ n ~ ', \\\"arguments\\\": ' }}") == "json"
    assert tool_format("<tool_call>\n<function=f>\n<parameter=p>") == "xml"
    assert tool_format("<tool_call>f<arg_key>") is None
    assert tool_format("{{ messages }}") is None
