"""The one gate to NVML (package nvidia-ml-py, module `pynvml`): raw readings, none of them judged.

The readings are taken by a child process, not a thread. A call into a wedged driver never returns and
cannot be cancelled, and a broken one may crash: a child can be abandoned at the deadline, and takes no one
with it. It writes one JSON line per reading as soon as it has it, the important ones first, so a sensor
that hangs costs only itself and what would have come after it. The price is one bare Python start (about
30 ms), paid only where an NVIDIA driver is present.

The child runs this file as a script, so module level imports only the standard library.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class NvmlReport:
    """What the child said: per GPU, in NVML's order, readings by name and the reason each missing one failed.

    `problem` is why the report is incomplete, or empty.
    """

    values: list[dict[str, Any]] = field(default_factory=list)
    errors: list[dict[str, str]] = field(default_factory=list)
    problem: str = ""


def read_nvml(deadline_s: float = 5.0) -> NvmlReport:
    """Ask NVML about every GPU, at most `deadline_s` seconds. Never raises for what a driver does."""
    import os
    import subprocess
    import tempfile

    # A file, not a pipe: what was written before the deadline is kept even if the child cannot be killed.
    with tempfile.TemporaryFile() as output:
        try:
            child = subprocess.Popen(
                [sys.executable, "-P", os.path.abspath(__file__), str(deadline_s)],  # noqa: PTH100
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.DEVNULL,
            )
        except OSError as error:
            return NvmlReport(problem=f"the NVML reader did not start: {error}")
        problem = ""
        try:
            if status := child.wait(deadline_s):
                problem = f"the NVML reader ended with status {status}"
        except subprocess.TimeoutExpired:
            child.kill()
            problem = f"NVML did not answer within {deadline_s:g} s"
        output.seek(0)
        return _parse_report(output.read().decode("utf-8", "replace"), problem)


def _parse_report(text: str, problem: str) -> NvmlReport:
    """The child's lines as a report; anything else in between is dropped."""
    report = NvmlReport(problem=problem)
    for line in text.splitlines(keepends=True):
        if not (line.startswith('{"') and line.endswith("}\n")):
            continue  # cut off by the deadline, or printed by the driver
        entry = json.loads(line)
        if "count" in entry:
            report.values = [{} for _ in range(entry["count"])]
            report.errors = [{} for _ in range(entry["count"])]
        elif "problem" in entry:
            report.problem = entry["problem"]
        elif "error" in entry:
            report.errors[entry["gpu"]][entry["key"]] = entry["error"]
        else:
            report.values[entry["gpu"]][entry["key"]] = entry["value"]
    return report


def _readings(nvml: Any) -> dict[str, Callable[[Any], Any]]:
    """Readings by name, the important ones first, the listing of processes, which may take longest, last.

    Clocks are MHz, at their maximum unless the name says `now`; widths bits or lanes, power mW, modes 0 or 1,
    temperatures degrees Celsius.
    """
    return {
        "name": nvml.nvmlDeviceGetName,
        "uuid": nvml.nvmlDeviceGetUUID,  # to match CUDA_VISIBLE_DEVICES; never kept
        "pci_bus_id": lambda gpu: nvml.nvmlDeviceGetPciInfo(gpu).busId,
        "vram_total": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).total,
        "vram_free": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu).free,
        "compute_capability": lambda gpu: list(nvml.nvmlDeviceGetCudaComputeCapability(gpu)),
        "driver": lambda gpu: nvml.nvmlSystemGetDriverVersion(),
        "cores": lambda gpu: nvml.nvmlDeviceGetNumGpuCores(gpu),
        "core_clock": lambda gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_clock": lambda gpu: nvml.nvmlDeviceGetMaxClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "memory_bus_width": lambda gpu: nvml.nvmlDeviceGetMemoryBusWidth(gpu),
        "pcie_gen": lambda gpu: nvml.nvmlDeviceGetCurrPcieLinkGeneration(gpu),
        "pcie_gen_max": lambda gpu: nvml.nvmlDeviceGetMaxPcieLinkGeneration(gpu),
        "pcie_width": lambda gpu: nvml.nvmlDeviceGetCurrPcieLinkWidth(gpu),
        "pcie_width_max": lambda gpu: nvml.nvmlDeviceGetMaxPcieLinkWidth(gpu),
        "pcie_gen_card_max": lambda gpu: nvml.nvmlDeviceGetGpuMaxPcieLinkGeneration(gpu),
        "power_limit": _either(nvml, "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetPowerManagementLimit"),
        "power_default": lambda gpu: nvml.nvmlDeviceGetPowerManagementDefaultLimit(gpu),
        "power_range": lambda gpu: list(nvml.nvmlDeviceGetPowerManagementLimitConstraints(gpu)),
        "core_clock_now": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM),
        "memory_clock_now": lambda gpu: nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM),
        "throttle_bits": _either(
            nvml, "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
        ),
        "power_now": lambda gpu: nvml.nvmlDeviceGetPowerUsage(gpu),
        "temperature": lambda gpu: nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU),
        "ecc": lambda gpu: nvml.nvmlDeviceGetCurrentEccMode(gpu),
        "mig": lambda gpu: nvml.nvmlDeviceGetMigMode(gpu)[0],
        # The second form of this reading leaves out what the driver holds for itself.
        "vram_used": lambda gpu: nvml.nvmlDeviceGetMemoryInfo(gpu, version=nvml.nvmlMemory_v2).used,
        "processes": lambda gpu: _count_processes(nvml, gpu),
    }


def _either(nvml: Any, *names: str) -> Callable[[Any], Any]:
    """The first of these functions that this driver has: newer drivers give them new names."""

    def read(gpu: Any) -> Any:
        for name in names[:-1]:
            try:
                return getattr(nvml, name)(gpu)
            except (nvml.NVMLError, AttributeError):
                continue
        return getattr(nvml, names[-1])(gpu)

    return read


def _count_processes(nvml: Any, gpu: Any) -> int:
    """Processes with a compute or graphics context, each counted once; neither names nor ids leave here."""
    listed = nvml.nvmlDeviceGetComputeRunningProcesses(gpu) + nvml.nvmlDeviceGetGraphicsRunningProcesses(gpu)
    return len({process.pid for process in listed})


def _serve(deadline_s: float) -> None:
    """The child's whole life: read everything, one JSON line per reading on standard output."""
    import signal

    if hasattr(signal, "alarm"):  # should the parent die meanwhile, this child ends by itself
        signal.alarm(int(deadline_s) + 2)
    try:
        import pynvml
    except ImportError as error:
        _tell(problem=f"nvidia-ml-py is not usable: {error}")
        return
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        gpus = [pynvml.nvmlDeviceGetHandleByIndex(position) for position in range(count)]
    except pynvml.NVMLError as error:
        _tell(problem=f"NVML: {error}")
        return
    _tell(count=count)
    for key, read in _readings(pynvml).items():
        for position, gpu in enumerate(gpus):
            try:
                value = read(gpu)
            except (pynvml.NVMLError, AttributeError, TypeError, ValueError, OSError) as error:
                _tell(gpu=position, key=key, error=f"NVML: {error}")
            else:
                _tell(gpu=position, key=key, value=value.decode() if isinstance(value, bytes) else value)


def _tell(**entry: object) -> None:
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    _serve(float(sys.argv[1]))
