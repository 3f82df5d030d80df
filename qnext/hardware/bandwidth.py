"""RAM read bandwidth of this machine by number of threads: what decode speed hangs on.

A sweep over numbers of threads, each given several short turns spread over the whole measurement, reads
buffers far larger than the caches (`read_memory`, in a child process). The best reading of each number of
threads counts: on a machine with other work the rest of them say how busy it was, which is the spread.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.errors import HardwareError
from qnext.hardware.apart import measure_apart
from qnext.hardware.files import parse_cpu_list, read_text
from qnext.hardware.machine import Cpu, Machine, Sources
from qnext.units import GIB, MIB, format_bytes

MOST_BYTES = 4 * GIB
"""Most memory that all buffers take together."""
LEAST_BYTES = 256 * MIB
UNKNOWN_CACHE_BYTES = 128 * MIB
"""Stands for a last-level cache that the system does not state."""
CACHE_FACTOR = 4
"""Buffers are so many times the last-level cache, so that hardly any of a block is still in it next time."""
LEAST_FACTOR = 2
"""With smaller buffers the caches would be measured, and nothing is."""
KNEE_SHARE = 0.95
MOST_POINTS = 7
_SPREAD_READINGS = 5
_QUICK_S = 0.5
_QUICK_LIMIT_S = 30.0
_LATE_S = 0.7
"""How long after the budget the child is killed: it keeps to the budget by itself once numpy is loaded."""


@dataclass(frozen=True, slots=True)
class Bandwidth:
    """What was measured, in bytes per second.

    `by_threads` holds the best reading per number of threads, in ascending numbers; `best_bps` the highest of
    them; `knee_threads` the fewest threads with at least 95 % of it. `spread` is (highest - lowest) / median
    of the readings at the best number of threads, None with fewer than five of them. `nodes` holds the best
    rate of each memory node read by its own CPUs, empty where threads were not pinned. `buffer_bytes` were
    read in turns; `note` says what else to know, mostly nothing.
    """

    best_bps: int
    by_threads: tuple[tuple[int, int], ...]
    knee_threads: int
    spread: float | None
    nodes: tuple[tuple[int, int], ...]
    readings: int
    buffer_bytes: int
    note: str = ""


def measure_bandwidth(
    threads: Sequence[int],
    *,
    nodes: Mapping[int, frozenset[int]] | None = None,
    llc_bytes: int | None = None,
    usable_bytes: int | None = None,
    budget_s: float = 5.0,
    limit_s: float | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Bandwidth:
    """Measure with each number of `threads` (`sweep_threads`) in about `budget_s` seconds, start included.

    `nodes` are the CPUs of each memory node (`read_node_cpus`); threads are pinned where there are several.
    Memory taken: four times `llc_bytes`, never above a quarter of `usable_bytes` or 4 GiB. `on_progress` is
    called with the share that is done, 0 to 1. At `limit_s` (by default shortly after the budget) the child
    is killed; what was measured by then counts. Raises HardwareError when nothing was measured, or there is
    too little memory to read past the caches.
    """
    began = time.monotonic()
    size = choose_buffer_bytes(llc_bytes, usable_bytes)
    question = {
        "threads": sorted(set(threads)),
        "bytes": size,
        "least_bytes": min(size, LEAST_FACTOR * (llc_bytes or 0)),
        "nodes": [[node, sorted(cpus)] for node, cpus in sorted((nodes or {}).items())],
        "ends": began + budget_s,
    }
    entries: list[dict[str, Any]] = []
    note = ""
    try:
        limit = budget_s + _LATE_S if limit_s is None else limit_s
        with closing(measure_apart("qnext.hardware.read_memory", question, limit)) as answers:
            for entry in answers:
                entries.append(entry)
                if on_progress is not None:
                    on_progress(min(1.0, (time.monotonic() - began) / budget_s))
    except HardwareError as error:
        if len(entries) < 2:
            raise
        note = f"ended early: {error.message}"
    if len(entries) < 2:
        raise HardwareError(
            "RAM bandwidth was not measured: no reading was taken", hint="Try again when less is running."
        )
    return summarise_readings(entries, llc_bytes, note)


def measure_in_child(threads: int, *, llc_bytes: int | None = None, usable_bytes: int | None = None) -> int:
    """Bytes per second that `threads` threads read together, measured in half a second.

    Raises HardwareError when it cannot be run.
    """
    return measure_bandwidth(
        (threads,),
        llc_bytes=llc_bytes,
        usable_bytes=usable_bytes,
        budget_s=_QUICK_S,
        limit_s=_QUICK_LIMIT_S,
    ).best_bps


def sweep_threads(cpu: Cpu) -> tuple[int, ...]:
    """1, 2, 4, … up to the usable logical cores, with the usable physical cores; at most seven numbers.

    On large machines the numbers after 1 are left out first: one knows before that they are no knee.
    """
    most = cpu.usable_logical_cores or cpu.logical_cores or os.cpu_count() or 1
    points = {1 << power for power in range(most.bit_length())} | {most, min(cpu.usable_cores or most, most)}
    ordered = sorted(points)
    return (ordered[0], *ordered[1:][-(MOST_POINTS - 1) :])


def read_node_cpus(root: Path = Path("/")) -> dict[int, frozenset[int]]:
    """The logical CPUs of each memory node that this process may use; empty where the system does not tell.

    Nodes without memory or without CPUs of ours are left out. `root` stands for `/`.
    """
    if sys.platform != "linux":
        return {}
    folder, ours = root / "sys/devices/system/node", os.sched_getaffinity(0)
    nodes = {
        node: parse_cpu_list(read_text(folder / f"node{node}/cpulist")) & ours
        for node in sorted(parse_cpu_list(read_text(folder / "has_memory")))
    }
    return {node: cpus for node, cpus in nodes.items() if cpus}


def with_bandwidth(machine: Machine, bandwidth: Bandwidth) -> Machine:
    """The machine with the measured facts and where they come from."""
    sources = Sources(machine.sources)
    tried = ", ".join(str(threads) for threads, _ in bandwidth.by_threads)
    how = (
        f"read with {tried} threads from {format_bytes(bandwidth.buffer_bytes)} in turns, "
        f"{bandwidth.readings} readings at the best, numpy"
    )
    how += f"; {bandwidth.note}" if bandwidth.note else ""
    few = f"fewer than {_SPREAD_READINGS} readings at the best"
    rates, nodes = dict(bandwidth.nodes), machine.memory.numa_nodes
    if nodes is not None and rates:
        nodes = tuple(
            dataclasses.replace(node, measured_bandwidth_bps=rates.get(node.node)) for node in nodes
        )
        for position, node in enumerate(nodes):
            sources.record(
                f"memory.numa_nodes.{position}.measured_bandwidth_bps",
                node.measured_bandwidth_bps,
                f"threads pinned to the node, {how}",
                "no CPU of this node is ours",
            )
    memory = dataclasses.replace(
        machine.memory,
        measured_bandwidth_bps=sources.record(
            "memory.measured_bandwidth_bps", bandwidth.best_bps, f"best of all: {how}"
        ),
        bandwidth_by_threads=sources.record("memory.bandwidth_by_threads", bandwidth.by_threads, how),
        bandwidth_knee_threads=sources.record(
            "memory.bandwidth_knee_threads",
            bandwidth.knee_threads,
            f"fewest threads with {KNEE_SHARE:.0%} of the best",
        ),
        bandwidth_spread=sources.record(
            "memory.bandwidth_spread",
            bandwidth.spread,
            f"(highest - lowest) / median of {bandwidth.readings} readings at the best",
            few,
        ),
        numa_nodes=nodes,
    )
    return dataclasses.replace(machine, memory=memory, sources=dict(sources))


def choose_buffer_bytes(llc: int | None, usable: int | None) -> int:
    """Bytes of all buffers together. Raises HardwareError when they would not reach past the cache."""
    size = min(max(CACHE_FACTOR * (llc or UNKNOWN_CACHE_BYTES), LEAST_BYTES), MOST_BYTES)
    if usable is not None:
        size = min(size, usable // 4)
    if size < LEAST_FACTOR * (llc or 0) or size < MIB:
        raise HardwareError(
            f"RAM bandwidth was not measured: {format_bytes(size)} may be read, the caches hold "
            f"{format_bytes(llc)}",
            hint="Free some memory, or raise the container's limit.",
        )
    return size


def summarise_readings(
    entries: Iterable[dict[str, Any]], llc: int | None = None, note: str = ""
) -> Bandwidth:
    """What the child's entries (`read_memory.measure`) say, at least one reading among them."""
    first, *readings = entries
    by_threads: dict[int, list[int]] = {}
    nodes: dict[int, int] = {}
    for reading in readings:
        by_threads.setdefault(reading["threads"], []).append(reading["bps"])
        for node, rate in reading["nodes"]:
            nodes[node] = max(rate, nodes.get(node, 0))
    curve = tuple(sorted((threads, max(rates)) for threads, rates in by_threads.items()))
    best_threads, best = max(curve, key=lambda point: point[1])
    at_best = by_threads[best_threads]
    enough = len(at_best) >= _SPREAD_READINGS
    size = first["buffer_bytes"]
    if llc and size < CACHE_FACTOR * llc:
        small = f"the buffers are only {size / llc:.1f} times the cache, which may flatter"
        note = f"{small}; {note}" if note else small
    return Bandwidth(
        best_bps=best,
        by_threads=curve,
        knee_threads=min(threads for threads, rate in curve if rate >= KNEE_SHARE * best),
        spread=(max(at_best) - min(at_best)) / statistics.median(at_best) if enough else None,
        nodes=tuple(sorted(nodes.items())) if len(nodes) > 1 else (),
        readings=len(at_best),
        buffer_bytes=size,
        note=note,
    )
