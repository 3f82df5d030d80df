"""Timed copies between host memory and a device, by the calls llama.cpp itself copies weights with.

`ggml_backend_tensor_set` returns when the host's memory may be used again, which for a device behind a queue
(RPC) is before the data has arrived. A byte read back after each copy to the device waits for it. Pinned
memory comes from the device's own host buffer type; where that runs out ggml silently hands out ordinary
memory, which the buffer's type gives away.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections.abc import Callable, Iterator
from typing import Any

from qnext.engine.llama.binding import EngineDevice, EngineFailure, InitParams, ggml, list_devices
from qnext.units import MIB

FIRST_BYTES = 16 * MIB
"""Copied first, to see how much can be copied in the time there is."""
_ROUNDS = 20
"""Aimed at: copies are made so large that so many fit into the time, where that is less than is allowed."""
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 200
_TYPE_I8 = 24
"""GGML_TYPE_I8: a byte per element."""


def time_copies(
    name: str, *, to_device: bool, pinned: bool, most_bytes: int, budget_s: float
) -> dict[str, Any]:
    """Copy up to `most_bytes` again and again for about `budget_s` seconds, to or from device `name`.

    Returns `bytes` per copy and `samples_ns`, or an empty list of samples and why in `missing`. Raises
    EngineFailure `device` when there is no such device or its memory cannot be had.
    """
    device = next((device for device in list_devices() if device.name == name), None)
    if device is None:
        raise EngineFailure("device", f"the engine has no device {name}")
    size = min(most_bytes, device.free_bytes // 4 or most_bytes) // MIB * MIB
    if not size:
        raise EngineFailure("device", f"{name} has too little free memory to measure copies")
    with _device_tensor(device, size) as tensor, _host_memory(device, size, pinned=pinned) as memory:
        if isinstance(memory, str):
            return {"bytes": size, "samples_ns": [], "missing": memory}
        copy = _copier(tensor, memory, to_device=to_device)
        copy(MIB)  # the first copy of all also sets up what the driver needs
        first = min(size, FIRST_BYTES)
        rate = first / copy(first)
        size = min(size, max(first, int(rate * budget_s * 1e9 / _ROUNDS) // MIB * MIB))
        ends = time.perf_counter() + budget_s
        samples: list[int] = []
        while len(samples) < _MOST_ROUNDS and (len(samples) < _FEWEST_ROUNDS or time.perf_counter() < ends):
            samples.append(copy(size))
    return {"bytes": size, "samples_ns": samples, "missing": ""}


def _copier(tensor: int, memory: int, *, to_device: bool) -> Callable[[int], int]:
    """A function that copies so many bytes and returns the nanoseconds it took, at least one."""
    put, get, byte = ggml("ggml_backend_tensor_set"), ggml("ggml_backend_tensor_get"), ctypes.c_uint8()

    def copy(size: int) -> int:
        started = time.perf_counter_ns()
        if to_device:
            put(tensor, memory, 0, size)
            get(tensor, ctypes.addressof(byte), size - 1, 1)
        else:
            get(tensor, memory, 0, size)
        return max(1, time.perf_counter_ns() - started)

    return copy


@contextlib.contextmanager
def _device_tensor(device: EngineDevice, size: int) -> Iterator[int]:
    """A tensor of `size` bytes in the device's memory."""
    context = ggml("ggml_init")(InitParams(mem_size=4096, mem_buffer=None, no_alloc=True))
    tensor: int = ggml("ggml_new_tensor_1d")(context, _TYPE_I8, size)
    buffer_type = ggml("ggml_backend_dev_buffer_type")(device.handle)
    buffer = ggml("ggml_backend_alloc_ctx_tensors_from_buft")(context, buffer_type)
    try:
        if not buffer:
            raise EngineFailure("device", f"{device.name} gives no buffer of {size // MIB} MiB")
        yield tensor
    finally:
        if buffer:
            ggml("ggml_backend_buffer_free")(buffer)
        ggml("ggml_free")(context)


@contextlib.contextmanager
def _host_memory(device: EngineDevice, size: int, *, pinned: bool) -> Iterator[int | str]:
    """Address of `size` bytes of host memory, every page of it touched; or why there is none."""
    if not pinned:
        pages = (ctypes.c_uint8 * size)()
        ctypes.memset(pages, 0x5A, size)
        yield ctypes.addressof(pages)
        return
    buffer_type = ggml("ggml_backend_dev_host_buffer_type")(device.handle)
    if not buffer_type:
        yield "this device has no pinned host memory"
        return
    buffer = ggml("ggml_backend_buft_alloc_buffer")(buffer_type, size)
    try:
        if not buffer or ggml("ggml_backend_buffer_get_type")(buffer) != buffer_type:
            yield "the driver gave no pinned host memory"
            return
        base: int = ggml("ggml_backend_buffer_get_base")(buffer)
        ctypes.memset(base, 0x5A, size)
        yield base
    finally:
        if buffer:
            ggml("ggml_backend_buffer_free")(buffer)
