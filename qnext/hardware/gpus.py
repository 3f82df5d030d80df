"""GPUs: NVML's readings judged, put into CUDA's order, cut to what CUDA will show this process; then others.

NVML numbers GPUs by PCI bus, CUDA by speed unless CUDA_DEVICE_ORDER=PCI_BUS_ID, and CUDA_VISIBLE_DEVICES
counts in CUDA's order; the two agree only for equal cards. The bus id is what a device is matched by
(https://docs.nvidia.com/cuda/cuda-c-programming-guide/index.html#cuda-environment-variables). AMD and Intel
cards follow as Linux shows them; Apple GPUs are known through the engine's own device list, not here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qnext.hardware.machine import Gpu, Sources
from qnext.hardware.nvml import NvmlReport, read_nvml
from qnext.hardware.sysfs_gpus import NVIDIA, BusReport, judge_cards, link_facts, read_bus
from qnext.units import MIB

_MOST_VRAM_BYTES = 1 << 44
_MOST_MILLIWATTS = 10_000_000
_SYSFS_DEADLINE_S = 2.0
_ABSURD = {0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF}
"""What failing sensors return instead of an error: zero, or all bits set."""


_THROTTLE_BITS = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "temperature, by the driver",
    0x040: "temperature, by the hardware",
    0x080: "power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""NVML's reasons (nvml.h, nvmlClocksEventReasons). Idle (0x1) and clocks set by hand (0x2) are none."""

_ON_THE_PROCESSOR = re.compile(r"\b(GB10|Thor|Orin)\b")
"""As NVML names the GPUs of DGX Spark and Jetson; it answers "Not Supported" when asked for their memory."""

_UNLISTED_BYTES = 256 * MIB
"""VRAM in use from which a list without any process cannot be whole."""


def detect_gpus(
    sources: Sources, environ: Mapping[str, str], root: Path = Path("/"), deadline_s: float = 5.0
) -> tuple[Gpu, ...]:
    """GPUs this process may use, in the order CUDA is expected to number them; notes go to `sources`."""
    bus = read_bus(root, min(deadline_s, _SYSFS_DEADLINE_S))
    nvidia: tuple[Gpu, ...] = ()
    if _driver_present(environ, root):
        nvidia = judge_gpus(read_nvml(deadline_s), sources, environ, bus)
    elif any(card["vendor"] == NVIDIA for card in bus.cards.values()):
        sources["gpus"] = "an NVIDIA card is on the bus, but its driver is not loaded"
    else:
        sources["gpus"] = "no NVIDIA driver on this machine"
    others, notes = judge_cards(bus, sources, len(nvidia))
    found = [f"sysfs lists {len(others)}"] if others else []
    sources["gpus"] = "; ".join([sources["gpus"], *found, *notes])
    return nvidia + others


def judge_gpus(
    report: NvmlReport, sources: Sources, environ: Mapping[str, str], bus: BusReport | None = None
) -> tuple[Gpu, ...]:
    """GPUs of a report: absurd readings become None with a note, CUDA's environment is applied.

    `bus` completes what NVML does not say of the links: what card and slot can do each alone.
    """
    order, how = _cuda_order(report, environ)
    visible, why = _visible(order, report, environ)
    found = f"NVML lists {len(report.values)}" if report.values else ""
    notes = [note for note in (found, how, why, report.problem) if note]
    sources["gpus"] = "; ".join(notes) or "NVML lists no GPU"
    return tuple(
        _judge(report, position, index, sources, how or "NVML", bus or BusReport())
        for index, position in enumerate(visible)
    )


def _judge(
    report: NvmlReport, position: int, index: int, sources: Sources, order: str, bus: BusReport
) -> Gpu:
    raw, errors = report.values[position], report.errors[position]
    bus_id = normal_bus_id(raw.get("pci_bus_id"))
    links = link_facts(bus.link(bus_id))

    def note(name: str, value: Any, key: str = "", source: str = "NVML", absent: str = "") -> Any:
        key = key or name
        if value is None and name in links and links[name][0] is not None:
            value, source = links[name][:2]
        said = f"NVML reads {raw[key]!r}, which cannot be" if key in raw else ""
        absent = absent or errors.get(key) or said or report.problem or "NVML says nothing"
        return sources.record(f"gpus.{index}.{name}", value, source, absent)

    def count(name: str, most: int, key: str = "", source: str = "NVML") -> Any:
        key = key or name
        return note(name, _count(raw.get(key), most), key, source)

    total = _count(raw.get("vram_total"), _MOST_VRAM_BYTES)
    free = _count(raw.get("vram_free"), total or 0)
    clock, width = _count(raw.get("memory_clock"), 100_000), _count(raw.get("memory_bus_width"), 65_536)
    bandwidth = clock * 1_000_000 * 2 * width // 8 if clock and width else None
    others = _from_zero(raw.get("vram_used"), total or 0)
    mig, sliced = _switch(raw.get("mig")), ""
    if mig:  # these are the whole card's; what CUDA shows of it, the engine's device list says
        total = free = bandwidth = None
        sliced = "the card is split (MIG) and CUDA shows a slice of it"
    processes, unlisted = _from_zero(raw.get("processes"), 1 << 20), ""
    if processes == 0 and (others or 0) > _UNLISTED_BYTES:
        processes, unlisted = None, "NVML lists none, yet VRAM is in use: they are out of sight from here"
    return Gpu(
        name=note("name", _text(raw.get("name"))),
        kind=note("kind", "cuda", "name", "NVML lists CUDA devices"),
        index=note("index", index, "name", order),
        pci_bus_id=note("pci_bus_id", bus_id),
        vram_total_bytes=note("vram_total_bytes", total, "vram_total", absent=sliced),
        vram_free_bytes=note("vram_free_bytes", free, "vram_free", absent=sliced),
        rated_bandwidth_bps=note(
            "rated_bandwidth_bps", bandwidth, "memory_clock", "NVML memory clock x 2 x bus width", sliced
        ),
        compute_capability=note("compute_capability", _capability(raw.get("compute_capability"))),
        pcie_gen=count("pcie_gen", 10, source="NVML, drops when idle"),
        pcie_gen_max=count("pcie_gen_max", 10),
        pcie_width=count("pcie_width", 32, source="NVML, may drop when idle"),
        pcie_width_max=count("pcie_width_max", 32),
        driver=note("driver", _text(raw.get("driver"))),
        pcie_gen_card_max=count("pcie_gen_card_max", 10),
        pcie_width_card_max=note("pcie_width_card_max", None, absent="the PCI bus does not tell"),
        pcie_gen_slot_max=note("pcie_gen_slot_max", None, absent="the PCI bus does not tell"),
        pcie_width_slot_max=note("pcie_width_slot_max", None, absent="the PCI bus does not tell"),
        power_limit_w=note("power_limit_w", _watts(raw.get("power_limit")), "power_limit"),
        power_default_w=note("power_default_w", _watts(raw.get("power_default")), "power_default"),
        power_max_w=note("power_max_w", _watts(_highest(raw.get("power_range"))), "power_range"),
        core_clock_mhz=count("core_clock_mhz", 100_000, "core_clock_now", "NVML, drops when idle"),
        core_clock_max_mhz=count("core_clock_max_mhz", 100_000, "core_clock"),
        memory_clock_mhz=count("memory_clock_mhz", 100_000, "memory_clock_now", "NVML, drops when idle"),
        memory_clock_max_mhz=count("memory_clock_max_mhz", 100_000, "memory_clock"),
        throttle_reasons=note("throttle_reasons", _reasons(raw.get("throttle_bits")), "throttle_bits"),
        processes=note("processes", processes, absent=unlisted),
        vram_others_bytes=note(
            "vram_others_bytes", others, "vram_used", "NVML, VRAM in use but for the driver's reserve"
        ),
        ecc=note("ecc", _switch(raw.get("ecc"))),
        mig=note("mig", mig),
    )


def shares_host_memory(gpu: Gpu) -> bool:
    """Whether an NVIDIA GPU is part of its processor and has no memory of its own (DGX Spark, Jetson)."""
    return gpu.kind == "cuda" and _ON_THE_PROCESSOR.search(gpu.name or "") is not None


def _cuda_order(report: NvmlReport, environ: Mapping[str, str]) -> tuple[list[int], str]:
    """(NVML positions in CUDA's expected order, how they were ordered or empty for a single GPU)."""
    values = report.values
    by_bus = sorted(range(len(values)), key=lambda at: normal_bus_id(values[at].get("pci_bus_id")) or "~")
    if len(by_bus) < 2:
        return by_bus, ""
    if environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID" or len({gpu.get("name") for gpu in values}) == 1:
        return by_bus, "in PCI order"

    def speed(at: int) -> int:
        cores = _count(values[at].get("cores"), 1 << 20) or 0
        return cores * (_count(values[at].get("core_clock"), 100_000) or 0)

    return sorted(by_bus, key=speed, reverse=True), "fastest first as CUDA does, by cores x clock (estimated)"


def _visible(order: list[int], report: NvmlReport, environ: Mapping[str, str]) -> tuple[list[int], str]:
    """(positions CUDA_VISIBLE_DEVICES leaves, note). CUDA stops at the first entry it does not know."""
    text = environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return order, ""
    chosen: list[int] = []
    for entry in (part.strip() for part in text.split(",")):
        if entry.isdigit():
            found = order[int(entry) : int(entry) + 1]
        elif entry.startswith("GPU-"):
            found = [at for at in order if str(report.values[at].get("uuid", "")).startswith(entry)]
        else:
            found = []  # -1, empty, a MIG slice (not read yet), or a mistake
        if len(found) != 1 or found[0] in chosen:
            break
        chosen += found
    return chosen, f"CUDA_VISIBLE_DEVICES shows {len(chosen)} of {len(order)}"


def normal_bus_id(value: object) -> str | None:
    """`00000000:01:00.0` (NVML) or `0000:01:00.0` (sysfs, CUDA) as the latter; None if it is neither."""
    parts = value.lower().replace(".", ":").split(":") if isinstance(value, str) else []
    try:
        domain, bus, device, function = (int(part, 16) for part in parts)
    except ValueError:
        return None
    return f"{domain:04x}:{bus:02x}:{device:02x}.{function:x}"


def _count(value: object, most: int) -> int | None:
    good = isinstance(value, int) and value not in _ABSURD and 0 < value <= most
    return value if good and isinstance(value, int) else None


def _from_zero(value: object, most: int) -> int | None:
    """A count that may be none at all."""
    return 0 if value == 0 and isinstance(value, int) else _count(value, most)


def _watts(milliwatts: object) -> int | None:
    count = _count(milliwatts, _MOST_MILLIWATTS)
    return round(count / 1000) or None if count else None


def _highest(limits: object) -> object:
    """The second of NVML's (lowest, highest) settable power limit."""
    return limits[1] if isinstance(limits, list) and len(limits) == 2 else None


def _reasons(bits: object) -> tuple[str, ...] | None:
    """Plain words of a throttle mask; None for one with bits that mean nothing."""
    if not isinstance(bits, int) or isinstance(bits, bool) or not 0 <= bits < 0x800:
        return None
    return tuple(words for bit, words in _THROTTLE_BITS.items() if bits & bit)


def _switch(mode: object) -> bool | None:
    return bool(mode) if isinstance(mode, int) and mode in (0, 1) else None


def _text(value: object) -> str | None:
    text = value.strip() if isinstance(value, str) else ""
    return None if text.lower() in {"", "n/a", "[n/a]", "unknown", "[unknown error]"} else text


def _capability(value: object) -> str | None:
    """`[12, 0]` -> `12.0`; CUDA has known no device below 1.0."""
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(part, int) for part in value):
        return None
    major, minor = value
    return f"{major}.{minor}" if 0 < major < 100 and 0 <= minor < 10 else None


def _driver_present(environ: Mapping[str, str], root: Path) -> bool:
    """Whether asking NVML can succeed; a few file checks that spare a child process on GPU-less machines."""
    if sys.platform == "win32":
        return (Path(environ.get("SystemRoot", "C:/Windows")) / "System32/nvml.dll").exists()
    return any((root / name).exists() for name in ("dev/nvidiactl", "dev/dxg"))
