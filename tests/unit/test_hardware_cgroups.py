"""Limits of control groups, read from constructed trees: the tightest level binds, nonsense binds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from qnext.hardware.cgroups import read_cpu_groups, read_memory_groups
from qnext.hardware.machine import Sources
from qnext.hardware.memory import detect_memory
from qnext.units import GIB, KIB

V2_MOUNT = "30 23 0:26 {top} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "35 31 0:32 {top} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V1_CPU_MOUNT = "36 31 0:33 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def meminfo(total: int, available: int) -> str:
    return (
        f"MemTotal: {total // KIB} kB\nMemAvailable: {available // KIB} kB\n"
        "SwapTotal: 1024 kB\nSwapFree: 512 kB\n"
    )


def usable(root: Path) -> tuple[int | None, int | None]:
    memory = detect_memory(Sources(), root)
    return memory.limit_bytes, memory.usable_bytes


def test_v2_the_tightest_of_nested_groups_binds(tmp_path: Path) -> None:
    base = "sys/fs/cgroup/user.slice"
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "0::/user.slice/app.service\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/"),
            f"{base}/memory.max": f"{16 * GIB}\n",
            f"{base}/memory.current": f"{6 * GIB}\n",
            f"{base}/memory.stat": f"anon 1\ninactive_file {1 * GIB}\nactive_file {1 * GIB}\n",
            f"{base}/app.service/memory.max": "max\n",
            f"{base}/app.service/memory.current": f"{2 * GIB}\n",
        },
    )
    assert usable(tmp_path) == (16 * GIB, 12 * GIB)  # 16 less 6 used, of which 2 are page cache


def test_a_fuller_outer_group_binds_before_a_tighter_inner_one(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "0::/a/b\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/"),
            "sys/fs/cgroup/a/memory.max": str(20 * GIB),
            "sys/fs/cgroup/a/memory.current": str(19 * GIB),
            "sys/fs/cgroup/a/b/memory.max": str(8 * GIB),
            "sys/fs/cgroup/a/b/memory.current": str(1 * GIB),
        },
    )
    assert usable(tmp_path) == (8 * GIB, 1 * GIB)


def test_v2_memory_high_counts_as_a_limit(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "0::/a\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/"),
            "sys/fs/cgroup/a/memory.max": "max",
            "sys/fs/cgroup/a/memory.high": str(10 * GIB),
            "sys/fs/cgroup/a/memory.current": "0",
        },
    )
    assert usable(tmp_path) == (10 * GIB, 10 * GIB)


def test_v2_container_with_its_own_namespace_reads_the_mount_itself(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/"),
            "sys/fs/cgroup/memory.max": str(16 * GIB),
            "sys/fs/cgroup/memory.current": str(1 * GIB),
            "sys/fs/cgroup/cpu.max": "150000 100000\n",
        },
    )
    assert usable(tmp_path) == (16 * GIB, 15 * GIB)
    assert [group.cores for group in read_cpu_groups(tmp_path)] == [1.5]


def test_v1_container_sees_the_host_path_but_only_its_own_mount(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n",
            "proc/self/mountinfo": V1_MOUNT.format(top="/docker/abc")
            + V1_CPU_MOUNT.format(top="/docker/abc"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(4 * GIB),
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(2 * GIB),
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 5\ntotal_inactive_file {GIB}\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "400000\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
        },
    )
    assert usable(tmp_path) == (4 * GIB, 3 * GIB)
    assert [group.cores for group in read_cpu_groups(tmp_path)] == [4.0]


def test_a_group_outside_what_the_container_sees_falls_back_to_the_mount(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/../other\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/kubepods/pod1"),
            "sys/fs/cgroup/memory.max": str(2 * GIB),
        },
    )
    assert [group.limit_bytes for group in read_memory_groups(tmp_path)] == [2 * GIB]


@pytest.mark.parametrize("nothing", ["9223372036854771712", "9223372036854710272", "max", "0", "", "-1", "x"])
def test_numbers_that_mean_no_limit_are_no_limit(tmp_path: Path, nothing: str) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "4:memory:/job\n0::/\n",
            "proc/self/mountinfo": V1_MOUNT.format(top="/"),
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": nothing,
        },
    )
    assert usable(tmp_path) == (None, 60 * GIB)


def test_a_limit_above_the_machine_is_no_limit(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(8 * GIB, 6 * GIB),
            "proc/self/cgroup": "0::/\n",
            "sys/fs/cgroup/memory.max": str(16 * GIB),
            "sys/fs/cgroup/memory.current": str(15 * GIB),
        },
    )
    assert usable(tmp_path) == (None, 6 * GIB)


def test_hybrid_trees_are_both_read_and_missing_levels_skipped(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/gone/job\n0::/\n",
            "proc/self/mountinfo": V1_MOUNT.format(top="/")
            + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/unified/cgroup.procs": "1",
        },
    )
    assert [group.path for group in read_memory_groups(tmp_path)] == ["/sys/fs/cgroup/memory"]


def test_without_proc_and_sys_nothing_is_claimed(tmp_path: Path) -> None:
    sources = Sources()
    memory = detect_memory(sources, tmp_path)
    assert memory.total_bytes is memory.available_bytes is memory.usable_bytes is memory.limit_bytes is None
    assert sources["memory.total_bytes"] == "not stated by /proc/meminfo"
    assert read_memory_groups(tmp_path) == read_cpu_groups(tmp_path) == ()


@pytest.mark.parametrize("available", [0x7FFFFFFFFFFFFC00, 65 * GIB])
def test_more_available_than_total_is_disbelieved(tmp_path: Path, available: int) -> None:
    plant(tmp_path, {"proc/meminfo": meminfo(64 * GIB, available)})
    memory = detect_memory(Sources(), tmp_path)
    assert memory.available_bytes is None
    assert memory.usable_bytes is None
