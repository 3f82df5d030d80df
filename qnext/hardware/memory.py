"""Host RAM: what there is, what is free, and what this process may really take.

MemTotal is not a budget. A container's limit, memory already charged to its control group, and MemAvailable
(the kernel's own estimate of what can be had without swapping) each lower it; the smallest one binds. What
the modules are and how they are plugged is the firmware's word (`dmi`, `modules`), and only on real machines.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

from qnext.hardware.cgroups import read_memory_groups
from qnext.hardware.dmi import read_slots
from qnext.hardware.files import parse_number, read_text
from qnext.hardware.machine import Memory, Sources
from qnext.hardware.modules import FIELDS, Modules, judge_modules
from qnext.hardware.numa import read_numa_nodes, read_numa_policy
from qnext.hardware.virtual import read_hypervisor
from qnext.units import KIB, format_bytes

_CAP_IPC_LOCK = 14
"""Bit in `/proc/self/status` CapEff that lifts RLIMIT_MEMLOCK, see capabilities(7)."""

_ABSURD = 1 << 50
"""KiB: an exbibyte. No machine has it; a counter that ran backwards shows such numbers."""

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
    rooms = [(group.room_bytes, group.path) for group in groups]
    candidates = [*rooms, *([(available, source)] if available is not None else [])]
    usable, binding = min(candidates, default=(None, ""))
    locked, locked_source = _locked_limit(root, total)
    swap_missing = f"not in {source}"
    linux = sys.platform.startswith("linux")
    return dataclasses.replace(
        _detect_linux_only(sources, root, total, counts) if linux else Memory(),
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
        measured_bandwidth_bps=sources.record("memory.measured_bandwidth_bps", None, "", NOT_MEASURED),
    )


def _detect_linux_only(sources: Sources, root: Path, total: int | None, counts: dict[str, int]) -> Memory:
    """Modules, pages and nodes: the facts that only Linux tells."""
    modules = _read_modules(sources, root, total)
    nodes, nodes_source = read_numa_nodes(root, total)
    policy, policy_source = read_numa_policy(root)
    pages = {}
    for name in ("total", "free"):
        count, size = counts.get(f"huge_{name}"), counts.get("huge_size")
        count = None if count is None or size is None else count * size
        if count is not None and total is not None and count > total:
            count = None  # more than there is RAM
        path = f"memory.hugepages_{name}_bytes"
        pages[name] = sources.record(path, count, "/proc/meminfo", "/proc/meminfo has no believable figure")
    thp, thp_source = _read_thp(root)
    return Memory(
        modules=modules.modules,
        channels=modules.channels,
        channels_max=modules.channels_max,
        speed_mtps=modules.speed_mtps,
        speed_max_mtps=modules.speed_max_mtps,
        rated_bandwidth_bps=modules.rated_bandwidth_bps,
        hugepages_total_bytes=pages["total"],
        hugepages_free_bytes=pages["free"],
        transparent_hugepages=sources.record("memory.transparent_hugepages", thp, thp_source, thp_source),
        numa_nodes=sources.record("memory.numa_nodes", nodes, nodes_source, nodes_source),
        numa_policy=sources.record("memory.numa_policy", policy, policy_source, policy_source),
    )


def _read_modules(sources: Sources, root: Path, total: int | None) -> Modules:
    """The memory modules, with the source or the reason of each of their facts."""
    hypervisor, _ = read_hypervisor(root)
    slots, source = read_slots(root)
    judged = judge_modules(slots, total)
    if hypervisor not in {None, "none"}:
        reason = "a virtual machine is not told its host's memory modules"
        judged = Modules(notes=dict.fromkeys(FIELDS, reason))
    elif not slots:
        judged = Modules(notes=dict.fromkeys(FIELDS, source))
    for name in FIELDS:
        value, note = getattr(judged, name), judged.notes.get(name, "")
        sources.record(f"memory.{name}", value, f"{source}: {note}" if note else source, note)
    return judged


def _read_thp(root: Path) -> tuple[str | None, str]:
    """(mode of transparent huge pages, source or reason): the bracketed word of `always [madvise] never`."""
    path = "sys/kernel/mm/transparent_hugepage/enabled"
    found = re.search(r"\[(always|madvise|never)\]", read_text(root / path, 256))
    return (found[1], f"/{path}") if found else (None, f"/{path} does not say: this kernel may lack them")


def _read_meminfo(path: Path) -> dict[str, int]:
    """Bytes under our names (numbers of huge pages as they are), for the lines that hold such a number."""
    names = {
        "MemTotal": "total",
        "MemAvailable": "available",
        "SwapTotal": "swap",
        "SwapFree": "swap_free",
        "Hugepagesize": "huge_size",
        "HugePages_Total": "huge_total",
        "HugePages_Free": "huge_free",
    }
    counts = {}
    for line in read_text(path).splitlines():
        key, _, value = line.partition(":")
        words = value.split()
        count = parse_number(words[0]) if key in names and words else None
        if count is not None and count < _ABSURD:
            counts[names[key]] = count * (KIB if words[1:] == ["kB"] else 1)
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
    found = re.search(r"^CapEff:\s*([0-9a-fA-F]{1,16})$", read_text(status), re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> _CAP_IPC_LOCK & 1)
