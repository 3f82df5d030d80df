"""`qnext bench sweep`: the fastest settings this machine can run, searched and proven."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qnext.cli.fetch import Yes, with_model_here
from qnext.cli.flags import MODEL_HELP, PlanFlags, takes_plan_flags
from qnext.cli.making_request import make_request, workload_named
from qnext.cli.output import note, print_json, print_table, stderr_console
from qnext.errors import UsageError

if TYPE_CHECKING:
    from qnext.config import Paths
    from qnext.pipeline.sweep_setup import Prepared
    from qnext.pipeline.sweep_values import Grid
    from qnext.pipeline.sweeping import Progress, SweepRun
    from qnext.store.sweeps import StoredSweep

_GRID = "Knobs to try, in lists with commas"
_TURN = "What is to be fast"


def _knob(*names: str, metavar: str = "N,…", help: str) -> Any:
    return typer.Option(*names, metavar=metavar, help=help, show_default=False, rich_help_panel=_GRID)


def register(app: typer.Typer) -> None:
    """Add the command to the `bench` group."""
    app.command("sweep")(sweep)


@takes_plan_flags
def sweep(
    flags: PlanFlags,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"{MODEL_HELP} With --resume: the id of a sweep, or nothing."),
    ] = None,
    objective: Annotated[
        str,
        typer.Option(
            "--objective",
            metavar="turn|decode|prefill",
            help="The time that counts: of a whole turn, or of one part of it.",
            rich_help_panel=_TURN,
        ),
    ] = "turn",
    workload: Annotated[
        str,
        typer.Option(
            "--workload",
            metavar="NAME",
            help="The turn: chat, code, documents or agent.",
            rich_help_panel=_TURN,
        ),
    ] = "chat",
    prompt: Annotated[
        int | None,
        typer.Option(
            "-p", "--n-prompt", min=1, metavar="N", help="Its prompt in tokens.", rich_help_panel=_TURN
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option("-n", "--n-gen", min=1, metavar="N", help="Its answer.", rich_help_panel=_TURN),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option("-d", "--n-depth", min=0, metavar="N", help="What came before.", rich_help_panel=_TURN),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", metavar="10m|30 cells", help="How long, or how many cells.")
    ] = "10m",
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on with the last sweep that was cut short.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", metavar="", help="Print cells, loads and expected time alone.")
    ] = False,
    cooldown: Annotated[
        float, typer.Option("--cooldown", min=0, metavar="SECONDS", help="Rest before each measurement.")
    ] = 0.0,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Of order and texts.")] = 0,
    yes: Yes = False,
    json_output: Annotated[
        bool, typer.Option("--json", metavar="", help="Print the result as JSON.")
    ] = False,
    threads: Annotated[str | None, _knob("-t", "--threads", help="CPU threads for decode.")] = None,
    threads_batch: Annotated[
        str | None, _knob("-tb", "--threads-batch", help="CPU threads for prefill.")
    ] = None,
    ubatch: Annotated[
        str | None, _knob("-ub", "--ubatch-size", "--ubatch", help="Prompt tokens computed at once.")
    ] = None,
    batch: Annotated[
        str | None, _knob("-b", "--batch-size", help="Prompt tokens given to the engine at once.")
    ] = None,
    cache_type_k: Annotated[
        str | None, _knob("-ctk", "--cache-type-k", metavar="TYPE,…", help="Types of the cache's keys.")
    ] = None,
    cache_type_v: Annotated[
        str | None, _knob("-ctv", "--cache-type-v", metavar="TYPE,…", help="The same of its values.")
    ] = None,
    flash_attention: Annotated[
        str | None, _knob("-fa", "--flash-attn", metavar="on,off", help="Flash attention.")
    ] = None,
    load_mode: Annotated[
        str | None, _knob("-lm", "--load-mode", metavar="MODE,…", help="How the file gets into memory.")
    ] = None,
    repack: Annotated[
        str | None, _knob("--repack", metavar="LAYOUT,…", help="Layouts of weights: full, experts, off.")
    ] = None,
    n_cpu_moe: Annotated[
        str | None, _knob("-ncmoe", "--n-cpu-moe", help="Layers whose experts are in RAM.")
    ] = None,
    affinity: Annotated[
        str | None,
        _knob("--affinity", metavar="free,cores", help="Threads run anywhere, or each on a core of its own."),
    ] = None,
) -> int:
    """Find the fastest settings this machine can run, and save them for qnext run.

    Starts from the plan and from llama.cpp's own fit, and ends with what is faster than both by a test, or
    with one of them. Everything measured is kept; Ctrl-C, then --resume. A knob given one value keeps it;
    with several values of any, the knobs that are not named stay as planned, and all combinations are
    measured as far as the time goes.

    Example: qnext bench sweep demo --budget 30s

    Example: qnext bench sweep model.gguf -ub 512,1024,2048 -t 6,8
    """
    from qnext.config import find_paths
    from qnext.pipeline.sweep_setup import prepare_sweep
    from qnext.pipeline.sweeping import reopen_sweep, start_sweep

    paths = find_paths()
    if resume:
        stored = _find_stored(model, paths)
        prepared = reopen_sweep(stored, paths, note)
    else:
        if model is None:
            raise UsageError("Missing argument 'MODEL'", hint="qnext bench sweep demo")
        seconds, cells = parse_budget(budget)
        named = {
            "threads": threads,
            "threads_batch": threads_batch,
            "batch": batch,
            "ubatch": ubatch,
            "kv_type_k": cache_type_k,
            "kv_type_v": cache_type_v,
            "flash_attention": flash_attention,
            "load_mode": load_mode,
            "repack": repack,
            "cpu_experts": n_cpu_moe,
            "affinity": affinity,
        }
        grid = _grid(named)
        turn = workload_named(workload, prompt=prompt, generate=generate, depth=depth)
        request = make_request(model, _pinned(flags, grid), turn)
        request = with_model_here(request, paths, yes=yes, silent=json_output)
        prepared = prepare_sweep(
            request,
            paths,
            note,
            objective=_objective(objective),
            grid=grid,
            seconds=seconds,
            cell_limit=cells,
            cooldown_s=cooldown,
            seed=seed,
        )
    if dry_run:
        _print_dry_run(prepared, json_output)
        return 0
    if not resume:
        stored = start_sweep(prepared, paths)
    try:
        run, loads = _run(stored, prepared, paths, resumed=resume)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        note(f"everything measured is kept; go on with: qnext bench sweep {stored.id} --resume")
        raise
    _finish(run, loads, paths, json_output)
    return 0


def parse_budget(text: str) -> tuple[float | None, int | None]:
    """(seconds, None) of `10m`, `90s`, `1h`; (None, cells) of `30 cells`. Raises UsageError."""
    time = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|sec|m|min|h)?\s*", text)
    if time and float(time[1]) > 0:
        return float(time[1]) * {"m": 60, "h": 3600}.get((time[2] or "s")[0], 1), None
    cells = re.fullmatch(r"\s*(\d+)\s*cells?\s*", text)
    if cells and int(cells[1]) > 0:
        return None, int(cells[1])
    raise UsageError(f"'{text}' is not a budget", hint="Write --budget 10m, 90s, 1h or '30 cells'.")


def _run(stored: StoredSweep, prepared: Prepared, paths: Paths, *, resumed: bool) -> tuple[SweepRun, int]:
    from qnext.pipeline.sweeping import SweepWatch, run_sweep
    from qnext.report.sweep_view import SweepBoard, measured_line

    board = SweepBoard(prepared.live, prepared.settings.seconds)
    for one in stored.measurements:
        from qnext.pipeline.sweep_engine import Taken

        if one.status is not None:
            taken = Taken(
                one.status,  # type: ignore[arg-type]
                prompt=one.prompt,
                prefill_ns=one.prefill_ns,
                token_ns=one.token_ns,
                turn_ns=one.turn_ns,
            )
            board.add(prepared.cells[one.cell], taken)
    live = sys.stderr.isatty()
    doing = ""
    with _drawn(board) as redraw:

        def on_start(sweep_id: str, race: Any) -> None:
            board.spent_s, board.loads = race.spent_s, race.loads
            if not live:
                again = "going on with" if resumed else "started"
                note(f"{again} sweep {sweep_id}: {len(prepared.live)} cells")

        def on_step(step: Any, cell: Any) -> None:
            nonlocal doing
            doing = f"{'loading for' if step.load else 'measuring'} {cell.name}"
            if step.also:
                doing += f", and for {step.also},"
            elif step.partner:
                doing += f" and {step.partner} by turns"
            doing += f" ({step.rung})"
            board.tell(doing)
            redraw()

        def on_load(share: float) -> None:
            board.tell(f"{doing}: {share:.0%}")
            redraw()

        def on_measured(progress: Progress) -> None:
            board.add(progress.cell, progress.taken)
            board.spent_s, board.loads = progress.spent_s, progress.race.loads
            if live:
                redraw()
            else:
                note(measured_line(progress, board.gain(progress.cell.name)))

        watch = SweepWatch(on_start, on_load, on_step, on_measured)
        run = run_sweep(stored, prepared, paths, watch, resumed=resumed)
    return run, board.loads


@contextmanager
def _drawn(board: Any) -> Iterator[Any]:
    """Draws the board on a terminal's stderr; calls of what it yields ask for it anew."""
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.live import Live

    with Live(
        get_renderable=board.view,
        console=stderr_console(),
        transient=True,
        refresh_per_second=4,
        redirect_stdout=False,
    ) as drawing:
        yield drawing.refresh


def _finish(run: SweepRun, loads: int, paths: Paths, json_output: bool) -> None:
    from qnext.pipeline.sweep_results import conclude, sweep_to_dict
    from qnext.report.sweep_view import sweep_view

    end = conclude(run, paths, sys.argv[1:], loads)
    if json_output:
        print_json(sweep_to_dict(end))
    else:
        import shutil

        print_table(sweep_view(end, min(shutil.get_terminal_size().columns, 120)))


def _print_dry_run(prepared: Prepared, json_output: bool) -> None:
    from qnext.report.sweep_view import dry_run_view

    if not json_output:
        print_table(dry_run_view(prepared))
        return
    settings = prepared.settings
    print_json(
        {
            "schema": "qnext.sweep-plan/1",
            "seconds": settings.seconds,
            "max_loads": settings.max_loads,
            "loads": len({cell.group for cell in prepared.live}),
            "cells": [
                {
                    "name": cell.name,
                    "roles": list(cell.roles),
                    "status": cell.status or "waiting",
                    "because": cell.because,
                    "group": cell.group,
                    "knobs": dict(cell.knobs),
                    "predicted_s": list(cell.predicted_s),
                }
                for cell in prepared.cells
            ],
        }
    )


def _find_stored(model: str | None, paths: Paths) -> StoredSweep:
    from qnext.store.sweeps import SweepStore

    store = SweepStore(paths.results_db)
    if model is not None and re.fullmatch(r"[0-9a-f]{4,12}", model):
        found: StoredSweep | None = store.get(model)
    else:
        found = store.unfinished(model)
    if found is None:
        which = f" of {model}" if model else ""
        raise UsageError(f"no sweep{which} was cut short", hint="Start one: leave out --resume.")
    if found.status == "ok":
        raise UsageError(f"sweep {found.id} is finished", hint="Start another: leave out --resume.")
    return found


def _objective(name: str) -> Any:
    if name not in ("turn", "decode", "prefill"):
        raise UsageError(f"'{name}' is not an objective", hint="Choose one of: turn, decode, prefill.")
    return name


_CHOICES = {
    "flash_attention": ("on", "off", "auto"),
    "load_mode": ("none", "mmap", "mlock", "mmap+mlock", "dio"),
    "repack": ("full", "experts", "off"),
    "affinity": ("free", "cores"),
}
_FLAGS = {
    "threads": "-t",
    "threads_batch": "-tb",
    "batch": "-b",
    "ubatch": "-ub",
    "kv_type_k": "-ctk",
    "kv_type_v": "-ctv",
    "flash_attention": "-fa",
    "load_mode": "-lm",
    "repack": "--repack",
    "cpu_experts": "-ncmoe",
    "affinity": "--affinity",
}
_FIELDS = {"kv_type_k": "cache_type_k", "kv_type_v": "cache_type_v", "cpu_experts": "n_cpu_moe"}
"""Fields of Grid under another name in PlanFlags."""


def _grid(named: dict[str, str | None]) -> Grid:
    """The knobs' lists. Raises UsageError for an entry that is no level."""
    from qnext.config import KV_TYPES
    from qnext.pipeline.sweep_values import Grid

    found: dict[str, Any] = {}
    for knob, text in named.items():
        if text is None:
            continue
        parts = [part.strip() for part in text.split(",")]
        choices = _CHOICES.get(knob, KV_TYPES if knob.startswith("kv_type") else None)
        if choices is not None:
            wrong = [part for part in parts if part not in choices]
            hint = f"Choose from: {', '.join(choices)}."
        else:
            least = 0 if knob == "cpu_experts" else 1
            wrong = [part for part in parts if not part.isascii() or not part.isdigit() or int(part) < least]
            hint = f"Write whole numbers with commas: {_FLAGS[knob]} 512,1024."
        if wrong:
            raise UsageError(f"'{wrong[0]}' is not a value of {_FLAGS[knob]}", hint=hint)
        found[knob] = tuple(parts) if choices is not None else tuple(int(part) for part in parts)
    return Grid(**found)


def _pinned(flags: PlanFlags, grid: Grid) -> PlanFlags:
    """The flags with every knob that has one value: the plan takes it, too."""
    single = {
        _FIELDS.get(entry.name, entry.name): getattr(grid, entry.name)[0]
        for entry in fields(grid)
        if entry.name != "affinity" and len(getattr(grid, entry.name) or ()) == 1
    }
    return replace(flags, **single)
