"""Limits of control groups, read from constructed trees: the tightest level binds, nonsense binds nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

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


def test_v2_a_slices_limit_binds_a_session_deep_below_it(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "0::/user.slice/user-1000.slice/user@1000.service/app.slice/run-u5.scope\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/"),
            "sys/fs/cgroup/user.slice/user-1000.slice/memory.high": str(8 * GIB),
            "sys/fs/cgroup/user.slice/user-1000.slice/memory.max": str(10 * GIB),
            "sys/fs/cgroup/user.slice/user-1000.slice/memory.current": str(1 * GIB),
            "sys/fs/cgroup/user.slice/cpu.max": "800000 100000\n",
            "sys/fs/cgroup/user.slice/user-1000.slice/cpu.max": "max 100000\n",
        },
    )
    assert usable(tmp_path) == (8 * GIB, 7 * GIB)
    assert [(group.path, group.cores) for group in read_cpu_groups(tmp_path)] == [
        ("/sys/fs/cgroup/user.slice", 8.0)
    ]


def test_a_container_in_a_container_obeys_the_outer_one_it_can_see(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "0::/docker/outer/docker/inner\n",
            "proc/self/mountinfo": V2_MOUNT.format(top="/docker/outer"),
            "sys/fs/cgroup/memory.max": str(4 * GIB),
            "sys/fs/cgroup/memory.current": "0",
            "sys/fs/cgroup/docker/inner/memory.max": str(6 * GIB),
            "sys/fs/cgroup/docker/inner/memory.current": "0",
            "sys/fs/cgroup/cpu.max": "200000 100000",
            "sys/fs/cgroup/docker/inner/cpu.max": "300000 100000",
        },
    )
    assert usable(tmp_path) == (4 * GIB, 4 * GIB)
    assert min(group.cores for group in read_cpu_groups(tmp_path)) == 2


def test_v1_a_limit_above_what_the_container_sees_is_the_hierarchical_one(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/meminfo": meminfo(64 * GIB, 60 * GIB),
            "proc/self/cgroup": "4:memory:/kubepods/pod1/app\n",
            "proc/self/mountinfo": V1_MOUNT.format(top="/kubepods/pod1/app"),
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
            "sys/fs/cgroup/memory/memory.stat": f"hierarchical_memory_limit {12 * GIB}\n",
        },
    )
    assert usable(tmp_path) == (12 * GIB, 11 * GIB)


def test_hybrid_memory_of_version_1_and_cpu_of_version_2_are_read_from_their_own_trees(
    tmp_path: Path,
) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "4:memory:/job\n0::/job\n",
            "proc/self/mountinfo": V1_MOUNT.format(top="/")
            + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": str(3 * GIB),
            "sys/fs/cgroup/unified/job/cpu.max": "100000 100000",
        },
    )
    assert [group.limit_bytes for group in read_memory_groups(tmp_path)] == [3 * GIB]
    assert [group.cores for group in read_cpu_groups(tmp_path)] == [1.0]


@pytest.mark.parametrize(
    ("text", "cores"),
    [
        ("max 100000", []),
        ("10000 100000", [0.1]),
        ("150000 100000", [1.5]),
        ("100000", []),
        ("0 100000", []),
        ("100000 0", []),
        ("-1 100000", []),
        ("9999999999999999999 100000", []),  # more CPUs than there are anywhere
        ("100000 1", []),  # no period the kernel takes
        ("² 100000", []),
        ("9" * 5000 + " 100000", []),
        ("", []),
    ],
)
def test_v2_a_quota_is_a_number_of_cpus_or_none(tmp_path: Path, text: str, cores: list[float]) -> None:
    plant(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": text})
    assert [group.cores for group in read_cpu_groups(tmp_path)] == cores


@pytest.mark.parametrize(
    ("quota", "period", "cores"), [("-1", "100000", []), ("50000", "100000", [0.5]), ("5", "", [])]
)
def test_v1_a_quota_is_a_number_of_cpus_or_none(
    tmp_path: Path, quota: str, period: str, cores: list[float]
) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/job"
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "3:cpu,cpuacct:/job\n",
            "proc/self/mountinfo": V1_CPU_MOUNT.format(top="/"),
            f"{folder}/cpu.cfs_quota_us": quota,
            f"{folder}/cpu.cfs_period_us": period,
        },
    )
    assert [group.cores for group in read_cpu_groups(tmp_path)] == cores


def test_without_mountinfo_the_usual_places_are_read(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/a\n2:memory:/b\n",
            "sys/fs/cgroup/memory/b/memory.limit_in_bytes": str(GIB),
        },
    )
    plant(tmp_path, {"sys/fs/cgroup/a/memory.max": str(2 * GIB)})
    assert sorted(group.limit_bytes for group in read_memory_groups(tmp_path)) == [GIB, 2 * GIB]


def test_a_mount_point_with_a_blank_is_unescaped(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": "0::/\n",
            "proc/self/mountinfo": "30 23 0:26 / /my\\040groups rw - cgroup2 cgroup2 rw\n",
            "my groups/memory.max": str(GIB),
        },
    )
    assert [group.path for group in read_memory_groups(tmp_path)] == ["/my groups"]


def test_a_group_that_was_deleted_still_obeys_its_parents(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {"proc/self/cgroup": "0::/a/b (deleted)\n", "sys/fs/cgroup/a/memory.max": str(GIB)},
    )
    assert [group.limit_bytes for group in read_memory_groups(tmp_path)] == [GIB]


_WORDS = st.text(st.sampled_from("/.a\\0\0: -,é"), max_size=30)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=80, deadline=None)
@given(
    group=_WORDS,
    top=_WORDS,
    mount=_WORDS,
    kind=st.sampled_from(["cgroup", "cgroup2"]),
    limit=st.text(max_size=10) | st.integers().map(str),
)
def test_any_group_and_mount_are_read_without_an_error(
    tmp_path: Path, group: str, top: str, mount: str, kind: str, limit: str
) -> None:
    plant(
        tmp_path,
        {
            "proc/self/cgroup": f"0::/{group}\n4:memory,cpu:/{group}\n",
            "proc/self/mountinfo": f"30 23 0:26 {top} {mount} rw - {kind} x rw,memory,cpu\n",
            "sys/fs/cgroup/memory.max": limit,
            "sys/fs/cgroup/memory.stat": f"hierarchical_memory_limit {limit}\n{limit}\n",
            "sys/fs/cgroup/cpu.max": f"{limit} {limit}",
        },
    )
    assert all(group.limit_bytes > 0 for group in read_memory_groups(tmp_path))
    assert all(group.cores > 0 for group in read_cpu_groups(tmp_path))


def test_a_group_ten_thousand_levels_deep_ends(tmp_path: Path) -> None:
    plant(tmp_path, {"proc/self/cgroup": "0::" + "/a" * 10_000 + "\n"})
    assert read_memory_groups(tmp_path) == ()
