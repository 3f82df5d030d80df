"""The measured RAM bandwidth: against a compiled read kernel, and against itself."""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil

from claims import CannotMeasure, Figure, claim
from qnext.errors import HardwareError
from qnext.hardware import Machine, detect_machine
from qnext.hardware.bandwidth import Bandwidth, measure_bandwidth, read_node_cpus, sweep_threads
from qnext.units import MIB

SOURCE = Path(__file__).with_name("stream_read.c")
KERNEL_BYTES = 256 * MIB
"""A round through it takes about as long as a slice of ours."""
TURN_S = 0.15
STREAM_LOW, STREAM_HIGH = 0.9, 1.1
REPEATS = 5
REPEAT_LIMIT = 0.1


@claim(
    "bandwidth-stream",
    "RAM read rate measured by qnext / by a compiled STREAM-style kernel",
    bar="0.9 to 1.1",
    minutes=0.5,
)
def measure_against_kernel() -> Figure:
    machine = detect_machine(Path.cwd())
    most = max(sweep_threads(machine.cpu))
    with tempfile.TemporaryDirectory() as folder:
        kernel = _compile(Path(folder))
        ratios = {threads: _ratio(machine, kernel, threads) for threads in sorted({1, most})}
    worst = max((ratio for ratio, _ in ratios.values()), key=lambda ratio: abs(ratio - 1))
    holds = all(STREAM_LOW <= ratio <= STREAM_HIGH for ratio, _ in ratios.values())
    detail = ", ".join(
        f"{threads} thread{'s' * (threads > 1)} {ratio:.3f} (kernel {rate / 1e9:.1f} GB/s)"
        for threads, (ratio, rate) in ratios.items()
    )
    return Figure(worst, "x", holds, f"{detail}; turns of {TURN_S:g} s, the best of each side")


@claim(
    "bandwidth-repeat",
    f"measured RAM bandwidth, {REPEATS} runs: (highest - lowest) / median",
    bar="within 10 %",
    minutes=0.6,
)
def measure_repeatability() -> Figure:
    machine = detect_machine(Path.cwd())
    began = time.monotonic()
    best = [_measure(machine, sweep_threads(machine.cpu)).best_bps for _ in range(REPEATS)]
    each = (time.monotonic() - began) / REPEATS
    spread = (max(best) - min(best)) / statistics.median(best)
    rates = ", ".join(f"{rate / 1e9:.2f}" for rate in best)
    return Figure(spread, "of the median", spread <= REPEAT_LIMIT, f"{rates} GB/s, {each:.1f} s each")


def _measure(machine: Machine, threads: tuple[int, ...], budget_s: float = 5.0) -> Bandwidth:
    return measure_bandwidth(
        threads,
        nodes=read_node_cpus(),
        llc_bytes=machine.cpu.llc_bytes,
        usable_bytes=machine.memory.usable_bytes,
        budget_s=budget_s,
    )


def _compile(folder: Path) -> Path:
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        raise CannotMeasure("needs a C compiler: apt install gcc")
    program = folder / "stream_read"
    argv = [compiler, "-O3", "-march=native", "-pthread", str(SOURCE), "-o", str(program)]
    subprocess.run(argv, check=True, capture_output=True, text=True)
    return program


def _ratio(machine: Machine, kernel: Path, threads: int) -> tuple[float, float]:
    """(ours / the kernel's, the kernel's rate): qnext's measuring child lies still during the kernel's turns.

    A stop falls between two blocks or makes one of them slow; the best slice is elsewhere.
    """
    budget_s = 8.0
    measured: list[Bandwidth | HardwareError] = []

    def measure() -> None:
        try:
            measured.append(_measure(machine, (threads,), budget_s))
        except HardwareError as error:
            measured.append(error)

    with subprocess.Popen(
        [kernel, str(threads), str(KERNEL_BYTES)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        _turn_of(other)  # its arrays are written now
        ours = threading.Thread(target=measure)
        ours.start()
        rates = []
        while ours.is_alive():
            children = [child for child in psutil.Process().children() if child.pid != other.pid]
            _signal(children, signal.SIGSTOP)
            rates.append(_turn_of(other))
            _signal(children, signal.SIGCONT)
            time.sleep(TURN_S)
        other.stdin.close()
    if isinstance(measured[0], HardwareError):
        raise measured[0]
    return measured[0].best_bps / max(rates), max(rates)


def _turn_of(kernel: subprocess.Popen[str]) -> float:
    assert kernel.stdin is not None
    assert kernel.stdout is not None
    print(TURN_S, file=kernel.stdin, flush=True)
    return float(kernel.stdout.readline())


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            os.kill(process.pid, number)
        except ProcessLookupError:
            continue
