"""How fast `qnext synth` writes a true-shape slice, and how fast a plain write to the same disk is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from claims import CannotMeasure, Figure, claim

ROUNDS = 3
_BLOCK = 64 << 20
_NEEDS_BYTES = 12 << 30


@claim("synth-rate", "qnext synth of a 4-layer slice: rate", bar="1 GB/s or as a plain write", minutes=2)
def measure_synth_rate() -> Figure:
    with tempfile.TemporaryDirectory(prefix="qnext-synth-") as folder:
        if shutil.disk_usage(folder).free < _NEEDS_BYTES:
            raise CannotMeasure("needs 12 GB of free disk in the temporary folder")
        rates: list[tuple[float, float]] = []
        for _ in range(ROUNDS):
            ours, size = _synth(Path(folder) / "slice.gguf")
            rates.append((ours, _plain_write(Path(folder) / "plain", size)))
    ours, plain = (median(side) for side in zip(*rates, strict=True))
    detail = f"GB/s, pairs with a plain write: {', '.join(f'{a:.2f}/{b:.2f}' for a, b in rates)}"
    return Figure(ours, "GB/s", ours >= 1 or ours >= 0.95 * plain, detail)


def _synth(path: Path) -> tuple[float, int]:
    argv = [sys.executable, "-m", "qnext", "synth", "qwen3-next-80b-a3b", "--quant", "Q4_K_M"]
    began = time.perf_counter()
    subprocess.run([*argv, "--layers", "4", "-o", str(path)], check=True, capture_output=True)
    elapsed, size = time.perf_counter() - began, path.stat().st_size
    path.unlink()
    return size / elapsed / 1e9, size


def _plain_write(path: Path, size: int) -> float:
    block = memoryview(os.urandom(_BLOCK))
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for start in range(0, size, _BLOCK):
            file.write(block[: min(_BLOCK, size - start)])
    elapsed = time.perf_counter() - began
    path.unlink()
    return size / elapsed / 1e9
