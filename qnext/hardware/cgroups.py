"""Linux control groups: the memory and CPU a container, a service or a batch job may really take.

A limit may stand at any level between the process's group and the root, in version 1 (one tree per
controller), version 2 (one tree), or a mix of both; the tightest one binds. `/proc/self/cgroup` names the
group, `/proc/self/mountinfo` says where its tree is mounted and which part of it is visible: inside a
container the group often reads `/` while the mount's root is the container's own group.
https://docs.kernel.org/admin-guide/cgroup-v2.html, https://docs.kernel.org/admin-guide/cgroup-v1/memory.html
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qnext.hardware.files import parse_number, read_number, read_text

_NO_LIMIT_BYTES = 1 << 60
"""Version 1 writes "no limit" as the largest page-aligned 63-bit number; no machine has an exbibyte."""
_PERIODS_US = range(1_000, 1_000_001)
"""The periods the kernel takes for a CPU quota, in microseconds: 1 ms to 1 s."""
_MOST_CORES = 1 << 16
_ABSURD_USE = 4
"""Use beyond so many times the limit is a sensor's lie: the kernel lets it exceed the limit only briefly."""
_MOST_LEVELS = 64
"""Nested groups that are looked at; real ones nest under ten deep."""
_OWN_GROUP = re.compile(r"^[0-9]+:[^:]*:/", re.MULTILINE)
_ESCAPE = re.compile(r"\\([0-7]{3})")
"""How mountinfo writes spaces, tabs, line ends and backslashes."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """One level that limits memory.

    `room_bytes` is the limit less what is used and cannot be reclaimed; the whole limit where the use is not
    told, which is still no more than may be taken.
    """

    path: str
    limit_bytes: int
    room_bytes: int


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
        if version == 2:
            names = ("memory.max", "memory.high")
            limit = _tightest(read_number(directory / name) for name in names)
            if limit is None:
                continue
            stat = _read_stat(directory / "memory.stat")
            used = read_number(directory / "memory.current")
            cache = stat.get("inactive_file", 0) + stat.get("active_file", 0)
        else:  # the hierarchical limit also covers the levels that a container cannot see
            stat = _read_stat(directory / "memory.stat")
            own = read_number(directory / "memory.limit_in_bytes")
            limit = _tightest([own, stat.get("hierarchical_memory_limit")])
            if limit is None:
                continue
            used = read_number(directory / "memory.usage_in_bytes")
            cache = stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0)
        believed = used is not None and 0 < used < _ABSURD_USE * limit
        room = max(0, limit - max(0, used - cache)) if used is not None and believed else limit
        found.append(MemoryGroup("/" + str(directory.relative_to(root)), limit, room))
    return tuple(found)


def read_cpu_groups(root: Path = Path("/")) -> tuple[CpuGroup, ...]:
    """Every level above this process with a CPU quota, in no order; empty without one."""
    found = []
    for version, directory in _levels("cpu", root):
        if version == 2:
            words = read_text(directory / "cpu.max").split()  # `max 100000` without a quota
        else:  # the quota is -1 without one
            words = [read_text(directory / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        quota, period = map(parse_number, words) if len(words) == 2 else (None, None)
        if quota and period and period in _PERIODS_US and quota <= period * _MOST_CORES:
            found.append(CpuGroup("/" + str(directory.relative_to(root)), quota / period))
    return tuple(found)


def _levels(controller: str, root: Path) -> Iterator[tuple[int, Path]]:
    """(version, folder) from the process's own group up to where its tree is mounted, for both versions."""
    text = read_text(root / "proc/self/cgroup")
    # Where it cannot be read, the top of what is mounted is at least the container's own limit.
    groups = _own_groups(text, controller) if _OWN_GROUP.search(text) else {1: "/", 2: "/"}
    mounts = _cgroup_mounts(read_text(root / "proc/self/mountinfo"), controller)
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
        for _ in range(_MOST_LEVELS):  # a level that is not there states no limit
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
        top, mount = (_ESCAPE.sub(lambda code: chr(int(code[1], 8)), part) for part in left[3:5])
        if ".." in PurePosixPath(mount).parts:
            continue
        if right[0] == "cgroup2":
            mounts.append((2, top, mount))
        elif right[0] == "cgroup" and controller in right[2].split(","):
            mounts.append((1, top, mount))
    return mounts


def _tightest(stated: Iterable[int | None]) -> int | None:
    """The smallest limit. 0 is none (no process could live under it), nor is an absurdly large one."""
    return min((value for value in stated if value and value < _NO_LIMIT_BYTES), default=None)


def _read_stat(path: Path) -> dict[str, int]:
    """The counters of `memory.stat`, in bytes."""
    words = (line.split() for line in read_text(path).splitlines())
    pairs = ((entry[0], parse_number(entry[1])) for entry in words if len(entry) == 2)
    return {name: value for name, value in pairs if value is not None}
