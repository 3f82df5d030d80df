"""What each layer costs on each device, in bytes and in seconds of a turn: the terms a packing adds up.

The forecast is a sum over layers (`qnext.plan.speed`): what one layer adds depends on its own device and on
whether its experts are there or in RAM, not on the other layers. So a layer is asked for alone, once for each
kind of layer, and any placement's time is an addition. Only the use of a further device costs by itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qnext.models.header import TensorInfo
from qnext.models.shape import is_expert, layer_of
from qnext.plan.cache import kv_bytes, recurrent_bytes
from qnext.plan.compute import estimate_compute
from qnext.plan.placement import Problem
from qnext.plan.speed import Load, Work, active_work, decode_terms, prefill_terms, total_ns
from qnext.plan.turn import turn_seconds
from qnext.plan.values import (
    HOST,
    OFFLOAD_MIN_TOKENS,
    DeviceMemory,
    Override,
    Placement,
    Prediction,
    SpeedRange,
)
from qnext.plan.weights import PlacedTensor, assign_buffers

NO_PIPELINE = Override("no-pipeline", HOST)
"""Matches no tensor. Several devices that hold everything work in a pipeline, with four copies of what they
are sent, unless there is any override (`llama_context`, `model.has_tensor_overrides()`)."""


@dataclass(frozen=True, slots=True)
class LayerPrice:
    """One layer on one device. `rest_bytes` are all but its routed experts: weights, cache, state.

    `seconds` of a turn with everything on the device, `saved` of them against experts in RAM. `copied_bytes`
    is the largest of its expert matrices, for which a GPU keeps room while any such is in RAM.
    """

    rest_bytes: int = 0
    expert_bytes: int = 0
    copied_bytes: int = 0
    seconds: float = 0.0
    saved: float = 0.0


@dataclass(frozen=True, slots=True)
class ComputeNeed:
    """Compute-buffer bytes of a device that holds all, some or none of its layers' experts.

    `copies` says whether the largest expert matrix left in RAM comes on top. `output` is that of a device
    with the output layer alone.
    """

    all: int
    some: int
    none: int
    output: int
    copies: bool


def price_layers(
    problem: Problem, placement: Placement, names: Sequence[str]
) -> Mapping[str, list[LayerPrice]]:
    """The price of every layer (trunk, MTP blocks, last the output layer) on each device of `names`.

    `placement` says how many layers leave the host, and context, cache types and ubatch; those that stay
    have no price. The problem must have speeds.
    """
    shape = problem.shape
    tensors = _tensors_by_layer(problem, placement, names[0])
    keys = [_kind(problem, layer, tensors[layer]) for layer in range(shape.n_layer_all + 1)]
    prices: dict[str, list[LayerPrice]] = {}
    for name in names:
        states = _states(problem, placement, name)
        known: dict[object, LayerPrice] = {}
        for layer, key in enumerate(keys):
            if key not in known:
                known[key] = _price(problem, placement, name, tensors[layer], states[layer])
        prices[name] = [known[key] for key in keys]
    return prices


def fixed_seconds(
    problem: Problem, placement: Placement, names: Sequence[str], with_layers: Sequence[str]
) -> float:
    """Seconds of a turn that using these devices costs by itself: crossings between them, network calls."""
    load = Load({name: Work(layers=1) for name in with_layers}, {})
    return _seconds(problem, placement, load, [_memory(problem, name) for name in names])


def compute_needs(problem: Problem, placement: Placement, names: Sequence[str]) -> Mapping[str, ComputeNeed]:
    """Compute buffers if all of these devices, in order, hold some of the layers, and no pipeline.

    The figures of a dry run where there are any, else the estimate, for layers cut evenly.
    """
    shape, measured = problem.shape, problem.compute or {}
    needs = {name: ComputeNeed(size, size, size, size, False) for name, size in measured.items()}
    if all(name in needs for name in names):
        return needs
    first = max(0, shape.n_layer_all + 1 - placement.n_gpu_layers)

    def dealt(over: Sequence[str]) -> tuple[str, ...]:
        """Layers cut evenly, the output layer on the last device."""
        moved = shape.n_layer_all - first
        homes = [over[number * len(over) // moved] for number in range(moved)]
        return (*[HOST] * first, *homes, names[-1])

    devices = [problem.traits[name] for name in names]
    placement = replace(placement, overrides=(NO_PIPELINE,))
    # Matrices without bytes: the room for the one that is copied comes on top.
    in_ram = tuple(
        PlacedTensor(replace(tensor, nbytes=0), HOST)
        for tensor in problem.header.tensors
        if is_expert(tensor.name) and "down" in tensor.name
    )
    present = estimate_compute(shape, placement, (), dealt(names), devices)
    absent = estimate_compute(shape, placement, in_ram, dealt(names), devices)
    output = estimate_compute(shape, placement, in_ram, dealt(names[:-1] or names), devices)
    copied = placement.op_offload and placement.ubatch >= OFFLOAD_MIN_TOKENS
    for device in devices:
        name = device.name
        if name not in needs:
            most = max(present[name], absent[name])
            copies = copied and device.kind == "gpu"
            needs[name] = ComputeNeed(present[name], most, absent[name], output[name], copies)
    return needs


def _tensors_by_layer(problem: Problem, placement: Placement, name: str) -> list[list[TensorInfo]]:
    shape, device = problem.shape, problem.traits[name]
    single = replace(placement, devices=(name,), tensor_split=None, overrides=())
    tensors: list[list[TensorInfo]] = [[] for _ in range(shape.n_layer_all + 1)]
    for item in assign_buffers(problem.header, shape, single, problem.traits[HOST], [device]):
        if item.buffer == device.buffer_type:
            layer = layer_of(item.tensor.name)
            tensors[shape.n_layer_all if layer is None else layer].append(item.tensor)
    return tensors


def _kind(problem: Problem, layer: int, tensors: Sequence[TensorInfo]) -> object:
    """Equal for layers that cost the same."""
    shape = problem.shape
    marks = (shape.recurrent[layer], shape.sliding[layer]) if layer < shape.n_layer else (layer,)
    names = (tensor.name.split(".", 2)[-1] for tensor in tensors)
    return (*marks, *((name, t.type_name, t.shape) for name, t in zip(names, tensors, strict=True)))


def _states(problem: Problem, placement: Placement, name: str) -> list[tuple[int, int]]:
    """Bytes of cache and of recurrent state of every layer, on one device."""
    labels = [str(layer) for layer in range(problem.shape.n_layer_all + 1)]
    if not placement.kv_offload:
        return [(0, 0)] * len(labels)
    traits = dict.fromkeys(labels, problem.traits[name])
    kv = kv_bytes(problem.shape, placement, labels, traits)
    recurrent = recurrent_bytes(problem.shape, placement, labels, traits)
    return [(kv.get(label, 0), recurrent.get(label, 0)) for label in labels]


def _price(
    problem: Problem, placement: Placement, name: str, tensors: Sequence[TensorInfo], state: tuple[int, int]
) -> LayerPrice:
    if not tensors:
        return LayerPrice()
    shape, traits = problem.shape, problem.traits[name]
    sizes = [traits.alloc_bytes(tensor.shape, tensor.type_name, tensor.nbytes) for tensor in tensors]
    experts = [is_expert(tensor.name) and not shape.dense for tensor in tensors]
    expert_bytes = sum(size for size, expert in zip(sizes, experts, strict=True) if expert)
    memories = [_memory(problem, HOST), _memory(problem, name, *state)]
    alone = fixed_seconds(problem, placement, (name,), (name,))

    def seconds(buffer: str) -> float:
        placed = tuple(
            PlacedTensor(tensor, buffer if expert else traits.buffer_type)
            for tensor, expert in zip(tensors, experts, strict=True)
        )
        load = active_work(shape, placed, {traits.buffer_type: name})
        return _seconds(problem, placement, load, memories) - alone

    here = seconds(traits.buffer_type)
    return LayerPrice(
        rest_bytes=sum(sizes) - expert_bytes + sum(state),
        expert_bytes=expert_bytes,
        copied_bytes=max((t.nbytes for t, e in zip(tensors, experts, strict=True) if e), default=0),
        seconds=here,
        saved=seconds(HOST) - here if expert_bytes else 0.0,
    )


def _memory(problem: Problem, name: str, kv: int = 0, recurrent: int = 0) -> DeviceMemory:
    return DeviceMemory(name, problem.traits[name].kind, None, 0, kv, recurrent, 0)


def _seconds(problem: Problem, placement: Placement, load: Load, memories: Sequence[DeviceMemory]) -> float:
    workload, speeds = problem.options.workload, problem.speeds
    assert speeds is not None
    kinds = {memory.name: memory.kind for memory in memories}
    decode = total_ns(decode_terms(load, placement, memories, speeds, workload))
    prefill = total_ns(prefill_terms(load, problem.shape, kinds, placement, speeds, workload))
    rates = [1e9 / max(nanoseconds, 1e-6) for nanoseconds in (decode, prefill)]
    alike = [SpeedRange(rate, rate, rate) for rate in rates]
    return turn_seconds(Prediction(alike[0], alike[1], "roofline"), workload)
