"""How much of each memory a plan may use: the machine's free memory less a margin, or what the user names.

The margin covers what no plan can count: the engine's own code and vocabulary, allocator slack, other
programs that grow. A budget the user names is taken as it is.
"""

from __future__ import annotations

from collections.abc import Mapping

from qnext.errors import HardwareError, UsageError
from qnext.hardware.machine import Gpu, Machine
from qnext.plan.values import HOST, Budget
from qnext.units import GIB, MIB

_ENGINE_NAMES = {"cuda": "CUDA", "rocm": "ROCm", "vulkan": "Vulkan", "metal": "MTL", "sycl": "SYCL"}
"""llama.cpp's device name for the first device of a backend is this followed by 0."""

HOST_MARGIN_SHARE = 16
HOST_MARGIN_BYTES = (192 * MIB, GIB)
GPU_MARGIN_SHARE = 16
GPU_MARGIN_BYTES = (256 * MIB, GIB)
"""Smallest and largest margin; `--fit` leaves 1 GiB on every device."""

UNIFIED_GPU_SHARE = (3, 4)
"""Part of a shared memory a GPU may hold: macOS lets Metal wire down three quarters of it."""


def make_budgets(
    machine: Machine,
    *,
    ram: int | None = None,
    vram: int | None = None,
    ram_headroom: int | None = None,
    vram_headroom: int | None = None,
    device_memory: Mapping[str, int] | None = None,
    rpc_servers: tuple[str, ...] = (),
) -> tuple[Budget, ...]:
    """Host first, then the machine's GPUs, then one RPC device per server. Bytes throughout.

    `ram` and `vram` (for every GPU) replace what was detected, `device_memory` one device by engine name;
    `ram_headroom` and `vram_headroom` replace the margins that are left of what was detected. An
    RPC device needs its size from `device_memory`: a worker on a CPU reports the whole machine's RAM. Devices
    are numbered over all workers, each of which is taken to offer one, but buffers by worker. Where
    CPU and GPU share one memory, what the GPUs may use is taken off the host's share, unless both are named.
    Raises HardwareError when RAM is unknown, UsageError for a device that is not there.
    """
    named = dict(device_memory or {})
    host = named.pop(HOST, ram)
    forced = host is not None
    if host is None:
        host = _less_margin(_host_bytes(machine), HOST_MARGIN_SHARE, HOST_MARGIN_BYTES, ram_headroom)
    gpus = []
    for position, gpu in enumerate(machine.gpus):
        name = engine_name(gpu, position)
        size = named.pop(name, vram)
        both_named = forced and size is not None
        if size is None:
            size = _shared_bytes(gpu, host) if machine.unified_memory else _gpu_bytes(gpu, vram_headroom)
        if machine.unified_memory and not both_named:
            host = max(0, host - size)
        gpus.append(Budget(name, "gpu", size, name))
    budgets = [Budget(HOST, "host", host, HOST), *gpus]
    for index, server in enumerate(rpc_servers):
        name = f"RPC{index}"
        if name not in named:
            raise UsageError(
                f"how much memory may be used on {name} ({server})?", hint=f"Add --device-memory {name}=8G."
            )
        budgets.append(Budget(name, "rpc", named.pop(name), f"RPC0[{server}]"))
    if named:
        known = ", ".join(budget.name for budget in budgets)
        raise UsageError(
            f"there is no device named {', '.join(sorted(named))}", hint=f"This machine has: {known}."
        )
    return tuple(budgets)


def _host_bytes(machine: Machine) -> int:
    memory = machine.memory
    for known in (memory.usable_bytes, memory.available_bytes, memory.limit_bytes, memory.total_bytes):
        if known is not None:
            return known
    raise HardwareError("this machine's RAM could not be read", hint="Say how much may be used: --ram 32G.")


def _gpu_bytes(gpu: Gpu, headroom: int | None) -> int:
    free = gpu.vram_free_bytes if gpu.vram_free_bytes is not None else gpu.vram_total_bytes
    if free is None:
        raise HardwareError(
            f"the memory of {gpu.name or 'a GPU'} could not be read", hint="Say how much it has: --vram 16G."
        )
    return _less_margin(free, GPU_MARGIN_SHARE, GPU_MARGIN_BYTES, headroom)


def _shared_bytes(gpu: Gpu, host: int) -> int:
    """Share of a common memory for its GPU: what it may take at most, the host keeping a quarter."""
    free = gpu.vram_free_bytes if gpu.vram_free_bytes is not None else gpu.vram_total_bytes
    most = host * UNIFIED_GPU_SHARE[0] // UNIFIED_GPU_SHARE[1]
    return most if free is None else min(free, most)


def engine_name(gpu: Gpu, position: int) -> str:
    """The engine's device name of the machine's GPU number `position`: `CUDA0`, `ROCm1`, `MTL0`."""
    index = position if gpu.index is None else gpu.index
    return f"{_ENGINE_NAMES.get(gpu.kind or 'cuda', 'CUDA')}{index}"


def _less_margin(size: int, share: int, limits: tuple[int, int], headroom: int | None) -> int:
    margin = min(max(size // share, limits[0]), limits[1]) if headroom is None else headroom
    return max(size - margin, 0)
