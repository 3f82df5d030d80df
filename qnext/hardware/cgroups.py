"""Linux control groups: the memory and CPU a container, a service or a batch job may really take.

A limit may stand at any level between the process's group and the root, in version 1 (one tree per
controller), version 2 (one tree), or a mix of both; the tightest one binds. `/proc/self/cgroup` names the
group, `/proc/self/mountinfo` says where its tree is mounted and which part of it is visible: inside a
container the group often reads `/` while the mount's root is the container's own group.
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest page-aligned 63-bit number; no machine has an exbibyte."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One level that limits memory. `room_bytes` is the limit less what is used and cannot be reclaimed."""

    path: str
    limit_bytes: int
    room_bytes: int | None


@dataclass(frozen=True, slots=True)
class CpuGroup:
    """One level that limits CPU time to `cores` CPUs' worth (1.5 is one and a half)."""

    path: str
    cores: float


def read_memory_groups(root: Path = Path("/")) -> tuple[MemoryGroup, ...]:
    """Every level above this process that limits memory, in no order; empty without cgroups.

    `root` stands for `/`. Page cache is not counted as used: the kernel gives it back under pressure, as
    MemAvailable assumes.
    """
    found = []
    for version, directory in _levels("memory", root):
        names = ("memory.max", "memory.high") if version == 2 else ("memory.limit_in_bytes",)
        limits = [limit for name in names if (limit := _read_limit(directory / name)) is not None]
        if not limits:
            continue
        used = _read_number(directory / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        room = None
        if used is not None:
            room = max(0, min(limits) - max(0, used - _reclaimable(directory, version)))
        found.append(MemoryGroup("/" + str(directory.relative_to(root)), min(limits), room))
    return tuple(found)


def read_cpu_groups(root: Path = Path("/")) -> tuple[CpuGroup, ...]:
    """Every level above this process with a CPU quota, in no order; empty without one."""
    found = []
    for version, directory in _levels("cpu", root):
        if version == 2:
            words = _read_text(directory / "cpu.max").split()
        else:
            words = [_read_text(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdigit() for word in words) and int(words[0]) and int(words[1]):
            cores = int(words[0]) / int(words[1])
            found.append(CpuGroup("/" + str(directory.relative_to(root)), cores))
    return tuple(found)


def _levels(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) from the process's own group up to where its tree is mounted, for both versions."""
    groups = _own_groups(_read_text(root / "proc/self/cgroup"), controller)
    mounts = _cgroup_mounts(_read_text(root / "proc/self/mountinfo"), controller)
    for version, group in groups.items():
        candidates = [(top, mount) for kind, top, mount in mounts if kind == version]
        inside = [entry for entry in candidates if PurePosixPath(group).is_relative_to(entry[0])]
        if inside:
            top, mount = max(inside, key=lambda entry: len(PurePosixPath(entry[0]).parts))
            below = PurePosixPath(group).relative_to(top)
        elif candidates:  # the group lies outside what this container can see: its own mount is the limit
            mount, below = candidates[0][1], PurePosixPath()
        else:
            mount = "/sys/fs/cgroup" if version == 2 else f"/sys/fs/cgroup/{controller}"
            below = PurePosixPath(group.lstrip("/"))
        top_folder = root / mount.lstrip("/")
        folder = top_folder / below if ".." not in below.parts else top_folder
        while True:
            if folder.is_dir():
                yield version, folder
            if folder == top_folder:
                break
            folder = folder.parent


def _own_groups(text: str, controller: str) -> dict[int, str]:
    """Version -> group path, from lines `id:controllers:path`; version 2 has id 0 and no controllers."""
    groups = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not path.startswith("/"):
            continue
        if number == "0" and not controllers:
            groups[2] = path
        elif controller in controllers.split(","):
            groups[1] = path
    return groups


def _cgroup_mounts(text: str, controller: str) -> list[tuple[int, str, str]]:
    """(version, root of the mount inside the tree, mount point) from `/proc/self/mountinfo`."""
    mounts = []
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        left, right = head.split(" "), tail.split(" ")
        if len(left) < 6 or len(right) < 3:
            continue
        top, mount = (part.replace("\\040", " ") for part in left[3:5])
        if right[0] == "cgroup2":
            mounts.append((2, top, mount))
        elif right[0] == "cgroup" and controller in right[2].split(","):
            mounts.append((1, top, mount))
    return mounts


def _reclaimable(directory: Path, version: int) -> int:
    """Page cache charged to the group and its children, in bytes; 0 when not stated."""
    stat = dict(
        line.split(" ", 1) for line in _read_text(directory / "memory.stat").splitlines() if " " in line
    )
    names = ("inactive_file", "active_file") if version == 2 else ("total_inactive_file", "total_active_file")
    values = (stat.get(name, "").strip() for name in names)
    return sum(int(value) for value in values if value.isdigit())


def _read_limit(path: Path) -> int | None:
    """A limit in bytes; None for `max`, 0 (no process could live under it) and absurdly large numbers."""
    value = _read_number(path)
    return value if value is not None and 0 < value < _NO_LIMIT_BYTES else None


def _read_number(path: Path) -> int | None:
    text = _read_text(path).strip()
    return int(text) if text.isdigit() else None


def _read_text(path: Path) -> str:
    """The file's text; empty when it is missing or may not be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
