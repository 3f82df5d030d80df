"""Headers and problems for the planner's tests: real headers of tiny models, budgets as the test says."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.shape import ModelShape, read_shape
from qnext.models.synth import synthesise
from qnext.plan.options import PlanOptions
from qnext.plan.placement import Problem
from qnext.plan.speed import MachineSpeeds
from qnext.plan.traits import device_traits, host_traits
from qnext.plan.values import HOST, Budget
from qnext.units import GIB

MIXTURES = (
    "tiny-qwen3next",
    "tiny-qwen3next-ssm-in",
    "tiny-qwen3next-fused",
    "tiny-qwen3next-mtp",
    "tiny-qwen3moe",
    "tiny-gpt-oss",
)
DENSE = "tiny-qwen3"
AVX512 = ("avx", "avx2", "avx512f", "f16c", "fma")
SPEEDS = MachineSpeeds(50_000_000_000, "given", {"CUDA0": 500_000_000_000}, 8, "avx2")


@cache
def model(name: str, quant: str = "Q4_K_M", layers: int | None = None) -> tuple[ModelHeader, ModelShape]:
    """Header and shape of a synthetic model; the file itself is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}-{quant}.gguf"
        synthesise(name, path, quant=quant, layers=layers, header_only=True)
        header = read_header(path)
    return header, read_shape(header)


def problem(
    name: str = "tiny-qwen3next",
    gpus: Mapping[str, int] | None = None,
    *,
    host: int = 64 * GIB,
    features: tuple[str, ...] = AVX512,
    compute: Mapping[str, int] | None = None,
    **options: object,
) -> Problem:
    """A problem with devices named as the engine does (`CUDA0`, `RPC0`), budgets in bytes."""
    header, shape = model(name)
    budgets = [Budget(HOST, "host", host, HOST)]
    servers = []
    for device, size in (gpus or {}).items():
        if device.startswith("RPC"):
            servers.append(f"127.0.0.1:{50052 + len(servers)}")
            budgets.append(Budget(device, "rpc", size, f"RPC0[{servers[-1]}]"))
        else:
            budgets.append(Budget(device, "gpu", size, device))
    traits = {HOST: host_traits(features)}
    for budget in budgets[1:]:
        traits[budget.name] = device_traits(budget, free_bytes=budget.budget_bytes)
    return Problem(
        header,
        shape,
        tuple(budgets),
        traits,
        PlanOptions(**options),  # type: ignore[arg-type]
        compute,
        tuple(servers),
    )


def expert_bytes(name: str) -> int:
    """All routed experts of the trunk."""
    shape = model(name)[1]
    return sum(layer.expert_bytes for layer in shape.layer_bytes[: shape.n_layer])
