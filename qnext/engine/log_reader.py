"""Reads from llama.cpp's log what it really allocated, and which settings are really active.

"Requested is not active": the engine pads contexts, drops flash attention and falls back to other buffer
types without failing. Its log is the only public account of that; lines are matched by their wording in the
pinned release (src/llama-model.cpp, llama-kv-cache.cpp, llama-memory-recurrent.cpp, llama-context.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from qnext.plan.values import HOST, Budget, DeviceMemory
from qnext.units import MIB

SIZE_LINE = "buffer size ="
"""What every line that states an allocation contains."""

_SIZE_LINE = re.compile(
    r":\s+(?P<buffer>\S+)\s+(?P<part>model|KV|RS|compute|output) buffer size =\s+(?P<mib>[\d.]+) MiB"
)
_PART_FIELDS = {
    "model": "weights_bytes",
    "KV": "kv_bytes",
    "RS": "recurrent_bytes",
    "compute": "compute_bytes",
    "output": "other_bytes",
}
PRINT_RESOLUTION_BYTES = MIB // 100
"""llama.cpp prints sizes as MiB with two decimals."""


@dataclass(frozen=True, slots=True)
class BufferSize:
    """One `… buffer size = … MiB` line: engine buffer name, part of memory it is for, bytes as printed."""

    buffer: str
    part: str
    bytes: int


def read_buffer_sizes(log: Iterable[str]) -> list[BufferSize]:
    """Every buffer size line of the log, in order."""
    sizes = []
    for line in log:
        match = _SIZE_LINE.search(line)
        if match:
            sizes.append(BufferSize(match["buffer"], match["part"], round(float(match["mib"]) * MIB)))
    return sizes


def device_of_buffer(buffer: str, devices: Iterable[str]) -> str:
    """Device whose memory a buffer takes: `CUDA0` for `CUDA0`, the host for `CPU_REPACK` and `CUDA_Host`."""
    for device in devices:
        if buffer == device or buffer.startswith(f"{device}["):
            return device
    return HOST


def allocated_devices(sizes: Iterable[BufferSize], budgets: Mapping[str, Budget]) -> tuple[DeviceMemory, ...]:
    """What each device holds, as logged; same order and keys as the plan's devices."""
    devices = {
        name: DeviceMemory(name, budget.kind, budget.budget_bytes, 0, 0, 0, 0)
        for name, budget in budgets.items()
    }
    gpu_names = [name for name in budgets if name != HOST]
    owners = {budget.buffer_type: name for name, budget in budgets.items()}
    for size in sizes:
        name = owners.get(size.buffer) or device_of_buffer(size.buffer, gpu_names)
        field = _PART_FIELDS[size.part]
        devices[name] = replace(devices[name], **{field: getattr(devices[name], field) + size.bytes})
    return tuple(devices.values())
