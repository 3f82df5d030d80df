"""A plan for people: what goes where, what each memory holds, how fast it should be, and why."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from qnext.plan.plan import Plan
from qnext.plan.values import DeviceMemory
from qnext.report.words import forecast, plural
from qnext.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def plan_view(plan: Plan) -> Group:
    """Everything about a plan, for 80 columns and more."""
    from rich.console import Group
    from rich.text import Text

    verdict = Text("fits", style="bold green") if plan.fits else Text("does not fit", style="bold red")
    headline = Text.assemble(
        (plan.shape.name or plan.model_ref, "bold"), f"  {_model_facts(plan)}  ", verdict
    )
    parts: list[RenderableType] = [headline, Text(), memory_table(plan), Text(), _settings(plan)]
    parts += [Text(), _why(plan)]
    parts += [Text(f"warning: {warning}", style="yellow") for warning in plan.warnings]
    if plan.fits:
        parts += [Text(), Text("The same with llama-server:", style="bold"), Text(shlex.join(plan.argv))]
    return Group(*parts)


def plan_line(plan: Plan) -> str:
    """One line before a run: model, placement, memory."""
    used = sum(device.total_bytes for device in plan.devices)
    where = plan.reasons[0].what
    return (
        f"{plan.shape.name or plan.model_ref} ({plan.shape.quant or plan.shape.arch}): {where}, context "
        f"{plan.placement.context:,}, {plural(plan.placement.threads, 'thread')}, {format_bytes(used)}"
    )


def memory_table(plan: Plan) -> RenderableType:
    """Bytes per device and part, the total against the budget."""
    from rich.table import Table

    source = "" if plan.compute_measured else " (est.)"
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("device")
    for title in ("weights", "KV", "state", f"compute{source}", "other", "total", "of budget"):
        table.add_column(title, justify="right")
    for device in plan.devices:
        table.add_row(*_device_cells(device))
    return table


def _device_cells(device: DeviceMemory) -> list[str]:
    parts = (
        device.weights_bytes,
        device.kv_bytes,
        device.recurrent_bytes,
        device.compute_bytes,
        device.other_bytes,
        device.total_bytes,
    )
    budget = device.budget_bytes
    over = budget is not None and device.total_bytes > budget
    last = f"[red]{format_bytes(budget)}[/red]" if over else format_bytes(budget)
    return [device.name, *(format_bytes(part) if part else "–" for part in parts), last]


def _model_facts(plan: Plan) -> str:
    shape = plan.shape
    experts = f", {shape.experts} experts ({shape.experts_used} used)" if shape.experts else ", dense"
    return (
        f"{shape.arch} {shape.quant or ''} {format_bytes(plan.header.file_bytes)}, "
        f"{plural(shape.n_layer, 'layer')}{experts}"
    )


def _settings(plan: Plan) -> RenderableType:
    from rich.table import Table

    placement = plan.placement
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    table.add_row("decode", forecast(plan.prediction.decode_tps))
    table.add_row("prefill", forecast(plan.prediction.prefill_tps))
    table.add_row("source", f"{plan.prediction.source}; the range is in brackets")
    table.add_row("experts", plan.reasons[0].what)
    slots = f" for {placement.parallel} slots" if placement.parallel > 1 else ""
    table.add_row(
        "context",
        f"{placement.context:,} tokens{slots}, KV {placement.kv_type_k}/{placement.kv_type_v}",
    )
    table.add_row("batch", f"{placement.batch}, ubatch {placement.ubatch}")
    table.add_row("threads", f"{placement.threads} decode, {placement.threads_batch} prefill")
    table.add_row("load mode", placement.load_mode)
    return table


def _why(plan: Plan) -> RenderableType:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column()
    for number, reason in enumerate(plan.reasons):
        table.add_row("why" if number == 0 else "", f"{reason.what}: {reason.because}")
    return table
