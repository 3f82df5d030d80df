"""A plan for people: what goes where, what each memory holds, how fast it should be, and why.

Memory is a table with a column per device, which stays inside 80 columns for up to five of them.
"""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from qnext.plan.plan import Plan
from qnext.report.words import MEMORY_PARTS, forecast, plural, shell_lines
from qnext.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult

_SOURCES = {
    "roofline": "bytes read and sums done at this machine's rates, fitted on published measurements; in "
    "brackets the range that held for four of five machines left out of the fit",
    "slice": "measured on a few layers of true shape; the range is in brackets",
    "history": "earlier runs here; the range is in brackets",
}


def plan_view(plan: Plan) -> Group:
    """Everything about a plan."""
    from rich.console import Group
    from rich.text import Text

    verdict = Text("fits", style="bold green") if plan.fits else Text("does not fit", style="bold red")
    headline = Text.assemble((plan.shape.name or plan.model_ref, "bold"), ": ", verdict)
    parts: list[RenderableType] = [headline, Text(_model_facts(plan)), Text(), memory_table(plan)]
    if not plan.compute_measured:
        parts.append(Text("compute is an estimate: no dry run of the engine", style="dim"))
    parts += [Text(), _settings(plan), Text(), Text("Why", style="bold")]
    parts += [_reason(reason.what, reason.because) for reason in plan.reasons]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    if plan.fits:
        parts += [Text(), Text("The same with llama-server", style="bold"), _Command(plan.argv)]
    return Group(*parts)


def plan_line(plan: Plan) -> str:
    """One line before a run: model, placement, memory."""
    used = sum(device.total_bytes for device in plan.devices)
    return (
        f"{plan.shape.name or plan.model_ref} {plan.shape.quant or plan.shape.arch}: {plan.reasons[0].what}, "
        f"context {plan.placement.context:,}, {plural(plan.placement.threads, 'thread')}, "
        f"{format_bytes(used)} of memory"
    )


def memory_table(plan: Plan) -> RenderableType:
    """Bytes per part, a column for each device; the total against the budget."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("memory")
    for device in plan.devices:
        table.add_column(device.name, justify="right")
    for word, field in MEMORY_PARTS:
        sizes = [getattr(device, field) for device in plan.devices]
        if any(sizes):
            style = "bold" if word == "total" else None
            table.add_row(word, *(format_bytes(size) if size else "–" for size in sizes), style=style)
    table.add_row("may use", *(format_bytes(device.budget_bytes) for device in plan.devices))
    if plan.missing:
        missing = (plan.missing.get(device.name) for device in plan.devices)
        table.add_row("missing", *(format_bytes(size) if size else "–" for size in missing), style="bold red")
    return table


def _model_facts(plan: Plan) -> str:
    shape = plan.shape
    experts = (
        f"{shape.experts} experts, {shape.experts_used} of them used for each token"
        if shape.experts
        else "dense"
    )
    quant = f" {shape.quant}" if shape.quant else ""
    size = format_bytes(plan.header.file_bytes)
    return f"{shape.arch}{quant}, {size}, {plural(shape.n_layer, 'layer')}, {experts}"


def _settings(plan: Plan) -> RenderableType:
    from rich.table import Table

    placement = plan.placement
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    table.add_row("decode", f"{forecast(plan.prediction.decode_tps)}, writing the answer")
    table.add_row("prefill", f"{forecast(plan.prediction.prefill_tps)}, reading the prompt")
    table.add_row("forecast from", _SOURCES[plan.prediction.source])
    growth = ""
    if plan.context_ceiling and plan.context_ceiling > placement.context:
        growth = f"; up to {plan.context_ceiling:,} fit at the cost of speed"
    slots = f" for {placement.parallel} slots" if placement.parallel > 1 else ""
    table.add_row(
        "context",
        f"{placement.context:,} tokens{slots}, KV cache in {placement.kv_type_k}/{placement.kv_type_v}"
        f"{growth}",
    )
    table.add_row("batch", f"{placement.batch:,}, computed {placement.ubatch:,} at once (ubatch)")
    table.add_row("threads", f"{placement.threads} for decode, {placement.threads_batch} for prefill")
    table.add_row("load mode", placement.load_mode)
    return table


def _reason(what: str, because: str) -> RenderableType:
    from rich.padding import Padding
    from rich.text import Text

    return Padding(Text(f"{what}: {because}"), (0, 0, 0, 2))


class _Command:
    """A command line broken so that it can be pasted into a shell at any width."""

    def __init__(self, argv: tuple[str, ...]) -> None:
        self._words = [shlex.quote(word) for word in argv]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from rich.text import Text

        # Words longer than the line (paths) are left to the terminal, whose own wrapping copies well.
        for line in shell_lines(self._words, options.max_width):
            yield Text(line, no_wrap=True, overflow="ignore")
