"""Planned memory against what people's logs say llama.cpp allocated, on machines that are not here.

The rows are profiles/memory/published.csv: one run each, sizes in MiB, `used` and the reason where not. The
flags become a placement, the model's published shape a header (`imagined_header`); of dynamic quants, whose
types differ by tensor, only what does not hang on them is compared: cache, recurrent state, compute and the
embedding on the host.

The logs with compute buffers are of llama.cpp b9010, ours is newer. Two things changed between them, and the
comparison plans for the older: logits were reserved for every token of a ubatch (`outputs_max` 0), and with
flash attention the mask was an F32 input cast to F16 on the device, where it is F16 at once since pull
request 23764; so the host's buffer held it twice as large.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from claims import Figure, claim
from qnext.models.shape import read_shape
from qnext.models.synth.imagined import imagined_header
from qnext.plan.memory import plan_memory
from qnext.plan.values import HOST, Budget, Override, Placement
from qnext.units import GIB, MIB

ROWS = Path(__file__).resolve().parent.parent / "profiles" / "memory" / "published.csv"
COMPUTE_SHARE = 0.08
COMPUTE_MIB = 64.0


@dataclass(frozen=True, slots=True)
class Compared:
    """One value of one row: MiB as planned and as published. `limit` is how far apart they may be."""

    row: str
    value: str
    planned: float
    published: float
    limit: float

    @property
    def off(self) -> float:
        """MiB between them."""
        return abs(self.planned - self.published)

    @property
    def exact(self) -> bool:
        """Whether this is a size that llama.cpp's arithmetic gives, and no estimate."""
        return not self.value.endswith("compute")

    @property
    def holds(self) -> bool:
        """Whether they agree."""
        return self.off <= self.limit


def compare_published() -> list[Compared]:
    """Every usable value of the published rows beside the plan's."""
    with ROWS.open(newline="") as lines:
        return [found for row in csv.DictReader(lines) if row["used"] == "yes" for found in _compare(row)]


def _compare(row: dict[str, str]) -> Iterator[Compared]:
    name = f"{row['model']} {row['quant']} {row['n_ctx']}".strip()
    left_out = row["not_compared"].split()
    # Published to so many digits; the plan may be half of the last one away.
    rounding = float(row["print_mib"]) * 0.501
    for value, planned in _planned(row).items():
        if not row.get(value) or value in left_out:
            continue
        published = float(row[value])
        limit = max(COMPUTE_SHARE * published, COMPUTE_MIB) if value.endswith("compute") else rounding
        yield Compared(name, value, planned / MIB, published, limit)


def _planned(row: dict[str, str]) -> dict[str, float]:
    """Bytes by column of the table."""
    header = imagined_header(row["shape"], row["header_quant"])
    shape = read_shape(header)
    placement = Placement(
        devices=tuple(row["devices"].split()),
        n_gpu_layers=-1,
        tensor_split=tuple(map(float, row["tensor_split"].split())) or None,
        overrides=tuple(Override(*rule.split("=")) for rule in row["overrides"].split()),
        context=int(row["n_ctx"] or 4096),
        ubatch=int(row["n_ubatch"] or 512),
        kv_type_k=row["kv_type"] or "f16",
        kv_type_v=row["kv_type"] or "f16",
    )
    budgets = [
        Budget(HOST, "host", 1024 * GIB, HOST),
        *(Budget(name, "gpu", 1024 * GIB, name) for name in placement.devices),
    ]
    host, *devices = plan_memory(header, shape, placement, budgets).devices
    planned: dict[str, float] = {
        "host_model": host.weights_bytes,
        "host_compute": host.compute_bytes,
        "host_output": host.other_bytes,
    }
    if row["f32_mask"]:
        planned["host_compute"] += 2 * placement.context * placement.ubatch
    for index, device in enumerate(devices):
        planned[f"gpu{index}_model"] = device.weights_bytes
        planned[f"gpu{index}_kv"] = device.kv_bytes
        planned[f"gpu{index}_rs"] = device.recurrent_bytes
        planned[f"gpu{index}_compute"] = device.compute_bytes
    planned["experts"] = sum(layer.expert_bytes for layer in shape.layer_bytes)
    planned["rest"] = sum(tensor.nbytes for tensor in header.tensors) - planned["experts"]
    return planned


@cache
def _published() -> list[Compared]:
    return compare_published()


@claim(
    "published-memory-exact",
    "planned weights, KV, recurrent and output buffers against logs of machines that are not here",
    bar="0 values off (print resolution)",
)
def measure_published_exact() -> Figure:
    exact = [found for found in _published() if found.exact]
    off = [found for found in exact if not found.holds]
    rows = len({found.row for found in exact})
    named = "".join(f"; {one.row} {one.value}: {one.planned:.2f} for {one.published}" for one in off)
    return Figure(len(off), "values off", not off, f"{len(exact)} values of {rows} published runs{named}")


@claim(
    "published-memory-compute",
    "estimated compute buffers against the same logs, planned for their older build",
    bar=f"each within {COMPUTE_SHARE:.0%} or {COMPUTE_MIB:g} MiB",
)
def measure_published_compute() -> Figure:
    compute = [found for found in _published() if not found.exact]
    worst = max(compute, key=lambda found: found.off / found.limit)
    detail = (
        f"worst of {len(compute)}: {worst.row} {worst.value}, {worst.planned:.1f} planned,"
        f" {worst.published:.1f} published"
    )
    return Figure(round(worst.off, 2), "MiB", all(found.holds for found in compute), detail)
