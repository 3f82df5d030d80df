"""Forecast of decode and prefill speed from bytes, bandwidth and arithmetic: a roofline with its overheads.

Decode reads every active weight once per token: the routed experts that were chosen, all else in full, the
cache up to the depth. Each device reads its share at its own bandwidth, one after the other, and every layer
costs a little for starting its graph nodes, more when it crosses between devices. Prefill on the CPU is
bound by arithmetic, 2 operations per active parameter. The constants are stated here and the range is wide:
a forecast from a measured slice or from this machine's history replaces it when there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qnext.models.shape import ModelShape, is_expert
from qnext.plan.values import HOST, DeviceMemory, Placement, Prediction, Reason, SpeedRange, Workload
from qnext.plan.weights import PlacedTensor

BANDWIDTH_EFFICIENCY = 0.70
"""Share of the measured read bandwidth that llama.cpp's CPU kernels reach on quantised experts."""
GPU_EFFICIENCY = 0.60
CPU_LAYER_NS = 60_000
"""Per layer and token on the CPU: some sixty graph nodes, each a barrier between the threads."""
CROSSING_NS = 300_000
"""Per layer whose experts are on the CPU while the rest is on a GPU (0.3 ms on an RTX 4070 desktop)."""
GFLOPS_PER_CORE = {"avx512": 45.0, "avx2": 25.0, "other": 12.0}
"""Quantised matrix products, per physical core; AVX-512 measured on a 2-core Xeon, 207 t/s prefill of a
four-layer Q4_K slice of Qwen3-Next."""
RANGE = (0.55, 1.6)
"""What the forecast is multiplied by for its low and high end."""
FALLBACK_RAM_BPS = 20_000_000_000
FALLBACK_GPU_BPS = 300_000_000_000


@dataclass(frozen=True, slots=True)
class MachineSpeeds:
    """What the forecast needs of a machine. Bandwidths in bytes per second; None where not known."""

    ram_bps: int | None
    ram_source: str
    device_bps: Mapping[str, int]
    cores: int
    instruction_set: str


def active_bytes(
    shape: ModelShape, placed: Sequence[PlacedTensor], device_of_buffer: Mapping[str, str]
) -> dict[str, int]:
    """Weight bytes read per decoded token on each device: `experts_used / experts` of the routed experts.

    Embeddings are looked up, one row, and count as nothing.
    """
    totals: dict[str, int] = {}
    for item in placed:
        if item.tensor.name == "token_embd.weight":
            tied = sum(other.tensor.name == item.tensor.name for other in placed) > 1
            if not tied:
                continue
        share = item.tensor.nbytes
        if is_expert(item.tensor.name) and shape.experts:
            share = share * shape.experts_used // shape.experts
        device = device_of_buffer.get(item.buffer, HOST)
        totals[device] = totals.get(device, 0) + share
    return totals


def active_parameters(shape: ModelShape, placed: Sequence[PlacedTensor]) -> int:
    """Parameters that take part in one prompt token's products (the output layer runs once per batch)."""
    total = 0
    for item in placed:
        if item.tensor.name.startswith(("token_embd", "output")):
            continue
        count = 1
        for length in item.tensor.shape:
            count *= length
        if is_expert(item.tensor.name) and shape.experts:
            count = count * shape.experts_used // shape.experts
        total += count
    return total


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
    per_device = active_bytes(shape, placed, device_of_buffer)
    context = max(1, placement.context)
    decode_ns = 0.0
    for device in devices:
        cache = device.kv_bytes * min(workload.depth + workload.prompt, context) // context
        read = per_device.get(device.name, 0) + cache + device.recurrent_bytes // max(1, placement.parallel)
        decode_ns += read / _bandwidth(device.name, speeds) * 1e9
    on_gpu = bool(placement.devices)
    cpu_layers = len(placement.cpu_expert_layers) if on_gpu else shape.n_layer
    decode_ns += cpu_layers * (CROSSING_NS if on_gpu else CPU_LAYER_NS)
    gflops = GFLOPS_PER_CORE.get(speeds.instruction_set, GFLOPS_PER_CORE["other"]) * max(1, speeds.cores)
    prefill_ns = 2 * active_parameters(shape, placed) / gflops
    prefill_ns += cpu_layers * CPU_LAYER_NS / min(placement.ubatch, max(1, workload.prompt))
    host_bps = speeds.ram_bps or FALLBACK_RAM_BPS
    reason = Reason(
        what="speed forecast",
        because=(
            f"each token reads the active weights once; RAM bandwidth {speeds.ram_source}"
            + ("; prefill on a GPU is not forecast yet" if on_gpu else "")
        ),
        numbers={
            "active_bytes_per_token": sum(per_device.values()),
            "host_bytes_per_token": per_device.get(HOST, 0),
            "ram_bandwidth_bps": host_bps,
        },
    )
    prefill = None if on_gpu else _range(1e9 / prefill_ns)
    return Prediction(_range(1e9 / decode_ns), prefill, "roofline"), reason


def _bandwidth(device: str, speeds: MachineSpeeds) -> float:
    if device == HOST:
        return (speeds.ram_bps or FALLBACK_RAM_BPS) * BANDWIDTH_EFFICIENCY
    if device.startswith("RPC"):
        return float(speeds.device_bps.get(device, speeds.ram_bps or FALLBACK_RAM_BPS)) * BANDWIDTH_EFFICIENCY
    return speeds.device_bps.get(device, FALLBACK_GPU_BPS) * GPU_EFFICIENCY


def _range(mid: float) -> SpeedRange:
    return SpeedRange(round(mid * RANGE[0], 2), round(mid, 2), round(mid * RANGE[1], 2))
