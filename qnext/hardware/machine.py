"""The machine as frozen values: what the planner budgets with and what a record is compared by.

Facts are plain values; unknown is None. Where a fact came from, or why it is missing, stands beside it in
`Machine.sources` under the fact's dotted path (`memory.limit_bytes`, `gpus.0.driver`). One flat mapping
instead of a wrapper around each value keeps arithmetic readable, serialises as it is, and lets a later
probe add a fact by adding a field and a line of `sources`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qnext.units import GIB

T = TypeVar("T")

UNNAMED = "this machine"

_FILE_RULES = {"extra": "forbid", "strict": True}
"""pydantic's settings for these classes when a recorded machine is read; a plain dict, so that defining the
values does not import pydantic."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """Processor. `usable_*` is what this process may use after affinity and the cgroup's CPU quota.

    `usable_cores` counts physical cores (decode threads), `usable_logical_cores` hardware threads.
    `instruction_sets` holds sorted lower-case names of those llama.cpp has kernels for: the kernel's own
    flag names on x86 (`avx2`, `avx512_vnni`, `amx_int8`), `neon`, `dotprod`, `i8mm`, `sve` on arm64.
    `performance_cores` and `efficiency_cores` count physical cores; all are performance cores where the CPU
    has one kind. `quota_cores` is the tightest cgroup quota in CPUs. `llc_bytes` sums the last-level caches.
    `governor` is cpufreq's, the most saving one where cores differ; `power_profile` the energy preference
    or platform profile. `hypervisor` and `container` are lower-case names, `none` where there is none.
    """

    __pydantic_config__ = _FILE_RULES

    model: str | None = None
    sockets: int | None = None
    physical_cores: int | None = None
    logical_cores: int | None = None
    usable_cores: int | None = None
    usable_logical_cores: int | None = None
    instruction_sets: tuple[str, ...] | None = None
    performance_cores: int | None = None
    efficiency_cores: int | None = None
    quota_cores: float | None = None
    llc_bytes: int | None = None
    governor: str | None = None
    power_profile: str | None = None
    hypervisor: str | None = None
    container: str | None = None


@dataclass(frozen=True, slots=True)
class NumaNode:
    """One memory node: its number, RAM in bytes, its logical CPUs, and its CPUs' read rate from it."""

    __pydantic_config__ = _FILE_RULES

    node: int = 0
    total_bytes: int | None = None
    logical_cores: int | None = None
    measured_bandwidth_bps: int | None = None


@dataclass(frozen=True, slots=True)
class Memory:
    """Host RAM in bytes. Bandwidths are bytes per second.

    `limit_bytes` is the tightest cgroup limit, None when none is below `total_bytes`. `usable_bytes` is what
    a new process may really take now: the smaller of `available_bytes` and the room left under every cgroup
    limit. `locked_limit_bytes` bounds mlock; it equals `total_bytes` where the limit is "unlimited".

    `rated_bandwidth_bps` is what the modules give as they are set now: `channels` x `speed_mtps` x 8 bytes.
    `channels` counts those with a module in them, `channels_max` those the board has; `speed_max_mtps` is
    the modules' own rating, which a memory profile (XMP, EXPO) switches on. `transparent_hugepages` is
    `always`, `madvise` or `never`. Nodes without RAM are left out of `numa_nodes`; None where the system
    does not tell. `numa_policy` is this process's (`default`, `interleave`, `bind`…).

    `measured_bandwidth_bps` is the best rate over the thread sweep, `bandwidth_by_threads` the sweep's
    (threads, rate) points, `bandwidth_knee_threads` the fewest threads that reach 95 % of the best,
    `bandwidth_spread` (highest - lowest) / median of repeated readings at the best.
    """

    __pydantic_config__ = _FILE_RULES

    total_bytes: int | None = None
    available_bytes: int | None = None
    limit_bytes: int | None = None
    usable_bytes: int | None = None
    swap_total_bytes: int | None = None
    swap_free_bytes: int | None = None
    locked_limit_bytes: int | None = None
    modules: int | None = None
    channels: int | None = None
    channels_max: int | None = None
    speed_mtps: int | None = None
    speed_max_mtps: int | None = None
    rated_bandwidth_bps: int | None = None
    measured_bandwidth_bps: int | None = None
    bandwidth_by_threads: tuple[tuple[int, int], ...] | None = None
    bandwidth_knee_threads: int | None = None
    bandwidth_spread: float | None = None
    hugepages_total_bytes: int | None = None
    hugepages_free_bytes: int | None = None
    transparent_hugepages: str | None = None
    numa_nodes: tuple[NumaNode, ...] | None = None
    numa_policy: str | None = None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU this process may use.

    `kind` is the engine's backend family (`cuda`, `rocm`, `vulkan`, `metal`). `index` is the position the
    backend is expected to give it; `pci_bus_id` (`0000:01:00.0`, as the engine reports it) is what to match
    by. `rated_bandwidth_bps` is the VRAM's, in bytes per second. `compute_capability` is `major.minor`.

    `pcie_gen` and `pcie_width` are the link's present state, which drops at idle; `*_loaded` the same while
    data is copied; `*_max` what card and slot reach together, `*_card_max` and `*_slot_max` each alone.
    `h2d_*_bps` and `d2h_*_bps` are measured copies between host and device, from pinned (page-locked) and
    ordinary memory. Watts and MHz for power and clocks; `throttle_reasons` are NVML's in plain words, empty
    when nothing holds the clocks down. `vram_others_bytes` is held by `processes` other programs.
    """

    __pydantic_config__ = _FILE_RULES

    name: str | None = None
    kind: str | None = None
    index: int | None = None
    pci_bus_id: str | None = None
    vram_total_bytes: int | None = None
    vram_free_bytes: int | None = None
    rated_bandwidth_bps: int | None = None
    compute_capability: str | None = None
    pcie_gen: int | None = None
    pcie_gen_max: int | None = None
    pcie_width: int | None = None
    pcie_width_max: int | None = None
    driver: str | None = None
    pcie_gen_card_max: int | None = None
    pcie_width_card_max: int | None = None
    pcie_gen_slot_max: int | None = None
    pcie_width_slot_max: int | None = None
    pcie_gen_loaded: int | None = None
    pcie_width_loaded: int | None = None
    h2d_pinned_bps: int | None = None
    h2d_pageable_bps: int | None = None
    d2h_pinned_bps: int | None = None
    d2h_pageable_bps: int | None = None
    power_limit_w: int | None = None
    power_default_w: int | None = None
    power_max_w: int | None = None
    core_clock_mhz: int | None = None
    core_clock_max_mhz: int | None = None
    memory_clock_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None
    processes: int | None = None
    vram_others_bytes: int | None = None
    ecc: bool | None = None
    mig: bool | None = None


@dataclass(frozen=True, slots=True)
class Disk:
    """The disk of the folder models are kept in.

    `filesystem` is the mount's type (`ext4`, `nfs4`, `fuse.s3fs`).
    `network` is True for a network filesystem, `fuse` for one served by a program. `read_bps` is a cold
    sequential read past the page cache, in bytes per second.
    """

    __pydantic_config__ = _FILE_RULES

    free_bytes: int | None = None
    total_bytes: int | None = None
    filesystem: str | None = None
    network: bool | None = None
    fuse: bool | None = None
    rotational: bool | None = None
    read_bps: int | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything known of one machine. `name` is a label (`this machine`, a profile's name), not a fact.

    `unified_memory` is True where CPU and GPU share one memory. `sources` maps every fact's dotted path to
    where it was read, or why it is None.
    """

    __pydantic_config__ = _FILE_RULES

    name: str = UNNAMED
    os: str | None = None
    arch: str | None = None
    cpu: Cpu = field(default_factory=Cpu)
    memory: Memory = field(default_factory=Memory)
    gpus: tuple[Gpu, ...] = ()
    unified_memory: bool | None = None
    disk: Disk = field(default_factory=Disk)
    sources: Mapping[str, str] = field(default_factory=dict)


class Sources(dict[str, str]):
    """The `sources` of a machine while it is being detected."""

    def record(self, path: str, value: T | None, source: str, absent: str = "") -> T | None:
        """Note where `value` was read, or with None why it is missing, and pass the value through."""
        self[path] = (absent or f"not stated by {source}") if value is None else source
        return value


def facts(machine: Machine) -> Iterator[tuple[str, object]]:
    """Every fact with its dotted path, `gpus` itself included, in the order of the fields."""
    for path in ("os", "arch", "unified_memory"):
        yield path, getattr(machine, path)
    yield "gpus", machine.gpus
    parts: list[tuple[str, Cpu | Memory | Disk | Gpu]] = [
        ("cpu", machine.cpu),
        ("memory", machine.memory),
        ("disk", machine.disk),
    ]
    parts += [(f"gpus.{position}", gpu) for position, gpu in enumerate(machine.gpus)]
    for prefix, part in parts:
        for entry in dataclasses.fields(part):
            yield f"{prefix}.{entry.name}", getattr(part, entry.name)


INTEGRATED_GPU = "processor shares the RAM"
"""Part of the note in `sources["gpus"]` where a GPU inside the processor was left out."""


def has_integrated_gpu(machine: Machine) -> bool:
    """Whether a GPU inside the processor was seen, which only an engine's own list counts."""
    return INTEGRATED_GPU in machine.sources.get("gpus", "")


def machine_to_dict(machine: Machine) -> dict[str, Any]:
    """JSON-ready form (lists for tuples) with every key present; `machine_from_dict` is its inverse."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(machine)))
    return plain


def machine_fingerprint(machine: Machine) -> str:
    """16 hex digits naming the hardware results are comparable on.

    Covers the CPU model, core counts with what this process may use of them, RAM and VRAM rounded to GiB
    (firmware and kernels move them by some MiB) and the GPUs in order. Free memory, limits in use, names and
    anything personal stay out.
    """
    cpu = machine.cpu
    identity = [
        [machine.arch, cpu.model, cpu.sockets, cpu.physical_cores, cpu.logical_cores],
        [cpu.usable_cores, cpu.usable_logical_cores],
        _round_gib(machine.memory.total_bytes),
        [[gpu.kind, gpu.name, _round_gib(gpu.vram_total_bytes)] for gpu in machine.gpus],
    ]
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]


def _round_gib(count: int | None) -> int | None:
    return None if count is None else round(count / GIB)
