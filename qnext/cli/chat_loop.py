"""The terminal side of a chat: reading lines, streaming answers, the slash commands."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING

from qnext.cli.output import note, print_error, stderr_console
from qnext.errors import EngineError, QnextError

if TYPE_CHECKING:
    from qnext.pipeline.chat import ChatRun
    from qnext.pipeline.conversation import Turn

_HELP = "/stats shows speeds and memory, /reset forgets the conversation, /exit leaves (Ctrl-D too)"


def chat_loop(chat: ChatRun) -> None:
    """Read a line, answer it, until /exit or the end of input. Ctrl-C stops an answer, not the chat."""
    from qnext.report.plan_view import plan_line

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)

    note(plan_line(chat.model.planned.plan))
    note(_HELP)
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            break
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            note("type /exit to leave")
            continue
        if not line:
            continue
        if line == "/exit":
            break
        if line.startswith("/"):
            _command(chat, line)
            continue
        _answer(chat, line)
    record = chat.finish("ok")
    if record.tests:
        note(f"recorded as {record.id}; see it with: qnext bench show {record.id}")


def _answer(chat: ChatRun, line: str) -> None:
    from qnext.report.record_view import turn_line

    try:
        turn = stream_answer(chat, line)
    except KeyboardInterrupt:
        sys.stdout.write("\n")
        note("stopped; the conversation before this question is kept")
        _revive(chat)
    except QnextError as error:
        sys.stdout.write("\n")
        print_error(error)
        note("the conversation before this question is kept")
        _revive(chat)
    else:
        note(turn_line(turn, chat.model.planned.plan))


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
        stderr_console().print(run_view(chat.record()))
    elif line == "/reset":
        chat.conversation.reset()
        note("forgotten")
    else:
        note(f"'{line}' is no command; {_HELP}")


def stream_answer(chat: ChatRun, text: str, *, silent: bool = False) -> Turn:
    """Print the answer to `text` as it comes: speech on stdout, thinking dimmed on stderr."""
    console = stderr_console()
    thinking = False
    for piece in chat.say(text):
        if silent or piece.kind == "prefill":
            continue
        if piece.kind == "thinking":
            thinking = True
            console.print(piece.text, style="dim italic", end="", markup=False)
            continue
        if thinking:
            thinking = False
            console.print("\n")
        sys.stdout.write(piece.text)
        sys.stdout.flush()
    if not silent:
        sys.stdout.write("\n")
        sys.stdout.flush()
    return chat.conversation.turns[-1]
