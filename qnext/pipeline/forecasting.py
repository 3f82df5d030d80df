"""The trip of `qnext forecast`: slices of a model, measured on this machine, and what they say of the whole.

Only the header of the model is needed. Two slices of a few layers are written, loaded side by side where
memory allows and measured in turns, so that whatever else the machine does strikes both. What is measured is
llama-bench's: a prompt of random tokens, and random tokens one by one, each choosing experts of its own.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qnext.config import Paths
from qnext.engine.llama.quantize import quantise_rows
from qnext.errors import DoesNotFitError, EngineError, ModelError
from qnext.models.synth.slices import Slices, choose_slices, layer_period, write_slices
from qnext.pipeline.planning import PlannedModel, lacking_words, plan_model
from qnext.pipeline.request import Request
from qnext.pipeline.running import RunningModel
from qnext.pipeline.speed_memory import LEAST_CACHES, remember_slices
from qnext.pipeline.surroundings import Notice, require_this_machine
from qnext.plan.choice import choose_placement
from qnext.plan.placement import Problem
from qnext.plan.slice_fit import (
    FIXED,
    Features,
    SliceForecast,
    Test,
    features_of,
    forecast_whole,
    kind_of_layer,
    part_ns,
    weights_of,
)
from qnext.plan.turn import place_tensors
from qnext.plan.values import HOST, Placement, SpeedRange, Workload
from qnext.units import format_bytes

LAYERS = 4, 8
"""Layers of the slices, each rounded up to whole periods."""
LEAST_ROUNDS, USUAL_ROUNDS, MOST_ROUNDS = 5, 9, 60
LEAST_SECONDS, SECONDS = 10.0, 100.0
"""Rounds go on until they are USUAL_ROUNDS and have taken LEAST_SECONDS, or until SECONDS are over."""
VISITS_ALONE, REPEATS_ALONE = 2, 4
"""Where only one slice can be loaded at a time: loads of each, there and back, and rounds in each of them."""
PROMPT, GENERATE = 256, 24
DEPTH = 1024
"""Tokens that the depth is measured with."""
NEIGHBOURS = 9
"""How many numbers of expert layers in RAM are told."""


@dataclass(frozen=True, slots=True)
class ForecastWatch:
    """What a caller may follow: the share written, the share loaded, (round, rounds) as each begins."""

    on_write: Callable[[float], None] | None = None
    on_load: Callable[[float], None] | None = None
    on_round: Callable[[int, int], None] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Arm:
    """A slice as it is loaded."""

    layers: int
    request: Request


@dataclass(slots=True)
class Measured:
    """Nanoseconds per token of each arm, a list per round; of the smallest at depth 0 and at DEPTH."""

    rounds: dict[Test, list[list[float]]] = field(default_factory=dict)
    shallow: list[float] = field(default_factory=list)
    deep: list[float] = field(default_factory=list)


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

    `decode` is by tokens of context that came before, `prefill` that of a prompt of `prompt` tokens;
    `neighbours` are other numbers of expert layers in RAM, the planned one among them, where there is a
    device. `fixed_ns` and `layers_ns` are a token's time in parts. `samples` are all that was measured.
    """

    planned: PlannedModel
    slices: Slices
    prompt: int
    decode: Mapping[int, SpeedRange]
    prefill: SpeedRange
    fixed_ns: float
    layers_ns: Mapping[str, float]
    neighbours: tuple[Neighbour, ...]
    warnings: tuple[str, ...]
    rounds: int
    elapsed_s: float
    slice_bytes: int
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
        progress=None if watch.on_write is None else lambda done, total: watch.on_write(done / total),  # type: ignore[misc]
    )
    arms = _arms(request, planned, found)
    measured, parts = _measure(arms, paths, notice, watch)
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
    kinds = [kind for kind in _features(planned, "decode") if kind != FIXED]
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


class _Loaded:
    """The arms in memory: all of them where they fit, else the one that is asked for."""

    def __init__(self, paths: Paths, notice: Notice, on_load: Callable[[float], None] | None) -> None:
        self._paths, self._notice, self._on_load = paths, notice, on_load
        self._models: dict[Arm, RunningModel] = {}
        self.alone = False

    def get(self, arm: Arm) -> RunningModel:
        """The arm's model, loaded now if it is not."""
        if arm not in self._models:
            if self.alone:
                self.close()
            try:
                self._models[arm] = self._open(arm)
            except DoesNotFitError:
                if not self._models:
                    raise
                self.alone = True
                self.close()
                self._models[arm] = self._open(arm)
        return self._models[arm]

    def _open(self, arm: Arm) -> RunningModel:
        return RunningModel(arm.request, self._paths, self._notice, self._on_load, planner=plan_model)

    def close(self) -> None:
        for model in self._models.values():
            model.close()
        self._models.clear()


def _measure(
    arms: Sequence[Arm], paths: Paths, notice: Notice, watch: ForecastWatch
) -> tuple[Measured, dict[Test, list[Features]]]:
    loaded, measured = _Loaded(paths, notice, watch.on_load), Measured({"decode": [], "prefill": []})
    loaded.alone = any(arm.request.rpc_servers for arm in arms)  # a worker has one client at a time
    parts: dict[Test, list[Features]] = {"decode": [], "prefill": []}
    with contextlib.closing(loaded):
        for arm in arms:
            planned = loaded.get(arm).planned
            for test in parts:
                parts[test].append(_features(planned, test))
            _time(loaded.get(arm), PROMPT, 0, seed=0, warmup=False)  # touches every page
        began, number = time.monotonic(), 0
        repeats = REPEATS_ALONE if loaded.alone else 1
        while not (
            number >= VISITS_ALONE * repeats if loaded.alone else _enough(number, time.monotonic() - began)
        ):
            if watch.on_round is not None:
                watch.on_round(number + 1, max(number + 1, USUAL_ROUNDS))
            taken: dict[Test, list[dict[Arm, float]]] = {test: [{} for _ in range(repeats)] for test in parts}
            for arm in arms if number // repeats % 2 else arms[::-1]:
                model = loaded.get(arm)
                for again in range(repeats):
                    seed = number + again + 1
                    taken["prefill"][again][arm] = _time(model, PROMPT, 0, seed=seed, warmup=False) / PROMPT
                    taken["decode"][again][arm] = _time(model, 0, GENERATE, seed=seed) / GENERATE
            number += repeats
            for test, rounds in taken.items():
                measured.rounds[test] += [[by_arm[arm] for arm in arms] for by_arm in rounds]
        smallest = loaded.get(min(arms, key=lambda arm: arm.layers))
        for _ in range(2):
            measured.shallow.append(_time(smallest, 0, GENERATE, seed=1) / GENERATE)
            measured.deep.append(_time(smallest, 0, GENERATE, seed=1, depth=DEPTH) / GENERATE)
    return measured, parts


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


def _enough(rounds: int, seconds: float) -> bool:
    if rounds < LEAST_ROUNDS or rounds >= MOST_ROUNDS:
        return rounds >= MOST_ROUNDS
    done = rounds >= USUAL_ROUNDS and seconds >= LEAST_SECONDS
    return done or seconds + seconds / rounds > SECONDS


def _time(
    model: RunningModel, prompt: int, generate: int, *, seed: int, warmup: bool = True, depth: int = 0
) -> float:
    """Nanoseconds of one test as llama-bench times it."""
    events = model.session.bench(
        prompt=prompt, generate=generate, depth=depth, repetitions=1, warmup=warmup, seed=seed
    )
    samples = [float(str(event["ns"])) for event in events if event["event"] == "sample"]
    if not samples:
        raise EngineError("the engine timed nothing", hint="Try again with -v to see what it says.")
    return samples[0]


def _features(planned: PlannedModel, test: Test) -> dict[str, float]:
    return _features_of(planned.problem, planned.plan.placement, test)


def _features_of(problem: Problem, placement: Placement, test: Test) -> dict[str, float]:
    return features_of(problem.shape, *place_tensors(problem, placement), test)


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
                weights = weights_of(parts[test], _features_of(problem, placement, test))
                speeds[test] = forecast_whole(rounds, weights).speed()
            found.append(Neighbour(count, fits, speeds["decode"], speeds["prefill"]))
    return tuple(found)


def _compose(
    planned: PlannedModel,
    slices: Slices,
    measured: Measured,
    parts: Mapping[Test, Sequence[Features]],
    elapsed_s: float,
    paths: Mapping[int, Path],
) -> Forecast:
    slice_bytes = sum(file.stat().st_size for file in next(iter(paths.values())).parent.glob("data-*"))
    shape, context = planned.model.shape, planned.plan.placement.context
    forecasts: dict[Test, SliceForecast] = {}
    costs: dict[str, float] = {}
    for test, rounds in measured.rounds.items():
        whole = _features(planned, test)
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
                hint="The machine may be too busy to measure on: try again in a quiet moment.",
            ) from error
    attention = len(shape.attention_layers) / sum(
        not shape.recurrent[slices.layers[position]] for position in range(slices.sizes[0])
    )
    deeper = max(0.0, min(measured.deep) - min(measured.shallow)) / DEPTH * attention
    depths = sorted({0, 4096, 32_768, planned.problem.options.workload.depth})
    decode = forecasts["decode"]
    return Forecast(
        planned=planned,
        slices=slices,
        prompt=PROMPT,
        decode={
            depth: replace(decode, ns=decode.ns + deeper * depth).speed()
            for depth in depths
            if depth <= context
        },
        prefill=forecasts["prefill"].speed(),
        fixed_ns=costs.pop(FIXED),
        layers_ns=costs,
        neighbours=_neighbours(planned, measured, parts),
        warnings=_warnings(planned, slice_bytes, any(one.noisy for one in forecasts.values())),
        rounds=len(measured.rounds["decode"]),
        elapsed_s=elapsed_s,
        slice_bytes=slice_bytes,
        samples={
            "parts": {test: list(map(dict, each)) for test, each in parts.items()},
            "ns_per_token": measured.rounds,
            "shallow_ns": measured.shallow,
            "deep_ns": measured.deep,
        },
    )
