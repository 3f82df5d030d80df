"""How fast weights reach each GPU: copies measured by the engine itself, and the PCIe link while they run.

Experts that stay in host memory are copied to the GPU for every large batch, so this rate bounds prefill.
Pinned (page-locked) memory is copied by the card's own engine; ordinary memory goes through a pinned buffer
of the driver first and is often half as fast. An idle link saves power at generation 1: only what it runs at
under load tells whether slot, riser or firmware hold it back.

Everything happens in engine children. A driver that crashes or hangs costs its figures and a deadline.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from qnext.engine.build import EngineBuild
from qnext.engine.session import EngineSession
from qnext.errors import EngineError
from qnext.hardware import Gpu, Machine
from qnext.hardware.gpus import normal_bus_id
from qnext.hardware.nvml import read_nvml
from qnext.hardware.pcie import read_link
from qnext.plan.budgets import engine_name
from qnext.plan.problem import backend_of
from qnext.units import MIB

MOST_BYTES = 256 * MIB
HOST_SHARE = 16
"""At most this part of the free RAM is taken for the host's side of a copy."""
BUDGET_S = 0.6
DEADLINE_S = 20.0
_WATCH_S, _WATCH_END_S, _NVML_S = 0.05, 1.0, 2.0

COPIES = {
    # fact: (words, to the device, from pinned memory)
    "h2d_pinned_bps": ("to the GPU from pinned memory", True, True),
    "h2d_pageable_bps": ("to the GPU from ordinary memory", True, False),
    "d2h_pinned_bps": ("from the GPU into pinned memory", False, True),
    "d2h_pageable_bps": ("from the GPU into ordinary memory", False, False),
}

Progress = Callable[[str], None]
LinkState = tuple[int | None, int | None]
"""(generation, lanes) of a PCIe link."""


@dataclasses.dataclass(frozen=True, slots=True)
class Copies:
    """One kind of copy, measured: bytes of each copy and every copy's time, or why there are none."""

    bytes: int = 0
    samples_ns: tuple[int, ...] = ()
    missing: str = ""

    @property
    def bps(self) -> int | None:
        """Bytes per second of the median copy."""
        return int(self.bytes * 1e9 / statistics.median(self.samples_ns)) if self.samples_ns else None

    @property
    def source(self) -> str:
        """How it was measured and how far the copies are apart, or why it was not."""
        if not self.samples_ns:
            return f"not measured: {self.missing}"
        slowest, fastest = (self.bytes / time for time in (max(self.samples_ns), min(self.samples_ns)))
        count, size = len(self.samples_ns), self.bytes // MIB
        return f"median of {count} copies of {size} MiB by the engine, {slowest:.2f} to {fastest:.2f} GB/s"


def measure_links(
    machine: Machine,
    build: EngineBuild,
    on_progress: Progress | None = None,
    *,
    deadline_s: float = DEADLINE_S,
) -> Machine:
    """`machine` with the copy rates of every GPU that this engine build drives, and its link under load.

    About three seconds per GPU, at most `deadline_s` for starting its engine and for each figure. Never
    raises for what a driver does: what could not be measured is None with the reason in `sources`.
    """
    gpus, sources = list(machine.gpus), dict(machine.sources)
    free = machine.memory.usable_bytes or machine.memory.available_bytes or HOST_SHARE * MOST_BYTES
    for position, gpu in enumerate(gpus):
        reason = _unmeasurable(machine, gpu, build)
        copies = {fact: Copies(missing=reason) for fact in COPIES}
        seen: list[LinkState] = []
        if not reason:
            with watch_link(gpu) as seen:
                copies = measure_copies(
                    engine_name(gpu, position),
                    bus_id=gpu.pci_bus_id,
                    most_bytes=min(MOST_BYTES, free // HOST_SHARE),
                    deadline_s=deadline_s,
                    on_progress=on_progress,
                )
        if not any(copy.samples_ns for copy in copies.values()):
            seen = []
            reason = reason or "nothing was copied"
        loaded: dict[str, Any] = {
            "pcie_gen_loaded": max((gen for gen, _ in seen if gen), default=None),
            "pcie_width_loaded": max((width for _, width in seen if width), default=None),
        }
        rates: dict[str, Any] = {fact: copy.bps for fact, copy in copies.items()}
        gpus[position] = dataclasses.replace(gpu, **loaded, **rates)
        sources |= {f"gpus.{position}.{fact}": copy.source for fact, copy in copies.items()}
        for fact, value in loaded.items():
            absent = f"not measured: {reason or 'nothing tells the state of the link'}"
            how = f"highest of {len(seen)} readings while the engine copied"
            sources[f"gpus.{position}.{fact}"] = absent if value is None else how
    return dataclasses.replace(machine, gpus=tuple(gpus), sources=sources)


def _unmeasurable(machine: Machine, gpu: Gpu, build: EngineBuild) -> str:
    """Why nothing can be measured on this GPU, or empty."""
    if machine.unified_memory:
        return "CPU and GPU share one memory, nothing is copied"
    if backend_of(gpu) not in build.backends:
        return f"this engine build has no {backend_of(gpu) or 'matching'} backend"
    return "the engine does not list this card" if gpu.index is None else ""


def measure_copies(
    device: str,
    *,
    bus_id: str | None = None,
    rpc_servers: tuple[str, ...] = (),
    most_bytes: int = MOST_BYTES,
    budget_s: float = BUDGET_S,
    deadline_s: float = DEADLINE_S,
    on_progress: Progress | None = None,
) -> dict[str, Copies]:
    """Each kind of `COPIES` between the host and an engine device of any kind, measured in a child.

    `device` is its name; the device that states `bus_id` goes before it. `budget_s` is the time for the
    copies of one kind. What fails, hangs or is not offered has no samples and says why.
    """
    found: dict[str, Copies] = {}
    try:
        with EngineSession(silence_limit_s=deadline_s) as session:
            listed = cast("list[dict[str, object]]", session.describe(rpc_servers)["devices"])
            named = [str(entry["name"]) for entry in listed if _is_at(entry, bus_id)] if bus_id else []
            for fact, (words, to_device, pinned) in COPIES.items():
                if on_progress is not None:
                    on_progress(f"copying {words}")
                reply = session.time_copies(
                    _of_backend(named, device),
                    limit_s=deadline_s,
                    rpc_servers=list(rpc_servers),
                    to_device=to_device,
                    pinned=pinned,
                    most_bytes=most_bytes,
                    budget_s=budget_s,
                )
                samples = tuple(cast("list[int]", reply["samples_ns"]))
                found[fact] = Copies(cast(int, reply["bytes"]), samples, str(reply["missing"]))
    except EngineError as error:
        return {fact: found.get(fact, Copies(missing=error.message)) for fact in COPIES}
    return found


def _is_at(entry: dict[str, object], bus_id: str) -> bool:
    return normal_bus_id(entry.get("pci_bus_id")) == bus_id


def _of_backend(named: list[str], device: str) -> str:
    """The one of `named` that has the backend of `device` (`CUDA1` for `CUDA0`), else `device`."""
    backend = device.rstrip("0123456789")
    return next((name for name in named if name.rstrip("0123456789") == backend), device)


@contextlib.contextmanager
def watch_link(gpu: Gpu, root: Path = Path("/")) -> Iterator[list[LinkState]]:
    """The states of the GPU's link, read again and again while the block runs; empty where nothing tells."""
    seen: list[LinkState] = []
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_WATCH_S):
            state = _link_state(gpu, root)
            if state != (None, None):
                seen.append(state)

    thread = threading.Thread(target=watch, name="pcie-link", daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join(_WATCH_END_S)


def _link_state(gpu: Gpu, root: Path) -> LinkState:
    """From sysfs; for a CUDA card where there is none (Windows, WSL) from NVML."""
    link = read_link(gpu.pci_bus_id, root) if gpu.pci_bus_id else None
    if link is not None and link.gen is not None:
        return link.gen, link.width
    if gpu.kind == "cuda":
        for card in read_nvml(_NVML_S).values:
            if normal_bus_id(card.get("pci_bus_id")) == gpu.pci_bus_id:
                return _plain(card.get("pcie_gen"), 10), _plain(card.get("pcie_width"), 32)
    return None, None


def _plain(value: object, most: int) -> int | None:
    return value if isinstance(value, int) and 0 < value <= most else None
