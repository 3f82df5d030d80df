"""Planned bytes against what llama.cpp allocates, and dry run against real load."""

from __future__ import annotations

from functools import cache
from typing import Any

from claims import Figure, claim, run_script

COMPUTE_LIMIT = 1.01


@claim(
    "planned-allocated",
    "planned - allocated weights, KV, recurrent: families × CPU, CPU+RPC × f16, q8_0 × 1, 4 slots",
    bar="0 bytes (print resolution 0.01 MiB)",
    minutes=5,
)
def measure_planned_bytes() -> Figure:
    found = _compare()
    worst = max(int(size) for size in found["worst_bytes"].values())
    detail = f"{found['combinations']} loads, {len(found['failures'])} off; the worst is print rounding"
    return Figure(worst, "bytes", not found["failures"], detail)


@claim("dry-run-compute", "compute buffers: real load / dry run", bar="within 1 %", minutes=5)
def measure_dry_run() -> Figure:
    ratio = float(_compare()["compute_dry_run_worst_ratio"])
    return Figure(ratio, "x", ratio <= COMPUTE_LIMIT, "worst of the same loads")


@cache
def _compare() -> dict[str, Any]:
    return run_script("bench_memory_exact.py")
