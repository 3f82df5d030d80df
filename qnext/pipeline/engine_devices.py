"""The machine's GPUs as the engine numbers them, and those only the engine can see (Apple's, and others).

NVML and sysfs know a card's facts, the engine which device it is: the two are matched by PCI bus id, which
CUDA, ROCm and Vulkan state, else by what both can say of a card. A card known to both appears once. What is
known of it stays; the engine adds what is missing, above all `kind` and `index`, by which a plan names it.

The engine is asked in a child, and only where it can tell something new: its build has a backend for which no
GPU is known yet, or NVML lists unequal cards, whose order in CUDA is only estimated, or a card in slices.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qnext.engine.build import EngineBuild
from qnext.errors import EngineError
from qnext.hardware import Gpu, Machine
from qnext.hardware.gpus import normal_bus_id
from qnext.units import GIB

logger = logging.getLogger(__name__)

_CPU_BACKENDS = {"cpu", "rpc", "blas"}
_KINDS = {"CUDA": "cuda", "ROCm": "rocm", "Vulkan": "vulkan", "MTL": "metal", "SYCL": "sycl"}
_BACKENDS = {"rocm": "hip"}
_NAME = re.compile(r"([A-Za-z]+)(\d+)")
_ABSURD_BYTES = 4096 * GIB
"""Vulkan drivers have reported more than any card holds."""


def add_engine_gpus(machine: Machine, build: EngineBuild) -> Machine:
    """`machine` with its GPUs as this engine lists them; unchanged when the engine cannot be asked."""
    cuda = [gpu for gpu in machine.gpus if gpu.kind == "cuda"]
    told = len({gpu.name for gpu in cuda}) < 2 and not any(gpu.mig for gpu in cuda)
    seen = {_BACKENDS.get(gpu.kind or "", gpu.kind) for gpu in machine.gpus if gpu.index is not None}
    if (told or "cuda" not in build.backends) and set(build.backends) <= _CPU_BACKENDS | seen:
        return machine
    from qnext.engine.session import EngineSession

    try:
        with EngineSession(silence_limit_s=30) as session:
            devices = session.describe()["devices"]
    except EngineError as error:
        logger.info("the engine's devices are unknown: %s", error.message)
        return machine
    return merge_devices(machine, devices if isinstance(devices, list) else [])


@dataclass(frozen=True, slots=True)
class _Device:
    """One GPU of the engine's list. Sizes in bytes, None where what it says cannot be."""

    kind: str
    index: int
    description: str
    shared: bool
    bus_id: str | None
    total: int | None
    free: int | None


def merge_devices(machine: Machine, devices: Iterable[Mapping[str, object]]) -> Machine:
    """`machine` with the GPUs among an engine's `devices` (name, description, kind, bytes, `pci_bus_id`).

    GPUs that share the host's memory count only where there is no other, as in llama.cpp. A card that the
    engine lists under several backends keeps the one it is known by. A card that the engine should list and
    does not loses its `index`.
    """
    found = [device for device in map(_listed, devices) if device is not None]
    own = [device for device in found if not device.shared]
    gpus, sources = list(machine.gpus), dict(machine.sources)
    shared = [] if own or any(gpu.index is not None for gpu in gpus) else found
    known_first = sorted(own, key=lambda device: device.kind not in _kinds_of(device, machine.gpus))
    taken: set[int] = set()
    for device in known_first + shared:
        at = _position(device, gpus, taken)
        if at is None:
            at = len(gpus)
            gpus.append(Gpu())
        elif at in taken:
            continue
        taken.add(at)
        sources |= {f"gpus.{at}.{fact}": "the engine's device list" for fact in _new(gpus[at], device)}
        gpus[at] = replace(gpus[at], **_new(gpus[at], device))
    by_bus = {device.kind for device in own if device.bus_id}
    for at, gpu in enumerate(gpus):
        if at not in taken and gpu.kind in by_bus and gpu.pci_bus_id and gpu.index is not None:
            gpus[at] = replace(gpu, index=None)
            sources[f"gpus.{at}.index"] = "the engine does not list this card"
    unified = True if shared else machine.unified_memory
    return replace(machine, gpus=tuple(gpus), sources=sources, unified_memory=unified)


def _listed(device: Mapping[str, object]) -> _Device | None:
    """A GPU of the engine's list; None for what is no GPU of this machine."""
    match = _NAME.fullmatch(str(device["name"]))
    if device["kind"] not in ("gpu", "igpu") or match is None or match[1] not in _KINDS:
        return None
    total, free = _believable(device["total_bytes"]), _believable(device["free_bytes"])
    return _Device(
        kind=_KINDS[match[1]],
        index=int(match[2]),
        description=str(device["description"]),
        shared=device["kind"] == "igpu",
        bus_id=normal_bus_id(device.get("pci_bus_id")),
        total=total,
        free=free if free is None or total is None else min(free, total),
    )


def _kinds_of(device: _Device, gpus: Iterable[Gpu]) -> set[str | None]:
    return {gpu.kind for gpu in gpus if device.bus_id and gpu.pci_bus_id == device.bus_id}


def _position(device: _Device, gpus: Sequence[Gpu], taken: Container[int]) -> int | None:
    """Which of the machine's GPUs the device is: by bus id, else by number, else one of its kind and size."""
    for at, gpu in enumerate(gpus):
        if device.bus_id and gpu.pci_bus_id == device.bus_id:
            return at
    nameless = [at for at, gpu in enumerate(gpus) if not (device.bus_id and gpu.pci_bus_id)]
    for at in nameless:
        if (gpus[at].kind, gpus[at].index) == (device.kind, device.index):
            return at
    free = (at for at in nameless if at not in taken and gpus[at].index is None)
    return next((at for at in free if _may_be(device, gpus[at])), None)


def _may_be(device: _Device, gpu: Gpu) -> bool:
    """Whether a card known from sysfs alone can be this device: drivers state a little less than there is."""
    size = gpu.vram_total_bytes
    fits = size is None or device.total is None or abs(size - device.total) <= size // 16
    return fits and device.kind in (gpu.kind, "vulkan")


def _new(gpu: Gpu, device: _Device) -> dict[str, Any]:
    """The fields of `gpu` that the device fills or corrects."""
    total = gpu.vram_total_bytes or device.total
    told = {
        "name": gpu.name or device.description or None,
        "kind": device.kind,
        "index": device.index,
        "pci_bus_id": gpu.pci_bus_id or device.bus_id,
        "vram_total_bytes": total,
        "vram_free_bytes": gpu.vram_free_bytes or (device.free and min(device.free, total or device.free)),
    }
    return {name: value for name, value in told.items() if value != getattr(gpu, name)}


def _believable(size: object) -> int | None:
    return size if isinstance(size, int) and 0 < size < _ABSURD_BYTES else None
