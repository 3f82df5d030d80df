"""Which buffer type each weight goes to, and how large each buffer becomes: llama.cpp's rules, on paper.

Layers go to devices as in `llama_model_base::load_tensors`: the input layer stays on the CPU, the last
`n_gpu_layers` of "all layers and the output" go to the devices, cut by the tensor split. Overrides, tied
embeddings and fallbacks are those of `llama_model_loader::create_tensor`: a weight on the CPU goes to pinned
memory of the first device that offers it (not with mmap), else to an extra buffer type that can repack it (if
allowed), else to plain memory. Each buffer pads its tensors (`ggml_backend_alloc_ctx_tensors_from_buft`).
With mmap, plain memory is not a copy but a window on the file, from its first to its last tensor, whatever
lies between.
"""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qnext.errors import UsageError
from qnext.models.header import ModelHeader, TensorInfo
from qnext.models.shape import ModelShape, is_expert, layer_of
from qnext.plan.expert_rules import EXPERT_TENSORS, expert_layers
from qnext.plan.identity import Same
from qnext.plan.traits import AMX, CPU_ALIGNMENT, DeviceTraits, amx_bytes, extra_buffer_accepts, pad
from qnext.plan.values import HOST, Override, Placement

MAPPED = "CPU_Mapped"
"""Name llama.cpp prints for the part of a mapped file that holds CPU weights."""

_KEPT = 32
"""Placements whose answers are kept: those that one search goes back and forth between."""

_INPUT = re.compile(r"^(?:token_embd|token_types|position_embd|per_layer_token_embd)\b(?!_norm)")
_ROPE = re.compile(r"^rope_(?:freqs|factors_long|factors_short)\.")
_LOOKED_UP = re.compile(
    r"(?:^|\.)(?:token_embd|embed_tokens|token_types|position_embd|per_layer_token_embd)\."
)
_EXPERT_OF = re.compile(rf"blk\.(\d+)\.{EXPERT_TENSORS}")
_MULTIPLIED = re.compile(r"\.weight$")


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """One tensor in one buffer type. A tied output or a RoPE table may be placed in several."""

    tensor: TensorInfo
    buffer: str


def maps_file(placement: Placement) -> bool:
    """Whether the load mode maps the file instead of reading it."""
    return placement.load_mode in ("mmap", "mmap+mlock")


def layer_devices(
    shape: ModelShape, placement: Placement, devices: Sequence[DeviceTraits]
) -> tuple[str, ...]:
    """Device name of every layer (trunk, then MTP blocks) and, last, of the output layer.

    `devices` are the traits of `placement.devices`, in order. The split is done in 32-bit floats because the
    engine does, and a layer on the boundary goes where rounding sends it.
    """
    n_all = shape.n_layer_all
    if not devices:
        return (HOST,) * (n_all + 1)
    wanted = n_all + 1 if placement.n_gpu_layers < 0 else placement.n_gpu_layers
    first, moved = max(n_all + 1 - wanted, 0), min(wanted, n_all + 1)
    edges = _split_edges(placement, devices)
    names = []
    for layer in range(n_all + 1):
        if layer < first:
            names.append(HOST)
        else:
            names.append(devices[bisect_right(edges, _f32((layer - first) / moved))].name)
    return tuple(names)


def assign_buffers(
    header: ModelHeader,
    shape: ModelShape,
    placement: Placement,
    host: DeviceTraits,
    devices: Sequence[DeviceTraits],
) -> tuple[PlacedTensor, ...]:
    """Every tensor the engine creates, with the buffer type it creates it in.

    Tensors of MTP blocks are left out unless `placement.load_mtp`. Assumes that an offload device can run
    the operations of the layers it is given (RPC says so of everything, CUDA and Metal do for these models).
    Raises UsageError for an override whose pattern is not a regular expression. The last answers are kept: a
    search asks about the same weights for many contexts and ubatches.
    """
    of_weights = Placement(
        devices=placement.devices,
        n_gpu_layers=placement.n_gpu_layers,
        overrides=placement.overrides,
        tensor_split=placement.tensor_split,
        load_mode=placement.load_mode,
        extra_buffers=placement.extra_buffers,
        load_mtp=placement.load_mtp,
    )
    return _assigned(Same(header), Same(shape), of_weights, host, tuple(devices))


@lru_cache(maxsize=_KEPT)
def _assigned(
    same_header: Same[ModelHeader],
    same_shape: Same[ModelShape],
    placement: Placement,
    host: DeviceTraits,
    devices: tuple[DeviceTraits, ...],
) -> tuple[PlacedTensor, ...]:
    header, shape = same_header.value, same_shape.value
    layers = layer_devices(shape, placement, devices)
    by_name = {device.name: device for device in devices}
    homes = [by_name.get(name) for name in layers]
    rules = _Rules(placement, host, devices)

    def place(tensor: TensorInfo, device_name: str, *, looked_up: bool) -> PlacedTensor:
        device = by_name.get(device_name)
        return PlacedTensor(tensor, rules.buffer_for(tensor, device, looked_up=looked_up))

    placed: list[PlacedTensor] = []
    tied = all(tensor.name != "output.weight" for tensor in header.tensors)
    created = shape.n_layer_all if placement.load_mtp else shape.n_layer
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        looked_up = _is_looked_up(tensor.name)
        if layer is not None:
            if layer < created:
                buffer = rules.buffer_for(tensor, homes[layer], looked_up=looked_up)
                placed.append(PlacedTensor(tensor, buffer))
        elif _INPUT.match(tensor.name):
            first = place(tensor, HOST, looked_up=looked_up)
            placed.append(first)
            if tied and tensor.name == "token_embd.weight":
                copy = place(tensor, layers[-1], looked_up=False)
                if copy.buffer != first.buffer:
                    placed.append(copy)
        elif _ROPE.match(tensor.name):
            copies = {place(tensor, name, looked_up=True).buffer for name in layers[: shape.n_layer]}
            placed.extend(PlacedTensor(tensor, buffer) for buffer in sorted(copies))
        elif tensor.name.startswith("token_embd_norm"):
            placed.append(place(tensor, layers[0], looked_up=True))
        else:
            placed.append(place(tensor, layers[-1], looked_up=False))
    return tuple(placed)


def buffer_bytes(
    placed: tuple[PlacedTensor, ...],
    placement: Placement,
    devices: Sequence[DeviceTraits],
) -> Mapping[str, int]:
    """Size of each weight buffer by the name llama.cpp prints ("model buffer size"), to the byte.

    With mmap the plain CPU buffer is called `CPU_Mapped` and spans each shard from its first to its last CPU
    tensor; everything else is the padded sum of its tensors.
    """
    return _buffer_bytes(Same(placed), maps_file(placement), tuple(devices))


@lru_cache(maxsize=_KEPT)
def _buffer_bytes(
    placed: Same[tuple[PlacedTensor, ...]], mapped: bool, devices: tuple[DeviceTraits, ...]
) -> Mapping[str, int]:
    own = {device.buffer_type: device for device in devices}
    sizes: dict[str, int] = defaultdict(int)
    windows: dict[int, tuple[int, int]] = {}
    for item in placed.value:
        tensor = item.tensor
        if item.buffer == HOST and mapped:
            end = tensor.offset + tensor.nbytes
            low, high = windows.get(tensor.shard, (tensor.offset, end))
            windows[tensor.shard] = min(low, tensor.offset), max(high, end)
        elif item.buffer in own:
            sizes[item.buffer] += own[item.buffer].alloc_bytes(tensor.shape, tensor.type_name, tensor.nbytes)
        elif item.buffer == AMX:
            sizes[AMX] += amx_bytes(tensor)
        else:
            sizes[item.buffer] += pad(tensor.nbytes, CPU_ALIGNMENT)
    if windows:
        sizes[MAPPED] = sum(high - low for low, high in windows.values())
    return dict(sizes)


def weights_by_device(sizes: Mapping[str, int], devices: Sequence[DeviceTraits]) -> dict[str, int]:
    """Buffer sizes summed per device; every buffer type that is no device's own is host memory."""
    own = {device.buffer_type: device.name for device in devices}
    totals: dict[str, int] = defaultdict(int)
    for buffer, size in sizes.items():
        totals[own.get(buffer, HOST)] += size
    return dict(totals)


@lru_cache(maxsize=8192)
def _is_looked_up(tensor_name: str) -> bool:
    return _LOOKED_UP.search(tensor_name) is not None


class _Rules:
    """The choice of a buffer type for one tensor, under one placement."""

    def __init__(self, placement: Placement, host: DeviceTraits, devices: Sequence[DeviceTraits]) -> None:
        self._overrides = [(_matches(rule), rule.buffer) for rule in placement.overrides]
        self._host = host
        self._extra = placement.extra_buffers
        self._pinned = next((device.host_buffer for device in devices if device.host_buffer), None)
        self._mapped = maps_file(placement)

    def buffer_for(self, tensor: TensorInfo, device: DeviceTraits | None, *, looked_up: bool) -> str:
        """`device` is None on the CPU; `looked_up` weights (embeddings) are indexed, not multiplied."""
        for matches, buffer in self._overrides:
            if matches[tensor.name]:
                if buffer != HOST:
                    # A mapped file is not copied to pinned memory, even where that is asked for.
                    return HOST if self._mapped and buffer == self._pinned else buffer
                return self._cpu_buffer(tensor, looked_up)
        return self._cpu_buffer(tensor, looked_up) if device is None else device.buffer_type

    def _cpu_buffer(self, tensor: TensorInfo, looked_up: bool) -> str:
        if self._pinned is not None:
            # A mapped file is not copied to pinned memory; the engine does not go on to try repacking then.
            return HOST if self._mapped else self._pinned
        if self._extra and not looked_up and _MULTIPLIED.search(tensor.name):
            for buffer in self._host.extra_buffers:
                if extra_buffer_accepts(buffer, tensor, is_expert(tensor.name), self._host.features):
                    return buffer
        return HOST


class _Matches(dict[str, bool]):
    """Whether a pattern is found in a tensor's name: a search for a placement asks it again and again."""

    def __init__(self, search: Callable[[str], object]) -> None:
        super().__init__()
        self._search = search

    def __missing__(self, name: str) -> bool:
        found = self[name] = bool(self._search(name))
        return found


@lru_cache(maxsize=256)
def _matches(rule: Override) -> _Matches:
    try:
        layers = expert_layers(rule.pattern)
        if layers is None:
            return _Matches(re.compile(rule.pattern).search)
        # Of a search's many patterns for experts only the layers differ: no need to compile each of them.
        return _Matches(lambda name: (found := _EXPERT_OF.search(name)) and found[1] in layers)
    except re.error as error:
        raise UsageError(
            f"'{rule.pattern}={rule.buffer}' is not a regular expression: {error}",
            hint="Write overrides as PATTERN=BUFFER, for example 'blk\\.(4[0-7])\\.ffn_.*_exps=CPU'.",
        ) from error


def _split_edges(placement: Placement, devices: Sequence[DeviceTraits]) -> list[float]:
    split = placement.tensor_split or ()
    if any(split):
        shares = [float(split[i]) if i < len(split) else 0.0 for i in range(len(devices))]
    else:
        shares = [float(device.free_bytes) for device in devices]
    if not any(shares):
        shares = [1.0] * len(devices)
    edges, total = [], 0.0
    for share in shares:
        total = _f32(total + _f32(share))
        edges.append(total)
    return [_f32(edge / total) for edge in edges]


def _f32(value: float) -> float:
    """`value` rounded to a 32-bit float."""
    return float(struct.unpack("f", struct.pack("f", value))[0])
