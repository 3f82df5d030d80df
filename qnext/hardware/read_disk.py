"""Reading a disk past every cache of ours: the measuring side of `disk`, run in a child process.

O_DIRECT moves blocks from the drive into this process without the page cache. Two blocks of 8 MiB are under
way at any time: with one, the drive would stand still while it is asked for the next; more than two measure
what no loader asks for, as the kernel's readahead stays a little ahead of one reader and no more. They are
read in order within stretches of 128 MiB, and the stretches lie at random places of a large file, so that
what the drive or a host keeps of the beginning does not flatter.

Without a large file one is written, into a file without a name: whatever ends this process frees its space.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from qnext.hardware.files import nearest_folder
from qnext.hardware.mounts import find_mount
from qnext.units import MIB, format_bytes

BLOCK_BYTES = 8 * MIB
STRETCH_BYTES = 128 * MIB
IN_FLIGHT = 2
LEAST_FILE_BYTES = 256 * MIB
SCRATCH_BYTES = 512 * MIB
LEAST_SCRATCH_BYTES = 64 * MIB
SCRATCH_SHARE = 0.05
"""Part of the free space that a scratch file may take."""
_SEARCH_S = 0.5
_WRITE_SHARE = 0.5
_UNFINISHED = (".incomplete", ".part", ".partial", ".tmp", ".aria2", ".crdownload", ".download")
_CACHED = {
    "tmpfs": "tmpfs is memory, not a disk",
    "ramfs": "ramfs is memory, not a disk",
    "rootfs": "rootfs is memory, not a disk",
    "zfs": "zfs may answer direct reads from its own cache",
}
"""Filesystems that take O_DIRECT and read from memory all the same."""


def measure(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read what `folder` holds for about `seconds` in all.

    Yields {"note"} and then, every tenth of a second, {"bytes", "seconds"} read so far. Raises OSError with
    the reason in its words where there is nothing to read or direct reads are refused.
    """
    until = time.monotonic() + question["seconds"]
    place = nearest_folder(Path(question["folder"]))
    mount = find_mount(place.resolve())
    if mount is not None and mount.filesystem in _CACHED:
        raise OSError(errno.EOPNOTSUPP, _CACHED[mount.filesystem])
    given = place == Path(question["folder"])  # what lies beside a folder yet to come is none of our business
    found = find_large_file(place, time.monotonic() + _SEARCH_S) if given else None
    if found is None:
        with tempfile.TemporaryFile(dir=place, buffering=0) as scratch:
            _make_direct(scratch)
            left = until - time.monotonic()
            size = _write(scratch, place, time.monotonic() + left * _WRITE_SHARE)
            yield {"note": "of a scratch file just written, direct reads"}
            yield from _read(scratch.fileno(), size, until)
    else:
        with found.open("rb", buffering=0) as file:
            _make_direct(file)
            size = os.fstat(file.fileno()).st_size
            yield {"note": f"of a file of {format_bytes(size)} in the model folder, direct reads"}
            yield from _read(file.fileno(), size, until)


def find_large_file(place: Path, until: float) -> Path | None:
    """The largest file worth reading that is found in time: whole, without holes, readable, no link."""
    if place.is_file():
        return place
    best, best_size = None, LEAST_FILE_BYTES - 1
    device = place.stat().st_dev
    for folder, _, names in os.walk(place):
        for name in names:
            path = Path(folder, name)
            if name.endswith(_UNFINISHED):
                continue
            try:
                status = path.lstat()
            except OSError:
                continue
            here = stat.S_ISREG(status.st_mode) and status.st_dev == device
            whole = here and status.st_blocks * 512 >= status.st_size
            if whole and status.st_size > best_size and os.access(path, os.R_OK):
                best, best_size = path, status.st_size
        if time.monotonic() > until:
            break
    return best


def _make_direct(file: IO[bytes]) -> None:
    """Switch the open file to direct reads and writes. Raises OSError where its filesystem has none."""
    import fcntl

    handle = file.fileno()
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        raise OSError(error.errno, "the filesystem refuses direct reads") from error


def _write(scratch: IO[bytes], place: Path, until: float) -> int:
    """Fill the scratch file until the time is over or it is large enough; return its size.

    One random block over and over: neither a drive nor a filesystem compresses across 8 MiB.
    """
    room = os.statvfs(place)
    most = min(SCRATCH_BYTES, int(room.f_bavail * room.f_frsize * SCRATCH_SHARE))
    if most < LEAST_SCRATCH_BYTES:
        raise OSError(errno.ENOSPC, "too little free space for a scratch file")
    size = 0
    with mmap.mmap(-1, BLOCK_BYTES) as block:
        block.write(random.randbytes(BLOCK_BYTES))
        while size + BLOCK_BYTES <= most and (size < LEAST_SCRATCH_BYTES or time.monotonic() < until):
            size += os.pwrite(scratch.fileno(), block, size)
    os.fsync(scratch.fileno())
    os.posix_fadvise(scratch.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # some write through the page cache
    return size


@dataclass(slots=True)
class _Progress:
    """What the reading threads have done: bytes, and the error that stopped one of them."""

    read: int = 0
    error: OSError | None = None


def _read(handle: int, size: int, until: float) -> Iterator[dict[str, Any]]:
    """Read the file, stretches in random order and each block once, until all is read or time is over."""
    starts = list(range(0, size - size % BLOCK_BYTES or size, STRETCH_BYTES))
    random.shuffle(starts)
    offsets = [
        offset
        for start in starts
        for offset in range(start, min(start + STRETCH_BYTES, size), BLOCK_BYTES)
        if offset + BLOCK_BYTES <= size or size < BLOCK_BYTES
    ]
    waiting, progress, lock = iter(offsets), _Progress(), threading.Lock()

    def fetch() -> None:
        with mmap.mmap(-1, BLOCK_BYTES) as block:
            while time.monotonic() < until and progress.error is None:
                with lock:
                    offset = next(waiting, None)
                if offset is None:
                    return
                try:
                    count = os.preadv(handle, [block], offset)
                except OSError as error:
                    progress.error = error
                    return
                with lock:
                    progress.read += count

    began = time.perf_counter()
    readers = [threading.Thread(target=fetch, daemon=True) for _ in range(IN_FLIGHT)]
    for reader in readers:
        reader.start()
    while any(reader.is_alive() for reader in readers):
        for reader in readers:
            reader.join(0.1 / IN_FLIGHT)
        yield {"bytes": progress.read, "seconds": time.perf_counter() - began}
    if progress.error is not None:
        raise progress.error
