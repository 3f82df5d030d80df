"""The chat, in a real terminal: history, slash commands, Ctrl-C, Ctrl-D, a context that fills up."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from qnext.config import find_paths
from qnext.models.synth import DEMO_SENTENCE
from tests.cli.conftest import CTRL_C, CTRL_D, Terminal
from tests.conftest import Qnext

pytestmark = pytest.mark.engine

Open = Callable[..., Terminal]


PROMPT = "> "


def test_a_conversation_with_all_its_commands(terminal: Open, qnext: Qnext) -> None:
    chat = terminal("run", "demo")
    assert "/stats" in chat.wait_for(PROMPT)
    chat.type("/stats\n")
    assert "nothing measured yet" in chat.wait_for(PROMPT)
    chat.type("Hello\n")
    first = chat.wait_for(PROMPT)
    assert " ".join(DEMO_SENTENCE.split()[:4]) in first
    assert "predicted" in first and "known" not in first
    chat.type("And now?\n")
    assert "known)" in chat.wait_for(PROMPT), "the first turn was still in the context"
    chat.type("/stats\n")
    stats = chat.wait_for(PROMPT)
    assert stats.count("prefill") == 2 and "allocated" in stats and "predicted" in stats
    chat.type("/help\n")
    assert "'/help' is no command: /stats" in chat.wait_for(PROMPT)
    chat.type("/reset\n")
    assert "forgotten" in chat.wait_for(PROMPT)
    chat.type("Hello\n")
    assert "known" not in chat.wait_for(PROMPT)
    chat.type(CTRL_C)
    assert "type /exit to leave" in chat.wait_for(PROMPT)
    chat.type(CTRL_D)
    chat.wait_for("recorded; see it with: qnext bench show")
    assert chat.wait() == 0
    record = json.loads(qnext("bench", "show", "--json").stdout)
    assert record["status"] == "ok"
    assert len(record["tests"]) == 6
    assert record["text"] is None


@pytest.mark.thorough
def test_an_answer_that_cannot_be_recorded_is_kept(
    terminal: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNEXT_HOME", str(tmp_path))
    chat = terminal("run", "demo", columns=120)
    chat.wait_for(PROMPT)
    with closing(sqlite3.connect(find_paths().results_db)) as database:
        database.execute("DROP TABLE tests")
    chat.type("Hello\n")
    chat.wait_for("your message and the answer are kept in the conversation, but not recorded")
    chat.wait_for(PROMPT)
    chat.type(CTRL_D)
    chat.wait()


def test_ctrl_c_while_the_prompt_is_read_leaves_the_chat_open(terminal: Open) -> None:
    chat = terminal("run", "demo", "--system", "word " * 12_000, columns=120)
    chat.wait_for(PROMPT)
    chat.type("Hello\n")
    chat.wait_for("reading the prompt")
    chat.type(CTRL_C)
    chat.wait_for("stopped; all before it is kept", timeout=5)
    chat.wait_for(PROMPT)
    chat.type("/exit\n")
    assert chat.wait() == 0


def test_a_full_context_loses_nothing(terminal: Open) -> None:
    chat = terminal("run", "demo", "-c", "256", columns=120)
    chat.wait_for(PROMPT)
    chat.type("Hello\n")
    chat.wait_for(PROMPT)
    chat.type("word " * 200 + "\n")
    told = chat.wait_for("is kept")
    assert "with this message the conversation is" in told and "/reset" in told and "--ctx-size" in told
    chat.wait_for(PROMPT)
    chat.type("Hello\n")
    assert "known)" in chat.wait_for(PROMPT), "the history before the long message is still there"
    chat.type("/exit\n")
    assert chat.wait() == 0
