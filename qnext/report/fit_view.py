"""qnext's plan and llama.cpp's own fit side by side, both counted the same way, host RAM included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qnext.plan.plan import Plan
from qnext.plan.values import HOST
from qnext.report.words import forecast, plural
from qnext.units import format_bytes

if TYPE_CHECKING:
    from rich.console import Group, RenderableType


def fit_view(ours: Plan, fit: Plan | None, error: str = "") -> Group:
    """A row per fact, a column per planner; `error` is what llama.cpp said where it has no plan."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("", no_wrap=True)
    for name in ("qnext", "llama.cpp --fit"):
        table.add_column(name)
    plans = [ours] if fit is None else [ours, fit]
    for label, *cells in zip(_labels(ours, fit), *(_cells(plan, ours, fit) for plan in plans), strict=True):
        table.add_row(label, *cells, *(["–"] if fit is None else []))
    parts: list[RenderableType] = [Text("Beside llama.cpp's own fit", style="bold"), table]
    if fit is None:
        parts.append(Text(f"llama.cpp: {error}", style="yellow"))
    elif not fit.compute_measured:
        parts.append(Text("compute is an estimate: no dry run of the engine", style="dim"))
    parts.append(
        Text(
            "Both with the same model, settings and memory per device. llama.cpp takes RAM for endless; "
            "its plan is counted and forecast here as qnext's own is.",
            style="dim",
        )
    )
    return Group(*parts)


def _device_names(ours: Plan, fit: Plan | None) -> list[str]:
    """Every device that either uses, the host last: RAM is what the two differ in."""
    devices = (*ours.devices, *(fit.devices if fit else ()))
    return [*dict.fromkeys(one.name for one in devices if one.name != HOST), HOST]


def _labels(ours: Plan, fit: Plan | None) -> list[str]:
    memory = [f"memory of {'RAM' if name == HOST else name}" for name in _device_names(ours, fit)]
    return [*memory, "layers on GPUs", "experts in RAM", "context", "decode", "prefill"]


def _cells(plan: Plan, ours: Plan, fit: Plan | None) -> list[str]:
    placement, shape = plan.placement, plan.shape
    used = {device.name: device for device in plan.devices}
    cells = []
    for name in _device_names(ours, fit):
        device = used.get(name)
        if device is None:
            cells.append("not used")
            continue
        lacking = plan.missing.get(name, 0)
        verdict = f"lacks {format_bytes(lacking)}" if lacking else "fits"
        cells.append(f"{format_bytes(device.total_bytes)} of {format_bytes(device.budget_bytes)}, {verdict}")
    layers = min(placement.n_gpu_layers, shape.n_layer_all + 1) if placement.devices else 0
    cells.append(f"{layers} of {shape.n_layer_all + 1}")
    # -ngl takes the last layers, so those before them lie in RAM with all they have.
    in_ram = {*placement.cpu_expert_layers, *range(shape.n_layer_all + 1 - layers)} & set(
        range(shape.n_layer)
    )
    cells.append(plural(len(in_ram), "layer") if shape.experts else "no experts")
    cells.append(f"{placement.context:,} tokens")
    cells += [forecast(plan.prediction.decode_tps), forecast(plan.prediction.prefill_tps)]
    return cells
