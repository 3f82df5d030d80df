"""Which mount a path lies on, from `/proc/self/mountinfo` alone (proc_pid_mountinfo(5)).

Found as the kernel walks a path: from the root, at every folder, into what is mounted there. Parents are
needed for that: neither the longest mount point tells (a later mount higher up hides it) nor the last line
(the order may be the tree's). Nothing here touches the mounts themselves, which may be dead.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qnext.hardware.files import parse_number, read_text


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: `device` is `major:minor`, `source` what is mounted, `/dev/…` or a server's."""

    number: int
    parent: int
    device: str
    point: PurePosixPath
    filesystem: str
    source: str


def find_mount(path: Path, root: Path = Path("/")) -> Mount | None:
    """The mount that a resolved, absolute path lies on. `root` stands for `/`."""
    mounts = parse_mountinfo(read_text(root / "proc/self/mountinfo"))
    numbers = {mount.number for mount in mounts}
    above = [m for m in mounts if PurePosixPath(path).is_relative_to(m.point)]
    # Where the walk starts: the mount whose parent is outside of what this process sees.
    on_top = [m for m in above if m.parent not in numbers or m.parent == m.number]
    current = None
    for _ in mounts:
        if not on_top:
            break
        # The shallowest is met first on the way down; of two on the same folder the later one is seen.
        depth = min(len(mount.point.parts) for mount in on_top)
        current = [mount for mount in on_top if len(mount.point.parts) == depth][-1]
        on_top = [m for m in above if m.parent == current.number and m is not current]
    return current


def parse_mountinfo(text: str) -> list[Mount]:
    """Mounts of `/proc/self/mountinfo` in its order, lines of another form left out."""
    mounts = []
    for line in text.split("\n"):
        head, dash, tail = line.partition(" - ")
        left, right = head.split(" "), tail.split(" ")
        if not dash or len(left) < 6 or len(right) < 2 or not left[4].startswith("/"):
            continue
        number, parent = parse_number(left[0]), parse_number(left[1])
        if number is None or parent is None:
            continue
        point, filesystem, source = (_unescape(word) for word in (left[4], *right[:2]))
        mounts.append(Mount(number, parent, left[2], PurePosixPath(point), filesystem, source))
    return mounts


def _unescape(word: str) -> str:
    """The kernel writes space, tab, line feed and backslash as three octal digits."""
    return re.sub(r"\\([0-3][0-7]{2})", lambda found: chr(int(found[1], 8)), word)
