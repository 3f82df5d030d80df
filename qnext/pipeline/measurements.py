"""What was measured on this machine, remembered: a plan and a quick doctor use it from then on."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from qnext.config import Paths
from qnext.engine.cache import write_atomically
from qnext.hardware import Machine, machine_fingerprint

_MEMORY = (
    "measured_bandwidth_bps",
    "bandwidth_by_threads",
    "bandwidth_knee_threads",
    "bandwidth_spread",
)
_GPU = (
    "pcie_gen_loaded",
    "pcie_width_loaded",
    "h2d_pinned_bps",
    "h2d_pageable_bps",
    "d2h_pinned_bps",
    "d2h_pageable_bps",
)
_DISK = ("read_bps",)


def recall_measurements(machine: Machine, paths: Paths) -> Machine:
    """`machine` with what was measured here before, where it has nothing of its own.

    Only while what was measured is still the same: memory at another speed, a card in another slot, a folder
    on another disk have to be measured again. A file that cannot be read counts as nothing measured.
    """
    known: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, TypeError):
        content = json.loads(_entry(machine, paths).read_text())
        known = content if isinstance(content, dict) else {}
    return _filled(machine, known)


def remember_measurements(machine: Machine, paths: Paths) -> None:
    """Keep the measured facts of `machine`; those it lacks stay as they were remembered.

    Not being able to write costs only the next measurement.
    """
    machine = recall_measurements(machine, paths)
    today = date.today().isoformat()
    content: dict[str, dict[str, Any]] = {}
    for part, key, facts in _measured(machine):
        kept = {}
        for path, value in facts.items():
            if value is not None:
                source = machine.sources.get(path, "measured")
                kept[path] = [value, source if _DATED.search(source) else f"{source}, on {today}"]
        content[part] = {"key": key, "facts": kept}
    with contextlib.suppress(OSError):
        write_atomically(_entry(machine, paths), json.dumps(content))


def _entry(machine: Machine, paths: Paths) -> Path:
    return paths.probes_dir / f"measured-{machine_fingerprint(machine)}.json"


_DATED = re.compile(r", on \d{4}-\d\d-\d\d$")


def _measured(machine: Machine) -> Iterator[tuple[str, Sequence[object], dict[str, object]]]:
    """(part, what it must still be for its figures to count, its measured facts by path)."""
    memory, disk = machine.memory, machine.disk
    facts = {f"memory.{name}": getattr(memory, name) for name in _MEMORY}
    for position, node in enumerate(memory.numa_nodes or ()):
        facts[f"memory.numa_nodes.{position}.measured_bandwidth_bps"] = node.measured_bandwidth_bps
    yield "memory", [memory.channels, memory.speed_mtps, memory.modules, memory.numa_policy], facts
    yield "disk", [disk.filesystem, disk.total_bytes], {f"disk.{name}": getattr(disk, name) for name in _DISK}
    for position, gpu in enumerate(machine.gpus):
        slot = [gpu.pci_bus_id, gpu.pcie_gen_slot_max, gpu.pcie_width_slot_max, gpu.pcie_width_max]
        yield f"gpu {position}", slot, {f"gpus.{position}.{name}": getattr(gpu, name) for name in _GPU}


def _filled(machine: Machine, known: dict[str, Any]) -> Machine:
    found: dict[str, tuple[Any, str]] = {}
    for part, key, facts in _measured(machine):
        with contextlib.suppress(TypeError, ValueError, KeyError):
            if known[part]["key"] == key:
                remembered = known[part]["facts"]
                found |= {
                    path: (_tuples(remembered[path][0]), str(remembered[path][1]))
                    for path, value in facts.items()
                    if value is None and path in remembered
                }

    def chosen(prefix: str) -> dict[str, Any]:
        return {
            path.removeprefix(prefix): value
            for path, (value, _) in found.items()
            if path.startswith(prefix) and "." not in path.removeprefix(prefix)
        }

    nodes = machine.memory.numa_nodes
    if nodes is not None:
        nodes = tuple(
            replace(node, **chosen(f"memory.numa_nodes.{position}.")) for position, node in enumerate(nodes)
        )
    return replace(
        machine,
        memory=replace(machine.memory, numa_nodes=nodes, **chosen("memory.")),
        disk=replace(machine.disk, **chosen("disk.")),
        gpus=tuple(replace(gpu, **chosen(f"gpus.{position}.")) for position, gpu in enumerate(machine.gpus)),
        sources={**machine.sources, **{path: source for path, (_, source) in found.items()}},
    )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
