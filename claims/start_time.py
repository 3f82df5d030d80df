"""How fast the command answers: its whole life beside that of an interpreter that does nothing.

The bar is on the difference. Pairs are interleaved, so that a machine that slows down slows both, and the
median of the differences ignores the pair that something else disturbed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from claims import ROOT, Figure, claim

PAIRS = 21


def _seconds(argv: list[str]) -> float:
    began = time.perf_counter_ns()
    subprocess.run(argv, stdout=subprocess.DEVNULL, check=True)
    return (time.perf_counter_ns() - began) / 1e9


def _measure_beside_bare(flag: str, bar_s: float) -> Figure:
    bare = [sys.executable, "-P", "-c", "pass"]
    command = [str(ROOT / "scripts" / "qnext"), flag]
    for argv in (bare, command):  # once for nothing: byte code and page cache
        _seconds(argv)
    pairs = [(_seconds(bare), _seconds(command)) for _ in range(PAIRS)]
    difference = statistics.median(whole - alone for alone, whole in pairs)
    alone, whole = (statistics.median(column) for column in zip(*pairs, strict=True))
    detail = f"whole command {whole:.3f} s, bare interpreter {alone:.3f} s, medians of {PAIRS} pairs"
    return Figure(difference, "s", difference < bar_s, detail)


@claim(
    "version-start",
    "`scripts/qnext --version` beside a bare interpreter's start",
    bar="under 0.12 s beside it",
)
def measure_version_start() -> Figure:
    return _measure_beside_bare("--version", 0.12)


@claim("help-start", "`scripts/qnext --help` beside a bare interpreter's start", bar="under 0.3 s beside it")
def measure_help_start() -> Figure:
    return _measure_beside_bare("--help", 0.3)
