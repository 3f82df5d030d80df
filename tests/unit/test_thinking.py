"""Thinking told from speech, wherever the stream is cut, and shown apart from it."""

from __future__ import annotations

from collections.abc import Generator, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.cli.answer import stream_answer, turn_warnings
from qnext.models.chat import ThinkingSplitter
from qnext.pipeline.conversation import Piece, Turn


def _split(text: str, cuts: Iterable[int], prompt: str = "") -> dict[bool, str]:
    splitter = ThinkingSplitter(prompt)
    parts = {True: "", False: ""}
    ends = sorted({min(cut, len(text)) for cut in cuts} | {len(text)})
    start = 0
    for end in ends:
        for thinking, piece in splitter.feed(text[start:end]):
            parts[thinking] += piece
        start = end
    for thinking, piece in splitter.finish():
        parts[thinking] += piece
    return parts


@given(st.lists(st.integers(0, 60)))
def test_cuts_do_not_change_what_is_thought_and_said(cuts: list[int]) -> None:
    text = "<think>1 < 2, so <b></think>\n\nAnswer: a<b <thin> <"
    assert _split(text, cuts) == {True: "1 < 2, so <b>", False: "\n\nAnswer: a<b <thin> <"}


@given(st.text("<>/think ab", max_size=40), st.lists(st.integers(0, 40)))
def test_nothing_but_tags_is_ever_lost(text: str, cuts: list[int]) -> None:
    parts = _split(text, cuts)
    assert parts == _split(text, [])
    kept = len(parts[True]) + len(parts[False])
    assert len(text) - kept in {7 * opened + 8 * closed for opened in range(7) for closed in range(7)}


def test_a_template_that_opens_the_thinking_is_noticed() -> None:
    text = "Hm.</think>Yes."
    assert _split(text, [3], prompt="<|im_start|>assistant\n<think>\n") == {True: "Hm.", False: "Yes."}
    assert _split("Yes.", [], prompt="<think>\n\n</think>\n\n") == {True: "", False: "Yes."}


def test_a_tag_that_is_mentioned_in_what_is_said_is_text() -> None:
    text = "<think>a</think> Write <think> and </think>."
    assert _split(text, range(len(text))) == {True: "a", False: " Write <think> and </think>."}


def test_unfinished_thinking_stays_thinking() -> None:
    assert _split("<think>and then </thi", [9]) == {True: "and then </thi", False: ""}


def _turn(**changes: object) -> Turn:
    fields: dict[str, object] = {
        "text": "said",
        "thinking": "",
        "prompt_tokens": 9,
        "cached_tokens": 0,
        "generated": 3,
        "decodes": 2,
        "prefill_ns": 1,
        "decode_ns": 1,
        "stop_reason": "eos",
    }
    return Turn(**{**fields, **changes})  # type: ignore[arg-type]


class _Said:
    """A chat whose next answer is given as pieces."""

    def __init__(self, *pieces: Piece) -> None:
        self.turns = [_turn()]
        self.conversation = self
        self._pieces = pieces

    def say(self, _: str) -> Generator[Piece, None, None]:
        yield from self._pieces


def test_thinking_is_shown_on_stderr_and_speech_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = (
        Piece("prefill", done=1, total=1),
        Piece("thinking", "[bold]hm"),
        Piece("thinking", "m"),
        Piece("text", "Yes"),
        Piece("text", "."),
    )
    stream_answer(_Said(*pieces), "?")  # type: ignore[arg-type]
    shown = capsys.readouterr()
    assert shown.out == "Yes.\n"
    assert shown.err.split() == ["(thinking)", "[bold]hmm", "(answer)"]


def test_a_line_end_of_the_models_own_is_not_doubled(capsys: pytest.CaptureFixture[str]) -> None:
    stream_answer(_Said(Piece("text", "a\n")), "?")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "a\n"


@pytest.mark.parametrize(
    ("turn", "word"),
    [
        (_turn(stop_reason="context"), "--ctx-size"),
        (_turn(stop_reason="length"), "--max-tokens"),
        (_turn(text=""), "without saying anything"),
    ],
)
def test_an_answer_that_is_cut_off_or_empty_is_said_to_be(turn: Turn, word: str) -> None:
    assert word in " ".join(turn_warnings(turn, 3))
    assert not list(turn_warnings(_turn(), 3))
