"""What was measured on this machine, remembered: a plan and a quick doctor use it from then on."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
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

    A file that cannot be read counts as nothing measured. Sources say when it was.
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
    content = {
        path: {"value": value, "source": machine.sources.get(path, "measured")}
        for path, value in _measured(machine)
        if value is not None
    }
    with contextlib.suppress(OSError):
        write_atomically(_entry(machine, paths), json.dumps(content))


def _entry(machine: Machine, paths: Paths) -> Path:
    return paths.probes_dir / f"measured-{machine_fingerprint(machine)}.json"


def _measured(machine: Machine) -> Iterator[tuple[str, object]]:
    for name in _MEMORY:
        yield f"memory.{name}", getattr(machine.memory, name)
    for position, node in enumerate(machine.memory.numa_nodes or ()):
        yield f"memory.numa_nodes.{position}.measured_bandwidth_bps", node.measured_bandwidth_bps
    for name in _DISK:
        yield f"disk.{name}", getattr(machine.disk, name)
    for position, gpu in enumerate(machine.gpus):
        for name in _GPU:
            yield f"gpus.{position}.{name}", getattr(gpu, name)


def _filled(machine: Machine, known: dict[str, Any]) -> Machine:
    missing = {path for path, value in _measured(machine) if value is None}
    found = {
        path: (_tuples(entry["value"]), str(entry["source"]))
        for path, entry in known.items()
        if path in missing and isinstance(entry, dict) and {"value", "source"} <= entry.keys()
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
