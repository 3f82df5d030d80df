"""Fit the forecast's constants to published measurements, and say how wrong it is on unseen machines.

    python scripts/fit_speed.py [--json] [--write]

Each row of profiles/speeds/published.csv becomes a machine, a problem and a placement as in `qnext plan`; the
terms of `qnext.plan.speed` are linear in the constants, so a few Gauss-Newton steps on the logarithms find
them. Every constant is pulled towards a belief (value and how freely it may move), all backends' node costs
towards each other, and every machine counts as one however many rows it has. Leave-one-machine-out: for each
machine all constants and all ranges are found again without any of its rows. Only rows marked `judged` count
in the error (profiles/speeds/README.md says which and why); the others only teach. Builds before March 2026
share a factor for being old.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from qnext.hardware.machine import Cpu, Gpu, Machine, Memory
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, read_shape
from qnext.models.synth import synthesise
from qnext.models.synth.imagined import imagined_header
from qnext.plan.choice import choose_placement
from qnext.plan.machine_speeds import machine_speeds
from qnext.plan.options import PlanOptions
from qnext.plan.problem import make_problem
from qnext.plan.speed import active_work, decode_terms, prefill_terms, several_gpus, situation
from qnext.plan.values import HOST, Override, Workload
from qnext.plan.weights import assign_buffers
from qnext.units import GIB

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "profiles" / "speeds"
MODULE = ROOT / "qnext" / "plan" / "kernels.py"
MARCH = "2026-03"
GB = 1_000_000_000

READING = {
    "gpu_read_plain": (1 / 0.80, 0.10),
    "gpu_read_block": (1 / 0.70, 0.15),
    "gpu_read_lookup": (1 / 0.50, 0.25),
    "cpu_read_plain": (1 / 0.80, 0.10),
    "cpu_read_block": (1 / 0.65, 0.15),
    "cpu_read_lookup": (1 / 0.40, 0.30),
}
BACKENDS = ("cuda", "rocm", "vulkan", "metal")
DECODE_PRIORS = READING | {
    **{f"gpu_node_{backend}": (1000.0, 0.7) for backend in BACKENDS},
    "cpu_node": (2500.0, 0.6),
    "crossing": (200_000.0, 0.4),
    "gpu_hop": (300_000.0, 0.7),
    "old": (1.28, 0.12),
    "old_cpu": (2.5, 0.5),
}
PREFILL_PRIORS = {
    **{f"gpu_compute_{backend}": (1 / 11, 0.8) for backend in BACKENDS},
    "cpu_compute": (1.0, 0.4),
    "gpu_copy": (1 / 0.75, 0.25),
    "old_prefill": (1.2, 0.15),
}
"""Belief and the standard deviation of its logarithm, of every constant: what dense models reach of the
bandwidth on such hardware, a microsecond or more per node. `old` is what the graph work of February and March
2026 gained (20 to 38 %); without a GPU one change alone gained 50 % (llama.cpp pull request 19365), and users
found CPUs "5x slower than expected" before (issues 17936, 19480), hence `old_cpu`."""
TOGETHER = {"gpu_node_": 0.35, "gpu_compute_": 0.5}
"""How far (logarithm) constants of one kind are expected to lie from their mean over backends."""
NOISE = 0.15
"""Expected error (logarithm) of the forecast for one machine, against which beliefs weigh."""
ORDINARY = {"decode": 0.22, "prefill": 0.40}
"""Expected standard deviation on an unseen machine, worth `WEIGHT` machines in every range."""
WEIGHT = 2.0
WIDTH = 1.2816
"""Standard deviations on either side that hold 80 % of a normal distribution."""


@dataclass(frozen=True)
class Row:
    """One published measurement with the terms of its forecast. Speeds are tokens per second.

    `engine` names the machine's entry with its backend and age: what an engine build is of one's own machine.
    """

    name: str
    machine: str
    engine: str
    model: str
    size_gib: float
    several_gpus: bool
    judged: bool
    where: str
    terms: dict[str, dict[str, float]]
    measured: dict[str, float]


@cache
def _header(shape: str, quant: str, size_gib: float) -> tuple[ModelHeader, ModelShape]:
    """The true shape in the nearest file type that can be imagined, its tensors scaled to the file's size."""
    name, _, layers = shape.partition(":")
    header = imagined_header(name, quant) if not layers else _slice_header(name, quant, int(layers))
    scale = size_gib * GIB / sum(tensor.nbytes for tensor in header.tensors)
    tensors = tuple(replace(tensor, nbytes=round(tensor.nbytes * scale)) for tensor in header.tensors)
    header = replace(header, tensors=tensors, file_bytes=round(header.file_bytes * scale))
    return header, read_shape(header)


def _slice_header(shape: str, quant: str, layers: int) -> ModelHeader:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slice.gguf"
        synthesise(shape, path, quant=quant, layers=layers, header_only=True)
        return read_header(path)


def _machine(facts: Mapping[str, Any]) -> Machine:
    gpus = tuple(
        Gpu(
            name=gpu["name"],
            kind=gpu["kind"],
            vram_total_bytes=round(gpu["vram_gib"] * GIB),
            vram_free_bytes=round(gpu["vram_gib"] * GIB),
            rated_bandwidth_bps=round(gpu["gbs"] * GB),
            pcie_gen_max=gpu.get("pcie", [None])[0],
            pcie_width_max=gpu.get("pcie", [None, None])[1],
        )
        for gpu in facts["gpus"]
    )
    memory = Memory(
        total_bytes=256 * GIB,
        available_bytes=256 * GIB,
        rated_bandwidth_bps=round(facts["ram_gbs"] * GB) if "ram_gbs" in facts else None,
        measured_bandwidth_bps=round(facts["ram_measured_gbs"] * GB) if "ram_measured_gbs" in facts else None,
    )
    cpu = Cpu(
        physical_cores=facts["cores"],
        logical_cores=facts["cores"],
        instruction_sets=tuple(facts["instruction_sets"]),
    )
    return Machine(name="published", cpu=cpu, memory=memory, gpus=gpus, unified_memory=facts.get("unified"))


def read_rows() -> list[Row]:
    """The published measurements, each planned as `qnext plan` would with the flags that were used."""
    machines = yaml.safe_load((DATA / "machines.yaml").read_text())
    with (DATA / "published.csv").open(newline="") as source:
        return [_row(entry, machines[entry["machine"]]) for entry in csv.DictReader(source)]


def _row(entry: Mapping[str, str], facts: Mapping[str, Any]) -> Row:
    header, shape = _header(entry["shape"], entry["header_quant"], float(entry["size_gib"]))
    machine, depth = _machine(facts), int(entry["depth"])
    threads = int(entry["threads"] or facts["cores"])
    split = tuple(float(part) for part in entry["tensor_split"].split("/")) if entry["tensor_split"] else None
    options = PlanOptions(
        context=max(4096, depth + 1024),
        ubatch=int(entry["ubatch"]),
        n_gpu_layers=999 if machine.gpus else 0,
        cpu_experts=int(entry["cpu_experts"]),
        overrides=tuple(Override(*rule.split("=")) for rule in entry["overrides"].split(",") if rule),
        tensor_split=split,
        threads=threads,
        threads_batch=threads,
    )
    problem = make_problem(header, shape, machine, options)
    placed = choose_placement(problem)
    used = problem.used(placed.placement)
    tensors = assign_buffers(header, shape, placed.placement, problem.traits[HOST], used)
    load = active_work(shape, tensors, {device.buffer_type: device.name for device in used})
    devices, speeds = placed.memory.devices, machine_speeds(machine)
    kinds = {device.name: device.kind for device in devices}
    terms = {"decode": decode_terms(load, placed.placement, devices, speeds, Workload(0, 128, depth))}
    measured = {"decode": float(entry["tg_tps"])}
    if entry["pp_tps"]:
        asked = Workload(int(entry["pp_tokens"]), 1, 0)
        terms["prefill"] = prefill_terms(load, shape, kinds, placed.placement, speeds, asked)
        measured["prefill"] = float(entry["pp_tps"])
    where = situation(load)
    if entry["date"] < MARCH:
        terms["decode"]["old_cpu" if where == "cpu" else "old"] = 1.0
        if "prefill" in terms:
            terms["prefill"]["old_prefill"] = 1.0
    return Row(
        name=f"{entry['quant']} {entry['build']}" + (f" at {depth}" if depth else ""),
        machine=facts["machine"],
        engine=f"{entry['machine']} {'before' if entry['date'] < MARCH else 'from'} March 2026",
        model=f"{entry['model']} {entry['quant']}",
        size_gib=float(entry["size_gib"]),
        several_gpus=several_gpus(load, kinds),
        judged=entry["judged"] == "yes",
        where=where,
        terms=terms,
        measured=measured,
    )


def _total_ns(terms: Mapping[str, float], constants: Mapping[str, float]) -> tuple[float, float]:
    """Sum of a row's terms, and what being old multiplies it by."""
    total = sum(amount * constants[name] for name, amount in terms.items() if not name.startswith("old"))
    return total, math.prod(constants[name] for name in terms if name.startswith("old"))


def error_of(row: Row, of: str, constants: Mapping[str, float]) -> float:
    """Logarithm of measured over forecast speed."""
    total, age = _total_ns(row.terms[of], constants)
    return math.log(row.measured[of] * total * age / 1e9)


def fit(rows: Sequence[Row], of: str, known: Mapping[str, float]) -> dict[str, float]:
    """Constants of `decode` or `prefill`; `known` are those that are not sought."""
    priors = DECODE_PRIORS if of == "decode" else PREFILL_PRIORS
    names = list(priors)
    rows = [row for row in rows if of in row.terms]
    count = {row.machine: sum(other.machine == row.machine for other in rows) for row in rows}
    believed = np.log([priors[name][0] for name in names])
    least = np.array([0.0 if "_read_" in name else -np.inf for name in names])  # no faster than the memory
    theta = believed.copy()
    for _ in range(60):
        constants = dict(known) | dict(zip(names, np.exp(theta), strict=True))
        residuals, slopes = [], []
        for row in rows:
            error, total = error_of(row, of, constants), _total_ns(row.terms[of], constants)[0]
            slope: list[float] = [
                row.terms[of].get(name, 0.0) * (1.0 if name.startswith("old") else constants[name] / total)
                for name in names
            ]
            # one outlier counts less than its square (Huber), and a machine as one
            weight = min(1.0, 2 * NOISE / max(abs(error), 1e-9)) ** 0.5 / NOISE / count[row.machine] ** 0.5
            residuals.append(error * weight)
            slopes.append(np.array(slope) * weight)
        for position, name in enumerate(names):
            residuals.append((theta[position] - believed[position]) / priors[name][1])
            slopes.append(np.eye(len(names))[position] / priors[name][1])
        for prefix, spread in TOGETHER.items():
            alike = np.array([name.startswith(prefix) for name in names], float)
            for place in np.flatnonzero(alike):
                slope_of = (np.eye(len(names))[place] - alike / alike.sum()) / spread
                residuals.append(float(slope_of @ theta))
                slopes.append(slope_of)
        step = np.linalg.lstsq(np.array(slopes), -np.array(residuals), rcond=None)[0]
        theta = np.maximum(theta + np.clip(step, -0.5, 0.5), least)
        if np.abs(step).max() < 1e-7:
            break
    return {name: float(value) for name, value in zip(names, np.exp(theta), strict=True)}


def fit_all(rows: Sequence[Row]) -> dict[str, float]:
    """Both sets of constants: decode's first, prefill's on top of them."""
    decode = fit(rows, "decode", {})
    return decode | fit(rows, "prefill", decode)


def _errors(rows: Sequence[Row], of: str, constants: Mapping[str, float]) -> list[tuple[Row, float]]:
    return [(row, error_of(row, of, constants)) for row in rows if of in row.terms]


def unseen_errors(rows: Sequence[Row], of: str) -> list[tuple[Row, float]]:
    """Every row's error with constants fitted without any row of its machine: leave-one-machine-out."""
    found: list[tuple[Row, float]] = []
    for machine in dict.fromkeys(row.machine for row in rows):
        constants = fit_all([row for row in rows if row.machine != machine])
        found += _errors([row for row in rows if row.machine == machine], of, constants)
    return found


def ranges(errors: Sequence[tuple[Row, float]], of: str) -> dict[str, tuple[float, float]]:
    """By situation, what a forecast is multiplied by so that 80 % of unseen measurements lie between.

    A machine's mean square error counts once per situation. Situations with few machines borrow from all.
    """
    squares: dict[str, dict[str, list[float]]] = {where: {} for where in ("gpu", "gpus", "mixed", "cpu")}
    for row, error in errors:
        squares[row.where].setdefault(row.machine, []).append(error**2)
    means = {where: [statistics.mean(of_one) for of_one in all_.values()] for where, all_ in squares.items()}
    every = [mean for of_one in means.values() for mean in of_one]
    pooled = (sum(every) + WEIGHT * ORDINARY[of] ** 2) / (len(every) + WEIGHT)
    result = {}
    for where, of_one in means.items():
        spread = math.sqrt((sum(of_one) + WEIGHT * pooled) / (len(of_one) + WEIGHT))
        result[where] = (math.exp(-WIDTH * spread), math.exp(WIDTH * spread))
    return result


def judge(rows: Sequence[Row], of: str = "decode") -> list[dict[str, Any]]:
    """Every row beside the forecast, and its range, made without its machine."""
    table = []
    for machine in dict.fromkeys(row.machine for row in rows):
        rest = [row for row in rows if row.machine != machine]
        spread = ranges(unseen_errors(rest, of), of)
        for row, error in _errors([r for r in rows if r.machine == machine], of, fit_all(rest)):
            low, high = (row.measured[of] / math.exp(error) * factor for factor in spread[row.where])
            mid = row.measured[of] / math.exp(error)
            table.append(
                {
                    "machine": machine, "row": row.name, "judged": row.judged, "where": row.where,
                    "measured": row.measured[of], "forecast": round(mid, 2), "low": round(low, 2),
                    "high": round(high, 2), "error": round(mid / row.measured[of] - 1, 4),
                    "inside": low <= row.measured[of] <= high,
                }
            )  # fmt: skip
    return table


def summary(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Median error and share inside the range over the judged rows, and over all."""
    found = {}
    for label, kept in (("judged", [r for r in table if r["judged"]]), ("all", list(table))):
        found[label] = {
            "rows": len(kept),
            "machines": len({row["machine"] for row in kept}),
            "median_error": round(statistics.median(abs(row["error"]) for row in kept), 4),
            "inside": round(sum(row["inside"] for row in kept) / len(kept), 4),
        }
    return found


def data_digest() -> str:
    """16 hex digits of the files the constants are fitted to."""
    return hashlib.sha256(
        b"".join((DATA / name).read_bytes() for name in ("machines.yaml", "published.csv"))
    ).hexdigest()[:16]


def write_constants(rows: Sequence[Row]) -> None:
    """Put the fit of all rows into qnext/plan/kernels.py, between its marks."""
    constants = {name: value for name, value in fit_all(rows).items() if not name.startswith("old")}
    lines = ["FITTED: Mapping[str, float] = {"]
    lines += [f'    "{name}": {value:.4g},' for name, value in constants.items()]
    lines += ["}", f'FIT_SOURCE = "fitted {date.today()} on {len(rows)} measurements of '
              f'{len({row.machine for row in rows})} machines (profiles/speeds)"',
              f'DATA_DIGEST = "{data_digest()}"']  # fmt: skip
    for of, name in (("decode", "DECODE_RANGE"), ("prefill", "PREFILL_RANGE")):
        lines.append(f"{name}: Mapping[str, tuple[float, float]] = {{")
        lines += [
            f'    "{where}": ({low:.3f}, {high:.3f}),'
            for where, (low, high) in ranges(unseen_errors(rows, of), of).items()
        ]
        lines.append("}")
    text = MODULE.read_text()
    block = "# fitted: begin\n" + "\n".join(lines) + "\n# fitted: end"
    MODULE.write_text(re.sub(r"# fitted: begin\n.*?# fitted: end", lambda _: block, text, flags=re.DOTALL))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument("--write", action="store_true", help="put the constants into qnext/plan/kernels.py")
    asked = parser.parse_args()
    rows = read_rows()
    if asked.write:
        write_constants(rows)
    tables = {of: judge(rows, of) for of in ("decode", "prefill")}
    found = {of: summary(table) for of, table in tables.items()}
    if asked.json:
        print(json.dumps({"digest": data_digest(), "summary": found, **tables}, indent=1))
        return
    for of, table in tables.items():
        print(f"{of}: each machine forecast without any of its rows")
        for row in sorted(table, key=lambda r: (not r["judged"], r["machine"])):
            mark = " " if row["inside"] else "!"
            judged = "judged " if row["judged"] else "teaches"
            print(
                f"  {judged} {row['machine'][:24]:24} {row['row'][:40]:40} {row['measured']:8.2f} "
                f"{row['forecast']:8.2f}  {row['error']:+6.1%} {row['low']:7.1f}-{row['high']:<7.1f}{mark}"
            )
        for label, one in found[of].items():
            print(
                f"  {label}: {one['rows']} rows of {one['machines']} machines, median error "
                f"{one['median_error']:.1%}, {one['inside']:.0%} inside the range"
            )


if __name__ == "__main__":
    main()
