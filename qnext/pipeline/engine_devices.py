"""GPUs that only the engine can see: AMD, Intel and Apple ones, for which there is no NVML.

The engine is asked in a child, and only where its build has a backend for which no GPU is known yet. What
NVML knows of a card stays; a device it does not know is added with what the engine says of its memory, if
that can be true.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from qnext.engine.build import EngineBuild
from qnext.errors import EngineError
from qnext.hardware import Gpu, Machine
from qnext.plan.budgets import engine_name
from qnext.units import GIB

logger = logging.getLogger(__name__)

_CPU_BACKENDS = {"cpu", "rpc", "blas"}
_KINDS = {"CUDA": "cuda", "ROCm": "rocm", "Vulkan": "vulkan", "MTL": "metal", "SYCL": "sycl"}
_BACKENDS = {"rocm": "hip"}
_NAME = re.compile(r"([A-Za-z]+)(\d+)")
_ABSURD_BYTES = 4096 * GIB
"""Vulkan drivers have reported more than any card holds."""


def add_engine_gpus(machine: Machine, build: EngineBuild) -> Machine:
    """`machine` with the GPUs that this engine lists beside those already known."""
    seen = {_BACKENDS.get(gpu.kind or "", gpu.kind) for gpu in machine.gpus}
    if set(build.backends) <= _CPU_BACKENDS | seen:
        return machine
    from qnext.engine.session import EngineSession

    try:
        with EngineSession(silence_limit_s=30) as session:
            devices = session.describe()["devices"]
    except EngineError as error:
        logger.info("the engine's devices are unknown: %s", error.message)
        return machine
    return merge_devices(machine, devices if isinstance(devices, list) else [])


def merge_devices(machine: Machine, devices: Iterable[Mapping[str, object]]) -> Machine:
    """`machine` with the GPUs among an engine's `devices` (name, description, kind, free_bytes, total_bytes).

    GPUs that share the host's memory count only where there is no other, as in llama.cpp.
    """
    found = [device for device in devices if device["kind"] in ("gpu", "igpu")]
    own = [device for device in found if device["kind"] == "gpu"]
    known = {engine_name(gpu, position) for position, gpu in enumerate(machine.gpus)}
    gpus, sources = list(machine.gpus), dict(machine.sources)
    for device in own or ([] if gpus else found):
        match = _NAME.fullmatch(str(device["name"]))
        if match is None or match[1] not in _KINDS or match[0] in known:
            continue
        path = f"gpus.{len(gpus)}"
        total, free = _believable(device["total_bytes"]), _believable(device["free_bytes"])
        gpus.append(
            Gpu(
                name=str(device["description"]) or None,
                kind=_KINDS[match[1]],
                index=int(match[2]),
                vram_total_bytes=total,
                vram_free_bytes=free if free is None or total is None else min(free, total),
            )
        )
        sources |= {f"{path}.{fact}": "the engine's device list" for fact in _FACTS}
    shared = bool(found) and not own and bool(gpus)
    unified = True if shared else machine.unified_memory
    return replace(machine, gpus=tuple(gpus), sources=sources, unified_memory=unified)


_FACTS = ("name", "kind", "index", "vram_total_bytes", "vram_free_bytes")


def _believable(size: object) -> int | None:
    return size if isinstance(size, int) and 0 < size < _ABSURD_BYTES else None
