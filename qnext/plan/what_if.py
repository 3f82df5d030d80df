"""A machine with some of its facts changed: what would another memory kit, slot or card bring?

Pure. What is in use stays in use: a machine with 64 GiB of RAM of which 10 are taken has 118 free with 128. A
measured rate that no longer holds is scaled by the rating where both are known, else forgotten. Sizes are
binary (24G = 24 GiB, as everywhere), rates decimal (90G = 90 GB/s, as memory and cards are sold).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import replace

from qnext.errors import UsageError
from qnext.hardware.machine import Cpu, Gpu, Machine, Memory
from qnext.plan.machine_speeds import pcie_rate
from qnext.units import format_bytes, parse_size

SOURCE = "what if"

_HINT = "Write for example --what-if vram=24G,ram=128G,ram_bandwidth=90G,cores=16,pcie=4x8."
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([MGT])?(?:B(?:/s|ps)?)?", re.IGNORECASE)
_RATE_FACTORS = {"": 1, "M": 10**6, "G": 10**9, "T": 10**12}
_LINK = re.compile(r"(\d)x(\d{1,2})", re.IGNORECASE)
_MOST_GPUS = 16


def with_changes(machine: Machine, text: str) -> tuple[Machine, tuple[str, ...]]:
    """`machine` with the changes of `text`, and each change in words: `vram 16.00 GiB → 24.00 GiB`.

    `text` is `KEY=VALUE,…` with the keys `ram`, `ram_bandwidth`, `cores` (physical ones), `gpus` (how many:
    more than there are repeat the last one), and for the first GPU, or the one numbered (`vram.1=24G`),
    `vram`, `gpu_bandwidth` and `pcie` (`4x8`: generation and lanes). The changed facts get the source "what
    if". Raises UsageError for what is not understood or not there.
    """
    wanted = _parse(text)
    gpu_keys = [key for key, _, _ in wanted if key in _GPU_CHANGES]
    counts = [value for key, _, value in wanted if key == "gpus"]
    if not machine.gpus and gpu_keys and not counts:
        raise UsageError(
            f"{gpu_keys[0]}: this machine has no GPU to change",
            hint="Imagine one: --what-if gpus=1,vram=24G,gpu_bandwidth=1000G,pcie=4x16.",
        )
    said: list[str] = []
    for count in counts:
        machine = _with_gpus(machine, count, said)
    for key, _, value in wanted:
        if key in _MACHINE_CHANGES:
            machine = _MACHINE_CHANGES[key](machine, value, said)
    for key, number, value in wanted:
        if key in _GPU_CHANGES:
            machine = _with_gpu(machine, key, number, value, said)
    unknown = [str(number) for number, gpu in enumerate(machine.gpus) if _memory_unknown(machine, gpu)]
    if counts and unknown:
        raise UsageError(
            f"how much memory has the imagined GPU {unknown[0]}?", hint=f"Add vram.{unknown[0]}=24G."
        )
    return replace(machine, name=f"{machine.name}, changed"), tuple(said)


def _parse(text: str) -> list[tuple[str, int, str]]:
    """(key, number of the GPU, value) of each change. A key given twice is refused: which one counts?"""
    found: dict[tuple[str, int], str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, value = part.partition("=")
        key, dot, number = name.strip().replace("-", "_").partition(".")
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, 1)
            known = f"Did you mean {near[0]}?" if near else f"Known are: {', '.join(KEYS)}."
            raise UsageError(f"--what-if: there is no '{key}' to change", hint=known)
        if not separator or not value.strip():
            raise UsageError(f"--what-if: '{part}' names no value", hint=_HINT)
        if dot and (key not in _GPU_CHANGES or not number.isdecimal()):
            raise UsageError(f"--what-if: '{name}' is no GPU's", hint="Number GPUs from 0: vram.1=24G.")
        index = int(number) if dot else 0
        if (key, index) in found:
            raise UsageError(f"--what-if: {name} is given twice", hint="Say it once.")
        found[key, index] = value.strip()
    if not found:
        raise UsageError("--what-if changes nothing", hint=_HINT)
    return [(key, index, value) for (key, index), value in found.items()]


def _rate(key: str, text: str) -> int:
    match = _RATE.fullmatch(text)
    rate = float(match[1]) * _RATE_FACTORS[(match[2] or "").upper()] if match else 0
    if rate < 10**6:
        raise UsageError(
            f"--what-if: {key}={text} is not a rate", hint=f"Bytes per second: {key}=90G is 90 GB/s."
        )
    return round(rate)


def _count(key: str, text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise UsageError(f"--what-if: {key}={text} is not a count", hint=f"Write {least} to {most}.")
    return int(text)


def _size(key: str, text: str) -> int:
    size = parse_size(text)
    if size < 1 << 20:
        raise UsageError(f"--what-if: {key}={text} is next to nothing", hint=f"Write {key}=24G.")
    return size


def _sourced(machine: Machine, prefix: str, **facts: object) -> dict[str, str]:
    """The machine's sources with those of changed facts; what a change makes unknown loses its source."""
    sources = dict(machine.sources)
    for name, value in facts.items():
        sources[f"{prefix}.{name}"] = (
            SOURCE if value is not None else f"not known for the changed machine ({SOURCE})"
        )
    return sources


def _with_memory(machine: Machine, **facts: object) -> Machine:
    memory: Memory = replace(machine.memory, **facts)  # type: ignore[arg-type]
    return replace(machine, memory=memory, sources=_sourced(machine, "memory", **facts))


def _ram(machine: Machine, text: str, said: list[str]) -> Machine:
    """More or fewer modules, without a cgroup's limit; what other programs hold stays held."""
    memory, total = machine.memory, _size("ram", text)
    before = memory.total_bytes if memory.limit_bytes is None else memory.limit_bytes
    said.append(f"ram {format_bytes(before)} → {format_bytes(total)}")
    held = 0 if before is None or memory.usable_bytes is None else max(0, before - memory.usable_bytes)
    free = max(0, total - held)
    changed = _with_memory(
        machine, total_bytes=total, available_bytes=free, usable_bytes=free, limit_bytes=None
    )
    if machine.unified_memory:  # the GPU's share is one of the whole memory
        for index in range(len(machine.gpus)):
            changed = _replace_gpu(changed, index, vram_total_bytes=None, vram_free_bytes=None)
    return changed


def _ram_bandwidth(machine: Machine, text: str, said: list[str]) -> Machine:
    memory, rated = machine.memory, _rate("ram_bandwidth", text)
    measured = None
    if memory.measured_bandwidth_bps and memory.rated_bandwidth_bps:
        measured = round(memory.measured_bandwidth_bps * (rated / memory.rated_bandwidth_bps))
    before = memory.rated_bandwidth_bps or memory.measured_bandwidth_bps
    said.append(f"ram_bandwidth {_rate_words(before)} → {_rate_words(rated)} by rating")
    return _with_memory(
        machine,
        rated_bandwidth_bps=rated,
        measured_bandwidth_bps=measured,
        bandwidth_by_threads=None,
        bandwidth_knee_threads=None,
        bandwidth_spread=None,
    )


def _cores(machine: Machine, text: str, said: list[str]) -> Machine:
    """Other processor of the same kind: as many threads per core as now."""
    cpu, cores = machine.cpu, _count("cores", text, 1, 1024)
    before = cpu.usable_cores or cpu.physical_cores
    said.append(f"cores {before or 'unknown'} → {cores}")
    per_core = 2 if (cpu.logical_cores or 0) > (cpu.physical_cores or cpu.logical_cores or 0) else 1
    facts = {
        "physical_cores": cores,
        "usable_cores": cores,
        "logical_cores": cores * per_core,
        "usable_logical_cores": cores * per_core,
        "performance_cores": None,
        "efficiency_cores": None,
        "quota_cores": None,
    }
    changed: Cpu = replace(cpu, **facts)  # type: ignore[arg-type]
    return replace(machine, cpu=changed, sources=_sourced(machine, "cpu", **facts))


def _with_gpus(machine: Machine, text: str, said: list[str]) -> Machine:
    """So many GPUs: the first ones, or the last one repeated; a plain CUDA card where there is none."""
    count, gpus = _count("gpus", text, 0, _MOST_GPUS), machine.gpus[:]
    said.append(f"gpus {len(gpus)} → {count}")
    pattern = gpus[-1] if gpus else Gpu(name="an imagined GPU", kind="cuda")
    more = (replace(pattern, index=number, pci_bus_id=None) for number in range(len(gpus), count))
    changed = (*gpus[:count], *more)
    sources = {
        path: source
        for path, source in machine.sources.items()
        if not path.startswith("gpus.") or int(path.split(".")[1]) < min(count, len(gpus))
    }
    return replace(machine, gpus=changed, sources={**sources, "gpus": SOURCE})


def _with_gpu(machine: Machine, key: str, index: int, text: str, said: list[str]) -> Machine:
    if index >= len(machine.gpus):
        last = len(machine.gpus) - 1
        raise UsageError(
            f"--what-if: there is no GPU {index}",
            hint=f"The last one is {last}." if machine.gpus else "gpus=0 leaves none to change.",
        )
    gpu = machine.gpus[index]
    facts, before, after = _GPU_CHANGES[key](gpu, text)
    label = key if len(machine.gpus) == 1 else f"{key}.{index}"
    said.append(f"{label} {before} → {after}")
    return _replace_gpu(machine, index, **facts)


def _replace_gpu(machine: Machine, index: int, **facts: object) -> Machine:
    gpu: Gpu = replace(machine.gpus[index], **facts)  # type: ignore[arg-type]
    gpus = (*machine.gpus[:index], gpu, *machine.gpus[index + 1 :])
    return replace(machine, gpus=gpus, sources=_sourced(machine, f"gpus.{index}", **facts))


_Changed = tuple[dict[str, object], str, str]


def _vram(gpu: Gpu, text: str) -> _Changed:
    total, before = _size("vram", text), gpu.vram_total_bytes
    held = 0 if before is None or gpu.vram_free_bytes is None else max(0, before - gpu.vram_free_bytes)
    facts: dict[str, object] = {"vram_total_bytes": total, "vram_free_bytes": max(0, total - held)}
    return facts, format_bytes(before), format_bytes(total)


def _gpu_bandwidth(gpu: Gpu, text: str) -> _Changed:
    rate = _rate("gpu_bandwidth", text)
    return {"rated_bandwidth_bps": rate}, _rate_words(gpu.rated_bandwidth_bps), _rate_words(rate)


def _pcie(gpu: Gpu, text: str) -> _Changed:
    match = _LINK.fullmatch(text)
    generation, width = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= generation <= 7 or width not in (1, 2, 4, 8, 16):
        raise UsageError(
            f"--what-if: pcie={text} is not a link", hint="Write generation and lanes: pcie=4x16."
        )
    facts: dict[str, object] = {"pcie_gen_max": generation, "pcie_width_max": width}
    facts |= dict.fromkeys(("pcie_gen", "pcie_width", "pcie_gen_loaded", "pcie_width_loaded"))
    facts |= dict.fromkeys(("h2d_pinned_bps", "h2d_pageable_bps", "d2h_pinned_bps", "d2h_pageable_bps"))
    old_generation = gpu.pcie_gen_loaded or gpu.pcie_gen_max
    old_width = gpu.pcie_width_loaded or gpu.pcie_width_max
    known = old_generation and old_width
    before = f"{old_generation}x{old_width}" if known else "unknown"
    return facts, before, f"{generation}x{width} ({_rate_words(pcie_rate(generation, width))})"


def _memory_unknown(machine: Machine, gpu: Gpu) -> bool:
    return not machine.unified_memory and gpu.vram_total_bytes is None and gpu.vram_free_bytes is None


def _rate_words(rate: int | None) -> str:
    return "unknown" if rate is None else f"{rate / 10**9:.4g} GB/s"


_GPU_CHANGES: dict[str, Callable[[Gpu, str], _Changed]] = {
    "vram": _vram,
    "gpu_bandwidth": _gpu_bandwidth,
    "pcie": _pcie,
}
_MACHINE_CHANGES: dict[str, Callable[[Machine, str, list[str]], Machine]] = {
    "ram": _ram,
    "ram_bandwidth": _ram_bandwidth,
    "cores": _cores,
}
KEYS = (*_MACHINE_CHANGES, "gpus", *_GPU_CHANGES)
