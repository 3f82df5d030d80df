"""`qnext run`: one answer, or a chat."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from qnext.cli.flags import PlanFlags, make_request, takes_plan_flags
from qnext.cli.output import load_progress, note, print_json, stderr_console

if TYPE_CHECKING:
    from qnext.pipeline.chat import ChatRun


@takes_plan_flags
def run(
    model: Annotated[str, typer.Argument(help="demo, or the path of a GGUF (any shard).")],
    flags: PlanFlags,
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="Answer this and exit; - reads standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    max_tokens: Annotated[int, typer.Option("-n", "--max-tokens", min=1, help="Longest answer.")] = 4096,
    temperature: Annotated[float | None, typer.Option("--temp", min=0, help="0 is greedy.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0, max=1, help="Nucleus share.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Most likely tokens kept.")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", min=0, max=1, help="Smallest share.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Seed of the sampler.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Send the prompt without chat template.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print answer and record as JSON.")] = False,
) -> None:
    """Chat with a model, or answer one --prompt, and compare forecast with measurement.

    Example: qnext run demo --prompt "Hello"
    """
    from qnext.config import find_paths
    from qnext.errors import UsageError
    from qnext.pipeline.chat import ChatRun
    from qnext.plan.values import Workload

    text = _prompt_text(prompt)
    if text is not None and not text.strip():
        raise UsageError("the prompt is empty", hint='Give one: --prompt "Hello".')
    if text is None and json_output:
        raise UsageError("--json needs a prompt", hint='Add --prompt "Hello", or pipe one in.')
    wishes = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    request = make_request(model, flags, Workload())
    with load_progress(f"loading {model}") as progress:
        chat = ChatRun(
            request,
            find_paths(),
            note,
            progress,
            command=sys.argv[1:],
            system=system,
            raw=raw,
            max_tokens=max_tokens,
            sampling={name: float(value) for name, value in wishes.items() if value is not None},
        )
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
        return sys.stdin.read()
    return None


def _answer_once(chat: ChatRun, text: str, json_output: bool) -> None:
    from qnext.cli.chat_loop import stream_answer
    from qnext.report.record_view import run_view
    from qnext.store.record import record_to_dict

    if not json_output:
        from qnext.report.plan_view import plan_line

        note(plan_line(chat.model.planned.plan))
    answer = stream_answer(chat, text, silent=json_output)
    record = chat.finish("ok")
    if json_output:
        print_json({**record_to_dict(record), "text": answer.text, "thinking": answer.thinking or None})
        return
    stderr_console().print(run_view(record))
