"""An answer falls into reasoning, text and calls, wherever the stream is cut."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given, settings
from hypothesis import strategies as st

from qnext.models.answer import Answer, AnswerEvent, AnswerParser, Thought, gather_answer
from qnext.models.tool_calls import Said, ToolFormat

TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": "<think>"}}\n</tool_call>'
OPENED = "<|im_start|>assistant\n<think>\n"
CLOSED = "<|im_start|>assistant\n<think>\n\n</think>\n\n"


def _read(
    text: str,
    prompt: str = "",
    ends: Iterable[int] = (),
    *,
    thinking: bool = True,
    style: ToolFormat | None = "json",
) -> Answer:
    parser = AnswerParser(prompt, thinking=thinking, tools=TOOLS, style=style)
    events: list[AnswerEvent] = []
    start = 0
    for end in [*sorted(min(end, len(text)) for end in ends), len(text)]:
        events += parser.feed(text[start:end])
        start = end
    events += parser.finish()
    assert all(event.text for event in events if isinstance(event, Thought | Said))
    return gather_answer(events)


def _parts(answer: Answer) -> tuple[str, str, list[tuple[str, str, bool]]]:
    calls = [(call.name, call.arguments, call.finished) for call in answer.calls]
    return answer.reasoning, answer.content, calls


def test_thinking_text_and_calls_in_one_answer() -> None:
    text = f"I could use <tool_call>.\n\nYes.\n</think>\n\nLet me see.\n{CALL}\n{CALL}"
    expected = (
        "I could use <tool_call>.\n\nYes.",
        "Let me see.",
        [("f", '{"a": "<think>"}', True)] * 2,
    )
    for ends in ((), range(len(text)), range(0, len(text), 5)):
        answer = _read(text, OPENED, ends)
        assert _parts(answer) == expected
        assert not answer.warnings
    assert _parts(_read("<think>\n" + text)) == expected
    assert _parts(_read("\n<think>" + text, "assistant\n")) == expected


@settings(max_examples=80)
@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", " ", "\n", "a", "<", "é", CALL, "<tool_call>"]), max_size=12
    ),
    st.lists(st.integers(0, 150), max_size=20),
    st.sampled_from(["", OPENED, CLOSED]),
    st.booleans(),
    st.sampled_from(["json", None]),
)
def test_where_the_stream_is_cut_changes_nothing(
    words: list[str], ends: list[int], prompt: str, thinking: bool, style: ToolFormat | None
) -> None:
    text = "".join(words)
    whole = _read(text, prompt, thinking=thinking, style=style)
    assert _parts(_read(text, prompt, ends, thinking=thinking, style=style)) == _parts(whole)
    if style is None and not thinking:
        assert whole.content == text


def test_line_breaks_of_the_template_are_no_part_of_the_answer() -> None:
    assert _parts(_read("\n\nHm.\n\n</think>\n\n Yes \n", OPENED)) == ("Hm.", "Yes \n", [])
    assert _parts(_read("\n\nYes", CLOSED)) == ("", "Yes", [])
    assert _parts(_read("\n</think>\n\n", OPENED)) == ("", "", [])
    assert _parts(_read(f"\n{CALL}\n", CLOSED)) == ("", "", [("f", '{"a": "<think>"}', True)])


def test_white_space_of_an_answer_without_thinking_is_kept() -> None:
    assert _read("  \n indented\n").content == "  \n indented\n"
    assert _read("\n").content == "\n"


def test_thinking_that_never_ends_stays_reasoning() -> None:
    assert _parts(_read(f"so {CALL} </thi", OPENED)) == (f"so {CALL} </thi", "", [])


def test_what_is_switched_off_is_text() -> None:
    text = f"<think>a</think>{CALL}"
    assert _read(text, thinking=False, style=None).content == text
    assert _parts(_read(text, thinking=False))[1] == "<think>a</think>"
    assert _parts(_read(text, style=None)) == ("a", CALL, [])
    no_tools = AnswerParser("", tools=[], style="json")
    assert list(no_tools.feed(CALL)) == [Said(CALL)]


def test_a_call_cut_off_is_known_to_be_unfinished() -> None:
    answer = _read(CALL[:50])
    assert [call.finished for call in answer.calls] == [False]
    assert answer.warnings
