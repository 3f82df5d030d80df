"""From a machine to the speeds that the forecast reckons with: measured where it was, else rated.

Pure, so that the same machine with one fault mended can be forecast too.
"""

from __future__ import annotations

from collections.abc import Iterable

from qnext.hardware.machine import Gpu, Machine
from qnext.plan.budgets import engine_name
from qnext.plan.speed import MachineSpeeds

PCIE_GEN1_LANE_BPS = 250_000_000
"""Bytes per second of one PCIe lane of the first generation; each later one doubles it."""

FASTEST_PCIE_GEN = 5
"""The latest generation that boards and cards are sold with."""

RATED_SHARE = 0.8
"""Part of the rated RAM bandwidth that a read loop reaches on an ordinary desktop."""

COPIED_SHARE = 0.8
"""Part of a PCIe link's rate that one large copy from pinned memory reaches: the rest is packet headers."""


def thread_counts(machine: Machine) -> tuple[int, int]:
    """Physical cores for decode (hyper-threads can cost a quarter of it), hardware threads for prefill."""
    cpu = machine.cpu
    physical = cpu.usable_cores or cpu.physical_cores or cpu.usable_logical_cores or cpu.logical_cores or 1
    return physical, cpu.usable_logical_cores or cpu.logical_cores or physical


def machine_speeds(machine: Machine, compiled: Iterable[str] | None = None) -> MachineSpeeds:
    """Bandwidths in bytes per second. `compiled` are the engine's instruction sets, None for the CPU's."""
    memory = machine.memory
    bandwidth, source = memory.measured_bandwidth_bps, "measured"
    if bandwidth is None and memory.rated_bandwidth_bps is not None:
        bandwidth, source = round(memory.rated_bandwidth_bps * RATED_SHARE), "taken as 80 % of its rating"
    if bandwidth is None:
        source = "unknown, taken as 20 GB/s"
    gpus = [(engine_name(gpu, position), gpu) for position, gpu in enumerate(machine.gpus)]
    sets = set(machine.cpu.instruction_sets or ())
    usable = sets if compiled is None else sets & set(compiled)
    return MachineSpeeds(
        ram_bps=bandwidth,
        ram_source=source,
        device_bps={name: gpu.rated_bandwidth_bps for name, gpu in gpus if gpu.rated_bandwidth_bps},
        link_bps={name: rate for name, gpu in gpus if (rate := link_rate(gpu)) is not None},
        device_clock={name: share for name, gpu in gpus if (share := _power_share(gpu)) < 1},
        cores=thread_counts(machine)[0],
        instruction_set="avx512" if "avx512f" in usable else "avx2" if "avx2" in usable else "other",
    )


def link_rate(gpu: Gpu) -> int | None:
    """Bytes per second of a GPU's link: from a measured copy, else as seen under load, else at its best."""
    if gpu.h2d_pinned_bps:
        return round(gpu.h2d_pinned_bps / COPIED_SHARE)
    generation = gpu.pcie_gen_loaded or gpu.pcie_gen_max
    width = gpu.pcie_width_loaded or gpu.pcie_width_max
    return pcie_rate(generation, width) if generation and width else None


def pcie_rate(generation: int, width: int) -> int:
    """Bytes per second of a PCIe link in one direction: 16 lanes of generation 4 are 32 GB/s."""
    return PCIE_GEN1_LANE_BPS * width << (generation - 1)


def _power_share(gpu: Gpu) -> float:
    """What of its usual clock a card keeps under its power limit: power grows with the cube of the clock."""
    limit, usual = gpu.power_limit_w, gpu.power_default_w
    return min(1.0, (limit / usual) ** (1 / 3)) if limit and usual else 1.0
