"""Forecast of decode and prefill speed from bytes, bandwidth and arithmetic: a roofline with its overheads.

Decode reads every active weight once per token: the routed experts that were chosen, all else in full, the
cache up to the depth. Each device reads its share at its own bandwidth, one after the other, and every layer
costs a little for starting its graph nodes, more when it crosses between devices. Prefill is bound by
arithmetic, 2 operations per active parameter, on the device that multiplies; a GPU first copies the CPU's
experts over its link, once per ubatch. The constants are stated here, and the range is wide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from qnext.models.shape import ModelShape, is_expert, layer_of
from qnext.plan.values import (
    HOST,
    OFFLOAD_MIN_TOKENS,
    DeviceMemory,
    Placement,
    Prediction,
    Reason,
    SpeedRange,
    Workload,
)
from qnext.plan.weights import PlacedTensor

BANDWIDTH_EFFICIENCY = 0.65
"""Share of the measured read bandwidth that llama.cpp's CPU kernels reach on quantised experts: 0.55 on an
eight-layer Q4_K_M slice of Qwen3-Next (2 cores of a Cascade Lake Xeon); rather more is assumed elsewhere."""
GPU_EFFICIENCY = 0.60
"""The same on a GPU, assumed; with it 2x RTX 3090 are forecast 16 % over the published 104 t/s of an IQ4_XS
80B-A3B (github.com/ikawrakow/ik_llama.cpp/pull/1278)."""
CPU_LAYER_NS = 120_000
"""Per layer and token on the CPU: some sixty graph nodes, each a barrier between the threads. The demo, whose
bytes hardly count, takes 1.3 to 1.7 ms for its eight layers with 2 threads (`qnext bench run demo -n 64`)."""
GPU_LAYER_NS = 80_000
"""Per layer and token on a GPU: kernel starts. RTX 5070 Ti + 5060 Ti, all of an IQ3 file, 114 t/s, of which
the bytes explain a third (public llama-bench log)."""
CROSSING_NS = 300_000
"""Per layer whose experts are on the CPU while the rest is on a GPU (0.3 ms on an RTX 4070 desktop)."""
RPC_CALL_NS = 500_000
"""Per token and RPC device, and per layer that crosses to one: a round trip on a local network. Assumed."""
GFLOPS_PER_CORE = {"avx512": 35.0, "avx2": 22.0, "other": 12.0}
"""Quantised matrix products, per physical core. AVX-512: pp512 of Q4_K_M slices of Qwen3-Next gives 27 on a
Cascade Lake Xeon (8 layers, 50 t/s) and 45 on a Sapphire Rapids (4 layers, 207 t/s), 2 cores each; the
others are assumed."""
GPU_FLOPS_PER_BYTE = 11.0
"""Arithmetic of prefill per byte/s of VRAM bandwidth, ubatch 512: 1,535 t/s on cards of 896 and 448 GB/s."""
LINK_EFFICIENCY = 0.6
"""Share of the PCIe link's rate that copies of expert matrices reach. Assumed."""
UNPINNED_SHARE = 0.7
"""Of that, when the experts lie in a mapped file and not in pinned memory: pinning gave prefill 36 to 56 %
more on desktops with one GPU (public reports)."""
OVERSUBSCRIBED_SHARE = 0.75
"""Of the bandwidth, with more decode threads than physical cores: two threads of a core wait for
each other at every barrier, which can cost a quarter (public reports)."""
CORE_READ_BPS = 20_000_000_000
"""What one core can read by itself, server cores less and desktop cores more: a few cores do not fill twelve
channels. Assumed."""
RANGE = (0.5, 2.0)
"""What the forecast is multiplied by for its low and high end."""
FALLBACK_RAM_BPS = 20_000_000_000
FALLBACK_GPU_BPS = 300_000_000_000
FALLBACK_LINK_BPS = 16_000_000_000


@dataclass(frozen=True, slots=True)
class MachineSpeeds:
    """What the forecast needs of a machine. Bandwidths in bytes per second; None or absent where not known.

    `link_bps` is that of each GPU's link to the host, `cores` are physical. `device_clock` is the share of
    its usual arithmetic that a GPU is allowed by its power limit.
    """

    ram_bps: int | None
    ram_source: str
    device_bps: Mapping[str, int]
    cores: int
    instruction_set: str
    link_bps: Mapping[str, int] = field(default_factory=dict)
    device_clock: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Work:
    """What one token costs on one device: weight bytes read, parameters multiplied, layers started.

    `expert_bytes` is the part of `bytes` that belongs to the experts this token chose.
    """

    bytes: int = 0
    expert_bytes: int = 0
    parameters: int = 0
    layers: int = 0


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
    shape: ModelShape, placed: Sequence[PlacedTensor], device_of_buffer: Mapping[str, str]
) -> Load:
    """What decoding one token touches: `experts_used / experts` of the routed experts, all else in full.

    Embeddings are looked up, one row, and count as nothing, unless they are the output matrix too.
    """
    tied = all(item.tensor.name != "output.weight" for item in placed)
    read: dict[str, int] = {}
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
        read[device] = read.get(device, 0) + size
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
    homes = list(layer_device.values())
    work = {
        device: Work(
            read.get(device, 0), chosen.get(device, 0), multiplied.get(device, 0), homes.count(device)
        )
        for device in dict.fromkeys((*read, *homes))
    }
    return Load(work, crossings)


def predict_speed(
    shape: ModelShape,
    placement: Placement,
    placed: Sequence[PlacedTensor],
    devices: Sequence[DeviceMemory],
    device_of_buffer: Mapping[str, str],
    speeds: MachineSpeeds,
    workload: Workload,
) -> tuple[Prediction, Reason]:
    """Decode and prefill forecast with range for a placement, and the numbers it rests on."""
    load = active_work(shape, placed, device_of_buffer)
    kinds = {device.name: device.kind for device in devices}
    decode_ns = _decode_ns(load, kinds, placement, devices, speeds, workload)
    prefill_ns = _prefill_ns(load, shape, kinds, placement, speeds, workload)
    numbers: dict[str, float | int | str] = {
        "active_bytes_per_token": sum(work.bytes for work in load.work.values()),
        "host_bytes_per_token": load.work.get(HOST, Work()).bytes,
        "ram_bandwidth_bps": speeds.ram_bps or FALLBACK_RAM_BPS,
        "layers_that_cross": sum(crossing.layers for crossing in load.crossings.values()),
    }
    because = f"each token reads the active weights once; RAM bandwidth {speeds.ram_source}"
    copied = sum(crossing.bytes for name, crossing in load.crossings.items() if kinds[name] == "gpu")
    if copied:
        numbers["copied_bytes_per_ubatch"] = copied
        because += "; for a prompt the CPU's experts are copied to the GPU once per ubatch"
    reason = Reason("speed forecast", because, numbers)
    return Prediction(_range(decode_ns), _range(prefill_ns), "roofline"), reason


def _decode_ns(
    load: Load,
    kinds: Mapping[str, str],
    placement: Placement,
    devices: Sequence[DeviceMemory],
    speeds: MachineSpeeds,
    workload: Workload,
) -> float:
    """Time of one token after `depth + prompt` others."""
    context = max(1, placement.context)
    share = min(workload.depth + workload.prompt, context) / context
    spent = 0.0
    for device in devices:
        work = load.work.get(device.name, Work())
        state = device.kv_bytes * share + device.recurrent_bytes / max(1, placement.parallel)
        spent += (work.bytes + state) / _bandwidth(device.name, kinds, speeds, placement.threads) * 1e9
        spent += work.layers * (CPU_LAYER_NS if device.kind == "host" else GPU_LAYER_NS)
        spent += RPC_CALL_NS * (device.kind == "rpc")
    for name, crossing in load.crossings.items():
        spent += crossing.layers * (RPC_CALL_NS if kinds[name] == "rpc" else CROSSING_NS)
    return spent


def _prefill_ns(
    load: Load,
    shape: ModelShape,
    kinds: Mapping[str, str],
    placement: Placement,
    speeds: MachineSpeeds,
    workload: Workload,
) -> float:
    """Time per token of a prompt of `workload.prompt` tokens, in ubatches of the placement's size.

    A short prompt is bound by reading, not by arithmetic: each of its tokens may choose other experts.
    """
    tokens = max(1, min(placement.ubatch, workload.prompt))
    cores = max(1, min(placement.threads_batch, speeds.cores))
    cpu = GFLOPS_PER_CORE.get(speeds.instruction_set, GFLOPS_PER_CORE["other"]) * cores
    spent = 0.0
    on_device = {name: work.parameters for name, work in load.work.items()}
    if placement.op_offload and tokens >= OFFLOAD_MIN_TOKENS:
        for name, crossing in load.crossings.items():
            if kinds[name] != "gpu":
                continue
            on_device[HOST] -= crossing.parameters
            on_device[name] += crossing.parameters
            link = (speeds.link_bps.get(name) or FALLBACK_LINK_BPS) * LINK_EFFICIENCY
            link *= UNPINNED_SHARE if placement.load_mode.startswith("mmap") else 1
            spent += crossing.bytes / link * 1e9 / tokens
    for name, parameters in on_device.items():
        if kinds.get(name, "host") == "gpu":
            rate = (speeds.device_bps.get(name) or FALLBACK_GPU_BPS) * GPU_FLOPS_PER_BYTE / 1e9
            rate *= speeds.device_clock.get(name, 1.0)
            spent += 2 * parameters / rate
        else:
            reading = _bytes_read(load.work.get(name, Work()), shape, tokens) / tokens
            reading_ns = reading / _bandwidth(name, kinds, speeds, placement.threads_batch) * 1e9
            spent += max(2 * parameters / cpu, reading_ns)
    layers = sum(work.layers for work in load.work.values())
    return spent + layers * CPU_LAYER_NS / tokens


def _bytes_read(work: Work, shape: ModelShape, tokens: int) -> float:
    """Weight bytes that `tokens` tokens read together, each choosing its experts evenly and by itself."""
    if not shape.experts or not work.expert_bytes:
        return work.bytes
    share = shape.experts_used / shape.experts
    union = (1 - (1 - share) ** tokens) / share
    return work.bytes - work.expert_bytes + work.expert_bytes * union


def _bandwidth(device: str, kinds: Mapping[str, str], speeds: MachineSpeeds, threads: int) -> float:
    """Bytes per second that decoding reads on a device; half of the cores already keep the RAM busy."""
    kind = kinds.get(device, "host")
    if kind == "gpu":
        return (speeds.device_bps.get(device) or FALLBACK_GPU_BPS) * GPU_EFFICIENCY
    ram = speeds.ram_bps or FALLBACK_RAM_BPS
    if kind == "rpc":  # what runs behind it is not known; a worker on this machine's CPU is assumed
        return (speeds.device_bps.get(device) or ram) * BANDWIDTH_EFFICIENCY
    share = min(1.0, 2 * max(1, threads) / max(1, speeds.cores))
    ram = min(ram, max(1, min(threads, speeds.cores)) * CORE_READ_BPS)
    return ram * BANDWIDTH_EFFICIENCY * (OVERSUBSCRIBED_SHARE if threads > speeds.cores else share)


def _range(mid_ns: float) -> SpeedRange:
    mid = 1e9 / max(mid_ns, 1.0)
    return SpeedRange(round(mid * RANGE[0], 2), round(mid, 2), round(mid * RANGE[1], 2))
