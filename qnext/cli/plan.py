"""`qnext plan`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.fetch import header_bar
from qnext.cli.flags import MODEL_HELP, PlanFlags, takes_plan_flags
from qnext.cli.making_request import make_request, workload_named
from qnext.cli.output import note, print_json, print_table
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.config import Paths
    from qnext.pipeline.comparing import FitComparison
    from qnext.pipeline.planning import PlannedModel
    from qnext.pipeline.request import Request
    from qnext.plan.levers import Lever, RunnerUp

    _Why = tuple[RunnerUp | None, tuple[Lever, ...]]

FORMATS = (
    "table",
    "json",
    "yaml",
    "argv",
    "llama-server",
    "llama-swap",
    "systemd",
    "docker",
    "ollama-env",
    "lmstudio-notes",
)
"""`table` is for people; the rest from `argv` on are `qnext.plan.export.TEXT_FORMATS`, written out here
because the help must not import the planner."""

_MACHINE_PANEL = "Machine"


@takes_plan_flags
def plan(
    flags: PlanFlags,
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP)] = None,
    all_models: Annotated[
        bool,
        typer.Option(
            "--all", metavar="", help="Rank the catalogue's models for this machine, instead of one MODEL."
        ),
    ] = False,
    online: Annotated[
        bool,
        typer.Option(
            "--online", metavar="", help="With --all: read published headers of models not described here."
        ),
    ] = False,
    workload: Annotated[
        str,
        typer.Option(
            "--workload", metavar="NAME", help="Typical turn to plan for: chat, code, documents or agent."
        ),
    ] = "chat",
    prompt: Annotated[
        int | None, typer.Option("-p", "--n-prompt", min=0, metavar="TOKENS", help="Prompt to plan for.")
    ] = None,
    generate: Annotated[
        int | None, typer.Option("-n", "--n-gen", min=0, metavar="TOKENS", help="Answer to plan for.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option("-d", "--n-depth", min=0, metavar="TOKENS", help="Conversation that went before it."),
    ] = None,
    what_if: Annotated[
        str | None,
        typer.Option(
            "--what-if",
            metavar="KEY=VALUE,…",
            help="Change the machine: vram=24G, ram=128G, ram_bandwidth=90G, gpu_bandwidth=1000G, pcie=4x8, "
            "cores=16, gpus=2; vram.1=24G is the second GPU's.",
            rich_help_panel=_MACHINE_PANEL,
        ),
    ] = None,
    compare_fit: Annotated[
        bool,
        typer.Option("--compare-fit", metavar="", help="Show llama.cpp's own --fit beside the plan."),
    ] = False,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain",
            metavar="",
            help="Add the numbers, the next best plan, and what would change it most.",
        ),
    ] = False,
    format_: Annotated[
        str,
        typer.Option("--format", metavar="FORMAT", help=f"Print the plan as {', '.join(FORMATS[1:])}."),
    ] = "table",
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="The same as --format json.")
    ] = False,
) -> None:
    """Show what goes where in memory, and how fast it should be. Nothing is loaded.

    Example: qnext plan model.gguf --vram 12G -c 65536
    """
    from qnext.config import find_paths
    from qnext.pipeline.planning import explain_plan, plan_model, require_fit

    form = _format(format_, json_output)
    if (model is None) is not all_models:
        raise UsageError(
            "MODEL and --all exclude each other" if all_models else "nothing to plan: no MODEL",
            hint="Name one model: qnext plan MODEL; or rank all that are known: qnext plan --all.",
        )
    if online and not all_models:
        raise UsageError("--online is for --all", hint="A named model's headers are read as needed.")
    if all_models and (compare_fit or explain or form not in ("table", "json")):
        other = "--compare-fit" if compare_fit else "--explain" if explain else f"--format {form}"
        raise UsageError(f"{other} is for one model", hint="Leave it out, or name a MODEL.")
    if compare_fit and form not in ("table", "json", "yaml"):
        raise UsageError(
            f"--format {form} holds one plan, not two", hint="Leave out --compare-fit, or use --format json."
        )
    turn = workload_named(workload, prompt=prompt, generate=generate, depth=depth)
    request = replace(make_request(model or "", flags, turn), what_if=what_if)
    paths = find_paths()
    if all_models:
        _rank(request, paths, online=online, json_output=form == "json")
        return
    with header_bar(f"planning {Path(request.model).name}", silent=form == "json") as read:
        planned = plan_model(request, paths, note, read)
    fit = None
    if compare_fit:
        from qnext.pipeline.comparing import compare_fit as compare

        fit = compare(planned, paths, note)
    why = explain_plan(planned, request) if explain else None
    if form == "table":
        _print_tables(planned, fit, why)
    elif form in ("json", "yaml"):
        _print_document(planned, fit, form, why)
    else:
        require_fit(planned.plan)
        _print_export(planned, form, request)
    require_fit(planned.plan)


def _rank(request: Request, paths: Paths, *, online: bool, json_output: bool) -> None:
    from qnext.pipeline.ranking import rank_models, ranking_to_dict

    with header_bar("ranking models", silent=json_output) as read:
        ranking = rank_models(request, paths, note, online=online, on_progress=read)
    for warning in ranking.surroundings.warnings:
        note(warning)
    if json_output:
        print_json({"schema": "qnext.ranking/1", **ranking_to_dict(ranking)})
    else:
        from qnext.report.ranking_view import ranking_view

        print_table(ranking_view(ranking))


def _format(wanted: str, json_output: bool) -> str:
    if json_output and wanted in ("table", "json"):
        return "json"
    if wanted not in FORMATS or json_output:
        raise UsageError(
            "--json and another --format" if wanted in FORMATS else f"'{wanted}' is not a value of --format",
            hint=f"Choose one of: {', '.join(FORMATS)}.",
        )
    return wanted


def _print_tables(planned: PlannedModel, fit: FitComparison | None, why: _Why | None) -> None:
    from qnext.report.plan_view import plan_view

    if planned.candidates:
        from qnext.report.candidates_view import candidates_view

        taken = planned.model.published
        print_table(candidates_view(planned.candidates, taken.quant if taken else ""))
        print_table("")
    print_table(plan_view(planned.plan))
    if why is not None:
        from qnext.report.explain_view import explain_view

        print_table("")
        print_table(explain_view(planned.plan, *why))
    if fit is not None:
        from qnext.report.fit_view import fit_view

        print_table("")
        print_table(fit_view(planned.plan, fit.plan, fit.error))


def _print_document(planned: PlannedModel, fit: FitComparison | None, form: str, why: _Why | None) -> None:
    from qnext.plan.plan import plan_to_dict
    from qnext.plan.quants import candidate_to_dict

    document: dict[str, Any] = {"schema": "qnext.plan/1", **plan_to_dict(planned.plan)}
    document["candidates"] = [candidate_to_dict(candidate) for candidate in planned.candidates]
    if planned.surroundings.changes:
        document["what_if"] = list(planned.surroundings.changes)
    if why is not None:
        document["next_best"] = asdict(why[0]) if why[0] else None
        document["levers"] = [asdict(lever) for lever in why[1]]
    if fit is not None:
        document["fit"] = {
            "flags": list(fit.flags),
            "seconds": round(fit.seconds, 3),
            "error": fit.error or None,
            "plan": None if fit.plan is None else plan_to_dict(fit.plan),
        }
    if form == "json":
        print_json(document)
        return
    import yaml

    # Through JSON, so that both say the same: tuples become lists, numbers stay what they are.
    plain = json.loads(json.dumps(document))
    _print_bytes(yaml.safe_dump(plain, allow_unicode=True, sort_keys=False, width=110))


def _print_export(planned: PlannedModel, form: str, request: Request) -> None:
    from qnext.pipeline.serving_wishes import serve_arguments
    from qnext.plan.export import TEXT_FORMATS, export_plan

    to = next(one for one in TEXT_FORMATS if one == form)
    model = _whole_path(planned.model.path)
    program, *words = _own_program()
    serve = [_whole_path(program), *words, *serve_arguments(request, model)]
    exported = export_plan(planned.plan, to, model=model, serve=serve)
    _print_bytes(exported.text)
    if not exported.commented:
        for text in exported.notes:
            note(text)


def _own_program() -> list[str]:
    """The words that start this qnext."""
    started = Path(sys.argv[0])
    if started.name != "__main__.py" and os.access(started, os.X_OK):
        return [str(started)]
    installed = shutil.which("qnext")
    return [installed] if installed else [sys.executable, "-P", "-m", "qnext"]


def _whole_path(path: str) -> str:
    """Absolute, links kept (in the Hub's cache only they have the file's name), and read as UTF-8.

    Where the locale is another one, Python holds the bytes of a path as surrogates.
    """
    return os.fsencode(Path(path).absolute()).decode("utf-8", "surrogateescape")


def _print_bytes(text: str) -> None:
    """UTF-8 whatever the locale: these texts are for files, and a path has to stay what it is."""
    sys.stdout.flush()
    sys.stdout.buffer.write(text.encode("utf-8", "surrogateescape"))
    sys.stdout.buffer.flush()
