"""The model folder's disk: the mount it lies on, its kind, its speed, and that nothing stays behind."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import threading
import time
from pathlib import Path, PurePosixPath

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qnext.hardware import disk as disk_module
from qnext.hardware import read_disk
from qnext.hardware.disk import DiskSpeed, detect_disk, measure_disk, with_disk_speed
from qnext.hardware.machine import Disk, Machine, Sources
from qnext.hardware.mounts import find_mount, parse_mountinfo
from qnext.units import GIB, MIB

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/mountinfo")


def line(
    number: int, parent: int, point: str, kind: str = "ext4", source: str = "/dev/x", device: str = "0:9"
) -> str:
    for sign in "\\ \t\n":
        point, source = (word.replace(sign, f"\\{ord(sign):03o}") for word in (point, source))
    return f"{number} {parent} {device} / {point} rw,relatime shared:1 - {kind} {source} rw\n"


def plant(root: Path, *lines: str) -> Path:
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/mountinfo").write_text("".join(lines))
    return root


BASE = (line(22, 27, "/proc", "proc", "proc"), line(27, 1, "/"))


@pytest.mark.parametrize(
    ("more", "path", "kind"),
    [
        ((), "/home/models", "ext4"),
        ((line(30, 27, "/home", "btrfs"),), "/home/models", "btrfs"),
        ((line(30, 27, "/home", "btrfs"),), "/homes", "ext4"),
        ((line(30, 27, "/home", "btrfs"), line(31, 30, "/home/a", "xfs")), "/home/a/b", "xfs"),
        ((line(30, 27, "/home/a", "xfs"), line(31, 27, "/home", "btrfs")), "/home/a/b", "btrfs"),
        ((line(30, 27, "/m", "xfs"), line(31, 30, "/m", "nfs4", "box:/m")), "/m/x", "nfs4"),
        ((line(30, 27, "/my models", "xfs"),), "/my models/a", "xfs"),
        ((line(30, 27, "/a\\b", "zfs", "tank/a"),), "/a\\b/c", "zfs"),
        ((line(30, 27, "/m", "fuse.sshfs", "me@box:/m"),), "/m", "fuse.sshfs"),
        (("31 27 0:5 / /m rw - nfs\n", "\n", "words\n", "a b c d /m f - xfs /dev/x rw\n"), "/m", "ext4"),
        ((line(31, 32, "/m", "xfs"), line(32, 31, "/m", "nfs")), "/m", "ext4"),
    ],
)  # fmt: skip
def test_a_path_lies_on_the_mount_that_the_kernel_would_walk_into(
    tmp_path: Path, more: tuple[str, ...], path: str, kind: str
) -> None:
    for lines in ((*BASE, *more), (*more, *BASE)):
        found = find_mount(Path(path), plant(tmp_path, *lines))
        assert found is not None
        assert found.filesystem == kind


def test_without_mounts_there_is_no_mount(tmp_path: Path) -> None:
    assert find_mount(Path("/home"), tmp_path) is None
    assert find_mount(Path("/home"), plant(tmp_path, line(3, 2, "/elsewhere"))) is None


folders = st.lists(st.sampled_from(["a", "b c", "d\\040", "é"]), max_size=3).map(
    lambda parts: "/" + "/".join(parts)
)


@given(st.lists(folders, max_size=8), folders, st.randoms(use_true_random=False))
def test_the_newest_mount_over_a_path_is_found_whatever_the_order_of_the_lines(
    points: list[str], path: str, random: object
) -> None:
    mounted: list[tuple[int, str]] = [(1, "/")]

    def newest_over(place: str) -> int:
        return max(number for number, point in mounted if PurePosixPath(place).is_relative_to(point))

    lines = [line(1, 0, "/", "fs1")]
    for number, point in enumerate(points, start=2):
        lines.append(line(number, newest_over(point), point, f"fs{number}"))
        mounted.append((number, point))
    random.shuffle(lines)  # type: ignore[attr-defined]
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        found = find_mount(Path(path), plant(Path(root), *lines))
    assert found is not None
    assert found.filesystem == f"fs{newest_over(path)}"


@given(st.text())
def test_no_text_breaks_the_reading_of_mounts(text: str) -> None:
    assert all(mount.point.is_absolute() for mount in parse_mountinfo(text + "\n" + BASE[1]))


def detect(root: Path, folder: Path, kind: str, source: str, device: str = "0:9") -> tuple[Disk, Sources]:
    sources = Sources()
    plant(root, *BASE, line(90, 27, str(folder.resolve()), kind, source, device))
    return detect_disk(folder, sources, root), sources


@pytest.mark.parametrize(
    ("kind", "source", "network", "fuse"),
    [
        ("ext4", "/dev/sda1", False, False), ("btrfs", "/dev/nvme0n1p2", False, False),
        ("zfs", "tank/models", False, False), ("overlay", "overlay", False, False),
        ("nfs", "box:/m", True, False), ("nfs4", "box:/m", True, False), ("cifs", "//box/m", True, False),
        ("smb3", "//box/m", True, False), ("ceph", "mon:/", True, False), ("lustre", "m@tcp:/l", True, False),
        ("9p", "C:\\", True, False), ("beegfs", "beegfs_nodev", True, False), ("gpfs", "gpfs", True, False),
        ("fuse.sshfs", "me@box:/m", True, True), ("fuse.s3fs", "s3fs", True, True),
        ("fuse.rclone", "drive:", True, True), ("fuse.juicefs", "JuiceFS:m", True, True),
        ("fuse", "mountpoint-s3", True, True), ("fuse", "https://box/dav", True, True),
        ("fuseblk", "/dev/sdb1", False, True), ("fuse.mergerfs", "a:b", False, True),
        ("fuse.gocryptfs", "/home/crypt", False, True), ("fuse.new", "box:/m", True, True),
        ("fuse.new", "/dev/fuse", None, True), ("autofs", "/etc/auto.home", None, False),
    ],
)  # fmt: skip
def test_network_and_fuse_filesystems_are_told_apart(
    tmp_path: Path, kind: str, source: str, network: bool | None, fuse: bool
) -> None:
    (tmp_path / "models").mkdir()
    disk, sources = detect(tmp_path, tmp_path / "models", kind, source)
    assert (disk.filesystem, disk.network, disk.fuse) == (kind, network, fuse)
    assert all(sources[f"disk.{name}"] for name in ("filesystem", "network", "fuse", "rotational"))
    assert disk.free_bytes is not None
    assert not any("box" in note for note in sources.values())  # a server's name is nobody's business


def plant_drive(root: Path, drive: str, rotational: str, partition: str = "", vendor: str = "") -> None:
    """A drive 8:0 with a partition 8:1 as /sys shows them."""
    folder = root / "sys/devices/pci/block" / drive
    (folder / "queue").mkdir(parents=True)
    (folder / "queue/rotational").write_text(rotational + "\n")
    if vendor:
        (folder / "device").mkdir()
        (folder / "device/vendor").write_text(vendor + "\n")
    for kind in ("dev/block", "class/block"):
        (root / "sys" / kind).mkdir(parents=True)
    (root / "sys/dev/block/8:0").symlink_to(folder)
    (root / "sys/class/block" / drive).symlink_to(folder)
    if partition:
        (folder / partition).mkdir()
        (folder / partition / "partition").write_text("1\n")
        (root / "sys/dev/block/8:1").symlink_to(folder / partition)
        (root / "sys/class/block" / partition).symlink_to(folder / partition)


@pytest.mark.parametrize(
    ("drive", "said", "partition", "vendor", "kind", "device", "rotational"),
    [
        ("sda", "1", "sda1", "ATA", "ext4", "8:1", True),
        ("sda", "1", "", "ATA", "ext4", "8:0", True),
        ("nvme0n1", "0", "nvme0n1p1", "", "xfs", "8:1", False),
        ("nvme0n1", "0", "nvme0n1p1", "", "btrfs", "0:44", False),
        ("vda", "1", "vda1", "", "ext4", "8:1", None),
        ("vda", "0", "vda1", "", "ext4", "8:1", False),
        ("sda", "1", "sda1", "QEMU", "ext4", "8:1", None),
        ("sda", "4294967295", "sda1", "ATA", "ext4", "8:1", None),
        ("sda", "", "sda1", "ATA", "ext4", "8:1", None),
        ("sda", "1", "sda1", "ATA", "ext4", "8:77", None),
    ],
)  # fmt: skip
def test_a_turning_disk_is_known_through_its_partition(
    tmp_path: Path,
    drive: str,
    said: str,
    partition: str,
    vendor: str,
    kind: str,
    device: str,
    rotational: bool | None,
) -> None:
    plant_drive(tmp_path, drive, said, partition, vendor)
    (tmp_path / "models").mkdir()
    source = "/dev/gone" if device == "8:77" else f"/dev/{partition or drive}"
    disk, sources = detect(tmp_path, tmp_path / "models", kind, source, device)
    assert disk.rotational is rotational
    assert sources["disk.rotational"]


def test_a_mapped_disk_is_judged_by_the_disk_under_it(tmp_path: Path) -> None:
    plant_drive(tmp_path, "dm-0", "1")
    below = tmp_path / "sys/devices/pci/block/vda"
    below.mkdir()
    (tmp_path / "sys/devices/pci/block/dm-0/slaves").mkdir()
    (tmp_path / "sys/devices/pci/block/dm-0/slaves/vda").symlink_to(below)
    (tmp_path / "models").mkdir()
    assert detect(tmp_path, tmp_path / "models", "ext4", "/dev/mapper/root", "8:0")[0].rotational is None


def test_a_folder_that_never_answers_costs_one_deadline_and_its_mount_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    monkeypatch.setattr(disk_module, "_read_room", lambda folder: release.wait(20))
    plant(tmp_path, *BASE, line(90, 27, str(tmp_path), "nfs4", "box:/m"))
    sources = Sources()
    began = time.monotonic()
    disk = detect_disk(tmp_path / "not/there", sources, tmp_path, deadline_s=0.2)
    assert time.monotonic() - began < 2
    release.set()
    assert (disk.free_bytes, disk.total_bytes, disk.filesystem, disk.network) == (None, None, "nfs4", True)
    assert "within 0.2 s" in sources["disk.free_bytes"]


@pytest.mark.parametrize("total", [0, 1 << 60, 0xFFFFFFFFFFFFFFFF])
def test_a_size_that_cannot_be_is_not_passed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int
) -> None:
    usage = type(shutil.disk_usage(tmp_path))(total, 0, total)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    sources = Sources()
    disk = detect_disk(tmp_path, sources, tmp_path)
    assert (disk.free_bytes, disk.total_bytes) == (None, None)
    assert "states a size" in sources["disk.total_bytes"]


def test_links_in_a_circle_and_foreign_paths_raise_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    for folder in (tmp_path / "a", tmp_path / "x\0y"):
        sources = Sources()
        detect_disk(folder, sources, tmp_path)
        assert sources["disk.free_bytes"]


def measurable(speed: DiskSpeed) -> bool:
    """Whether a rate was measured; where not, the note has to say why."""
    assert (speed.read_bps is None) == speed.note.startswith("not measured: ")
    return speed.read_bps is not None


def test_a_file_is_read_within_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(os.urandom(MIB) * 40)
    os.sync()
    began = time.monotonic()
    speed = measure_disk(file, budget_s=3)
    assert time.monotonic() - began < 3.5
    if measurable(speed):
        assert MIB < (speed.read_bps or 0) < 1000 * GIB
        assert "direct reads" in speed.note
        assert "model.gguf" not in speed.note


def test_no_scratch_file_stays_behind_at_the_end_or_at_the_deadline(tmp_path: Path) -> None:
    for budget_s in (0.8, 1.5):
        began = time.monotonic()
        measurable(measure_disk(tmp_path / "not/there/yet", budget_s=budget_s))
        assert time.monotonic() - began < budget_s + 1
        assert list(tmp_path.iterdir()) == []


def test_no_scratch_file_stays_behind_when_the_child_is_killed(tmp_path: Path) -> None:
    found: list[DiskSpeed] = []
    thread = threading.Thread(target=lambda: found.append(measure_disk(tmp_path, budget_s=4)))
    thread.start()
    time.sleep(0.5)
    for child in psutil.Process().children():
        child.kill()
    thread.join(6)
    assert list(tmp_path.iterdir()) == []
    measurable(found[0])


def test_a_disk_in_memory_has_no_speed(tmp_path: Path) -> None:
    mount = find_mount(Path("/dev/shm"))
    if mount is None or mount.filesystem != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    speed = measure_disk(Path("/dev/shm"), budget_s=2)
    assert speed == DiskSpeed(None, "not measured: tmpfs is memory, not a disk")


def test_a_folder_that_takes_no_file_has_no_speed() -> None:
    speed = measure_disk(Path("/proc/self"), budget_s=2)
    assert not measurable(speed)


def test_too_little_room_has_no_speed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_disk, "SCRATCH_SHARE", 0.0)
    with pytest.raises(OSError) as caught:
        list(read_disk.measure({"folder": str(tmp_path), "seconds": 1.0}))
    assert caught.value.errno in {errno.ENOSPC, errno.EINVAL, errno.EOPNOTSUPP}
    assert list(tmp_path.iterdir()) == []


def test_only_whole_files_are_worth_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_disk, "LEAST_FILE_BYTES", MIB)
    ends = time.monotonic() + 60
    (tmp_path / "small").write_bytes(os.urandom(1000))
    (tmp_path / "getting.incomplete").write_bytes(os.urandom(8 * MIB))
    with (tmp_path / "holes.gguf").open("wb") as sparse:
        sparse.truncate(GIB)
    (tmp_path / "link.gguf").symlink_to(tmp_path / "getting.incomplete")
    assert read_disk.find_large_file(tmp_path, ends) is None
    (tmp_path / "blobs").mkdir()
    for name, size in (("good", 3), ("better", 4), ("last", 2)):
        (tmp_path / "blobs" / name).write_bytes(os.urandom(size * MIB))
    assert read_disk.find_large_file(tmp_path, ends) == tmp_path / "blobs/better"


def test_what_lies_beside_a_folder_yet_to_come_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "private.gguf").write_bytes(os.urandom(MIB) * 260)
    speed = measure_disk(tmp_path / "models", budget_s=1.5)
    assert not measurable(speed) or "scratch file" in speed.note


def test_the_measured_rate_or_its_absence_enters_the_machine() -> None:
    before = Machine(disk=Disk(free_bytes=5))
    after = with_disk_speed(before, DiskSpeed(700, "how"))
    assert (after.disk.read_bps, after.disk.free_bytes, after.sources["disk.read_bps"]) == (700, 5, "how")
    absent = with_disk_speed(before, DiskSpeed(None, "not measured: why"))
    assert (absent.disk.read_bps, absent.sources["disk.read_bps"]) == (None, "not measured: why")
