"""A forecast from slices as a table, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qnext.plan.plan import plan_to_dict
from qnext.units import format_bytes

if TYPE_CHECKING:
    from qnext.pipeline.forecasting import Forecast
    from qnext.plan.values import SpeedRange


MEMORY_BOUND = 0.75
"""Share of the RAM's bandwidth from which on memory is said to bound decode."""
_BAR = 12
"""Characters of the longest bar."""


def forecast_view(forecast: Forecast) -> Group:
    """Speeds with their ranges, what a token's time goes into, and what was measured for it."""
    planned, shape = forecast.planned, forecast.planned.model.shape
    speeds = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "low t/s", "forecast", "high t/s", "plan said"):
        speeds.add_column(name, justify="left" if not name else "right")
    said = planned.plan.prediction
    speeds.add_row(f"prefill, {forecast.prompt} tokens", *_cells(forecast.prefill, said.prefill_tps))
    workload = planned.problem.options.workload
    for depth, speed in forecast.decode.items():
        usual = said.decode_tps if depth == workload.depth else None
        speeds.add_row(f"decode after {depth:,} tokens", *_cells(speed, usual))
    layers = "+".join(map(str, forecast.slices.sizes))
    total = forecast.fixed_ns + sum(forecast.layers_ns.values())
    shares = ", ".join(f"{ns / total:.0%} {name}" for name, ns in _parts(forecast).items())
    words = [
        f"{shape.name or planned.plan.model_ref} {shape.quant or ''}: {shape.n_layer} layers from {layers}, "
        f"{forecast.rounds} rounds in {forecast.elapsed_s:.0f} s, "
        f"slices of {format_bytes(forecast.slice_bytes)}",
        f"a token takes {total / 1e6:.1f} ms: {shares}",
        *([] if forecast.ram_share is None else [_bound(forecast.ram_share)]),
    ]
    parts: list[RenderableType] = [Text(words[0], style="bold"), speeds, *map(Text, words[1:])]
    if len(forecast.neighbours) > 1:
        parts += [Text(), _curve(forecast)]
    parts += [Text(f"warning: {text}", style="yellow") for text in forecast.warnings]
    return Group(*parts)


def _parts(forecast: Forecast) -> dict[str, float]:
    """What a token's time goes into, in nanoseconds."""
    layers, experts = dict(forecast.layers_ns), forecast.experts_ns
    if experts is not None:
        inside = sum(layers.values())
        experts = min(experts, inside)
        shape = forecast.planned.model.shape
        rest = "attention and DeltaNet" if any(shape.recurrent) else "attention"
        layers = {"routed experts": experts, f"{rest} layers without them": inside - experts}
    return {**layers, "head and start": forecast.fixed_ns}


def _bound(share: float) -> str:
    """In a sentence, what limits decode, by the share of the RAM's bandwidth that it uses."""
    reads = f"a token reads its weights at {share:.0%} of the bandwidth measured for this RAM"
    if share >= MEMORY_BOUND:
        return f"{reads}: memory is what bounds it, more cores would not help"
    return f"{reads}: what bounds it are the processor's sums and its start of each step, not memory"


def _curve(forecast: Forecast) -> Table:
    """Decode and prefill over the number of expert layers in RAM, as bars."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("experts in RAM", "decode t/s", "", "prefill t/s", ""):
        table.add_column(name, justify="right" if name else "left")
    most = [max(getattr(one, test).mid for one in forecast.neighbours) for test in ("decode", "prefill")]
    chosen = len(forecast.planned.plan.placement.cpu_expert_layers)
    for one in forecast.neighbours:
        mark = " planned" if one.cpu_expert_layers == chosen else "" if one.fits else " does not fit"
        cells = []
        for speed, top in zip((one.decode, one.prefill), most, strict=True):
            cells += [f"{speed.mid:.1f}", "▇" * max(1, round(_BAR * speed.mid / top))]
        cells[-1] += mark
        style = "bold" if one.cpu_expert_layers == chosen else "dim" if not one.fits else ""
        table.add_row(str(one.cpu_expert_layers), *cells, style=style)
    return table


def forecast_to_dict(forecast: Forecast) -> dict[str, Any]:
    """All of it, raw samples included."""
    plan = plan_to_dict(forecast.planned.plan)
    return {
        "model": plan["model"],
        "placement": plan["placement"],
        "plan_prediction": plan["prediction"],
        "prompt": forecast.prompt,
        "prefill_tps": asdict(forecast.prefill),
        "decode_tps": [{"depth": depth, **asdict(speed)} for depth, speed in forecast.decode.items()],
        "fixed_ns": forecast.fixed_ns,
        "layers_ns": dict(forecast.layers_ns),
        "experts_ns": forecast.experts_ns,
        "ram_share": forecast.ram_share,
        "neighbours": [asdict(one) for one in forecast.neighbours],
        "warnings": list(forecast.warnings),
        "rounds": forecast.rounds,
        "elapsed_s": forecast.elapsed_s,
        "slice_bytes": forecast.slice_bytes,
        "slices": asdict(forecast.slices),
        "samples": dict(forecast.samples),
    }


def _cells(speed: SpeedRange, planned: SpeedRange | None) -> tuple[str, str, str, str]:
    before = "" if planned is None else f"{planned.mid:.1f} ({planned.low:.1f}-{planned.high:.1f})"
    return f"{speed.low:.1f}", f"{speed.mid:.1f}", f"{speed.high:.1f}", before
