"""What joins the history of a chat when an answer ends, is stopped, or fails."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from qnext.errors import EngineError
from qnext.models.chat import ChatTemplate
from qnext.pipeline.chat import without_text
from qnext.pipeline.conversation import ContextFullError, Conversation

_TEMPLATE = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
_DONE: dict[str, object] = {
    "event": "done",
    "prompt_tokens": 3,
    "cached_tokens": 0,
    "generated": 2,
    "decodes": 1,
    "prefill_ns": 1,
    "decode_ns": 1,
    "stop_reason": "eos",
}


class _Model:
    """The part of a running model that a conversation uses; `says` is the next answer, piece by piece."""

    def __init__(self, context: int = 1000, slots: int = 1) -> None:
        self.opened = SimpleNamespace(facts={"context": context * slots, "context_per_sequence": context})
        self.session = SimpleNamespace(tokenize=lambda text: list(text.encode()))
        self.says: list[str | Exception] = []
        self.asked: list[str] = []

    def generate(self, prompt: str, **_: object) -> Iterator[dict[str, object]]:
        self.asked.append(prompt)
        yield {"event": "prefill", "done": 3, "total": 3}
        for piece in self.says:
            if isinstance(piece, Exception):
                raise piece
            yield {"event": "token", "text": piece}
        yield _DONE


def _conversation(model: _Model, system: str | None = None) -> Conversation:
    return Conversation(model, _TEMPLATE, {}, system=system)  # type: ignore[arg-type]


def test_an_answer_joins_the_history_without_its_thinking() -> None:
    model = _Model()
    chat = _conversation(model, system="S")
    model.says = ["<think>h", "m</thi", "nk>\n\nYes", ".\n"]
    pieces = list(chat.say("A?"))
    assert "".join(piece.text for piece in pieces if piece.kind == "thinking") == "hm"
    assert "".join(piece.text for piece in pieces if piece.kind == "text") == "Yes.\n"
    assert (chat.turns[-1].text, chat.turns[-1].thinking) == ("Yes.", "hm")
    list(chat.say("B?"))
    assert model.asked[-1] == "[system]S[user]A?[assistant]Yes.[user]B?"
    chat.reset()
    list(chat.say("C?"))
    assert model.asked[-1] == "[system]S[user]C?"


def test_an_answer_stopped_on_the_way_is_kept_as_far_as_it_went() -> None:
    model = _Model()
    chat = _conversation(model)
    model.says = ["One ", "two ", "three"]
    answer = chat.say("Count")
    assert [next(answer).text for _ in range(3)] == ["", "One ", "two "]
    answer.close()
    assert chat.cut_off
    assert not chat.turns
    list(chat.say("Go on"))
    assert model.asked[-1] == "[user]Count[assistant]One two[user]Go on"


def test_stopped_before_the_first_word_nothing_is_kept() -> None:
    model = _Model()
    chat = _conversation(model)
    model.says = ["<think>", "hm"]
    answer = chat.say("Hard?")
    next(answer)
    next(answer)
    answer.close()
    assert not chat.cut_off
    assert chat.messages == []


def test_after_an_error_the_history_is_as_before() -> None:
    model = _Model()
    chat = _conversation(model)
    model.says = ["Yes"]
    list(chat.say("A?"))
    before = list(chat.messages)
    model.says = ["No", EngineError("gone")]
    with pytest.raises(EngineError):
        list(chat.say("B?"))
    assert chat.messages == before


def test_a_conversation_that_outgrows_the_context_is_refused_whole() -> None:
    model = _Model(context=40)
    chat = _conversation(model)
    model.says = ["Yes"]
    with pytest.raises(ContextFullError, match=r"the prompt is 56 tokens long, .* room for 40") as caught:
        list(chat.say("x" * 50))
    assert "--ctx-size 128" in caught.value.hint and "/reset" not in caught.value.hint
    list(chat.say("A?"))
    with pytest.raises(ContextFullError, match="with this message the conversation is") as caught:
        list(chat.say("x" * 20))
    assert "/reset" in caught.value.hint
    assert len(model.asked) == 1, "the engine was not bothered"
    assert len(chat.messages) == 2


def test_room_for_a_longer_message_counts_every_slot() -> None:
    with pytest.raises(ContextFullError) as caught:
        list(_conversation(_Model(context=40, slots=3)).say("x" * 50))
    assert caught.value.hint.endswith("--ctx-size 384")


def test_the_recorded_command_has_no_text_of_the_user() -> None:
    words = [
        "run",
        "demo",
        "-phi there",
        "--prompt=hi there",
        "-sys",
        "be kind",
        "-c",
        "256",
        "-sys=be kind",
    ]
    assert without_text(words, "hi there", "be kind", None) == [
        *("run", "demo", "-p(text)", "--prompt=(text)", "-sys", "(text)", "-c", "256", "-sys=(text)")
    ]
