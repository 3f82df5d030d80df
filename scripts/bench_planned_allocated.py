#!/usr/bin/env python3
"""Loads random plans on one and two loopback devices and lays planned bytes beside allocated ones.

    scripts/bench_planned_allocated.py [--plans N] [--seed N] [--rows FILE]

The plans are those of `bench_plans_that_fit.py`, made as `qnext plan` makes them with the engine's dry run,
over eleven models of eight families, with budgets from a seventh of what the model takes to twice that: some
leave experts or layers on the host, some fill two devices that then work in a pipeline. Each is loaded, and
the log's account of every device is compared with the plan's. The log prints MiB with two decimals: half of
0.01 MiB per line is what a figure may be off. `--rows` keeps every plan with both accounts as JSON. Prints
JSON; takes two minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from qnext.engine.log_reader import (  # noqa: E402
    BufferSize,
    allocated_devices,
    device_of_buffer,
    read_buffer_sizes,
)
from qnext.engine.rpc import RpcWorker  # noqa: E402
from qnext.engine.session import EngineSession  # noqa: E402
from qnext.plan.values import HOST, Budget  # noqa: E402
from qnext.units import MIB  # noqa: E402
from scripts.bench_plans_that_fit import SMALL, Fitting, Planner, Tally  # noqa: E402

HALF_PRINTED_UNIT = 0.00501 * MIB
EXACT = ("weights", "kv", "recurrent", "other")
TOTAL_LIMIT = 0.01
MOST_OF_THE_MODEL = 2.0


@dataclass
class Found:
    """The worst of all devices of all plans; sizes and shares are what is left beyond print rounding."""

    loads: int = 0
    worst_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*EXACT, "compute"), 0))
    worst_total: float = 0.0
    failures: list[str] = field(default_factory=list)
    families: Counter[str] = field(default_factory=Counter)
    devices: Counter[int] = field(default_factory=Counter)
    split: int = 0
    pipelines: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


def compare(session: EngineSession, one: Fitting, found: Found) -> None:
    """Load one plan and compare each part of each device."""
    placement = one.placed.placement
    session.open(one.path, placement)
    sizes = read_buffer_sizes(session.size_lines)
    budgets = {
        budget.name: budget for budget in one.problem.budgets if budget.name in (HOST, *placement.devices)
    }
    lines = _lines(sizes, budgets)
    row: dict[str, Any] = {
        "model": Path(one.path).stem,
        "family": one.problem.shape.arch,
        "pipeline": any("pipeline parallelism enabled" in line for line in session.log),
        "placement": asdict(placement) | {"rpc_servers": None},
        "devices": [],
    }
    planned_devices = one.placed.memory.devices
    for planned, real in zip(planned_devices, allocated_devices(sizes, budgets), strict=True):
        row["devices"].append({"planned": asdict(planned), "allocated": asdict(real)})
        for part in (*EXACT, "compute"):
            off = abs(getattr(planned, f"{part}_bytes") - getattr(real, f"{part}_bytes"))
            beyond = max(0, round(off - HALF_PRINTED_UNIT * lines[planned.name, part]))
            found.worst_bytes[part] = max(found.worst_bytes[part], beyond)
            if beyond and part in EXACT:
                found.failures.append(f"{one.say()}: {part} of {planned.name} is {off} bytes off")
        rounding = HALF_PRINTED_UNIT * sum(lines[planned.name, part] for part in (*EXACT, "compute"))
        off = max(0.0, abs(planned.total_bytes - real.total_bytes) - rounding)
        share = off / max(1, real.total_bytes)
        found.worst_total = max(found.worst_total, share)
        if share > TOTAL_LIMIT:
            found.failures.append(f"{one.say()}: {planned.name} is {share:.1%} off in all")
    found.loads += 1
    found.families[one.problem.shape.arch] += 1
    found.devices[len(placement.devices)] += 1
    found.split += planned_devices[0].weights_bytes > 0 and bool(
        placement.cpu_expert_layers or placement.n_gpu_layers <= one.problem.shape.n_layer_all
    )
    found.pipelines += row["pipeline"]
    found.rows.append(row)


def _lines(sizes: list[BufferSize], budgets: dict[str, Budget]) -> Counter[tuple[str, str]]:
    """Number of log lines that each part of each device was added up from; one where there is none."""
    parts = {"model": "weights", "KV": "kv", "RS": "recurrent", "output": "other", "compute": "compute"}
    lines = Counter({(name, part): 0 for name in budgets for part in parts.values()})
    owners = {budget.buffer_type: name for name, budget in budgets.items()}
    for size in sizes:
        name = owners.get(size.buffer) or device_of_buffer(size.buffer, budgets)
        lines[name, parts[size.part]] += 1
    return Counter({key: max(1, count) for key, count in lines.items()})


def run(plans: int, seed: int) -> Found:
    """All plans, each once."""
    found = Found()
    with tempfile.TemporaryDirectory() as name, RpcWorker() as first, RpcWorker() as second:
        servers = (first.endpoint, second.endpoint)
        planner = Planner(Path(name), servers, seed, workers=(1, 2, 2), most=MOST_OF_THE_MODEL)
        drawn = planner.draw(SMALL, plans, Tally())
        different = {(one.path, one.placed.placement): one for one in drawn if one.placed.placement.devices}
        with EngineSession() as session:
            for one in different.values():
                compare(session, one, found)
    return found


def main() -> int:
    """Print the result as JSON; status 1 when a plan was off."""
    parser = argparse.ArgumentParser(description="Compare planned with allocated memory on loopback devices.")
    parser.add_argument("--plans", type=int, default=264, help="plans to draw (264)")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--rows", type=Path, help="file for every plan with both accounts, as JSON")
    asked = parser.parse_args()
    began = time.monotonic()
    found = run(asked.plans, asked.seed)
    if asked.rows:
        asked.rows.write_text(json.dumps(found.rows, indent=1) + "\n")
    result = {
        "plans": found.loads,
        "families": dict(found.families.most_common()),
        "by_offload_devices": dict(sorted(found.devices.items())),
        "split_between_host_and_devices": found.split,
        "in_a_pipeline": found.pipelines,
        "worst_bytes_beyond_rounding": found.worst_bytes,
        "worst_total_beyond_rounding": round(found.worst_total, 5),
        "failures": found.failures,
        "seconds": round(time.monotonic() - began),
    }
    print(json.dumps(result, indent=1))
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
