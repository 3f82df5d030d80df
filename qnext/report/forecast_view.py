"""A forecast from slices as a table, and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qnext.plan.plan import plan_to_dict
from qnext.report.words import digits
from qnext.units import format_bytes

if TYPE_CHECKING:
    from qnext.pipeline.forecasting import Forecast
    from qnext.plan.values import SpeedRange


MEMORY_BOUND = 0.75
"""Share of the RAM's bandwidth from which on memory is said to bound decode."""
_WAITS = "starting operations and waiting"
_BAR = 12
"""Characters of the longest bar."""


def forecast_view(forecast: Forecast) -> Group:
    """Speeds with their ranges, what a token's time goes into, and what was measured for it."""
    planned, shape = forecast.planned, forecast.planned.model.shape
    speeds = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("", "low t/s", "forecast", "high t/s", "plan said"):
        speeds.add_column(name, justify="left" if not name else "right")
    said, asked = planned.plan.prediction, planned.problem.options.workload.depth
    usual = [said.prefill_tps, *(said.decode_tps if depth == asked else None for depth in forecast.decode)]
    for (name, speed), planned_speed in zip(speed_rows(forecast), usual, strict=True):
        speeds.add_row(name, *_cells(speed, planned_speed))
    times = token_parts(forecast)
    total = sum(times.values())
    shares = ", ".join(f"{ns / total:.0%} {name}" for name, ns in times.items())
    name = f"{shape.name or planned.plan.model_ref} {shape.quant or ''}"
    parts: list[RenderableType] = [
        Text(f"{name}: {measured_words(forecast)}", style="bold"),
        speeds,
        Text(f"a token takes {total / 1e6:.1f} ms: {shares}"),
    ]
    if bound := bound_words(forecast):
        parts.append(Text(bound))
    if forecast.prefill_by_ubatch:
        speeds_by = ", ".join(f"{size:,}: {tps:.1f}" for size, tps in forecast.prefill_by_ubatch.items())
        chosen = planned.plan.placement.ubatch
        parts.append(Text(f"prefill t/s by ubatch (long prompts; the plan has {chosen}): {speeds_by}"))
    if len(forecast.neighbours) > 1:
        parts += [Text(), _curve(forecast)]
    parts += [Text(f"warning: {text}", style="yellow") for text in forecast.warnings]
    return Group(*parts)


def speed_rows(forecast: Forecast) -> list[tuple[str, SpeedRange]]:
    """Each speed that is told, with its name."""
    decode = [(f"decode after {depth:,} tokens", speed) for depth, speed in forecast.decode.items()]
    return [(f"prefill, {forecast.prompt} tokens", forecast.prefill), *decode]


def headline_words(forecast: Forecast) -> str:
    """What to expect, in a sentence."""
    decode, prefill = next(iter(forecast.decode.values())), forecast.prefill
    return (
        f"{digits(decode.mid)} tokens per second of answer ({digits(decode.low)} to {digits(decode.high)}), "
        f"{digits(prefill.mid)} of prompt ({digits(prefill.low)} to {digits(prefill.high)})"
    )


def measured_words(forecast: Forecast) -> str:
    """What the forecast rests on."""
    layers = "+".join(map(str, forecast.slices.sizes))
    return (
        f"{forecast.planned.model.shape.n_layer} layers from {layers}, {forecast.rounds} rounds in "
        f"{forecast.elapsed_s:.0f} s, slices of {format_bytes(forecast.slice_bytes)}"
    )


def token_parts(forecast: Forecast) -> dict[str, float]:
    """What a token's time goes into, in nanoseconds."""
    experts = forecast.experts_ns
    waits = {name: min(ns, forecast.layers_ns[name]) for name, ns in forecast.waits_ns.items()}
    layers = {name: ns - waits.get(name, 0.0) for name, ns in forecast.layers_ns.items()}
    if experts is not None:
        inside = sum(layers.values())
        experts = min(experts, inside)
        recurrent = any(forecast.planned.model.shape.recurrent)
        rest = (
            "attention, DeltaNet and what else is in layers"
            if recurrent
            else "attention and what else is in layers"
        )
        layers = {"routed experts": experts, rest: inside - experts}
    return {**layers, _WAITS: sum(waits.values()), "head and start of a step": forecast.fixed_ns}


def bound_words(forecast: Forecast) -> str:
    """In a sentence, what limits decode, by the share of the RAM's bandwidth that it uses; "" on devices."""
    if forecast.ram_share is None:
        return ""
    reads = f"weights are read at {forecast.ram_share:.0%} of this RAM's measured bandwidth"
    if forecast.ram_share >= MEMORY_BOUND:
        return f"{reads}: memory bounds decode, more cores would not help"
    return f"{reads}: the processor's sums bound decode, not memory"


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
        "prefill_by_ubatch_tps": dict(forecast.prefill_by_ubatch),
        "fixed_ns": forecast.fixed_ns,
        "layers_ns": dict(forecast.layers_ns),
        "experts_ns": forecast.experts_ns,
        "waits_ns": dict(forecast.waits_ns),
        "ram_share": forecast.ram_share,
        "neighbours": [asdict(one) for one in forecast.neighbours],
        "warnings": list(forecast.warnings),
        "rounds": forecast.rounds,
        "elapsed_s": forecast.elapsed_s,
        "slice_bytes": forecast.slice_bytes,
        "memory_bytes": forecast.memory_bytes,
        "slices": asdict(forecast.slices),
        "samples": dict(forecast.samples),
    }


def _cells(speed: SpeedRange, planned: SpeedRange | None) -> tuple[str, str, str, str]:
    before = "" if planned is None else f"{planned.mid:.1f} ({planned.low:.1f}-{planned.high:.1f})"
    return f"{speed.low:.1f}", f"{speed.mid:.1f}", f"{speed.high:.1f}", before
