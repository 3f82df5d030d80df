"""Small files below /proc, /sys and /run, read so that none of them can hang, flood or break a detection.

The kernel answers these files at once and briefly. What stands in their place may not: a bind mount in a
container can put a FIFO there, which blocks whoever opens it, or a file without end. So only regular files
are read, without blocking, up to a cap; what cannot be read is empty. Numbers are read as strictly: Python
accepts digits of other scripts and refuses numbers of more than 4300 digits, both with an exception.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

MOST_BYTES = 1 << 20
"""What is read of one file at most: the cpuinfo of several hundred CPUs, sixteen times an SMBIOS table."""

_MOST_DIGITS = 20
_MOST_CPUS = 1 << 16
"""Eight times what Linux can be built for (CONFIG_NR_CPUS); a longer list is no list of CPUs."""

_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """The first `most` bytes of a regular file; empty when it is missing, may not be read or is none."""
    try:
        handle = os.open(path, _FLAGS)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return b""
    parts: list[bytes] = []
    try:
        left = most if stat.S_ISREG(os.fstat(handle).st_mode) else 0
        while left > 0 and (part := os.read(handle, min(left, 1 << 16))):
            parts.append(part)
            left -= len(part)
    except OSError:  # sysfs: the device behind the file is gone, or has no answer
        return b""
    finally:
        os.close(handle)
    return b"".join(parts)


def read_text(path: Path, most: int = MOST_BYTES) -> str:
    """The file's first `most` bytes as text, foreign bytes replaced; empty as `read_bytes` is."""
    return read_bytes(path, most).decode("utf-8", "replace")


def read_number(path: Path) -> int | None:
    """The one whole number in the file; None for anything else."""
    return parse_number(read_text(path, 64).strip())


def parse_number(text: str) -> int | None:
    """A whole number of 1 to 20 ASCII digits; None for anything else."""
    return int(text) if 0 < len(text) <= _MOST_DIGITS and text.isascii() and text.isdigit() else None


def parse_cpu_list(text: str) -> frozenset[int]:
    """`0,4-6` -> {0, 4, 5, 6}; empty for anything that is no list of CPU or node numbers."""
    numbers: set[int] = set()
    for part in text.strip().split(","):
        low, dash, high = part.partition("-")
        first = parse_number(low)
        last = parse_number(high) if dash else first
        if first is None or last is None or last >= _MOST_CPUS:
            return frozenset()
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def nearest_folder(path: Path) -> Path:
    """`path`, or the nearest above it that exists: the disk that something not there yet would lie on."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def numbered(folder: Path, prefix: str) -> list[tuple[int, Path]]:
    """(number, path) of the entries named `prefix` and a number (`cpu0`, `node1`), by number."""
    try:
        names = [entry.name for entry in folder.iterdir()]
    except (OSError, ValueError):
        return []
    found = ((parse_number(name.removeprefix(prefix)), name) for name in names if name.startswith(prefix))
    return sorted((number, folder / name) for number, name in found if number is not None)
