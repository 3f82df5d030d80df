"""The firmware's list of memory slots (SMBIOS structures of type 17), with or without root.

`/sys/firmware/dmi` holds the tables as bytes, readable by root alone, because serial numbers are in them.
But where udev has systemd's `dmi_memory_id` (since 248), it has decoded them at boot into its database, which
everyone may read: that comes first. Only sizes, speeds, widths, kinds and the labels of slots are taken;
makers, serial numbers, asset tags and part numbers are never looked at.

Layout: DMTF DSP0134 (SMBIOS 3.7), 6.1 for the structures, 7.17 for the memory array, 7.18 for the device.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from qnext.hardware.files import numbered, parse_number, read_bytes, read_text
from qnext.units import GIB, KIB, MIB

UDEV = "run/udev/data/+dmi:id"
TABLE = "sys/firmware/dmi/tables/DMI"
ENTRIES = "sys/firmware/dmi/entries"
NEEDS_ROOT = "needs root: `sudo qnext doctor` adds the memory modules, their speed and channels"

_SIZES = range(64 * MIB, 4096 * GIB + 1)
"""Bytes of one module that can be; anything else is a firmware's mistake."""
_SPEEDS = range(200, 20_001)
"""MT/s that can be: DDR to DDR6."""
_WIDTHS = {16: 16, 32: 32, 36: 32, 40: 32, 64: 64, 72: 64, 80: 64, 128: 128, 256: 256}
"""Bits as stated -> bits of data: some firmware counts those of the error correction in."""
_MOST_SLOTS = 1024

_SYSTEM_MEMORY = 3
_KINDS = {
    0x18: "DDR3", 0x1A: "DDR4", 0x1B: "LPDDR", 0x1C: "LPDDR2", 0x1D: "LPDDR3", 0x1E: "LPDDR4", 0x22: "DDR5",
    0x20: "HBM", 0x21: "HBM2", 0x23: "LPDDR5", 0x24: "HBM3",
}  # fmt: skip
_NOT_RAM = {"ROM", "FLASH", "EEPROM", "FEPROM", "EPROM", "LOGICAL NON-VOLATILE DEVICE"}
_NOT_RAM_CODES = {0x08, 0x09, 0x0A, 0x0B, 0x0C, 0x1F}
_PERSISTENT = {4, 5, 6, 7}
"""Memory technologies (7.18.6) that are not ordinary RAM: the NVDIMMs and Optane."""

_UDEV_LINE = re.compile(
    r"^E:MEMORY_DEVICE_([0-9]{1,4})_(SIZE|DATA_WIDTH|SPEED_MTS|CONFIGURED_SPEED_MTS|TYPE|MEMORY_TECHNOLOGY"
    r"|LOCATOR|BANK_LOCATOR|PRESENT)=(.*)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Slot:
    """A place for a memory module, or a soldered one. `size_bytes` is None when empty.

    `width_bits` is the data path's, without error correction. `speed_mtps` is what the module can do,
    `configured_mtps` what it is set to. `kind` is `DDR5` and the like, or empty. `locator` and `bank` are
    the board's labels.
    """

    size_bytes: int | None = None
    width_bits: int | None = None
    speed_mtps: int | None = None
    configured_mtps: int | None = None
    kind: str = ""
    locator: str = ""
    bank: str = ""


def read_slots(root: Path = Path("/")) -> tuple[tuple[Slot, ...], str]:
    """(every slot of system memory, source); no slots, and the reason, where they cannot be read."""
    if slots := parse_udev(read_text(root / UDEV)):
        return slots, "SMBIOS as udev decoded it"
    if slots := parse_table(read_bytes(root / TABLE)):
        return slots, f"/{TABLE}"
    if slots := parse_table(b"".join(_entries(root / ENTRIES))):
        return slots, f"/{ENTRIES}"
    for name in (TABLE, ENTRIES):
        if os.access(root / name, os.F_OK):
            readable = os.access(root / name, os.R_OK)
            return (), "the firmware lists no memory modules" if readable else NEEDS_ROOT
    return (), "the firmware's tables (SMBIOS) are not shown here"


def parse_udev(text: str) -> tuple[Slot, ...]:
    """Slots from lines `E:MEMORY_DEVICE_<n>_<KEY>=<value>`; an empty slot has no SIZE."""
    devices: dict[int, dict[str, str]] = {}
    for number, key, value in _UDEV_LINE.findall(text):
        if int(number) < _MOST_SLOTS:
            devices.setdefault(int(number), {})[key] = value.strip()
    slots = []
    for _, stated in sorted(devices.items()):
        kind = stated.get("TYPE", "").upper()
        if kind in _NOT_RAM or stated.get("MEMORY_TECHNOLOGY", "").startswith(("NVDIMM", "Intel Optane")):
            continue
        width = _WIDTHS.get(parse_number(stated.get("DATA_WIDTH", "")) or 0)
        if kind == "<OUT OF SPEC>":  # systemd's list ends before DDR5
            kind = "DDR5" if width == 64 else "LPDDR5"
        slots.append(
            Slot(
                size_bytes=_within(_SIZES, parse_number(stated.get("SIZE", ""))),
                width_bits=width,
                speed_mtps=_within(_SPEEDS, parse_number(stated.get("SPEED_MTS", ""))),
                configured_mtps=_within(_SPEEDS, parse_number(stated.get("CONFIGURED_SPEED_MTS", ""))),
                kind=kind if kind in _KINDS.values() else "",
                locator=stated.get("LOCATOR", "")[:64],
                bank=stated.get("BANK_LOCATOR", "")[:64],
            )
        )
    return tuple(slots)


def parse_table(data: bytes) -> tuple[Slot, ...]:
    """Slots of system memory from raw SMBIOS structures; what does not hold together ends the reading."""
    arrays: dict[int, int] = {}
    devices: list[tuple[bytes, list[str]]] = []
    for kind, fixed, strings in _structures(data):
        if kind == 16 and len(fixed) >= 0x0F:
            arrays[_word(fixed, 2)] = fixed[0x05]
        elif kind == 17 and len(fixed) >= 0x15 and len(devices) < _MOST_SLOTS:
            devices.append((fixed, strings))
    slots = []
    for fixed, strings in devices:
        use = arrays.get(_word(fixed, 0x04), _SYSTEM_MEMORY)  # others hold video memory, flash or caches
        technology = fixed[0x28] if len(fixed) > 0x28 else 0
        if use == _SYSTEM_MEMORY and fixed[0x12] not in _NOT_RAM_CODES and technology not in _PERSISTENT:
            slots.append(_slot(fixed, strings))
    return tuple(slots)


def _structures(data: bytes) -> Iterator[tuple[int, bytes, list[str]]]:
    """(type, formatted area with its header, strings) of each structure."""
    at = 0
    while at + 4 <= len(data):
        kind, length = data[at], data[at + 1]
        end = data.find(b"\0\0", at + length)
        if length < 4 or end < 0 or kind == 127:
            return
        strings = data[at + length : end].split(b"\0")
        yield kind, data[at : at + length], [text.decode("utf-8", "replace").strip() for text in strings]
        at = end + 2


def _slot(fixed: bytes, strings: list[str]) -> Slot:
    def text(offset: int) -> str:
        index = fixed[offset]
        return strings[index - 1][:64] if 0 < index <= len(strings) else ""

    size = _word(fixed, 0x0C)
    if size == 0xFFFF:
        count = 0
    elif size == 0x7FFF:
        count = (_double(fixed, 0x1C) & 0x7FFFFFFF) * MIB
    else:
        count = (size & 0x7FFF) * (KIB if size & 0x8000 else MIB)
    return Slot(
        size_bytes=_within(_SIZES, count),
        width_bits=_WIDTHS.get(_word(fixed, 0x0A)),
        speed_mtps=_speed(fixed, 0x15, 0x54),
        configured_mtps=_speed(fixed, 0x20, 0x58),
        kind=_KINDS.get(fixed[0x12], ""),
        locator=text(0x10),
        bank=text(0x11),
    )


def _speed(fixed: bytes, offset: int, extended: int) -> int | None:
    """MT/s; 0xFFFF refers to the four-byte field that came with SMBIOS 3.3."""
    speed = _word(fixed, offset)
    return _within(_SPEEDS, _double(fixed, extended) & 0x7FFFFFFF if speed == 0xFFFF else speed)


def _entries(folder: Path) -> Iterator[bytes]:
    """The structures of types 16 and 17 that the dmi-sysfs module shows one by one."""
    for prefix in ("16-", "17-"):
        for _, entry in numbered(folder, prefix)[:_MOST_SLOTS]:
            yield read_bytes(entry / "raw", 4096)


def _within(bounds: range, value: int | None) -> int | None:
    return value if value is not None and value in bounds else None


def _word(data: bytes, offset: int) -> int:
    """Two bytes at `offset`, 0 beyond the structure's end: older firmware writes shorter ones."""
    return int.from_bytes(data[offset : offset + 2], "little") if offset + 2 <= len(data) else 0


def _double(data: bytes, offset: int) -> int:
    return int.from_bytes(data[offset : offset + 4], "little") if offset + 4 <= len(data) else 0
