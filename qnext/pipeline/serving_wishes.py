"""A request as the command line that makes it again: what a unit file starts `qnext serve` with."""

from __future__ import annotations

from dataclasses import fields

from qnext.pipeline.request import Request
from qnext.plan.values import Workload

_PLAIN = {
    "ram": "--ram",
    "vram": "--vram",
    "ram_headroom": "--ram-headroom",
    "vram_headroom": "--vram-headroom",
    "context": "--ctx-size",
    "batch": "--batch-size",
    "ubatch": "--ubatch-size",
    "kv_type_k": "--cache-type-k",
    "kv_type_v": "--cache-type-v",
    "flash_attention": "--flash-attn",
    "load_mode": "--load-mode",
    "threads": "--threads",
    "threads_batch": "--threads-batch",
    "repack": "--repack",
    "n_gpu_layers": "--n-gpu-layers",
    "cpu_experts": "--n-cpu-moe",
    "prefer": "--prefer",
    "min_tps": "--min-tps",
}
"""Fields whose value is written as it is."""
_TURN = {"prompt": "--n-prompt", "generate": "--n-gen", "depth": "--n-depth"}


def serve_arguments(request: Request, model: str) -> list[str]:
    """Arguments of `qnext serve` that ask for what `request` asks for, of `model`.

    A recorded or changed machine is left out: where it is started, it serves on the machine that is there.
    """
    usual = {field.name: field.default for field in fields(Request)}
    words = ["serve", model, "--parallel", "auto" if request.parallel is None else str(request.parallel)]
    for name, flag in _PLAIN.items():
        value = getattr(request, name)
        if value != usual[name]:
            words += [flag, f"{value:g}" if isinstance(value, float) else str(value)]
    for rule in request.overrides:
        words += ["--override-tensor", f"{rule.pattern}={rule.buffer}"]
    if request.tensor_split is not None:
        words += ["--tensor-split", ",".join(f"{share:.9g}" for share in request.tensor_split)]
    for device, size in request.device_memory.items():
        words += ["--device-memory", f"{device}={size}"]
    if request.rpc_servers:
        words += ["--rpc", ",".join(request.rpc_servers)]
    for name, flag in _TURN.items():
        if (tokens := getattr(request.workload, name)) != getattr(Workload(), name):
            words += [flag, str(tokens)]
    return words
