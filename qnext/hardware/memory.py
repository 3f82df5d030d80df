"""Host RAM: what there is, what is free, and what this process may really take.

MemTotal is not a budget. A container's limit, memory already charged to its control group, and MemAvailable
(the kernel's own estimate of what can be had without swapping) each lower it; the smallest one binds.
"""

from __future__ import annotations

import sys
from pathlib import Path

from qnext.hardware.cgroups import read_memory_groups
from qnext.hardware.machine import Memory, Sources
from qnext.units import KIB, format_bytes

_CAP_IPC_LOCK = 14
"""Bit in `/proc/self/status` CapEff that lifts RLIMIT_MEMLOCK, see capabilities(7)."""

NOT_MEASURED = "not measured"


def detect_memory(sources: Sources, root: Path = Path("/")) -> Memory:
    """Read RAM, swap and limits; notes go to `sources`. `root` stands for `/`."""
    if sys.platform.startswith("linux"):
        counts, source = _read_meminfo(root / "proc/meminfo"), "/proc/meminfo"
    else:
        counts, source = _read_psutil(), "psutil"
    total = counts.get("total") or None
    available = counts.get("available")
    if available is not None and (total is None or available > total):
        available = None  # a sensor that reports more free than there is knows nothing
    groups = [
        group for group in read_memory_groups(root) if total is None or group.limit_bytes < total
    ]  # a limit above the machine's RAM limits nothing
    tightest = min(groups, key=lambda group: group.limit_bytes, default=None)
    rooms = [(group.room_bytes, group.path) for group in groups if group.room_bytes is not None]
    candidates = [*rooms, *([(available, source)] if available is not None else [])]
    usable, binding = min(candidates, default=(None, ""))
    locked, locked_source = _locked_limit(root, total)
    swap_missing = f"not in {source}"
    return Memory(
        total_bytes=sources.record("memory.total_bytes", total, source),
        available_bytes=sources.record(
            "memory.available_bytes", available, source, f"{source} has no believable figure"
        ),
        limit_bytes=sources.record(
            "memory.limit_bytes",
            tightest.limit_bytes if tightest else None,
            tightest.path if tightest else "",
            "no control group limits memory below the machine's RAM",
        ),
        usable_bytes=sources.record(
            "memory.usable_bytes", usable, f"bound by {binding}", "available memory is not known"
        ),
        swap_total_bytes=sources.record("memory.swap_total_bytes", counts.get("swap"), source, swap_missing),
        swap_free_bytes=sources.record(
            "memory.swap_free_bytes", counts.get("swap_free"), source, swap_missing
        ),
        locked_limit_bytes=sources.record(
            "memory.locked_limit_bytes", locked, locked_source, "this system states no limit on locked memory"
        ),
        rated_bandwidth_bps=sources.record(
            "memory.rated_bandwidth_bps", None, "", "not readable without root; a profile may state it"
        ),
        measured_bandwidth_bps=sources.record("memory.measured_bandwidth_bps", None, "", NOT_MEASURED),
    )


def _read_meminfo(path: Path) -> dict[str, int]:
    """Bytes under our names, for the lines that are there and are numbers."""
    names = {
        "MemTotal": "total",
        "MemAvailable": "available",
        "SwapTotal": "swap",
        "SwapFree": "swap_free",
    }
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    counts = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        if key in names and words and words[0].isdigit():
            counts[names[key]] = int(words[0]) * KIB
    return counts


def _read_psutil() -> dict[str, int]:
    """The same figures on macOS and Windows."""
    import psutil

    counts: dict[str, int] = {}
    try:
        memory = psutil.virtual_memory()
        counts |= {"total": memory.total, "available": memory.available}
        swap = psutil.swap_memory()
        counts |= {"swap": swap.total, "swap_free": swap.free}
    except (OSError, RuntimeError, psutil.Error):  # performance counters may be switched off on Windows
        pass
    return counts


def _locked_limit(root: Path, total: int | None) -> tuple[int | None, str]:
    """(bytes that may be locked, source). Unlimited, or the privilege to ignore the limit, means all RAM."""
    if sys.platform == "win32":
        return None, ""
    import resource

    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if soft == resource.RLIM_INFINITY:
        return total, "RLIMIT_MEMLOCK is unlimited: all RAM"
    if _has_ipc_lock(root / "proc/self/status"):
        return total, f"RLIMIT_MEMLOCK {format_bytes(soft)}, lifted by CAP_IPC_LOCK: all RAM"
    return soft, "RLIMIT_MEMLOCK"


def _has_ipc_lock(status: Path) -> bool:
    try:
        lines = status.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    for line in lines:
        if line.startswith("CapEff:"):
            try:
                return bool(int(line.split()[1], 16) >> _CAP_IPC_LOCK & 1)
            except (IndexError, ValueError):
                return False
    return False
