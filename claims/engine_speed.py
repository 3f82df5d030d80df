"""qnext's measurements against llama-bench's, and weight layouts against each other.

Both on a true-shape slice of Qwen3-Next-80B-A3B (Q4_K_M, eight layers, random weights, 7 GB), made for the
occasion and removed afterwards. The two sides take turns and the order is reversed every other round, so
that heat and other load strike both; what is compared is the median over all samples of a side, and the
ratio of each round's pair.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from statistics import median

from claims import CannotMeasure, Figure, claim

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 6
SAMPLES = 2
PROMPT, GENERATE = 512, 128
SLICE_LAYERS = 8
_NEEDS_BYTES = 20 << 30

Samples = dict[str, list[int]]
"""Nanoseconds per test name."""


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
    ratio = median(theirs[test]) / median(ours[test])
    return Figure(ratio, "x", abs(ratio - 1) <= 0.02, _rounds_text(theirs[test], ours[test]))


def _gain(test: str) -> Figure:
    experts, plain = _layouts()
    ratio = median(plain[test]) / median(experts[test])
    from qnext.bench.statistics import paired_ratio

    pairs = paired_ratio(_by_round(plain[test]), _by_round(experts[test]))
    return Figure(ratio, "x", ratio > 1 and pairs.low > 1, _rounds_text(plain[test], experts[test]))


def _rounds_text(slow: list[int], fast: list[int]) -> str:
    from qnext.bench.statistics import paired_ratio

    pairs = paired_ratio(_by_round(slow), _by_round(fast))
    return (
        f"{len(fast)} samples a side in {ROUNDS} interleaved rounds; pairs {pairs.low:.3f}–{pairs.high:.3f} "
        f"at {pairs.confidence:.0%}"
    )


def _by_round(samples: list[int]) -> list[int]:
    return [round(median(samples[at : at + SAMPLES])) for at in range(0, len(samples), SAMPLES)]


@cache
def _against_llama_bench() -> tuple[Samples, Samples]:
    """(qnext, llama-bench), same file, placement, threads and build."""
    bench = _llama_bench()
    with _slice() as (model, home):
        layout = _safe_layout(home)
        repack = "1" if layout == "full" else "0"
        theirs = [
            str(bench), "-m", str(model), "-p", str(PROMPT), "-n", str(GENERATE), "-r", str(SAMPLES),
            "-t", _threads(), "-ngl", "0", "-fa", "1", "-lm", "none", "--repack", repack, "-o", "json",
        ]  # fmt: skip
        return _interleave(
            lambda: _qnext(model, home, "full" if layout == "full" else "off"), lambda: _theirs(theirs)
        )


@cache
def _layouts() -> tuple[Samples, Samples]:
    """(experts in CPU_REPACK, file layout)."""
    with _slice() as (model, home):
        return _interleave(lambda: _qnext(model, home, "experts"), lambda: _qnext(model, home, "off"))


def _interleave(first: Callable[[], Samples], second: Callable[[], Samples]) -> tuple[Samples, Samples]:
    gathered: tuple[Samples, Samples] = ({}, {})
    for number in range(ROUNDS):
        sides = [(0, first), (1, second)]
        for index, measure in sides if number % 2 == 0 else reversed(sides):
            for name, samples in measure().items():
                gathered[index].setdefault(name, []).extend(samples)
            print(f"  round {number + 1} of {ROUNDS}, side {index + 1} done", file=sys.stderr, flush=True)
    return gathered


def _qnext(model: Path, home: Path, layout: str) -> Samples:
    argv = [
        sys.executable, "-m", "qnext", "bench", "run", str(model), "-p", str(PROMPT), "-n", str(GENERATE),
        "-r", str(SAMPLES), "-t", _threads(), "--repack", layout, "--json",
    ]  # fmt: skip
    record = json.loads(_output(argv, home))
    return {test["name"]: test["samples_ns"] for test in record["tests"]}


def _theirs(argv: list[str]) -> Samples:
    rows = json.loads(_output(argv, None))
    return {
        f"pp{row['n_prompt']}" if row["n_prompt"] else f"tg{row['n_gen']}": row["samples_ns"] for row in rows
    }


def _output(argv: list[str], home: Path | None) -> str:
    import os

    environment = dict(os.environ, **({"QNEXT_HOME": str(home)} if home else {}))
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    return done.stdout


def _threads() -> str:
    from qnext.hardware import detect_machine

    cpu = detect_machine(ROOT).cpu
    return str(cpu.usable_cores or cpu.usable_logical_cores or 1)


def _safe_layout(home: Path) -> str:
    """The layout that the probe allows here: llama-bench crashes with AMX buffers on some CPUs."""
    _output([sys.executable, "-m", "qnext", "plan", "demo", "--json"], home)
    entries = list((home / "cache" / "probes").glob("layout-*.json"))
    return str(json.loads(entries[0].read_text())["policy"])


def _llama_bench() -> Path:
    done = subprocess.run(
        [str(ROOT / "scripts" / "peers")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    paths = [Path(line) for line in done.stdout.splitlines() if line.endswith("llama-bench")]
    if done.returncode or not paths:
        raise CannotMeasure("needs llama-bench: run scripts/peers")
    return paths[0]


@contextmanager
def _slice() -> Iterator[tuple[Path, Path]]:
    """A slice and a private QNEXT_HOME, both gone afterwards."""
    from qnext.hardware import detect_machine

    machine = detect_machine(Path(tempfile.gettempdir()))
    for have, what in (
        (machine.memory.usable_bytes, "free memory"),
        (machine.disk_free_bytes, "free disk in the temporary folder"),
    ):
        if have is not None and have < _NEEDS_BYTES:
            raise CannotMeasure(f"needs {_NEEDS_BYTES >> 30} GiB of {what}")
    with tempfile.TemporaryDirectory(prefix="qnext-claims-") as folder:
        model = Path(folder) / "slice.gguf"
        shape = ["qwen3-next-80b-a3b", "--quant", "Q4_K_M", "--layers", str(SLICE_LAYERS), "-o", str(model)]
        _output([sys.executable, "-m", "qnext", "synth", *shape], Path(folder))
        yield model, Path(folder)
