"""qnext's measurements against llama-bench's, and weight layouts against each other.

Both on a true-shape slice of Qwen3-Next-80B-A3B (Q4_K_M, eight layers, random weights, 8 GB), made for the
occasion and removed afterwards. The two sides are in memory together and run in turns of a tenth of a second
(`claims._turns`); the figure is the median ratio of the pairs, runs of both that fell into the same moments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

from claims import ROOT, Figure, claim
from claims._slice import peer, safe_layout, true_slice, wheel_libraries
from claims._turns import LlamaBench, QnextBench, Samples, Side, take_turns
from qnext.bench.verdict import Verdict, compare_paired

LOADS = 2
"""Each side is loaded so often, in the other order each time: where its pages come to lie may matter."""
SAMPLES = 5
PROMPT, GENERATE = 512, 128
SLICE_LAYERS = 8


@claim("bench-pp512", "pp512 of an 8-layer slice: qnext / llama-bench", bar="within 2 %", minutes=8)
def measure_bench_prefill() -> Figure:
    return _agreement(f"pp{PROMPT}")


@claim("bench-tg128", "tg128 of an 8-layer slice: qnext / llama-bench", bar="within 2 %", minutes=8)
def measure_bench_decode() -> Figure:
    return _agreement(f"tg{GENERATE}")


@claim("repack-pp512", "prefill with experts in CPU_REPACK / no repack", bar="faster", minutes=8)
def measure_repack_prefill() -> Figure:
    return _gain(f"pp{PROMPT}")


@claim("repack-tg128", "decode with experts in CPU_REPACK / no repack", bar="faster", minutes=8)
def measure_repack_decode() -> Figure:
    return _gain(f"tg{GENERATE}")


def _agreement(test: str) -> Figure:
    ours, theirs = _against_llama_bench()
    pairs = compare_paired(theirs[test], ours[test])
    return Figure(pairs.ratio, "x", abs(pairs.ratio - 1) <= 0.02, _pairs_text(pairs))


def _gain(test: str) -> Figure:
    experts, plain = _layouts()
    pairs = compare_paired(plain[test], experts[test])
    return Figure(pairs.ratio, "x", pairs.low > 1, _pairs_text(pairs))


def _pairs_text(pairs: Verdict) -> str:
    return (
        f"median of {pairs.pairs} pairs run in turns over {LOADS} loads; {pairs.low:.3f}–{pairs.high:.3f} at "
        f"{pairs.confidence:.0%}"
    )


@cache
def _against_llama_bench() -> tuple[Samples, Samples]:
    """(qnext, llama-bench), same file, placement, threads, and the very same libraries."""
    bench = peer("llama-bench")
    with true_slice(SLICE_LAYERS) as (model, home):
        layout = safe_layout(home)
        theirs = [
            str(bench), "-m", str(model), "-p", str(PROMPT), "-n", str(GENERATE), "-r", str(SAMPLES),
            "-t", _threads(), "-ngl", "0", "-fa", "1", "-lm", "none", "--progress", "-o", "jsonl",
            "--repack", "1" if layout == "full" else "0",
        ]  # fmt: skip
        ours = "full" if layout == "full" else "off"
        return _compare(lambda: (_qnext(model, home, ours), LlamaBench(theirs, wheel_libraries())))


@cache
def _layouts() -> tuple[Samples, Samples]:
    """(experts in CPU_REPACK, file layout)."""
    with true_slice(SLICE_LAYERS) as (model, home):
        safe_layout(home)
        return _compare(lambda: (_qnext(model, home, "experts"), _qnext(model, home, "off")))


def _compare(sides: Callable[[], tuple[Side, Side]]) -> tuple[Samples, Samples]:
    """Samples of both sides, the same number of each test, in pairs of about the same moment."""
    gathered: tuple[Samples, Samples] = ({}, {})
    for load in range(LOADS):
        first, second = sides()
        if load % 2:
            other, one = take_turns(second, first, ROOT)
        else:
            one, other = take_turns(first, second, ROOT)
        for samples, new in zip(gathered, (one, other), strict=True):
            for test in new:
                samples.setdefault(test, []).extend(new[test])
        print(f"  load {load + 1} of {LOADS} done: {one} {other}", file=sys.stderr, flush=True)
    return gathered


def _qnext(model: Path, home: Path, layout: str) -> QnextBench:
    numbers = (_threads(), str(PROMPT), str(GENERATE), str(SAMPLES))
    argv = [sys.executable, "-m", "claims._turns", str(model), layout, *numbers]
    return QnextBench(argv, {"QNEXT_HOME": str(home)})


def _threads() -> str:
    from qnext.hardware import detect_machine

    cpu = detect_machine(ROOT).cpu
    return str(cpu.usable_cores or cpu.usable_logical_cores or 1)
