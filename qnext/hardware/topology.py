"""The processor's cores and caches as Linux lays them out in sysfs: who shares what.

A physical core is a set of CPU numbers that are hardware threads of one core. Fast and slow cores of one
processor are told apart by the names Intel's performance counters have (`cpu_core`, `cpu_atom`) or, on
arm64, by the capacity that the scheduler reckons with.
"""

from __future__ import annotations

from pathlib import Path

from qnext.hardware.files import numbered, parse_cpu_list, parse_number, read_number, read_text
from qnext.hardware.virtual import CPUINFO_BYTES
from qnext.units import GIB, KIB, MIB

_CPUS = "sys/devices/system/cpu"
_FAST_SHARE = 0.8
"""An arm64 core with at least this part of the fastest one's `cpu_capacity` is a performance core: vendors
clock some of them a little higher than the others, while the next kind is well below."""
_LARGEST_CACHE = 8 * GIB
_MOST_CAPACITY = 1024
_MOST_PACKAGE = 65_535
_CACHE_LEVELS = range(1, 5)


def parse_cache_size(text: str) -> int | None:
    """Bytes of `36608K`, `32M` or a plain count, as sysfs writes cache sizes; None for anything else."""
    text = text.strip()
    factor = {"K": KIB, "M": MIB, "G": GIB}.get(text[-1:], 1)
    count = parse_number(text[:-1] if factor > 1 else text)
    return count * factor if count is not None and 0 < count * factor <= _LARGEST_CACHE else None


def read_topology(folder: Path) -> tuple[list[frozenset[int]], int | None]:
    """(logical CPU numbers of each physical core, number of sockets) of the CPUs that are online.

    Nothing where one of them tells nothing or contradicts another: a count would be wrong.
    """
    cores: list[frozenset[int]] = []
    packages: set[int | None] = set()
    seen: set[int] = set()
    entries = numbered(folder, "cpu")
    present = {number for number, _ in entries}
    for number, entry in entries:
        if number in seen:
            continue
        siblings = parse_cpu_list(
            read_text(entry / "topology/core_cpus_list") or read_text(entry / "topology/thread_siblings_list")
        )
        siblings &= present
        if number in siblings and not siblings & seen:
            cores.append(siblings)
            seen |= siblings
            package = read_number(entry / "topology/physical_package_id")
            packages.add(package if package is not None and package <= _MOST_PACKAGE else None)
        elif (entry / "topology").is_dir():  # an offline CPU has none
            return [], None
    return cores, None if None in packages or not packages else len(packages)


def count_performance_cores(root: Path, cores: list[frozenset[int]]) -> tuple[int | None, str]:
    """(physical cores of the fast kind, source or reason); all of them where there is one kind."""
    if not cores:
        return None, ""
    fast = parse_cpu_list(read_text(root / "sys/devices/cpu_core/cpus"))
    slow = parse_cpu_list(read_text(root / "sys/devices/cpu_atom/cpus"))
    if any((root / "sys/devices" / kind).exists() for kind in ("cpu_core", "cpu_atom")):
        if fast & slow or fast | slow != frozenset().union(*cores):
            return None, "/sys/devices/cpu_core and cpu_atom do not tell the kind of each CPU"
        return len([core for core in cores if core & fast]), "/sys/devices/cpu_core and cpu_atom"
    cpuinfo = read_text(root / "proc/cpuinfo", CPUINFO_BYTES)
    if "\nflags" in cpuinfo:
        return len(cores), "one kind of core: no /sys/devices/cpu_atom"
    if "\nCPU implementer" not in cpuinfo:
        return None, "/proc/cpuinfo does not tell what kind of processor this is"
    files = [root / _CPUS / f"cpu{min(core)}" / "cpu_capacity" for core in cores]
    if not any(file.exists() for file in files):
        return len(cores), "taken as one kind of core: no cpu_capacity"
    known = [number for file in files if (number := read_number(file)) and number <= _MOST_CAPACITY]
    if len(known) < len(cores):
        return None, "cpu_capacity is not readable for every core"
    return len([capacity for capacity in known if capacity >= _FAST_SHARE * max(known)]), "cpu_capacity"


def read_last_level_cache(folder: Path, online: frozenset[int]) -> tuple[int | None, str]:
    """(bytes of all caches of the highest level together, source or reason); each shared one counts once."""
    caches: list[tuple[int, int | None]] = []
    covered: set[int] = set()
    for cpu in sorted(online):
        if cpu in covered:
            continue
        levels = [
            (read_number(path / "level") or 0, path)
            for _, path in numbered(folder / f"cpu{cpu}/cache", "index")
        ]
        if not levels:
            continue
        level, path = max(levels)
        if any(known not in _CACHE_LEVELS for known, _ in levels):
            return None, f"/{_CPUS} states a cache of no known level"
        shared = parse_cpu_list(read_text(path / "shared_cpu_list"))
        size = parse_cache_size(read_text(path / "size")) if cpu in shared else None
        caches.append((level, size))
        covered |= shared
    highest = max((level for level, _ in caches), default=0)
    sizes = [size for level, size in caches if level == highest]
    known = [size for size in sizes if size is not None]
    if highest < 2 or len(known) < len(sizes):
        return None, f"/{_CPUS} does not state the caches"
    return sum(known), f"/{_CPUS}: {len(sizes)} of level {highest}"
