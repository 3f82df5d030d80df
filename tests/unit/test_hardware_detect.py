"""Detection: every fact has a source or a reason, broken trees give None, and start-up stays light."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qnext.hardware import detect_machine, machine_fingerprint, machine_from_dict, machine_to_dict
from qnext.hardware.cpu import detect_cpu, parse_cpuinfo
from qnext.hardware.machine import Cpu, Disk, Gpu, Machine, Memory, Sources, facts
from qnext.units import GIB, MIB

linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and /sys trees")


def plant_cpus(root: Path, cores: list[str], packages: list[str], cpuinfo: str = "") -> Path:
    """One physical core per entry, given as the list of its logical CPUs."""
    for siblings, package in zip(cores, packages, strict=True):
        for number in siblings.split(","):
            topology = root / f"sys/devices/system/cpu/cpu{number}/topology"
            topology.mkdir(parents=True)
            (topology / "core_cpus_list").write_text(siblings + "\n")
            (topology / "physical_package_id").write_text(package + "\n")
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/cpuinfo").write_text(cpuinfo)
    return root


def test_every_fact_of_this_machine_has_a_source_or_a_reason(tmp_path: Path) -> None:
    machine = detect_machine(tmp_path / "not" / "there")
    assert set(machine.sources) == {path for path, _ in facts(machine)}
    assert all(machine.sources.values())
    assert machine.disk.free_bytes is not None
    assert machine.cpu.usable_logical_cores is not None
    assert machine.memory.usable_bytes is not None
    assert machine.memory.total_bytes is not None
    assert 0 < machine.memory.usable_bytes <= machine.memory.total_bytes


def test_an_empty_root_gives_reasons_and_no_exception(tmp_path: Path) -> None:
    machine = detect_machine(tmp_path, root=tmp_path, environ={})
    assert machine.gpus == ()
    assert machine.sources["gpus"] == "no NVIDIA driver on this machine"
    assert all(machine.sources[path] for path, _ in facts(machine))


def test_a_detected_machine_survives_the_round_trip_through_json(tmp_path: Path) -> None:
    machine = detect_machine(tmp_path)
    assert machine_from_dict(json.loads(json.dumps(machine_to_dict(machine)))) == machine


def test_nothing_personal_is_in_a_machine(tmp_path: Path) -> None:
    import getpass
    import platform

    values = [str(value) for _, value in facts(detect_machine(tmp_path))]
    assert platform.node() not in values
    assert getpass.getuser() not in values


@linux_only
def test_hyperthreads_share_a_core_and_affinity_counts_cores(tmp_path: Path) -> None:
    root = plant_cpus(tmp_path, ["0,4", "1,5", "2,6", "3,7"], ["0", "0", "1", "1"])
    cpu = detect_cpu(Sources(), root, affinity=frozenset({0, 4, 1}))
    assert (cpu.sockets, cpu.physical_cores, cpu.logical_cores) == (2, 4, 8)
    assert (cpu.usable_cores, cpu.usable_logical_cores) == (2, 3)


@linux_only
@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("250000", 2), ("9900000", 4), ("max", 4)])
def test_a_cpu_quota_bounds_the_threads(tmp_path: Path, quota: str, cores: int) -> None:
    root = plant_cpus(tmp_path, ["0", "1", "2", "3"], ["0"] * 4)
    (root / "proc/self/cgroup").write_text("0::/\n")
    (root / "sys/fs/cgroup").mkdir(parents=True)
    (root / "sys/fs/cgroup/cpu.max").write_text(f"{quota} 100000\n")
    cpu = detect_cpu(Sources(), root, affinity=frozenset(range(4)))
    assert cpu.usable_cores == cpu.usable_logical_cores == cores


def test_instruction_sets_of_x86_and_arm64() -> None:
    x86 = "model name\t: Xeon X\nflags\t\t: fpu avx2 avx512f amx_int8 amx_tile avx512_vnni\nmodel name : B\n"
    assert parse_cpuinfo(x86) == ("Xeon X", ("amx_int8", "amx_tile", "avx2", "avx512_vnni", "avx512f"))
    arm = "Features\t: fp asimd asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"
    assert parse_cpuinfo(arm) == ("ARM implementer 0x41 part 0xd4f", ("dotprod", "i8mm", "neon"))
    assert parse_cpuinfo("") == (None, None)


def test_fingerprint_ignores_what_changes_by_itself_and_sees_what_matters() -> None:
    gpus = (Gpu(name="A", kind="cuda", vram_total_bytes=16303 * MIB), Gpu(name="B", kind="cuda"))
    base = Machine(
        arch="x86_64", cpu=Cpu(model="C", physical_cores=8), memory=Memory(total_bytes=62 * GIB), gpus=gpus
    )
    name = machine_fingerprint(base)
    busy = dataclasses.replace(
        base,
        name="other",
        disk=Disk(free_bytes=1),
        memory=Memory(total_bytes=62 * GIB + 30 * MIB, available_bytes=GIB, usable_bytes=GIB),
    )
    assert machine_fingerprint(busy) == name
    for different in (
        dataclasses.replace(base, gpus=gpus[::-1]),
        dataclasses.replace(base, memory=Memory(total_bytes=30 * GIB)),
        dataclasses.replace(base, cpu=Cpu(model="C", physical_cores=8, usable_cores=4)),
    ):
        assert machine_fingerprint(different) != name


def test_importing_the_room_loads_no_heavy_library() -> None:
    code = (
        "import sys, qnext.hardware, qnext.config; heavy = {'psutil', 'pydantic', 'yaml', 'pynvml', 'numpy',"
        " 'subprocess', 'platformdirs', 'tomllib'}; print(*sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
