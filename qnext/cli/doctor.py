"""`qnext doctor`."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer

from qnext.cli.flags import PlanFlags, takes_plan_flags
from qnext.cli.making_request import make_request, workload_named
from qnext.cli.output import note, print_json, print_table, progress_bar
from qnext.errors import UsageError

_OK, _TROUBLE = 0, 3


@takes_plan_flags
def doctor(
    flags: PlanFlags,
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="MODEL",
            help="What prices are quoted for: a GGUF file, demo, or a shape such as qwen3-30b-a3b:Q4_K_M.",
        ),
    ] = None,
    full: Annotated[
        bool,
        typer.Option("--full/--quick", help="Measure RAM, disk and GPU links (some 15 s), or only look."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", metavar="", help="Warnings end with exit code 3, too.")
    ] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", metavar="", help="Print a block for a bug report, nothing personal.")
    ] = False,
    workload: Annotated[
        str,
        typer.Option("--workload", metavar="NAME", help="Prices are for chat, code, documents or agent."),
    ] = "chat",
    save: Annotated[
        str | None,
        typer.Option("--save", metavar="NAME", help="Keep this machine as a profile for --hardware NAME."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", metavar="", help="With --save: replace a profile of that name.")
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", metavar="", help="Print all as JSON.")] = False,
) -> int:
    """Tell what limits this machine, and what each fault costs.

    Costs are in tokens per second, for a stated model and workload.

    Example: qnext doctor --full --model qwen3-next-80b-a3b:Q4_K_M
    """
    from qnext.config import find_paths
    from qnext.hardware.recorded import path_for, save_profile
    from qnext.pipeline.doctoring import DEFAULT_MODEL, examination_to_dict, examine_machine

    if json_output and markdown:
        raise UsageError("--json and --markdown are two forms of the same", hint="Leave one of them out.")
    if model == "":
        raise UsageError("--model is empty", hint=f"Name one, for example --model {DEFAULT_MODEL}.")
    paths = find_paths()
    if save is not None:
        path_for(save, paths.hardware_dir, force=force)  # a bad name is told before anything is measured
    request = make_request(model or DEFAULT_MODEL, flags, workload_named(workload))
    with progress_bar("measuring") if full else contextlib.nullcontext() as show:
        found = examine_machine(request, paths, named=model is not None, full=full, notice=note, show=show)
    if save is not None:
        note(f"saved as {save_profile(found.machine, save, paths.hardware_dir, force=force)}")
    if json_output:
        print_json(examination_to_dict(found))
    elif markdown:
        from qnext.report.doctor_markdown import doctor_markdown

        typer.echo(doctor_markdown(found))
    else:
        from qnext.report.doctor_view import doctor_view

        print_table(doctor_view(found))
    levels = {finding.level for finding in found.findings}
    bad = "error" in levels or (strict and "warning" in levels)
    return _TROUBLE if bad else _OK
