"""A GPU's PCI Express link as Linux knows it: present state, what the card can do, what its slot can do.

A link is two ports, one at each end, and each states its own limits: the card's `max_link_*` is what the card
can do, that of the port above it what the slot can do. AMD and Intel graphics cards carry a switch of their
own: the GPU then sits two bridges deep, its own link is the one inside the card and always looks fast, and
the link to the slot is that of the switch's upper port. Bridges of the card's own vendor are therefore passed
on the way up, except the processor's root port, which Intel also makes.

The kernel's words: https://docs.kernel.org/admin-guide/abi-testing.html (sysfs-bus-pci, current_link_speed).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from qnext.hardware.files import read_number, read_text

_GENERATIONS = {"2.5": 1, "5": 2, "5.0": 2, "8": 3, "8.0": 3, "16": 4, "16.0": 4, "32": 5, "32.0": 5}
_GENERATIONS |= {"64": 6, "64.0": 6}
"""GT/s per lane of each generation; older kernels write `8 GT/s`, newer ones `8.0 GT/s PCIe`."""

_WIDTHS = {1, 2, 4, 8, 12, 16, 32}
"""Lanes a link may have. A card that fell off the bus reads as all ones: 63 or 255 lanes."""

_BRIDGE_CLASS = "0x0604"

_EMULATED = {"0x1b36", "0x15ad"}
"""Makers of virtual machines' ports (QEMU, VMware): what such a port says of its lanes is made up."""


@dataclass(frozen=True, slots=True)
class Link:
    """One card's link. Generations are 1 to 6, widths lanes; `gen` and `width` drop when idle.

    `card_*` is what the card can do, `slot_*` what the port it is plugged into can do.
    """

    gen: int | None = None
    width: int | None = None
    card_gen_max: int | None = None
    card_width_max: int | None = None
    slot_gen_max: int | None = None
    slot_width_max: int | None = None


def read_link(bus_id: str, root: Path = Path("/")) -> Link | None:
    """The link of the card at `bus_id` (`0000:01:00.0`); None where the system does not show the device."""
    chain = bus_path(bus_id, root)
    if not chain:
        return None
    at = len(chain) - 2
    vendor = read_text(chain[-1] / "vendor").strip()
    while at > 0 and vendor and _is_bridge_of(vendor, chain[at]):
        at -= 1
    card, slot = chain[at + 1], chain[at] if at >= 0 else None
    if slot is not None and read_text(slot / "vendor").strip() in _EMULATED:
        slot = None
    return Link(
        gen=_generation(card / "current_link_speed"),
        width=_width(card / "current_link_width"),
        card_gen_max=_generation(card / "max_link_speed"),
        card_width_max=_width(card / "max_link_width"),
        slot_gen_max=_generation(slot / "max_link_speed") if slot else None,
        slot_width_max=_width(slot / "max_link_width") if slot else None,
    )


def bus_path(bus_id: str, root: Path) -> list[Path]:
    """Folders of the device and of every port above it, the one nearest the processor first."""
    try:
        chain = [(root / "sys/bus/pci/devices" / bus_id).resolve(strict=True)]
        while (chain[0].parent / "vendor").exists():
            chain.insert(0, chain[0].parent)
    except (OSError, RuntimeError):  # RuntimeError: a loop of links
        return []
    return chain


def _is_bridge_of(vendor: str, folder: Path) -> bool:
    is_bridge = read_text(folder / "class").startswith(_BRIDGE_CLASS)
    return is_bridge and read_text(folder / "vendor").strip() == vendor


def _generation(path: Path) -> int | None:
    return _GENERATIONS.get(read_text(path, 64).strip().split(" ")[0])


def _width(path: Path) -> int | None:
    lanes = read_number(path)
    return lanes if lanes in _WIDTHS else None
