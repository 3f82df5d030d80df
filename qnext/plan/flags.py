"""The command-line projection of a placement: a llama-server that does exactly what the plan says.

`--fit off` goes with explicit flags, because llama.cpp's own fitting would otherwise warn and give up on
them. Overrides are written as `--n-cpu-moe N` where that says the same: it moves the experts of the first N
layers, so only when those are the ones, all of them.
"""

from __future__ import annotations

from qnext.models.shape import ModelShape
from qnext.plan.expert_rules import expert_pattern
from qnext.plan.host_caches import HostCaches
from qnext.plan.values import CPU_REPACK, HOST, Override, Placement
from qnext.units import MIB


def llama_server_argv(
    placement: Placement,
    model_path: str,
    shape: ModelShape,
    caches: HostCaches,
) -> tuple[str, ...]:
    """llama-server's argument list for this placement.

    Only devices' own buffer types can be named there: overrides to others in host memory (`CPU_REPACK`,
    `CUDA_Host`) become plain CPU ones and `server_warnings` says so. The server's own caches are
    held to `caches`.
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
    flags += ["--ctx-checkpoints", str(caches.checkpoints)]
    return (*flags, "--cache-ram", str(caches.prompt_cache_bytes // MIB))


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
