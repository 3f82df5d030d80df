"""A machine in words: sections of rows, each a fact with one line of what it means.

A row's `key` is what findings refer to as `about`. The same rows make the terminal's page and the block for a
bug report.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qnext.hardware.machine import Gpu, Machine
from qnext.report.words import plural
from qnext.units import format_bytes


@dataclass(frozen=True, slots=True)
class Row:
    """One fact: `key` for findings, `label` and `value` to show, `meaning` in one line or empty."""

    key: str
    label: str
    value: str
    meaning: str = ""


@dataclass(frozen=True, slots=True)
class Section:
    """Rows about one part of the machine."""

    title: str
    rows: tuple[Row, ...]


def machine_sections(machine: Machine, file_bytes: int | None = None) -> list[Section]:
    """CPU, memory, each GPU and the disk. `file_bytes` is a model's size, to say how long it loads."""
    gpus = [
        Section(f"GPU {position}", tuple(_gpu_rows(machine, position, gpu)))
        for position, gpu in enumerate(machine.gpus)
    ]
    none = Row("gpus", "GPU", "none", _why(machine, "gpus"))
    return [
        Section("CPU", tuple(_cpu_rows(machine))),
        Section("Memory", tuple(_memory_rows(machine))),
        *(gpus or [Section("GPU", (none,))]),
        Section("Disk", tuple(_disk_rows(machine, file_bytes))),
    ]


def headline(machine: Machine) -> str:
    """The box in one line: `AMD Ryzen 9 9950X, 16 cores · 125 GiB RAM · RTX 5080 15.9 GiB`."""
    cpu = machine.cpu
    cores = f", {plural(cpu.physical_cores, 'core')}" if cpu.physical_cores else ""
    gpus = [f"{gpu.name or 'a GPU'} {format_bytes(gpu.vram_total_bytes)}" for gpu in machine.gpus]
    parts = [f"{cpu.model or 'unknown CPU'}{cores}", f"{format_bytes(machine.memory.total_bytes)} RAM"]
    return " · ".join([*parts, *(gpus or ["no GPU"])])


def _cpu_rows(machine: Machine) -> Iterator[Row]:
    cpu = machine.cpu
    counts = [
        plural(count, word)
        for count, word in (
            (cpu.sockets, "socket"),
            (cpu.physical_cores, "core"),
            (cpu.logical_cores, "thread"),
        )
        if count
    ]
    kinds = f"{cpu.performance_cores} fast and {cpu.efficiency_cores} saving cores"
    yield Row("cpu.model", "model", cpu.model or "unknown", ", ".join(counts))
    if cpu.efficiency_cores:
        yield Row("cpu.kinds", "kinds", kinds, "the slowest thread sets the pace at each barrier")
    yield Row(
        "cpu.usable",
        "usable",
        f"{_count(cpu.usable_cores, 'core')}, {_count(cpu.usable_logical_cores, 'thread')}",
        _why(machine, "cpu.usable_cores"),
    )
    yield Row(
        "cpu.instructions",
        "instructions",
        instruction_words(cpu.instruction_sets),
        "what llama.cpp has faster kernels for",
    )
    if cpu.llc_bytes:
        yield Row("cpu.cache", "cache", format_bytes(cpu.llc_bytes), "last level, all together")
    power = " / ".join(word for word in (cpu.governor, cpu.power_profile) if word)
    yield Row("cpu.power", "power", power or "not told", "" if power else _why(machine, "cpu.governor"))
    yield Row("cpu.inside", "runs in", _inside(machine))


def _inside(machine: Machine) -> str:
    cpu = machine.cpu
    words = []
    if cpu.hypervisor not in (None, "none"):
        words.append(
            "a virtual machine" if cpu.hypervisor == "unknown" else f"a virtual machine ({cpu.hypervisor})"
        )
    if cpu.container not in (None, "none"):
        words.append(f"a container ({cpu.container})")
    if words:
        return " and ".join(words)
    return "not told" if cpu.hypervisor is None else "no virtual machine or container seen"


def _memory_rows(machine: Machine) -> Iterator[Row]:
    memory = machine.memory
    yield Row(
        "memory.size",
        "size",
        format_bytes(memory.total_bytes),
        ", ".join(
            part
            for part in (
                f"{format_bytes(memory.usable_bytes)} usable now",
                _why(machine, "memory.usable_bytes"),
            )
            if part
        ),
    )
    limited = memory.limit_bytes is not None
    yield Row(
        "memory.limit",
        "limit",
        format_bytes(memory.limit_bytes) if limited else "none",
        _why(machine, "memory.limit_bytes"),
    )
    yield Row(
        "memory.modules",
        "modules",
        _modules(machine),
        f"rated {memory.rated_bandwidth_bps / 1e9:.1f} GB/s"
        if memory.rated_bandwidth_bps
        else _why(machine, "memory.speed_mtps"),
    )
    yield Row("memory.bandwidth", "bandwidth", *_bandwidth(machine))
    if memory.numa_nodes is not None:
        sizes = ", ".join(format_bytes(node.total_bytes) for node in memory.numa_nodes)
        policy = f"policy {memory.numa_policy}" if memory.numa_policy else ""
        yield Row("memory.nodes", "NUMA", f"{plural(len(memory.numa_nodes), 'node')}: {sizes}", policy)
    used = (memory.swap_total_bytes or 0) - (memory.swap_free_bytes or 0)
    swap = f"{format_bytes(used)} of {format_bytes(memory.swap_total_bytes)} in use"
    yield Row("memory.swap", "swap", swap if memory.swap_total_bytes else "none", "a plan never counts on it")
    pages = [f"transparent {memory.transparent_hugepages or 'unknown'}"]
    if memory.hugepages_total_bytes:
        pages.append(f"{format_bytes(memory.hugepages_total_bytes)} set aside")
    yield Row("memory.pages", "huge pages", ", ".join(pages))
    yield Row("memory.locking", "may lock", format_bytes(memory.locked_limit_bytes))


def _modules(machine: Machine) -> str:
    memory = machine.memory
    words = [plural(memory.modules, "module")] if memory.modules else []
    if memory.channels:
        of = f" of {memory.channels_max}" if memory.channels_max else ""
        words.append(f"{memory.channels}{of} channels")
    if memory.speed_mtps:
        words.append(f"{memory.speed_mtps} MT/s")
    return ", ".join(words) or "not known"


def _bandwidth(machine: Machine) -> tuple[str, str]:
    memory = machine.memory
    measured = memory.measured_bandwidth_bps
    if not measured:
        return "not measured", "qnext doctor --full measures it; it is what decode on the CPU is bound by"
    knee = memory.bandwidth_knee_threads
    spread = memory.bandwidth_spread
    parts = [f"reached with {plural(knee, 'thread')}"] if knee else []
    parts += [f"spread {spread:.0%}".replace("%", " %")] if spread is not None else []
    return f"{measured / 1e9:.1f} GB/s", ", ".join(parts) or "measured; decode on the CPU is bound by it"


def _gpu_rows(machine: Machine, position: int, gpu: Gpu) -> Iterator[Row]:
    key = f"gpus.{position}"
    facts = [f"compute {gpu.compute_capability}"] if gpu.compute_capability else []
    facts += [f"driver {gpu.driver}"] if gpu.driver else []
    yield Row(f"{key}.name", "model", gpu.name or "unknown", ", ".join(facts))
    yield Row(
        f"{key}.memory",
        "memory",
        format_bytes(gpu.vram_total_bytes),
        "shared with the CPU" if machine.unified_memory else f"{format_bytes(gpu.vram_free_bytes)} free",
    )
    if not machine.unified_memory:
        yield Row(f"{key}.link", "link", *_link(gpu))
    watts = f"{gpu.power_limit_w} W" if gpu.power_limit_w else "not told"
    of = f"of {gpu.power_default_w} W usual" if gpu.power_default_w else ""
    yield Row(f"{key}.power", "power", watts, of)


def _link(gpu: Gpu) -> tuple[str, str]:
    seen = [
        f"PCIe {generation}.0 x{width} {when}"
        for generation, width, when in (
            (gpu.pcie_gen_loaded, gpu.pcie_width_loaded, "under load"),
            (gpu.pcie_gen_max, gpu.pcie_width_max, "at best"),
            (gpu.pcie_gen, gpu.pcie_width, "now"),
        )
        if generation and width
    ]
    copies = [
        f"{words} {rate / 1e9:.1f} GB/s"
        for words, rate in (
            ("to it", gpu.h2d_pinned_bps),
            ("pageable", gpu.h2d_pageable_bps),
            ("from it", gpu.d2h_pinned_bps),
        )
        if rate
    ]
    return (seen[0] if seen else "not known"), ", ".join(copies) or "copies not measured: qnext doctor --full"


def _disk_rows(machine: Machine, file_bytes: int | None) -> Iterator[Row]:
    disk = machine.disk
    of = f"of {format_bytes(disk.total_bytes)}" if disk.total_bytes else ""
    yield Row("disk.space", "free", format_bytes(disk.free_bytes), f"{of} where models are kept".strip())
    kind = "over the network" if disk.network else "served by a program" if disk.fuse else ""
    kind = kind or ("spinning" if disk.rotational else "")
    yield Row("disk.kind", "filesystem", disk.filesystem or "not known", kind)
    if disk.read_bps:
        load = f"{format_bytes(file_bytes)} load in {file_bytes / disk.read_bps:.0f} s" if file_bytes else ""
        yield Row("disk.read", "cold read", f"{disk.read_bps / 1e9:.2f} GB/s", load)
    else:
        yield Row("disk.read", "cold read", "not measured", _why(machine, "disk.read_bps"))


_SET_WORDS = (
    ("avx2", "AVX2"),
    ("avx_vnni", "AVX-VNNI"),
    ("avx512f", "AVX-512"),
    ("avx512_vnni", "VNNI"),
    ("avx512_bf16", "BF16"),
    ("amx_int8", "AMX"),
    ("neon", "NEON"),
    ("dotprod", "dotprod"),
    ("i8mm", "i8mm"),
    ("sve", "SVE"),
    ("sme", "SME"),
)


def instruction_words(sets: tuple[str, ...] | None) -> str:
    """`AVX2, AVX-512, VNNI`: those that change speeds most; `unknown` for None."""
    if sets is None:
        return "unknown"
    return ", ".join(word for name, word in _SET_WORDS if name in sets) or "none of note"


def _count(count: int | None, noun: str) -> str:
    return plural(count, noun) if count else f"unknown {noun}s"


def _why(machine: Machine, path: str) -> str:
    """Where a fact comes from, or why it is missing; nothing for what a recording does or does not state."""
    source = machine.sources.get(path, "")
    return "" if "the recording" in source else source
