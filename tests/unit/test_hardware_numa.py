"""Memory nodes, the policy, huge pages: what Linux tells, and None where it tells nonsense."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qnext.hardware.machine import Memory, NumaNode, Sources
from qnext.hardware.memory import detect_memory
from qnext.hardware.numa import read_numa_nodes, read_numa_policy
from qnext.units import GIB, KIB, MIB
from tests.machine_trees import MACHINES, NODES, meminfo, nodes, plant

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /sys trees")


def detect(root: Path) -> tuple[Memory, Sources]:
    sources = Sources()
    return detect_memory(sources, root), sources


def test_eight_nodes_of_two_sockets_each_with_its_cpus(tmp_path: Path) -> None:
    memory, _ = detect(plant(tmp_path, MACHINES["two-socket-epyc"]()))
    assert memory.numa_nodes == tuple(NumaNode(node, 62 * GIB, 16) for node in range(8))


def test_only_the_nodes_that_the_cpuset_leaves_count(tmp_path: Path) -> None:
    plant(tmp_path, MACHINES["two-socket-epyc"]() | {"proc/self/status": "Mems_allowed_list:\t0,2-3\n"})
    memory, sources = detect(tmp_path)
    assert memory.numa_nodes is not None
    assert [node.node for node in memory.numa_nodes] == [0, 2, 3]
    assert "5 more kept from this process" in sources["memory.numa_nodes"]


def test_nodes_without_ram_are_left_out_and_ram_without_cpus_stays(tmp_path: Path) -> None:
    plant(tmp_path, nodes(["0-3", ""], 8 * GIB))
    plant(tmp_path, {f"{NODES}/node2/meminfo": "Node 2 MemTotal: 0 kB\n", f"{NODES}/node2/cpulist": "4-7\n"})
    found, source = read_numa_nodes(tmp_path)
    assert found == (NumaNode(0, 8 * GIB, 4), NumaNode(1, 8 * GIB, 0))
    assert "1 without RAM" in source


@pytest.mark.parametrize("text", ["", "\0\xff", "Node 0 MemTotal: x kB", f"Node 0 MemTotal: {1 << 60} kB"])
def test_a_node_without_a_believable_size_makes_all_unknown(tmp_path: Path, text: str) -> None:
    plant(tmp_path, nodes(["0-3", "4-7"], 8 * GIB) | {"proc/meminfo": meminfo(16 * GIB)})
    plant(tmp_path, {f"{NODES}/node1/meminfo": text})
    memory, sources = detect(tmp_path)
    assert memory.numa_nodes is None
    assert "node1" in sources["memory.numa_nodes"]


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ("55d0c0000000 default file=/usr/bin/x mapped=2\n", "default"),
        ("55d0c0000000 interleave:0-7 file=/usr/bin/x\n", "interleave"),
        ("55d0c0000000 weighted interleave:0-1 anon=1\n", "weighted interleave"),
        ("55d0c0000000 bind:0 anon=1\n", "bind"),
        ("", None),
        ("rubbish\n", None),
    ],
)
def test_the_policy_is_the_first_mappings(tmp_path: Path, maps: str, expected: str | None) -> None:
    assert read_numa_policy(plant(tmp_path, {"proc/self/numa_maps": maps}))[0] == expected


def test_huge_pages_are_bytes(tmp_path: Path) -> None:
    pages = "HugePages_Total: 512\nHugePages_Free: 500\nHugepagesize: 2048 kB\n"
    plant(tmp_path, {"proc/meminfo": meminfo(8 * GIB, more=pages)})
    memory, _ = detect(tmp_path)
    assert (memory.hugepages_total_bytes, memory.hugepages_free_bytes) == (GIB, 1000 * MIB)


@pytest.mark.parametrize(
    "pages",
    [
        "HugePages_Total: 512\n",
        "HugePages_Total: 18446744073709551615\nHugepagesize: 2048 kB\n",
        "HugePages_Total: [N/A]\nHugepagesize: 2048 kB\n",
        f"HugePages_Total: {8 * GIB // (2048 * KIB) + 1}\nHugepagesize: 2048 kB\n",
    ],
)
def test_huge_pages_that_cannot_be_are_none(tmp_path: Path, pages: str) -> None:
    memory, sources = detect(plant(tmp_path, {"proc/meminfo": meminfo(8 * GIB, more=pages)}))
    assert memory.hugepages_total_bytes is None
    assert sources["memory.hugepages_total_bytes"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("always [madvise] never\n", "madvise"),
        ("[always] madvise never\n", "always"),
        ("[on] off", None),
        ("", None),
    ],
)
def test_transparent_huge_pages_are_the_bracketed_word(
    tmp_path: Path, text: str, expected: str | None
) -> None:
    plant(tmp_path, {"sys/kernel/mm/transparent_hugepage/enabled": text})
    assert detect(tmp_path)[0].transparent_hugepages == expected


@pytest.mark.parametrize("name", sorted(MACHINES))
def test_every_memory_fact_has_a_source_or_a_reason(tmp_path: Path, name: str) -> None:
    _, sources = detect(plant(tmp_path, MACHINES[name]()))
    measured = {"bandwidth_by_threads", "bandwidth_knee_threads", "bandwidth_spread"}
    for field in set(Memory.__dataclass_fields__) - measured:
        assert sources[f"memory.{field}"], field


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(rubbish=st.binary(max_size=200))
def test_rubbish_in_every_file_is_read_without_an_error(tmp_path: Path, rubbish: bytes) -> None:
    names = (
        *("proc/meminfo", "proc/self/status", "proc/self/numa_maps", f"{NODES}/node0/meminfo"),
        *(f"{NODES}/node0/cpulist", "sys/kernel/mm/transparent_hugepage/enabled", "run/udev/data/+dmi:id"),
        *("sys/firmware/dmi/tables/DMI", "proc/self/cgroup", "proc/self/mountinfo"),
    )
    memory, sources = detect(plant(tmp_path, dict.fromkeys(names, rubbish)))
    assert memory.numa_nodes is None
    assert memory.rated_bandwidth_bps is None
    assert all(sources.values())
