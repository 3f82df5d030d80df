"""Forecast of decode and prefill speed: a sum of terms, each a time at rated speed times a fitted constant.

Decode reads every active weight once per token: the routed experts that were chosen, all else in full, the
cache up to the depth, the recurrent state. Each device reads its share at its own bandwidth, one after the
other, slower where the tensor type needs unpacking. Every layer starts its graph nodes, which costs the same
however small they are: for models with few active parameters that is much of a token's time. A layer whose
experts are in RAM crosses to the CPU and back (only activations travel), a token crosses once to each
further device. Prefill is bound by arithmetic, 2 operations per active parameter; a GPU first copies the
CPU's experts over its link, once per ubatch, and reads the experts that a ubatch chose. The constants and
how far they can be trusted are in `qnext.plan.kernels`; `qnext.plan.speed_history` corrects the terms by what
was measured on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import Literal

from qnext.models.gguf_types import GGML_TYPES_BY_NAME
from qnext.models.shape import ModelShape, is_expert, layer_of
from qnext.plan.identity import Same
from qnext.plan.kernels import (
    ATTENTION_NODES,
    DECODE_RANGE,
    FIT_SOURCE,
    FITTED,
    PREFILL_RANGE,
    RECURRENT_NODES,
    backend_of_device,
    kernel_family,
)
from qnext.plan.speed_history import (
    NOTHING_LEARNT,
    SpeedHistory,
    corrected_terms,
    forecast_range,
    model_key,
    parts_ns,
)
from qnext.plan.values import (
    HOST,
    OFFLOAD_MIN_TOKENS,
    DeviceMemory,
    Placement,
    Prediction,
    Reason,
    Workload,
)
from qnext.plan.weights import PlacedTensor

RPC_CALL_NS = 500_000
"""Per token and RPC device, and per layer that crosses to one: a round trip on a local network. Assumed."""
GFLOPS_PER_CORE = {"avx512": 35.0, "avx2": 22.0, "other": 12.0}
"""Quantised matrix products, per physical core. AVX-512: pp512 of Q4_K_M slices of Qwen3-Next gives 27 on a
Cascade Lake Xeon (8 layers, 50 t/s) and 45 on a Sapphire Rapids (4 layers, 207 t/s), 2 cores each; the
others are assumed."""
UNPINNED_SHARE = 0.7
"""Of a copy's rate, when the experts lie in a mapped file and not in pinned memory: pinning gave prefill 36
to 56 % more on desktops with one GPU (public reports)."""
OVERSUBSCRIBED_SHARE = 0.75
"""Of the bandwidth, with more decode threads than physical cores: two threads of a core wait for
each other at every barrier, which can cost a quarter (public reports)."""
CORE_READ_BPS = 20_000_000_000
"""What one core can read by itself, server cores less and desktop cores more: a few cores do not fill twelve
channels. Assumed."""
FALLBACK_RAM_BPS = 20_000_000_000
FALLBACK_GPU_BPS = 300_000_000_000
FALLBACK_LINK_BPS = 16_000_000_000


@dataclass(frozen=True, slots=True)
class MachineSpeeds:
    """What the forecast needs of a machine. Bandwidths in bytes per second; None or absent where not known.

    `link_bps` is that of each GPU's link to the host, `cores` are physical. `device_clock` is the share of
    its usual arithmetic that a GPU is allowed by its power limit, `history` what tests here have taught.
    """

    ram_bps: int | None
    ram_source: str
    device_bps: Mapping[str, int]
    cores: int
    instruction_set: str
    link_bps: Mapping[str, int] = field(default_factory=dict)
    device_clock: Mapping[str, float] = field(default_factory=dict)
    history: SpeedHistory = NOTHING_LEARNT


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs on one device: weight bytes read, parameters multiplied, layers and their nodes.

    `expert_bytes` is the part of `bytes` that belongs to the experts this token chose; `by_family` splits
    `bytes` by kind of kernel.
    """

    bytes: int = 0
    expert_bytes: int = 0
    parameters: int = 0
    layers: int = 0
    nodes: int = 0
    by_family: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Crossing:
    """Layers on one device whose experts are in RAM: their number, all experts' bytes, active parameters."""

    layers: int = 0
    bytes: int = 0
    parameters: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """Work per device, and by device the layers that have their experts on the host (counted there)."""

    work: Mapping[str, Work]
    crossings: Mapping[str, Crossing]


def active_work(
    shape: ModelShape, placed: tuple[PlacedTensor, ...], device_of_buffer: Mapping[str, str]
) -> Load:
    """What decoding one token touches: `experts_used / experts` of the routed experts, all else in full.

    Embeddings are looked up, one row, and count as nothing, unless they are the output matrix too. The last
    answers are kept.
    """
    return _active_work(Same(shape), Same(placed), tuple(device_of_buffer.items()))


@lru_cache(maxsize=32)
def _active_work(
    same_shape: Same[ModelShape],
    same_placed: Same[tuple[PlacedTensor, ...]],
    owners: tuple[tuple[str, str], ...],
) -> Load:
    shape, placed, device_of_buffer = same_shape.value, same_placed.value, dict(owners)
    tied = all(item.tensor.name != "output.weight" for item in placed)
    read: dict[str, dict[str, int]] = {}
    chosen: dict[str, int] = {}
    multiplied: dict[str, int] = {}
    layer_device: dict[int, str] = {}
    host_experts: dict[int, Crossing] = {}
    embeddings = [item for item in placed if item.tensor.name == "token_embd.weight"]
    for item in placed:
        tensor, device = item.tensor, device_of_buffer.get(item.buffer, HOST)
        if tensor.name == "token_embd.weight" and not (tied and item is embeddings[-1]):
            continue
        size, count = tensor.nbytes, prod(tensor.shape)
        layer = layer_of(tensor.name)
        if is_expert(tensor.name) and layer is not None and shape.experts:
            whole = size
            size = size * shape.experts_used // shape.experts
            count = count * shape.experts_used // shape.experts
            chosen[device] = chosen.get(device, 0) + size
            if device == HOST:
                so_far = host_experts.get(layer, Crossing())
                host_experts[layer] = Crossing(1, so_far.bytes + whole, so_far.parameters + count)
        elif layer is not None:
            layer_device.setdefault(layer, device)
        families, family = read.setdefault(device, {}), kernel_family(tensor.type_name)
        families[family] = families.get(family, 0) + size
        if not tensor.name.startswith(("token_embd", "output")):  # those run for the last token only
            multiplied[device] = multiplied.get(device, 0) + count
    crossings: dict[str, Crossing] = {}
    for layer, experts in host_experts.items():
        home = layer_device.get(layer, HOST)
        if home != HOST:
            known = crossings.get(home, Crossing())
            crossings[home] = Crossing(
                known.layers + 1, known.bytes + experts.bytes, known.parameters + experts.parameters
            )
    nodes: dict[str, int] = {}
    for layer, home in layer_device.items():
        nodes[home] = nodes.get(home, 0) + (RECURRENT_NODES if shape.recurrent[layer] else ATTENTION_NODES)
    homes = list(layer_device.values())
    work = {
        device: Work(
            sum(read.get(device, {}).values()),
            chosen.get(device, 0),
            multiplied.get(device, 0),
            homes.count(device),
            nodes.get(device, 0),
            read.get(device, {}),
        )
        for device in dict.fromkeys((*read, *homes))
    }
    return Load(work, crossings)


def predict_speed(
    shape: ModelShape,
    placement: Placement,
    placed: tuple[PlacedTensor, ...],
    devices: Sequence[DeviceMemory],
    device_of_buffer: Mapping[str, str],
    speeds: MachineSpeeds,
    workload: Workload,
) -> tuple[Prediction, Reason]:
    """Decode and prefill forecast with range for a placement, and the numbers it rests on."""
    load = active_work(shape, placed, device_of_buffer)
    kinds = {device.name: device.kind for device in devices}
    decode = decode_terms(load, placement, devices, speeds, workload)
    prefill = prefill_terms(load, shape, kinds, placement, speeds, workload)
    where = situation(load)
    numbers: dict[str, float | int | str] = {
        "active_bytes_per_token": sum(work.bytes for work in load.work.values()),
        "host_bytes_per_token": load.work.get(HOST, Work()).bytes,
        "ram_bandwidth_bps": speeds.ram_bps or FALLBACK_RAM_BPS,
        "layers_that_cross": sum(crossing.layers for crossing in load.crossings.values()),
        **{f"{part}_ms": round(ns / 1e6, 3) for part, ns in decode_parts(decode).items()},
    }
    because = (
        f"each token reads the active weights once; RAM bandwidth {speeds.ram_source}; constants {FIT_SOURCE}"
    )
    copied = sum(crossing.bytes for name, crossing in load.crossings.items() if kinds[name] == "gpu")
    if copied:
        numbers["copied_bytes_per_ubatch"] = copied
        because += "; for a prompt the CPU's experts are copied to the GPU once per ubatch"
    history, several, model = speeds.history, several_gpus(load, kinds), model_key(shape)
    decode_tps, decode_words = forecast_range(
        parts_ns(decode, FITTED, several), DECODE_RANGE[where], history.decode, model
    )
    prefill_tps, prefill_words = forecast_range(
        parts_ns(prefill, FITTED, several), PREFILL_RANGE[where], history.prefill, model
    )
    for what, words in (("decode", decode_words), ("prefill", prefill_words)):
        because += f"; {what} {words}" if words else ""
    source: Literal["roofline", "slice", "history"] = (
        "history" if decode_words or prefill_words else "roofline"
    )
    if history.decode is not None and model in history.decode.sliced:
        source = "slice"
    return Prediction(decode_tps, prefill_tps, source), Reason("speed forecast", because, numbers)


def several_gpus(load: Load, kinds: Mapping[str, str]) -> bool:
    """Whether layers are on more than one GPU."""
    return sum(work.layers > 0 and kinds.get(name) == "gpu" for name, work in load.work.items()) > 1


def situation(load: Load) -> str:
    """Which range a forecast has: `gpu` (one), `gpus`, `mixed` (weights in RAM beside a GPU) or `cpu`."""
    busy = [name for name, work in load.work.items() if work.layers]
    if busy in ([], [HOST]):
        return "cpu"
    if load.crossings or HOST in busy:
        return "mixed"
    return "gpu" if len(busy) == 1 else "gpus"


def total_ns(terms: Mapping[str, float], constants: Mapping[str, float] = FITTED) -> float:
    """Nanoseconds of all terms; `rpc` is in nanoseconds already."""
    return sum(amount * constants.get(name, 1.0) for name, amount in terms.items())


def decode_parts(terms: Mapping[str, float]) -> dict[str, float]:
    """Where a token's time goes, in nanoseconds: reading VRAM, reading RAM, starting nodes, crossing."""
    parts = {"gpu_reading": 0.0, "ram_reading": 0.0, "node_starts": 0.0, "crossings": 0.0}
    for name, amount in terms.items():
        part = "node_starts" if "_node" in name else "crossings"
        if "_read_" in name:
            part = "ram_reading" if name.startswith("cpu") else "gpu_reading"
        parts[part] += amount * FITTED.get(name, 1.0)
    return parts


def decode_terms(
    load: Load,
    placement: Placement,
    devices: Sequence[DeviceMemory],
    speeds: MachineSpeeds,
    workload: Workload,
) -> dict[str, float]:
    """What one token takes after `depth + prompt` others, by constant."""
    terms: dict[str, float] = {}
    kinds = {device.name: device.kind for device in devices}
    context = max(1, placement.context)
    share = min(workload.depth + workload.prompt, context) / context
    for device in devices:
        work = load.work.get(device.name, Work())
        state = device.kv_bytes * share * _unrounded(placement)
        state += device.recurrent_bytes / max(1, placement.parallel)
        unit = "gpu" if device.kind == "gpu" else "cpu"
        ns_per_byte = 1e9 / _bandwidth(device.name, kinds, speeds, placement.threads)
        for family, size in work.by_family.items():
            _add(terms, f"{unit}_read_{family}", size * ns_per_byte)
        _add(terms, f"{unit}_read_plain", state * ns_per_byte)
        _add(terms, _node_term(device.name, device.kind), work.nodes)
        _add(terms, "rpc", RPC_CALL_NS * (device.kind == "rpc"))
    used = [name for name, work in load.work.items() if work.layers and kinds.get(name) == "gpu"]
    _add(terms, "gpu_hop", max(0, len(used) - 1))
    for name, crossing in load.crossings.items():
        if kinds[name] == "rpc":
            _add(terms, "rpc", crossing.layers * RPC_CALL_NS)
        else:
            _add(terms, "crossing", crossing.layers)
    return corrected_terms(terms, speeds.history.decode, several_gpus(load, kinds))


def prefill_terms(
    load: Load,
    shape: ModelShape,
    kinds: Mapping[str, str],
    placement: Placement,
    speeds: MachineSpeeds,
    workload: Workload,
) -> dict[str, float]:
    """What each token takes of a prompt of `workload.prompt` tokens in the placement's ubatches, by constant.

    A short prompt is bound by reading, not by arithmetic: each of its tokens may choose other experts.
    """
    tokens = max(1, min(placement.ubatch, workload.prompt))
    cores = max(1, min(placement.threads_batch, speeds.cores))
    cpu = GFLOPS_PER_CORE.get(speeds.instruction_set, GFLOPS_PER_CORE["other"]) * cores
    terms: dict[str, float] = {}
    on_device = {name: work.parameters for name, work in load.work.items()}
    offloaded = 0  # active bytes of the experts that a GPU multiplies in the host's stead
    if placement.op_offload and tokens >= OFFLOAD_MIN_TOKENS:
        for name, crossing in load.crossings.items():
            if kinds[name] != "gpu":
                continue
            on_device[HOST] -= crossing.parameters
            on_device[name] += crossing.parameters
            offloaded += crossing.bytes * shape.experts_used // shape.experts
            link = speeds.link_bps.get(name) or FALLBACK_LINK_BPS
            link = round(link * UNPINNED_SHARE) if placement.load_mode.startswith("mmap") else link
            copied = crossing.bytes * _share_chosen(shape, tokens)
            _add(terms, "gpu_copy", copied / link * 1e9 / tokens)
    for name, parameters in on_device.items():
        kind = kinds.get(name, "host")
        work = load.work.get(name, Work())
        read = _bytes_read(work, shape, tokens, offloaded if name == HOST else 0) / tokens
        reading = read / _bandwidth(name, kinds, speeds, placement.threads_batch) * 1e9
        if kind == "gpu":
            rate = (speeds.device_bps.get(name) or FALLBACK_GPU_BPS) / 1e9
            rate *= speeds.device_clock.get(name, 1.0)
            _add(terms, f"gpu_compute_{backend_of_device(name)}", 2 * parameters / rate)
            _add(terms, "gpu_read_block", reading)
        else:
            _add(terms, "cpu_compute", 2 * parameters / cpu)
            _add(terms, "cpu_read_plain", reading)
        _add(terms, _node_term(name, kind), work.nodes / tokens)
    return corrected_terms(terms, speeds.history.prefill, several_gpus(load, kinds))


def _unrounded(placement: Placement) -> float:
    """How much larger the cache would be in f16: a rounded one takes less room, but no less time.

    Unpacking it is taken to cost what reading less saves.
    """
    kinds = [GGML_TYPES_BY_NAME[name.upper()] for name in (placement.kv_type_k, placement.kv_type_v)]
    bytes_each = [kind.block_bytes / kind.block_size for kind in kinds]
    return max(1.0, 2 * len(kinds) / sum(bytes_each))


def _node_term(device: str, kind: str) -> str:
    return f"gpu_node_{backend_of_device(device)}" if kind == "gpu" else "cpu_node"


def _add(terms: dict[str, float], name: str, amount: float) -> None:
    if amount:
        terms[name] = terms.get(name, 0.0) + amount


def _bytes_read(work: Work, shape: ModelShape, tokens: int, offloaded: int) -> float:
    """Weight bytes that `tokens` tokens read together, each choosing its experts evenly and by itself.

    `offloaded` is the part of the chosen experts' bytes that is multiplied on another device.
    """
    if not shape.experts or not work.expert_bytes:
        return work.bytes
    union = _share_chosen(shape, tokens) * shape.experts / shape.experts_used
    return work.bytes - work.expert_bytes + max(0, work.expert_bytes - offloaded) * union


def _share_chosen(shape: ModelShape, tokens: int) -> float:
    """Part of the experts that at least one of `tokens` tokens chooses, if all are equally wanted."""
    return 1.0 - (1.0 - shape.experts_used / shape.experts) ** tokens if shape.experts else 1.0


def _bandwidth(device: str, kinds: Mapping[str, str], speeds: MachineSpeeds, threads: int) -> float:
    """Rated bytes per second of a device; of RAM, what the threads can draw: half of the cores suffice."""
    kind = kinds.get(device, "host")
    if kind == "gpu":
        return speeds.device_bps.get(device) or FALLBACK_GPU_BPS
    ram = speeds.ram_bps or FALLBACK_RAM_BPS
    if kind == "rpc":  # what runs behind it is not known; a worker on this machine's CPU is assumed
        return speeds.device_bps.get(device) or ram
    share = min(1.0, 2 * max(1, threads) / max(1, speeds.cores))
    ram = min(ram, max(1, min(threads, speeds.cores)) * CORE_READ_BPS)
    return ram * (OVERSUBSCRIBED_SHARE if threads > speeds.cores else share)
