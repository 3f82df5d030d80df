"""The disk of the model folder: room, filesystem, kind of drive, and how fast it reads.

Whatever touches the folder itself runs in a thread or a child with a deadline: a dead network mount never
answers. What kind of mount it is needs no answer from it: the kernel lists them (`mounts`).
"""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from qnext.errors import HardwareError
from qnext.hardware.apart import measure_apart
from qnext.hardware.files import read_text
from qnext.hardware.machine import Disk, Machine, Sources
from qnext.hardware.mounts import Mount, find_mount
from qnext.units import format_bytes

DEADLINE_S = 2.0
LATE_S = 0.2
MARGIN_S = 0.5
"""Left of the budget for starting the child, the last blocks under way, and giving a scratch file back."""
MOST_BYTES = 1 << 60
"""No disk has an exbibyte; filesystems without a size of their own state such numbers."""

NETWORK_TYPES = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb3", "smbfs", "ncpfs", "9p", "afs", "coda", "davfs"),
        *(
            "ceph",
            "glusterfs",
            "lustre",
            "beegfs",
            "gpfs",
            "orangefs",
            "pvfs2",
            "gfs2",
            "ocfs2",
            "panfs",
            "wekafs",
        ),
    }
)
_NETWORK_FUSE = frozenset(
    {
        *("sshfs", "s3fs", "rclone", "glusterfs", "ceph", "ceph-fuse", "gcsfuse", "goofys", "mount-s3"),
        *("mountpoint-s3", "juicefs", "blobfuse", "blobfuse2", "davfs", "davfs2", "curlftpfs", "seaweedfs"),
        *("moosefs", "mfs", "hf-mount", "google-drive-ocamlfuse", "onedriver", "gvfsd-fuse", "smbnetfs"),
    }
)
_LOCAL_FUSE = frozenset(
    {
        *(
            "ntfs",
            "ntfs-3g",
            "exfat",
            "mergerfs",
            "bindfs",
            "fuse-overlayfs",
            "overlayfs",
            "gocryptfs",
            "encfs",
        ),
        *(
            "cryfs",
            "unionfs",
            "lxcfs",
            "portal",
            "snapfuse",
            "squashfuse",
            "ext2",
            "fuse2fs",
            "apfs",
            "veracrypt",
        ),
    }
)
_REMOTE_SOURCE = re.compile(r"//|[a-z][a-z0-9+.-]*://|[^/\s]+@?[^/\s]*:", re.IGNORECASE)
"""`//server/share`, `s3://bucket`, `user@host:folder`, `remote:`."""
_VIRTUAL_VENDORS = ("qemu", "vmware", "msft", "vbox", "xen", "google", "nutanix", "virtual")
_NOT_LINUX = "not read on this operating system"
_NO_MOUNT = "/proc/self/mountinfo names no mount of the model folder"


@dataclass(frozen=True, slots=True)
class DiskSpeed:
    """A cold sequential read in bytes per second, None where it was not measured; how, or why not."""

    read_bps: int | None
    note: str


@dataclass(frozen=True, slots=True)
class _Room:
    folder: Path
    free: int
    total: int


def detect_disk(
    folder: Path, sources: Sources, root: Path = Path("/"), deadline_s: float = DEADLINE_S
) -> Disk:
    """Facts of the disk that holds `folder` (which need not exist); notes go to `sources`.

    `root` stands for `/` in what is read from /proc, /sys and /dev. Takes `deadline_s` at most.
    """
    late = f"the model folder's disk did not answer within {deadline_s:g} s"
    room, why = _within(deadline_s, lambda: _read_room(folder), late)
    free, total = (room.free, room.total) if room else (None, None)
    if room and not 0 < room.total < MOST_BYTES:
        free, total, why = None, None, f"its filesystem states a size of {format_bytes(room.total)}"
    linux = sys.platform.startswith("linux")
    mount = find_mount(room.folder if room else folder.absolute(), root) if linux else None
    absent = _NO_MOUNT if linux else _NOT_LINUX
    network, network_why = _is_network(mount) if mount else (None, absent)
    rotational, how = _is_rotational(mount, root) if mount else (None, absent)
    found = f"{mount.filesystem} in /proc/self/mountinfo" if mount else ""
    return Disk(
        free_bytes=sources.record("disk.free_bytes", free, "statvfs of the model folder", why),
        total_bytes=sources.record("disk.total_bytes", total, "statvfs of the model folder", why),
        filesystem=sources.record(
            "disk.filesystem", mount.filesystem if mount else None, "/proc/self/mountinfo", absent
        ),
        network=sources.record("disk.network", network, network_why, network_why),
        fuse=sources.record("disk.fuse", _is_fuse(mount) if mount else None, found, absent),
        rotational=sources.record("disk.rotational", rotational, how, how),
        read_bps=sources.record("disk.read_bps", None, "", "not measured"),
    )


def measure_disk(folder: Path, budget_s: float = 4.0) -> DiskSpeed:
    """Measure how fast `folder` (or the file it names) delivers what no cache holds, in at most `budget_s`.

    Reads a large file that is there, or writes one of at most 512 MiB without a name, which is gone with the
    process that wrote it. Never raises for what a disk does: the note says why there is no rate.
    """
    if not sys.platform.startswith("linux"):
        return DiskSpeed(None, "reads past the page cache are measured on Linux only")
    done, seconds, note = 0, 0.0, ""
    problem = "nothing was read"
    question = {"folder": str(folder.absolute()), "seconds": max(0.1, budget_s - MARGIN_S)}
    try:
        with closing(measure_apart("qnext.hardware.read_disk", question, budget_s - LATE_S)) as answers:
            for entry in answers:
                note = entry.get("note", note)
                done, seconds = entry.get("bytes", done), entry.get("seconds", seconds)
    except HardwareError as error:
        problem = error.message
    if not done or seconds <= 0:
        return DiskSpeed(None, f"not measured: {problem}")
    return DiskSpeed(round(done / seconds), f"{format_bytes(done)} {note}")


def with_disk_speed(machine: Machine, speed: DiskSpeed) -> Machine:
    """The machine with the measured rate, or the reason why there is none."""
    sources = Sources(machine.sources)
    rate = sources.record("disk.read_bps", speed.read_bps, speed.note, speed.note)
    return dataclasses.replace(
        machine, disk=dataclasses.replace(machine.disk, read_bps=rate), sources=dict(sources)
    )


def _is_fuse(mount: Mount) -> bool:
    return mount.filesystem in {"fuse", "fuseblk"} or mount.filesystem.startswith("fuse.")


def _is_network(mount: Mount) -> tuple[bool | None, str]:
    """(whether files come over a network, source or why it is not known)."""
    kind, found = mount.filesystem, f"{mount.filesystem} in /proc/self/mountinfo"
    if kind == "autofs":
        return None, "nothing is mounted there yet (autofs)"
    if not _is_fuse(mount):
        return kind in NETWORK_TYPES, found
    program = kind.partition(".")[2] or mount.source
    if kind == "fuseblk" or program in _LOCAL_FUSE:
        return False, found
    if program in _NETWORK_FUSE:
        return True, found
    if _REMOTE_SOURCE.match(mount.source):
        return True, f"{found}, mounted from another machine"
    return None, f"{kind} may be served from anywhere"


def _is_rotational(mount: Mount, root: Path) -> tuple[bool | None, str]:
    """(whether the drive has turning platters, source or why it is not known)."""
    entry = root / "sys/dev/block" / mount.device
    if not _exists(entry):  # btrfs and others give a device number of their own; the source names the disk
        name = PurePosixPath(mount.source)
        if not name.is_relative_to("/dev"):
            return None, f"{mount.filesystem} names no disk of its own"
        entry = root / "sys/class/block" / _resolved(root / str(name).lstrip("/")).name
    drive = _resolved(entry)
    if not _exists(drive / "queue") and _exists(drive / "partition"):
        drive = drive.parent
    said = read_text(drive / "queue/rotational", 8).strip()
    if said not in {"0", "1"}:
        return None, "the disk's driver does not tell"
    if said == "1" and any(map(_is_virtual, (drive, *_below(drive)))):
        return None, "a virtual disk, which says so whatever is behind it"
    return said == "1", "queue/rotational of the disk in /sys"


def _below(drive: Path) -> list[Path]:
    """The disks that a mapped one (LVM, encryption, RAID) lies on."""
    try:
        return [entry.resolve() for entry in (drive / "slaves").iterdir()]
    except (OSError, RuntimeError):
        return []


def _is_virtual(drive: Path) -> bool:
    vendor = read_text(drive / "device/vendor", 64).strip().lower()
    return drive.name.startswith(("vd", "xvd")) or vendor.startswith(_VIRTUAL_VENDORS)


def _read_room(folder: Path) -> _Room:
    """Room of the nearest folder that exists. Raises OSError."""
    import shutil

    for place in (folder.absolute(), *folder.absolute().parents):
        if place.exists():
            usage = shutil.disk_usage(place)
            return _Room(place.resolve(), usage.free, usage.total)
    raise FileNotFoundError(2, "no such folder")


def _within(deadline_s: float, ask: Callable[[], _Room], late: str) -> tuple[_Room | None, str]:
    """(the answer, why there is none), from a thread that is left behind when it is late."""
    import threading

    answer: list[tuple[_Room | None, str]] = []

    def run() -> None:
        try:
            answer.append((ask(), ""))
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: symlinks in a circle
            reason = getattr(error, "strerror", None) or type(error).__name__
            answer.append((None, f"the model folder cannot be asked: {reason}"))

    thread = threading.Thread(target=run, name="disk", daemon=True)
    thread.start()
    thread.join(deadline_s)
    return answer[0] if answer else (None, late)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):
        return path
