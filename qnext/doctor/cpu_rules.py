"""What holds the processor back: limits, threads, power settings, a program that does not know it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from qnext.doctor.case import Case
from qnext.doctor.values import Finding
from qnext.hardware.power import SAVING_PLATFORMS, SELF_GOVERNING_DRIVERS
from qnext.plan.machine_speeds import thread_counts

_SAVING_PROFILES = SAVING_PLATFORMS | {"power", "power-saver"}


def cpu_findings(case: Case) -> Iterator[Finding]:
    """Findings about the processor and how it is used."""
    yield from _limit(case)
    yield from _threads(case)
    yield from _power(case)
    yield from _instructions(case)


def _limit(case: Case) -> Iterator[Finding]:
    cpu = case.machine.cpu
    usable, cores = cpu.usable_cores, cpu.physical_cores
    if not usable or not cores or usable >= cores:
        return
    by_quota = cpu.quota_cores is not None and cpu.quota_cores < cores
    how = f"a quota of {cpu.quota_cores:g} CPUs" if by_quota else "the set of CPUs it may run on"
    whole = case.with_cpu(usable_cores=cores, usable_logical_cores=cpu.logical_cores, quota_cores=None)
    yield Finding(
        id="cpu-limit",
        level="warning",
        about="cpu.usable",
        what=f"{usable} of {cores} cores can be used",
        because=f"{how} limits this process",
        fix="Raise the container's or the job's share (docker run --cpus, systemd CPUQuota, taskset).",
        price=case.price(whole),
    )


def _threads(case: Case) -> Iterator[Finding]:
    asked = case.here.threads
    cores = thread_counts(case.machine)[0]
    if asked is None or asked <= cores:
        return
    yield Finding(
        id="threads-all-logical",
        level="warning",
        about="cpu.usable",
        what=f"{asked} threads are asked for, {cores} physical cores can be used",
        because="threads beyond the cores wait for each other at every barrier",
        fix=f"Leave the threads to qnext, or give -t {cores} (or unset QNEXT_THREADS).",
        price=case.price(replace(case.here, threads=cores)),
    )


def _power(case: Case) -> Iterator[Finding]:
    cpu = case.machine.cpu
    source = case.machine.sources.get("cpu.governor", "")
    decides = not any(driver in source for driver in SELF_GOVERNING_DRIVERS)
    governor = cpu.governor in ("powersave", "conservative") and decides
    profile = cpu.power_profile in _SAVING_PROFILES
    if not governor and not profile:
        return
    setting = f"governor {cpu.governor}" if governor else f"power profile {cpu.power_profile}"
    yield Finding(
        id="cpu-powersave",
        level="warning",
        about="cpu.power",
        what=f"the CPU saves power ({setting})",
        because="clocks stay low or rise late, and prefill on the CPU runs at the clock's pace",
        fix="powerprofilesctl set performance, or: sudo cpupower frequency-set -g performance",
        unpriced="how far the clock falls is not known; measure before and after: qnext bench run",
    )


def _instructions(case: Case) -> Iterator[Finding]:
    sets = case.machine.cpu.instruction_sets
    if sets is None or case.machine.arch != "x86_64" or "avx2" in sets:
        return
    yield Finding(
        id="cpu-without-avx2",
        level="warning",
        about="cpu.instructions",
        what="the CPU has no AVX2",
        because="llama.cpp's fast kernels for quantised weights need it; a virtual machine may be hiding it",
        fix="In a virtual machine give it the host's CPU (QEMU: -cpu host); else there is no remedy.",
        price=case.price(case.with_cpu(instruction_sets=tuple(sorted({*sets, "avx2"})))),
    )
