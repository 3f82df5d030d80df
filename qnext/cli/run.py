"""`qnext run`: one answer, or a chat."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.fetch import Yes, with_model_here
from qnext.cli.flags import PlanFlags, Tuned, takes_plan_flags
from qnext.cli.making_request import make_request
from qnext.cli.output import note, print_json, progress_bar, stderr_console
from qnext.cli.propose import ModelOrBest, propose_model, require_someone

if TYPE_CHECKING:
    from qnext.pipeline.chat import ChatRun

_SAMPLING = "Sampling (what is not given comes from the file)"


@takes_plan_flags
def run(
    flags: PlanFlags,
    model: ModelOrBest = None,
    prompt: Annotated[
        str | None,
        typer.Option(
            "-p", "--prompt", metavar="TEXT", help="Answer this and exit; - reads it from standard input."
        ),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(
            "-sys",
            "--system",
            "--system-prompt",
            metavar="TEXT",
            help="Instructions before the first message.",
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("-n", "--max-tokens", "--n-predict", min=1, metavar="TOKENS", help="Longest answer."),
    ] = 4096,
    raw: Annotated[
        bool,
        typer.Option("--raw", metavar="", help="Continue the prompt as it is, without chat template."),
    ] = False,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print answer and record as JSON.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temp",
            min=0,
            metavar="X",
            help="0 always takes the likeliest token.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    yes: Yes = False,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0,
            max=1,
            metavar="X",
            help="Likeliest tokens up to this share of probability.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            min=0,
            metavar="N",
            help="That many likeliest tokens; 0 is all.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            "--min-p",
            min=0,
            max=1,
            metavar="X",
            help="Tokens at least this likely, relative to the likeliest.",
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "-s", "--seed", min=0, metavar="N", help="The same dice each time.", rich_help_panel=_SAMPLING
        ),
    ] = None,
    tuned: Tuned = True,
) -> None:
    """Chat with a model, or answer one --prompt. Speeds are shown beside the forecast.

    Example: qnext run demo --prompt "Hello"
    """
    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.pipeline.chat import ChatRun

    if model is None:
        require_someone()
    text = _prompt_text(prompt)
    if text is not None and not text.strip():
        raise UsageError("the prompt is empty", hint='Give one: --prompt "Hello".')
    if text is None and json_output:
        raise UsageError("--json needs a prompt", hint='Add --prompt "Hello", or pipe one in.')
    wishes = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    paths = find_paths()
    request = replace(make_request(model or "", flags), tuned=tuned)
    if model is None:
        request = propose_model(request, paths, yes=yes)
    request = with_model_here(request, paths, yes=yes, silent=json_output)
    try:
        with progress_bar(f"loading {Path(model or request.model).name}") as show:
            chat = ChatRun(
                request,
                paths,
                note,
                show,
                command=sys.argv[1:],
                prompt=prompt,
                system=system,
                raw=raw,
                max_tokens=max_tokens,
                sampling={name: float(value) for name, value in wishes.items() if value is not None},
            )
    except KeyboardInterrupt:
        note("the model was not loaded, so nothing was measured or stored")
        raise
    with chat:
        if text is None:
            from qnext.cli.chat_loop import chat_loop

            chat_loop(chat)
        else:
            _answer_once(chat, text, json_output)


def _prompt_text(prompt: str | None) -> str | None:
    """The prompt to answer: the flag's, standard input's for `-` or when it is no terminal, else None."""
    if prompt is not None and prompt != "-":
        return prompt
    if prompt == "-" or not sys.stdin.isatty():
        from qnext.errors import UsageError

        try:
            return sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UsageError(
                f"standard input is not text: {error.reason} at byte {error.start}",
                hint="Pipe in plain text in UTF-8.",
            ) from error
    return None


def _answer_once(chat: ChatRun, text: str, json_output: bool) -> None:
    from qnext.cli.answer import stream_answer, turn_warnings
    from qnext.report.record_view import run_view
    from qnext.store.record import record_to_dict

    if not json_output:
        from qnext.report.plan_view import plan_line

        note(plan_line(chat.model.planned.plan))
    try:
        turn = stream_answer(chat, text, silent=json_output)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        said = "what was said so far is above" if chat.conversation.cut_off else "nothing was said yet"
        note(f"{said}; record {chat.record_id} is marked interrupted and has no speeds")
        raise
    for warning in turn_warnings(turn, chat.max_tokens):
        note(warning)
    record = chat.finish("ok")
    if json_output:
        print_json({**record_to_dict(record), "text": turn.text, "thinking": turn.thinking or None})
    else:
        stderr_console().print(run_view(record))
