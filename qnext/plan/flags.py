"""The command-line projection of a placement: a llama-server that does exactly what the plan says.

`--fit off` goes with explicit flags, because llama.cpp's own fitting would otherwise warn and give up on
them. Overrides are written as `--n-cpu-moe N` where that says the same: it moves the experts of the first N
layers, so only when those are the ones, all of them.
"""

from __future__ import annotations

from qnext.models.shape import ModelShape
from qnext.plan.values import CPU_REPACK, HOST, Override, Placement
from qnext.units import MIB

DEFAULT_CACHE_RAM_MIB = 8192
DEFAULT_CHECKPOINTS = 32
"""llama-server's own defaults of `--cache-ram` and `--ctx-checkpoints` (common.h)."""

EXPERT_TENSORS = r"ffn_(up|down|gate_up|gate)_(ch|)exps"
"""Regex of llama.cpp's `--cpu-moe`: every routed-expert tensor of a block, fused and chunked ones too."""


def expert_pattern(layers: tuple[int, ...]) -> str:
    """Override pattern for the routed experts of these layers."""
    return rf"blk\.({'|'.join(str(layer) for layer in layers)})\.{EXPERT_TENSORS}"


def llama_server_argv(
    placement: Placement,
    model_path: str,
    shape: ModelShape,
    *,
    spare_host_bytes: int = 0,
    snapshot_bytes: int = 0,
) -> tuple[str, ...]:
    """llama-server's argument list for this placement.

    Only devices' own buffer types can be named there: overrides to others in host memory (`CPU_REPACK`,
    `CUDA_Host`) become plain CPU ones and `server_warnings` says so. `spare_host_bytes` is host memory that
    the plan leaves: the server's own caches, 8 GiB and 32 snapshots of the recurrent state per slot by
    default, are held inside it. `snapshot_bytes` is the size of that state for one slot.
    """
    flags = ["llama-server", "-m", model_path, "--fit", "off"]
    if placement.rpc_servers:  # before everything that names one of their devices or buffers
        flags += ["--rpc", ",".join(placement.rpc_servers)]
    flags += ["--device", ",".join(placement.devices) or "none", "-ngl", str(placement.n_gpu_layers)]
    flags += _override_flags(placement, shape)
    if placement.tensor_split is not None:
        flags += ["-ts", ",".join(f"{share:.9g}" for share in placement.tensor_split)]
    flags += ["-c", str(placement.context), "-b", str(placement.batch), "-ub", str(placement.ubatch)]
    flags += ["-ctk", placement.kv_type_k, "-ctv", placement.kv_type_v, "-fa", placement.flash_attention]
    flags += ["-t", str(placement.threads), "-tb", str(placement.threads_batch)]
    flags += ["-np", str(placement.parallel), "--load-mode", placement.load_mode]
    flags.append("--repack" if placement.extra_buffers else "--no-repack")
    flags.append("--kv-unified" if placement.kv_unified else "--no-kv-unified")
    if not placement.kv_offload:
        flags.append("--no-kv-offload")
    if not placement.op_offload:
        flags.append("--no-op-offload")
    if placement.swa_full:
        flags.append("--swa-full")
    return (*flags, *_server_caches(placement, spare_host_bytes, snapshot_bytes))


def server_warnings(placement: Placement) -> tuple[str, ...]:
    """What the command line cannot say of this placement."""
    warnings = []
    buffers = {override.buffer for override in placement.overrides}
    if CPU_REPACK in buffers:
        warnings.append(
            "llama-server cannot name CPU_REPACK: started by hand it keeps the experts as they are in the "
            "file, a little slower than qnext runs them"
        )
    warnings += [
        f"llama-server cannot name {buffer}: its line says CPU there, which is the same memory, not pinned"
        for buffer in sorted(buffers - {CPU_REPACK})
        if _is_host_buffer(buffer)
    ]
    return tuple(warnings)


def _is_host_buffer(buffer: str) -> bool:
    """Whether a buffer type lies in host memory: `CPU_REPACK`, and the pinned `CUDA_Host`, `Vulkan_Host`…"""
    return buffer == CPU_REPACK or buffer.endswith("_Host")


def _server_caches(placement: Placement, spare: int, snapshot: int) -> list[str]:
    """At most half of what is spare for the slots' snapshots, the rest for the cache of earlier prompts."""
    per_step = max(1, placement.parallel) * snapshot
    checkpoints = min(DEFAULT_CHECKPOINTS, spare // 2 // per_step) if per_step else DEFAULT_CHECKPOINTS
    cache_mib = min(DEFAULT_CACHE_RAM_MIB, (spare - checkpoints * per_step) // MIB)
    return ["--ctx-checkpoints", str(checkpoints), "--cache-ram", str(cache_mib)]


def _override_flags(placement: Placement, shape: ModelShape) -> list[str]:
    moved = placement.cpu_expert_layers
    rule = Override(expert_pattern(moved), HOST) if moved else None
    if rule is not None and placement.overrides == (rule,):
        if moved == tuple(range(shape.n_layer_all if placement.load_mtp else shape.n_layer)):
            return ["--cpu-moe"]
        if moved == tuple(range(len(moved))):
            return ["--n-cpu-moe", str(len(moved))]
    plain = [
        f"{override.pattern}={HOST if _is_host_buffer(override.buffer) else override.buffer}"
        for override in placement.overrides
        if override.buffer != CPU_REPACK or placement.devices
    ]
    return ["-ot", ",".join(plain)] if plain else []
