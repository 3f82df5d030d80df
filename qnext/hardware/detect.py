"""The whole machine, detected: every sensor asked once, each with a deadline, nothing written or sent."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

from qnext.hardware.cpu import detect_cpu
from qnext.hardware.disk import detect_disk
from qnext.hardware.gpus import detect_gpus, shares_host_memory
from qnext.hardware.machine import Gpu, Machine, Sources, facts
from qnext.hardware.memory import detect_memory


def detect_machine(
    model_dir: Path,
    *,
    root: Path = Path("/"),
    environ: Mapping[str, str] | None = None,
    gpu_deadline_s: float = 5.0,
) -> Machine:
    """Read this machine. `model_dir` (need not exist) is the folder whose free space counts.

    `root` stands for `/` in everything read from /proc, /sys and /dev. What cannot be read is None with the
    reason in `sources`; nothing raises for a missing, failing or hanging sensor.
    """
    sources = Sources()
    system, arch = _system()
    cpu, memory = detect_cpu(sources, root), detect_memory(sources, root)
    gpus = detect_gpus(sources, os.environ if environ is None else environ, root, gpu_deadline_s)
    machine = Machine(
        os=sources.record("os", system, "uname"),
        arch=sources.record("arch", arch, "uname"),
        cpu=cpu,
        memory=memory,
        gpus=gpus,
        unified_memory=sources.record(
            "unified_memory",
            _unified(system, arch, gpus),
            "operating system and GPUs",
            "no GPU reports memory of its own",
        ),
        disk=detect_disk(model_dir, sources, root),
    )
    for path, value in facts(machine):
        if value is None:
            sources.setdefault(path, "not read on this system")
    return dataclasses.replace(machine, sources=dict(sources))


def _system() -> tuple[str | None, str | None]:
    """(`linux`, `darwin` or `windows`; `x86_64`, `arm64` or the system's own word)."""
    import platform

    arch = platform.machine().lower()
    return platform.system().lower() or None, {"amd64": "x86_64", "aarch64": "arm64"}.get(arch, arch) or None


def _unified(system: str | None, arch: str | None, gpus: tuple[Gpu, ...]) -> bool | None:
    if (system == "darwin" and arch == "arm64") or any(shares_host_memory(gpu) for gpu in gpus):
        return True
    return False if gpus and all(gpu.vram_total_bytes for gpu in gpus) else None
