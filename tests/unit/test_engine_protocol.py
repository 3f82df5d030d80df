"""Frames between us and the engine child, and the text that comes out of its tokens."""

from __future__ import annotations

import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.engine.llama.text import TextStream
from qnext.engine.protocol import frame, read_message

JSON = st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text() | st.lists(st.text()))


class Dribble(io.RawIOBase):
    """A pipe that hands over one byte at a time."""

    def __init__(self, data: bytes) -> None:
        self._data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        piece = self._data.read(1)
        buffer[: len(piece)] = piece
        return len(piece)


@given(st.lists(JSON, max_size=4))
def test_messages_arrive_whole_and_in_order_however_they_are_split(messages: list[dict[str, object]]) -> None:
    stream = io.BufferedReader(Dribble(b"".join(frame(message) for message in messages)))
    assert [read_message(stream) for _ in messages] == messages
    assert read_message(stream) is None


@given(JSON, st.data())
def test_a_writer_that_dies_in_the_middle_of_a_frame_ends_the_stream(
    message: dict[str, object], data: st.DataObject
) -> None:
    whole = frame(message)
    cut = data.draw(st.integers(0, len(whole) - 1))
    assert read_message(io.BytesIO(whole[:cut])) is None


@pytest.mark.parametrize("garbage", [b"\xff\xff\xff\xff", b"\0\0\0\x02[]", b"\0\0\0\x01{", b"\0\0\0\x01\xff"])
def test_bytes_that_are_no_frame_are_refused(garbage: bytes) -> None:
    with pytest.raises(ValueError):
        read_message(io.BytesIO(garbage))


def test_names_that_are_no_utf8_survive() -> None:
    name = os.fsdecode(b"/models/\xff.gguf")
    assert read_message(io.BytesIO(frame({"model": name}))) == {"model": name}


def run(pieces: list[bytes], stops: list[str]) -> tuple[str, bool]:
    stream, shown = TextStream(stops), ""
    for piece in pieces:
        shown += stream.feed(piece)
        if stream.stopped:
            return shown, True
    return shown + stream.feed(b"", final=True), stream.stopped


@given(st.text(alphabet="abé🙂 ", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4)), st.data())
def test_text_is_cut_exactly_at_the_first_stop_string_however_tokens_split_it(
    text: str, stops: list[str], data: st.DataObject
) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    pieces = [raw[start:end] for start, end in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    found = [text.index(stop) for stop in stops if stop in text]
    shown, stopped = run(pieces, stops)
    assert stopped == bool(found)
    if not found:
        assert shown == text
    else:
        assert text.startswith(shown) and not any(stop in shown for stop in stops)
        assert any(text.startswith(stop, len(shown)) for stop in stops)


def test_what_cannot_be_a_stop_string_is_shown_at_once() -> None:
    stream = TextStream(["<end>"])
    assert stream.feed(b"hello <") == "hello "
    assert stream.feed(b"b>") == "<b>"


def test_a_character_cut_off_at_the_end_is_marked() -> None:
    assert run(["é".encode()[:1]], []) == ("�", False)
