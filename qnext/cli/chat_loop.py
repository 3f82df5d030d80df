"""The terminal side of a chat: reading lines, the slash commands, and what is said after each answer."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from qnext.cli.answer import stream_answer, turn_warnings
from qnext.cli.output import note, print_error, stderr_console
from qnext.errors import EngineError, QnextError, StoreError

if TYPE_CHECKING:
    from qnext.pipeline.chat import ChatRun

_HELP = "/stats shows speeds and memory, /reset forgets the conversation, /exit leaves (so does Ctrl-D)"


def chat_loop(chat: ChatRun) -> None:
    """Read a line, answer it, until /exit or the end of input. Ctrl-C stops an answer, not the chat."""
    from qnext.report.plan_view import plan_line

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)

    note(plan_line(chat.model.planned.plan))
    for warning in chat.model.warnings:
        note(f"warning: {warning}")
    note(_HELP)
    while True:
        try:
            line = _read_line()
        except EOFError:
            sys.stderr.write("\n")
            break
        except KeyboardInterrupt:
            sys.stderr.write("\n")
            note("type /exit to leave")
            continue
        if line == "/exit":
            break
        if line.startswith("/"):
            _command(chat, line)
        elif line:
            _answer(chat, line)
    record = chat.finish("ok")
    if record.tests:
        note(f"recorded; see it with: qnext bench show {record.id}")


def _read_line() -> str:
    """A line from the terminal. The prompt is no data, so it goes to stderr unless readline draws it."""
    sys.stderr.write("\n")
    sys.stderr.flush()
    if sys.stdout.isatty():
        return input("> ").strip()
    sys.stderr.write("> ")
    sys.stderr.flush()
    return input().strip()


def _answer(chat: ChatRun, line: str) -> None:
    from qnext.report.record_view import turn_line

    try:
        turn = stream_answer(chat, line)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        kept = (
            "your message and what was answered so far are"
            if chat.conversation.cut_off
            else "all before it is"
        )
        note(f"stopped; {kept} kept in the conversation")
        _revive(chat)
    except QnextError as error:
        sys.stderr.write("\n")
        print_error(error)
        if isinstance(error, StoreError):
            note("your message and the answer are kept in the conversation, but not recorded")
        else:
            note("your message was not added; the conversation before it is kept")
        _revive(chat)
    else:
        for warning in turn_warnings(turn, chat.max_tokens):
            note(warning)
        note(turn_line(turn, chat.model.planned))


def _revive(chat: ChatRun) -> None:
    if chat.model.session.alive:
        return
    note("starting the engine again")
    try:
        chat.model.reopen()
    except EngineError as error:
        print_error(error)


def _command(chat: ChatRun, line: str) -> None:
    from qnext.report.record_view import run_view

    if line == "/stats":
        record = chat.record()
        if record.tests:
            stderr_console().print(run_view(record))
        else:
            note("nothing measured yet; say something first")
    elif line == "/reset":
        chat.conversation.reset()
        note("forgotten; the next message starts afresh")
    else:
        note(f"'{line}' is no command: {_HELP}")
