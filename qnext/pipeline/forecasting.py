"""The trip of `qnext forecast`: slices of a model, measured on this machine, and what they say of the whole.

Only the header of the model is needed. Two slices of a few layers are written, loaded side by side where
memory allows and measured in turns, so that whatever else the machine does strikes both. What is measured is
llama-bench's: a prompt of random tokens, and random tokens one by one, each choosing experts of its own.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import sub
from pathlib import Path
from statistics import median
from typing import Any

from qnext.config import Paths
from qnext.engine.llama.quantize import quantise_rows
from qnext.errors import EngineError, ModelError
from qnext.models.synth.slices import FEW, Slices, WrittenSlices, choose_slices, layer_period, write_slices
from qnext.pipeline.planning import PlannedModel, lacking_words, plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.slice_measuring import (
    DEPTH,
    GENERATE,
    PROMPT,
    Arm,
    ForecastWatch,
    Measured,
    features_placed,
    features_planned,
    measure_slices,
)
from qnext.pipeline.speed_memory import LEAST_CACHES, remember_slices
from qnext.pipeline.surroundings import Notice, require_this_machine
from qnext.plan.choice import choose_placement
from qnext.plan.slice_fit import (
    FIXED,
    Features,
    SliceForecast,
    Test,
    forecast_whole,
    kind_of_layer,
    median_with_error,
    part_ns,
    weights_of,
)
from qnext.plan.speed import active_work
from qnext.plan.turn import place_tensors
from qnext.plan.values import HOST, Placement, SpeedRange, Workload
from qnext.units import format_bytes

LAYERS = 4, 8
"""Layers of the slices, each rounded up to whole periods."""
NEIGHBOURS = 9
"""How many numbers of expert layers in RAM are told."""


@dataclass(frozen=True, slots=True)
class Neighbour:
    """Speeds with the experts of so many layers in RAM, the others on devices."""

    cpu_expert_layers: int
    fits: bool
    decode: SpeedRange
    prefill: SpeedRange


@dataclass(frozen=True, slots=True)
class Forecast:
    """What slices say of a model on this machine, as it was planned; with `warnings`, plans do not use it.

    `decode` is by tokens of context that came before, `prefill` that of a prompt of `prompt` tokens,
    `prefill_by_ubatch` the middle of prompts that fill a batch of so many tokens;
    `neighbours` are other numbers of expert layers in RAM, the planned one among them, where there is a
    device. `fixed_ns` and `layers_ns` are a token's time in parts, `experts_ns` what routed experts have of
    the latter, None where that was not measured. `waits_ns` is what starting each operation and waiting for
    threads and devices has of `layers_ns` at most: the time of layers with next to no weights. `ram_share` is
    what a token reads in its time over the RAM's measured bandwidth, None where devices have a part.
    `memory_bytes` is what the plans of all slices in memory at once add up to, with their programs. `samples`
    are all that was measured.
    """

    planned: PlannedModel
    slices: Slices
    prompt: int
    decode: Mapping[int, SpeedRange]
    prefill: SpeedRange
    prefill_by_ubatch: Mapping[int, float]
    fixed_ns: float
    layers_ns: Mapping[str, float]
    experts_ns: float | None
    waits_ns: Mapping[str, float]
    ram_share: float | None
    neighbours: tuple[Neighbour, ...]
    warnings: tuple[str, ...]
    rounds: int
    elapsed_s: float
    slice_bytes: int
    memory_bytes: int
    samples: Mapping[str, Any]


def run_forecast(request: Request, paths: Paths, notice: Notice, watch: ForecastWatch) -> Forecast:
    """Forecast `request.model` from slices, whether or not all of it fits here.

    Raises ModelError for what has no slices, DoesNotFitError where not even a slice fits, EngineError.
    """
    began = time.monotonic()
    planned = plan_model(request, paths, notice)
    build = require_this_machine(planned.surroundings)
    shape = planned.model.shape
    period = layer_period(shape)
    sizes = tuple(dict.fromkeys(-(-size // period) * period for size in LAYERS))
    if len(sizes) < 2:
        sizes = (period, 2 * period)
    if shape.n_layer <= sizes[-1]:
        raise ModelError(
            f"{shape.name or request.model} has {shape.n_layer} layers, as many as a slice",
            hint=f"Measure it itself: qnext bench run {request.model}",
        )
    slices = choose_slices(shape, sizes)
    found = write_slices(
        planned.model.header,
        shape,
        slices,
        slices_dir(paths),
        quantizer=quantise_rows,
        progress=watch.on_write,
    )
    arms = _arms(request, planned, found.paths)
    few = None
    if found.few_path is not None:
        few = replace(arms[0], request=replace(arms[0].request, model=str(found.few_path)))
    smallest = arms[:: len(sizes)]
    bare = [Arm(arm.layers, replace(arm.request, model=str(found.bare_path))) for arm in smallest]
    measured, parts = measure_slices(arms, few, bare, paths, notice, watch)
    forecast = _compose(planned, slices, measured, parts, time.monotonic() - began, found)
    if forecast.warnings:
        return forecast
    said = {Workload(0, GENERATE, depth): speed.mid for depth, speed in forecast.decode.items()}
    remember_slices({Workload(PROMPT, 0, 0): forecast.prefill.mid, **said}, planned, build, paths)
    return forecast


def slices_dir(paths: Paths) -> Path:
    """Where slices are written, and kept for the next forecast of the same model."""
    return paths.cache_dir / "slices"


def clean_slices(paths: Paths) -> int:
    """Delete all slices; the bytes that were freed."""
    folder = slices_dir(paths)
    freed = sum(file.stat().st_size for file in folder.rglob("data-*.gguf"))
    shutil.rmtree(folder, ignore_errors=True)
    return freed


def _arms(request: Request, planned: PlannedModel, paths: Mapping[int, Path]) -> list[Arm]:
    """What to load: each slice with all its layers placed as some of the plan's are."""
    placement = planned.plan.placement
    pinned = replace(
        request,
        context=max(PROMPT, GENERATE + DEPTH) + 64,
        parallel=1,
        batch=placement.batch,
        ubatch=placement.ubatch,
        kv_type_k=placement.kv_type_k,
        kv_type_v=placement.kv_type_v,
        flash_attention=placement.flash_attention,
        load_mode=placement.load_mode,
        threads=placement.threads,
        threads_batch=placement.threads_batch,
        repack=planned.surroundings.repack,
        n_gpu_layers=0,
        cpu_experts=None,
        workload=Workload(PROMPT, GENERATE, 0),
    )
    kinds = [kind for kind in features_planned(planned, "decode") if kind != FIXED]
    return [
        Arm(layers, _placed_as(kind, layers, replace(pinned, model=str(path)), placement))
        for kind in kinds
        for layers, path in paths.items()
    ]


def _placed_as(kind: str, layers: int, request: Request, placement: Placement) -> Request:
    """The request that places all layers of a slice as those of `kind`, the head where the plan has it."""
    if not placement.devices:
        return request
    if kind == kind_of_layer(HOST, HOST):
        return replace(request, n_gpu_layers=min(1, placement.n_gpu_layers), cpu_experts=layers)
    on_host = kind.endswith(f" on {HOST}")
    return replace(request, n_gpu_layers=None, cpu_experts=layers if on_host else None)


def _warnings(planned: PlannedModel, slice_bytes: int, noisy: bool) -> tuple[str, ...]:
    found = []
    if lacking := lacking_words(planned.plan):
        found.append(f"the whole model does not fit here, {lacking} missing: this is with more memory")
    caches = planned.surroundings.machine.cpu.llc_bytes or 0
    if slice_bytes < LEAST_CACHES * caches:
        found.append(
            f"slices of {format_bytes(slice_bytes)} are partly read from the processor's cache of"
            f" {format_bytes(caches)}: the whole model will be slower than this"
        )
    if noisy:
        found.append("the machine was uneven meanwhile: the range may be too narrow, try in a quiet moment")
    return tuple(found)


def _hint(parts: Sequence[Features], whole: Features) -> str:
    lacking = sorted(whole.keys() - {name for one in parts for name in one})
    if lacking:
        return f"No slice has {', '.join(lacking)}: measure another placement, such as --cpu-moe."
    return "The machine may be too busy to measure on: try again in a quiet moment."


def _by_ubatch(measured: Measured, usual: int, tps: float) -> dict[int, float]:
    """Tokens per second of the whole by ubatch, as the smallest slice's change; `tps` is with `usual`."""
    if usual not in measured.ubatch:
        return {}
    ns = {size: median(each) for size, each in measured.ubatch.items()}
    return {size: round(tps * ns[usual] / each, 2) for size, each in ns.items()}


def _ram_share(planned: PlannedModel, token_ns: float) -> float | None:
    """Bytes that a token reads in its time, over what the RAM was measured to give."""
    bandwidth = planned.surroundings.speeds.ram_bps
    if planned.plan.placement.devices or not bandwidth:
        return None
    load = active_work(planned.model.shape, *place_tensors(planned.problem, planned.plan.placement))
    return sum(work.bytes for work in load.work.values()) / (token_ns / 1e9) / bandwidth


def _neighbours(
    planned: PlannedModel, measured: Measured, parts: Mapping[Test, Sequence[Features]]
) -> tuple[Neighbour, ...]:
    """Speeds over the number of expert layers in RAM, as far as the slices tell them."""
    problem, chosen = planned.problem, planned.plan.placement
    layers = planned.model.shape.n_layer
    if not chosen.devices or not planned.model.shape.experts:
        return ()
    counts = {round(step * layers / (NEIGHBOURS - 1)) for step in range(NEIGHBOURS)}
    found = []
    for count in sorted({*counts, len(chosen.cpu_expert_layers)}):
        if count == len(chosen.cpu_expert_layers):
            placement, fits = chosen, True
        else:
            options = replace(
                problem.options, cpu_experts=count, ubatch=chosen.ubatch, context=chosen.context
            )
            placed = choose_placement(replace(problem, options=options))
            placement, fits = placed.placement, placed.fits
        speeds: dict[Test, SpeedRange] = {}
        with contextlib.suppress(ValueError):  # a kind of layer that no slice has
            for test, rounds in measured.rounds.items():
                weights = weights_of(parts[test], features_placed(problem, placement, test))
                speeds[test] = forecast_whole(rounds, weights).speed()
            found.append(Neighbour(count, fits, speeds["decode"], speeds["prefill"]))
    return tuple(found)


def _compose(
    planned: PlannedModel,
    slices: Slices,
    measured: Measured,
    parts: Mapping[Test, Sequence[Features]],
    elapsed_s: float,
    written: WrittenSlices,
) -> Forecast:
    folder = next(iter(written.paths.values())).parent
    slice_bytes = sum(file.stat().st_size for file in folder.glob("data-*"))
    shape, context = planned.model.shape, planned.plan.placement.context
    forecasts: dict[Test, SliceForecast] = {}
    costs: dict[str, float] = {}
    wholes: dict[Test, Features] = {test: features_planned(planned, test) for test in measured.rounds}
    for test, rounds in measured.rounds.items():
        whole = wholes[test]
        try:
            forecasts[test] = forecast_whole(rounds, weights_of(parts[test], whole))
            if test == "decode":
                costs = {
                    name: amount * part_ns(rounds, weights_of(parts[test], {name: 1.0}))
                    for name, amount in whole.items()
                }
        except ValueError as error:
            raise EngineError(
                f"the slices do not tell the {test} of the whole model: {error}",
                hint=_hint(parts[test], whole),
            ) from error
    attention = len(shape.attention_layers) / sum(
        not shape.recurrent[slices.layers[position]] for position in range(slices.sizes[0])
    )
    slope, doubt = median_with_error(list(map(sub, measured.deep, measured.shallow)))
    deeper = max(0.0, slope) * attention / DEPTH, doubt * attention / DEPTH
    depths = sorted({0, 4096, 32_768, planned.problem.options.workload.depth})
    decode = forecasts["decode"]
    experts_ns = None
    if measured.fewer and len(costs) == 2:  # layers of one kind
        kind = next(name for name in costs if name != FIXED)
        saved = median(map(sub, measured.usual, measured.fewer)) * shape.experts_used
        times_larger = wholes["decode"][kind] / parts["decode"][0][kind]
        experts_ns = max(0.0, saved / (shape.experts_used - FEW) * times_larger)
    waits: dict[str, float] = {}
    for smallest, steps in zip(parts["decode"][:: len(slices.sizes)], measured.bare, strict=True):
        kind = next(name for name in smallest if name != FIXED)
        waits[kind] = median(steps) * wholes["decode"][kind] / smallest[kind]
    return Forecast(
        planned=planned,
        slices=slices,
        prompt=PROMPT,
        decode={depth: decode.after(depth, deeper).speed() for depth in depths if depth <= context},
        prefill=(prefill := forecasts["prefill"].speed()),
        prefill_by_ubatch=_by_ubatch(measured, min(PROMPT, planned.plan.placement.ubatch), prefill.mid),
        fixed_ns=costs.pop(FIXED),
        layers_ns=costs,
        experts_ns=experts_ns,
        waits_ns=waits,
        ram_share=_ram_share(planned, decode.ns),
        neighbours=_neighbours(planned, measured, parts),
        warnings=_warnings(planned, slice_bytes, any(one.noisy for one in forecasts.values())),
        rounds=len(measured.rounds["prefill"]),
        elapsed_s=elapsed_s,
        slice_bytes=slice_bytes,
        memory_bytes=measured.memory_bytes,
        samples={
            "parts": {test: list(map(dict, each)) for test, each in parts.items()},
            "ns_per_token": measured.rounds,
            "shallow_ns": measured.shallow,
            "deep_ns": measured.deep,
            "usual_experts_ns": measured.usual,
            "fewer_experts_ns": measured.fewer,
            "bare_ns": measured.bare,
            "ubatch_ns": measured.ubatch,
        },
    )
