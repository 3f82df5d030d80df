"""Planned bytes against what llama.cpp allocates, and dry run against real load."""

from __future__ import annotations

from functools import cache
from typing import Any

from claims import CannotMeasure, Figure, claim, run_script
from qnext.config import find_paths
from qnext.engine.build import installed_build

COMPUTE_LIMIT = 1.01
ENOUGH_PLANS, ENOUGH_FAMILIES = 200, 5
EXACT_PARTS = ("weights", "kv", "recurrent")


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


@claim(
    "planned-allocated-loopback",
    "random plans on 1 and 2 loopback RPC devices, loaded: planned - allocated weights, KV, recurrent",
    bar="0 bytes (print resolution 0.01 MiB), total within 1 %",
    minutes=2,
)
def measure_loopback_plans() -> Figure:
    if installed_build() is None:
        raise CannotMeasure("no engine to load with: ./scripts/qnext --version builds it")
    rows = find_paths().cache_dir / "claims" / "planned-allocated-loopback.json"
    rows.parent.mkdir(parents=True, exist_ok=True)
    found = run_script("bench_planned_allocated.py", "--rows", str(rows))
    off = max(found["worst_bytes_beyond_rounding"][part] for part in EXACT_PARTS)
    devices, families = found["by_offload_devices"], found["families"]
    detail = (
        f"{found['plans']} plans, {len(found['failures'])} off, {devices.get('1', 0)} with one device and "
        f"{devices.get('2', 0)} with two ({found['in_a_pipeline']} in a pipeline), {len(families)} families, "
        f"{found['split_between_host_and_devices']} split; total at most "
        f"{found['worst_total_beyond_rounding']:.2%} off; rows in the cache's claims/{rows.name}"
    )
    enough = found["plans"] >= ENOUGH_PLANS and len(families) >= ENOUGH_FAMILIES and len(devices) == 2
    return Figure(off, "bytes", enough and not found["failures"], detail)


@cache
def _compare() -> dict[str, Any]:
    return run_script("bench_memory_exact.py")
