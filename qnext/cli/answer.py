"""One answer in the terminal: speech on stdout as it comes, thinking and progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

from qnext.cli.output import progress_bar, stderr_console

if TYPE_CHECKING:
    from qnext.pipeline.chat import ChatRun
    from qnext.pipeline.conversation import Piece, Turn


def stream_answer(chat: ChatRun, text: str, *, silent: bool = False) -> Turn:
    """Print the answer to `text` as it comes; `silent` prints none of it.

    stdout gets the words said and a final newline, and nothing else. Thinking goes to stderr between two
    lines that name it, dimmed where the terminal can.
    """
    # Bytes that were not UTF-8 arrive as surrogates, which no tokenizer takes.
    text = text.encode(errors="surrogateescape").decode(errors="replace")
    with closing(chat.say(text)) as pieces:
        speech = _after_prefill(pieces)
        if silent:
            for _ in speech:
                pass
        else:
            _print_pieces(speech)
    return chat.conversation.turns[-1]


def _after_prefill(pieces: Iterator[Piece]) -> Iterator[Piece]:
    """The pieces of the answer; while the prompt is read a progress bar shows how far it is."""
    with ExitStack() as stack:
        show = stack.enter_context(progress_bar("reading the prompt"))
        for piece in pieces:
            if piece.kind == "prefill":
                show(piece.done / piece.total if piece.total else 1.0)
                continue
            stack.close()
            yield piece


def _print_pieces(pieces: Iterator[Piece]) -> None:
    thinking, ended = False, "\n"
    console = None
    for piece in pieces:
        if (piece.kind == "thinking") != thinking:
            thinking = not thinking
            console = console or stderr_console()
            console.print("(thinking)" if thinking else "\n(answer)", style="dim")
        if thinking and console is not None:
            console.print(piece.text, style="dim italic", end="", markup=False, soft_wrap=True)
            continue
        sys.stdout.write(piece.text)
        sys.stdout.flush()
        ended = piece.text[-1:] or ended
    if thinking:
        sys.stderr.write("\n")
    if ended != "\n":
        sys.stdout.write("\n")
        sys.stdout.flush()


def turn_warnings(turn: Turn, max_tokens: int) -> Iterator[str]:
    """What the reader of an answer has to know: that it was cut off, and by what, or that there is none."""
    if turn.stop_reason == "context":
        yield "the context is full, so the answer was cut off here; start with more room: --ctx-size"
    elif turn.stop_reason == "length":
        yield f"the answer was cut off after {max_tokens:,} tokens (--max-tokens)"
    elif not turn.text:
        yield "the model ended its answer without saying anything"
