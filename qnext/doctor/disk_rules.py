"""What is wrong with the disk that models are kept on."""

from __future__ import annotations

from collections.abc import Iterator

from qnext.doctor.case import Case
from qnext.doctor.values import Finding
from qnext.units import GIB, format_bytes

SLOW_LOAD_S = 60.0
"""A load that takes longer is worth a word."""
_SPARE_BYTES = 2 * GIB


def disk_findings(case: Case) -> Iterator[Finding]:
    """Findings about the disk. Its price is counted in seconds of loading: no token waits for it."""
    disk, size = case.machine.disk, case.header.file_bytes
    load_s = size / disk.read_bps if disk.read_bps else None
    loading = (
        f"loading {case.model} takes about {load_s:.0f} s, decode is not slower"
        if load_s
        else "decode is not slower; how long loading takes: qnext doctor --full"
    )
    if disk.network:
        yield Finding(
            id="disk-network",
            level="warning",
            about="disk.kind",
            what=f"models are kept on a network disk ({disk.filesystem})",
            because="every load of the model comes over the network, and a mapped file stalls with it",
            fix="Keep the model on a local disk: set HF_HOME, or give the path of a local copy.",
            unpriced=loading,
        )
    elif disk.fuse:
        yield Finding(
            id="disk-fuse",
            level="info",
            about="disk.kind",
            what=f"models are kept on a disk served by a program ({disk.filesystem})",
            because="such disks copy every block once more and may refuse direct reads",
            fix="Keep the model on a disk the kernel serves itself (ext4, xfs, btrfs).",
            unpriced=loading,
        )
    if load_s and load_s > SLOW_LOAD_S and not disk.network:
        yield Finding(
            id="disk-slow",
            level="info",
            about="disk.read",
            what=f"{format_bytes(size)} at {(disk.read_bps or 0) / 1e9:.2f} GB/s load in {load_s:.0f} s",
            because="measured past the page cache" if not disk.rotational else "it is a spinning disk",
            fix="Keep the model on an NVMe disk, or leave it loaded.",
            unpriced=loading,
        )
    if not case.on_disk and disk.free_bytes is not None and disk.free_bytes < size + _SPARE_BYTES:
        yield Finding(
            id="disk-full",
            level="warning",
            about="disk.space",
            what=f"{format_bytes(disk.free_bytes)} are free, {case.model} is {format_bytes(size)}",
            because="the download and some room for it do not fit",
            fix="Free some space, or set HF_HOME to a larger disk.",
            unpriced="it cannot be downloaded",
        )
