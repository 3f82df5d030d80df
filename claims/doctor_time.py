"""How long `qnext doctor` takes, quick and full, and how much memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import cache
from statistics import median

from claims import ROOT, Figure, claim

QUICK_ROUNDS, FULL_ROUNDS = 9, 3
QUICK_S, QUICK_MB, FULL_S = 1.5, 120.0, 20.0


@claim("doctor-quick", "`qnext doctor`, whole process, median", bar=f"under {QUICK_S} s")
def measure_quick_time() -> Figure:
    times, _ = _quick()
    spread = f"median of {len(times)}, {min(times):.2f}–{max(times):.2f} s"
    detail = f"{spread}; the first, nothing cached: {times[0]:.2f} s"
    return Figure(median(times), "s", median(times) < QUICK_S, detail)


@claim("doctor-memory", "peak memory of `qnext doctor`", bar=f"under {QUICK_MB:g} MB")
def measure_quick_memory() -> Figure:
    _, peaks = _quick()
    return Figure(max(peaks), "MB", max(peaks) < QUICK_MB, f"largest of {len(peaks)}, children apart")


@claim("doctor-full", "`qnext doctor --full`, whole process, slowest", bar=f"under {FULL_S:g} s", minutes=2)
def measure_full_time() -> Figure:
    with tempfile.TemporaryDirectory(prefix="qnext-doctor-") as home:
        times = [_run(home, "--full")[0] for _ in range(FULL_ROUNDS)]
    detail = f"of {FULL_ROUNDS}, median {median(times):.1f} s; the first probes the weight layouts too"
    return Figure(max(times), "s", max(times) < FULL_S, detail)


@cache
def _quick() -> tuple[list[float], list[float]]:
    with tempfile.TemporaryDirectory(prefix="qnext-doctor-") as home:
        runs = [_run(home) for _ in range(QUICK_ROUNDS)]
    return [seconds for seconds, _ in runs], [peak for _, peak in runs]


def _run(home: str, *arguments: str) -> tuple[float, float]:
    """(seconds, peak resident megabytes of the process itself)."""
    argv = [sys.executable, "-m", "qnext", "doctor", *arguments]
    began = time.perf_counter()
    child = subprocess.Popen(
        argv, cwd=ROOT, env={**os.environ, "QNEXT_HOME": home}, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode not in (0, 3):
        raise subprocess.CalledProcessError(child.returncode, argv)
    return time.perf_counter() - began, usage.ru_maxrss * 1024 / 1e6
