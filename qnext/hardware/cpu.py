"""The processor: model, cores, what this process may use of them, and instruction sets.

On Linux everything comes from `/proc/cpuinfo` and `/sys/devices`, which every user may read and which take
a few milliseconds; elsewhere psutil gives the counts. The core counts of /proc and /sys are the
host's even inside a container: affinity (which includes cpusets) and the CPU quota say what is really ours.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qnext.hardware.cgroups import CpuGroup, read_cpu_groups
from qnext.hardware.files import parse_number, read_text
from qnext.hardware.machine import Cpu, Sources
from qnext.hardware.power import read_governor, read_power_profile
from qnext.hardware.topology import count_performance_cores, read_last_level_cache, read_topology
from qnext.hardware.virtual import CPUINFO_BYTES, read_container, read_hypervisor

_X86_SETS = frozenset(
    {
        *("ssse3", "sse4_2", "avx", "avx2", "avx_vnni", "bmi2", "f16c", "fma"),
        *("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"),
        *("avx512vbmi", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
        *("amx_tile", "amx_int8", "amx_bf16"),
    }
)
_ARM_SETS = {
    "asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16", "i8mm": "i8mm", "bf16": "bf16",
    "sve": "sve", "sve2": "sve2", "sme": "sme",
}  # fmt: skip
"""Linux's names of arm64 features -> the names llama.cpp's build uses."""

_CPUS = "sys/devices/system/cpu"


def detect_cpu(sources: Sources, root: Path = Path("/"), affinity: frozenset[int] | None = None) -> Cpu:
    """Read the processor; notes go to `sources`. `root` stands for `/`.

    `affinity` replaces the set of logical CPUs this process may run on (tests give it).
    """
    return (
        _detect_linux(sources, root, affinity)
        if sys.platform.startswith("linux")
        else _detect_other(sources, affinity)
    )


def _detect_linux(sources: Sources, root: Path, affinity: frozenset[int] | None) -> Cpu:
    model, sets = parse_cpuinfo(read_text(root / "proc/cpuinfo", CPUINFO_BYTES))
    cores, sockets = read_topology(root / _CPUS)
    online = frozenset().union(*cores) if cores else frozenset()
    allowed = _affinity() if affinity is None else affinity
    usable = (allowed & online) or allowed or online
    usable_cores = len([core for core in cores if core & usable]) or None
    quota = min(read_cpu_groups(root), key=lambda group: group.cores, default=None)
    where, how = f"/{_CPUS}", "affinity" if allowed else "no affinity known"
    if quota:
        how += f", CPU quota {quota.cores:g} in {quota.path}"
    missing = f"{where} has no topology"
    performance, kinds = count_performance_cores(root, cores)
    efficiency = None if performance is None else len(cores) - performance
    llc, llc_source = read_last_level_cache(root / _CPUS, online)
    governor, governor_source = read_governor(root)
    profile, profile_source = read_power_profile(root)
    hypervisor, hypervisor_source = read_hypervisor(root)
    container, container_source = read_container(root)
    return Cpu(
        model=sources.record("cpu.model", model, "/proc/cpuinfo"),
        sockets=sources.record("cpu.sockets", sockets, where, missing),
        physical_cores=sources.record("cpu.physical_cores", len(cores) or None, where, missing),
        logical_cores=sources.record("cpu.logical_cores", len(online) or None, where, missing),
        usable_cores=sources.record("cpu.usable_cores", _under_quota(usable_cores, quota), how, missing),
        usable_logical_cores=sources.record(
            "cpu.usable_logical_cores", _under_quota(len(usable) or None, quota), how, missing
        ),
        instruction_sets=sources.record("cpu.instruction_sets", sets, "/proc/cpuinfo"),
        performance_cores=sources.record("cpu.performance_cores", performance, kinds, missing),
        efficiency_cores=sources.record("cpu.efficiency_cores", efficiency, kinds, missing),
        quota_cores=sources.record(
            "cpu.quota_cores",
            quota.cores if quota else None,
            quota.path if quota else "",
            "no control group limits CPU time",
        ),
        llc_bytes=sources.record("cpu.llc_bytes", llc, llc_source, llc_source),
        governor=sources.record("cpu.governor", governor, governor_source, governor_source),
        power_profile=sources.record("cpu.power_profile", profile, profile_source, profile_source),
        hypervisor=sources.record("cpu.hypervisor", hypervisor, hypervisor_source, hypervisor_source),
        container=sources.record("cpu.container", container, container_source, container_source),
    )


def parse_cpuinfo(text: str) -> tuple[str | None, tuple[str, ...] | None]:
    """(model, sorted instruction sets) of the first processor in `/proc/cpuinfo`.

    arm64 kernels name no model there: implementer and part numbers stand in for it.
    """
    first: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        first.setdefault(key.strip(), value.strip())
    model = first.get("model name") or None
    if model is None and first.get("CPU part"):
        model = f"ARM implementer {first.get('CPU implementer', '?')} part {first['CPU part']}"
    if "flags" in first:
        return model, tuple(sorted(_X86_SETS & set(first["flags"].split())))
    if "Features" in first:
        present = set(first["Features"].split())
        return model, tuple(sorted(name for flag, name in _ARM_SETS.items() if flag in present))
    return model, None


def _under_quota(count: int | None, quota: CpuGroup | None) -> int | None:
    """Threads beyond the quota's whole CPUs would be stopped in each period: round down, keep one."""
    return count if count is None or quota is None else min(count, max(1, int(quota.cores)))


def _affinity() -> frozenset[int]:
    return frozenset(os.sched_getaffinity(0)) if sys.platform == "linux" else frozenset()


def _detect_other(sources: Sources, affinity: frozenset[int] | None) -> Cpu:
    """macOS and Windows: counts from psutil, the model where the system tells it cheaply."""
    import platform

    import psutil

    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count(logical=True)
    apple = sys.platform == "darwin" and platform.machine() == "arm64"
    usable = len(affinity) if affinity else logical
    usable_cores = min(physical, usable) if physical and usable else None
    model = _sysctl("machdep.cpu.brand_string") if sys.platform == "darwin" else platform.processor() or None
    sets = ("dotprod", "fp16", "neon") if apple else None
    fast, slow = (_perf_level(0), _perf_level(1)) if apple else (None, None)
    levels = "sysctl hw.perflevel0 and hw.perflevel1"
    return Cpu(
        model=sources.record("cpu.model", model, "the operating system"),
        sockets=sources.record("cpu.sockets", None, "", "not read on this operating system"),
        physical_cores=sources.record("cpu.physical_cores", physical, "psutil"),
        logical_cores=sources.record("cpu.logical_cores", logical, "psutil"),
        usable_cores=sources.record("cpu.usable_cores", usable_cores, "psutil"),
        usable_logical_cores=sources.record("cpu.usable_logical_cores", usable, "psutil"),
        instruction_sets=sources.record(
            "cpu.instruction_sets", sets, "every Apple silicon CPU has them", "not read on this system"
        ),
        performance_cores=sources.record("cpu.performance_cores", fast, levels, "not read on this system"),
        efficiency_cores=sources.record("cpu.efficiency_cores", slow, levels, "not read on this system"),
    )


def _perf_level(level: int) -> int | None:
    """Physical cores of Apple's performance level 0 (the fast ones) or 1."""
    return parse_number(_sysctl(f"hw.perflevel{level}.physicalcpu") or "")


def _sysctl(name: str) -> str | None:
    import subprocess

    try:
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=2, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
