"""AMD and Intel graphics cards as the Linux kernel shows them, and every card's PCI Express link.

Cards are found on the PCI bus by their class, so that one without a driver is noticed too. Only a card with
a render node below /dev/dri counts: /sys shows a container all cards of the machine, /dev those it may use.
The GPU inside a processor is left out: what it calls VRAM is a slice of RAM. AMD's shares its slot with
devices of the processor (vendor 0x1022: security processor, USB), Intel's is device 2 of the root bus.

amdgpu's files: https://docs.kernel.org/gpu/amdgpu/driver-misc.html and thermal.html; Intel's hwmon files:
https://docs.kernel.org/admin-guide/abi-testing.html (sysfs-driver-intel-xe-hwmon).

A read below /sys asks the card's driver, and a wedged one may not answer. So a thread reads, into a dict that
grows; at the deadline what is there counts and the thread is left behind.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qnext.hardware.files import read_number, read_text
from qnext.hardware.machine import INTEGRATED_GPU, Gpu, Sources
from qnext.hardware.pcie import Link, bus_path, read_link
from qnext.units import GIB

AMD, INTEL, NVIDIA = "0x1002", "0x8086", "0x10de"
_AMD_PROCESSOR = "0x1022"
_MAKERS = {AMD: "AMD", INTEL: "Intel"}
_KINDS = {AMD: "rocm", INTEL: "sycl"}
"""The maker's own backend. Which one the installed engine drives the card by, its device list says."""

_DISPLAY_CLASSES = ("0x0300", "0x0302", "0x0380")
_MOST_VRAM_BYTES = 1 << 44
_CLOCK = re.compile(r"^\d+: (\d+)\s?MHz( \*)?$", re.IGNORECASE | re.MULTILINE)


@dataclass(slots=True)
class BusReport:
    """Per graphics card by PCI bus id, readings by name; those not there were not read, or not in time.

    `vendor`, `device` and `revision` are sysfs's hexadecimal words, `link` a Link, sizes bytes, power µW.
    `problem` is why the report is incomplete, or empty.
    """

    cards: dict[str, dict[str, Any]] = field(default_factory=dict)
    problem: str = ""

    def link(self, bus_id: str | None) -> Link:
        """The card's link; an empty one where the bus does not show the card."""
        return self.cards.get(bus_id or "", {}).get("link") or Link()


def read_bus(root: Path = Path("/"), deadline_s: float = 2.0) -> BusReport:
    """Every graphics card on the PCI bus, in at most `deadline_s` seconds. No driver makes it raise."""
    report = BusReport()
    thread = threading.Thread(target=_read_cards, args=(root, report.cards), name="pci-gpus", daemon=True)
    thread.start()
    thread.join(deadline_s)
    if not thread.is_alive():
        return report
    cards = {bus_id: dict(card) for bus_id, card in list(report.cards.items())}
    return BusReport(cards, f"a graphics driver did not answer within {deadline_s:g} s")


def _read_cards(root: Path, cards: dict[str, dict[str, Any]]) -> None:
    try:
        devices = sorted((root / "sys/bus/pci/devices").iterdir())
    except OSError:
        return
    for device in devices:
        if read_text(device / "class", 64).startswith(_DISPLAY_CLASSES):
            cards[device.name] = {name: read_text(device / name, 64).strip() for name in ("vendor", "device")}
    for bus_id, card in cards.items():  # every card is known before one is asked
        for name, read in _readings(root / "sys/bus/pci/devices" / bus_id, root, card).items():
            card[name] = read()


def _readings(device: Path, root: Path, card: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Readings by name, those the driver is not asked for first."""
    readings: dict[str, Callable[[], Any]] = {"link": lambda: read_link(device.name, root)}
    if card["vendor"] not in _KINDS:
        return readings
    hwmon = "power1_cap" if card["vendor"] == AMD else "power1_max"
    default = "power1_cap_default" if card["vendor"] == AMD else "power1_rated_max"
    return readings | {
        "revision": lambda: read_text(device / "revision", 64).strip(),
        "driver": lambda: _link_name(device / "driver"),
        "node": lambda: _render_node(device, root),
        "integrated": lambda: _is_integrated(device, card["vendor"], root),
        "name": lambda: _product_name(card, root),
        "vram_total": lambda: read_number(device / "mem_info_vram_total"),
        "vram_used": lambda: read_number(device / "mem_info_vram_used"),
        "power_limit": lambda: _first_number(device, f"hwmon/hwmon*/{hwmon}"),
        "power_default": lambda: _first_number(device, f"hwmon/hwmon*/{default}"),
        "power_max": lambda: _first_number(device, "hwmon/hwmon*/power1_cap_max"),
        "core_clocks": lambda: _clocks(device / "pp_dpm_sclk"),
        "memory_clocks": lambda: _clocks(device / "pp_dpm_mclk"),
    }


def judge_cards(report: BusReport, sources: Sources, first: int = 0) -> tuple[tuple[Gpu, ...], list[str]]:
    """(AMD and Intel cards this process may use, what is to be said of those it may not).

    Their facts' paths start with `gpus.<first>`. Which number the engine gives a card is not known here, so
    `index` is None: without the engine's device list no plan can use it.
    """
    gpus: list[Gpu] = []
    notes = [report.problem] if report.problem else []
    for bus_id, card in sorted(report.cards.items()):
        maker = _MAKERS.get(card["vendor"])
        if maker is None:
            continue
        if "integrated" not in card:
            notes.append(f"an {maker} card is not counted: nothing is known of it")
        elif card["integrated"]:
            notes.append(f"the GPU in the {maker} {INTEGRATED_GPU}: only the engine's list counts it")
        elif not card["driver"]:
            notes.append(f"an {maker} card has no driver loaded")
        elif not card["node"]:
            notes.append(f"an {maker} card is out of reach: it has no render node in /dev/dri")
        else:
            gpus.append(_judge(report, bus_id, card, sources, f"gpus.{first + len(gpus)}"))
    return tuple(gpus), notes


def _judge(report: BusReport, bus_id: str, card: dict[str, Any], sources: Sources, path: str) -> Gpu:
    driver, link = card.get("driver"), report.link(bus_id)
    silent = report.problem or f"the driver {driver} does not tell"

    def note(name: str, value: Any, source: str, absent: str = "") -> Any:
        return sources.record(f"{path}.{name}", value, source, absent or silent)

    total, used = _within(card.get("vram_total"), _MOST_VRAM_BYTES), card.get("vram_used")
    used = 0 if used == 0 and total else _within(used, total or 0)
    core, memory = card.get("core_clocks") or (None, None), card.get("memory_clocks") or (None, None)
    facts: dict[str, tuple[Any, ...]] = {
        "name": (card.get("name"), "libdrm's or the PCI table of names"),
        "kind": (_KINDS[card["vendor"]], "maker of the card"),
        "index": (None, "", "the engine has not listed this card"),
        "pci_bus_id": (bus_id, "sysfs"),
        "vram_total_bytes": (total, "amdgpu's mem_info_vram_total"),
        "vram_free_bytes": (None if used is None or total is None else total - used, "VRAM total - used"),
        "vram_others_bytes": (used, "amdgpu's mem_info_vram_used, with what the driver holds for itself"),
        "compute_capability": (None, "", "only CUDA cards have one"),
        "driver": (driver, "kernel module of the card"),
        **link_facts(link),
        "power_limit_w": (_watts(card.get("power_limit")), "hwmon, the cap in force"),
        "power_default_w": (_watts(card.get("power_default")), "hwmon, the card's default cap"),
        "power_max_w": (_watts(card.get("power_max")), "hwmon, the highest cap"),
        "core_clock_mhz": (core[0], "pp_dpm_sclk, drops when idle"),
        "core_clock_max_mhz": (core[1], "pp_dpm_sclk"),
        "memory_clock_mhz": (memory[0], "pp_dpm_mclk, drops when idle"),
        "memory_clock_max_mhz": (memory[1], "pp_dpm_mclk"),
    }
    return Gpu(**{name: note(name, *fact) for name, fact in facts.items()})


def link_facts(link: Link) -> dict[str, tuple[int | None, str, str]]:
    """The Gpu fields a link states: value, source, and what to say where there is none."""
    facts = {
        "pcie_gen": (link.gen, "sysfs link speed, drops when idle"),
        "pcie_width": (link.width, "sysfs link width, may drop when idle"),
        "pcie_gen_max": (_lower(link.card_gen_max, link.slot_gen_max), "sysfs, the lower of card and slot"),
        "pcie_width_max": (_lower(link.card_width_max, link.slot_width_max), "sysfs, card and slot together"),
        "pcie_gen_card_max": (link.card_gen_max, "sysfs, the card's port"),
        "pcie_width_card_max": (link.card_width_max, "sysfs, the card's port"),
        "pcie_gen_slot_max": (link.slot_gen_max, "sysfs, the port above the card"),
        "pcie_width_slot_max": (link.slot_width_max, "sysfs, the port above the card"),
    }
    return {name: (value, source, "the PCI bus does not tell") for name, (value, source) in facts.items()}


def _is_integrated(device: Path, vendor: str, root: Path) -> bool:
    on_root_bus = len(bus_path(device.name, root)) == 1
    slot, _, _ = device.name.rpartition(".")
    if vendor == INTEL:
        return on_root_bus and slot.endswith(":00:02")
    functions = _glob(device.parent, f"{slot}.*")
    if any(read_text(function / "vendor", 64).strip() == _AMD_PROCESSOR for function in functions):
        return True
    # Processors before 2017 have it alone on the root bus, as virtual machines have cards handed to them.
    return on_root_bus and (read_number(device / "mem_info_vram_total") or 0) < 4 * GIB


def _render_node(device: Path, root: Path) -> str | None:
    """`renderD128` if this process's /dev has the card's node."""
    nodes = sorted(entry.name for entry in _glob(device, "drm/renderD*"))
    return next((node for node in nodes if (root / "dev/dri" / node).exists()), None)


def _product_name(card: dict[str, Any], root: Path) -> str:
    """As the tables of libdrm (exact) and of PCI (the chip) call it, else by its numbers."""
    maker, device = _MAKERS[card["vendor"]], card["device"].removeprefix("0x")
    if card["vendor"] == AMD:
        revision = card.get("revision", "").removeprefix("0x")
        table = read_text(root / "usr/share/libdrm/amdgpu.ids")
        row = re.search(rf"^{re.escape(device)},\s*{re.escape(revision)},\s*(\S.*)$", table, re.M | re.I)
        if row:
            return row[1].strip()
    vendor = card["vendor"].removeprefix("0x")
    for place in ("usr/share/misc/pci.ids", "usr/share/hwdata/pci.ids"):
        table = read_text(root / place, 1 << 23)
        rows = re.search(rf"^{vendor}  .*\n((?:[\t#].*\n|\n)*)", table, re.M)
        row = re.search(rf"^\t{re.escape(device)}  (\S.*)$", rows[1], re.M) if rows else None
        if row:
            return f"{maker} {row[1].strip()}"
    return f"{maker} GPU {vendor}:{device}"


def _clocks(path: Path) -> tuple[int | None, int | None]:
    """(MHz now, highest MHz) of a `pp_dpm_*` file, whose line in force ends in a star."""
    levels = [(_within(int(mhz[:9]), 100_000), star) for mhz, star in _CLOCK.findall(read_text(path, 4096))]
    now = next((mhz for mhz, star in levels if star), None)
    return now, max((mhz for mhz, _ in levels if mhz), default=None)


def _first_number(device: Path, pattern: str) -> int | None:
    return next((number for path in _glob(device, pattern) if (number := read_number(path))), None)


def _glob(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:
        return []


def _link_name(path: Path) -> str | None:
    try:
        return path.readlink().name or None
    except OSError:
        return None


def _watts(microwatts: object) -> int | None:
    """µW as W; a cap beyond 10 kW is none."""
    count = _within(microwatts, 10_000_000_000)
    return round(count / 1_000_000) or None if count else None


def _within(value: object, most: int) -> int | None:
    return value if isinstance(value, int) and 0 < value <= most and value != 0xFFFFFFFF else None


def _lower(card: int | None, slot: int | None) -> int | None:
    return min(card, slot) if card and slot else None
