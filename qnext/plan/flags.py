"""The command-line projection of a placement: a llama-server that does exactly what the plan says.

`--fit off` goes with explicit flags, because llama.cpp's own fitting would otherwise warn and give up on
them. Overrides are written as `--n-cpu-moe N` where that says the same: it moves the experts of the first N
layers, so only when those are the ones, all of them.
"""

from __future__ import annotations

from qnext.models.shape import ModelShape
from qnext.plan.values import CPU_REPACK, HOST, Override, Placement

EXPERT_TENSORS = r"ffn_(up|down|gate_up|gate)_(ch|)exps"
"""Regex of llama.cpp's `--cpu-moe`: every routed-expert tensor of a block, fused and chunked ones too."""


def expert_pattern(layers: tuple[int, ...]) -> str:
    """Override pattern for the routed experts of these layers."""
    return rf"blk\.({'|'.join(str(layer) for layer in layers)})\.{EXPERT_TENSORS}"


def llama_server_argv(placement: Placement, model_path: str, shape: ModelShape) -> tuple[str, ...]:
    """llama-server's argument list for this placement.

    Extra CPU buffer types (`CPU_REPACK`) cannot be named there: such overrides become plain CPU ones and
    `server_warnings` says so.
    """
    flags = ["llama-server", "-m", model_path, "--fit", "off"]
    if placement.rpc_servers:
        flags += ["--rpc", ",".join(placement.rpc_servers)]
    flags += ["--device", ",".join(placement.devices) or "none", "-ngl", str(placement.n_gpu_layers)]
    flags += _override_flags(placement, shape)
    if placement.tensor_split is not None:
        flags += ["-ts", ",".join(f"{share:g}" for share in placement.tensor_split)]
    flags += ["-c", str(placement.context), "-b", str(placement.batch), "-ub", str(placement.ubatch)]
    flags += ["-ctk", placement.kv_type_k, "-ctv", placement.kv_type_v, "-fa", placement.flash_attention]
    flags += [
        "-t",
        str(placement.threads),
        "-tb",
        str(placement.threads_batch),
        "-np",
        str(placement.parallel),
    ]
    flags += ["--load-mode", placement.load_mode]
    if not placement.extra_buffers:
        flags.append("--no-repack")
    flags.append("--kv-unified" if placement.kv_unified else "--no-kv-unified")
    if not placement.kv_offload:
        flags.append("--no-kv-offload")
    if not placement.op_offload:
        flags.append("--no-op-offload")
    return tuple(flags)


def server_warnings(placement: Placement) -> tuple[str, ...]:
    """What the command line cannot say of this placement."""
    if any(override.buffer == CPU_REPACK for override in placement.overrides):
        return (
            "llama-server cannot name CPU_REPACK: started by hand it keeps the experts as they are in the "
            "file, a little slower than qnext runs them",
        )
    return ()


def _override_flags(placement: Placement, shape: ModelShape) -> list[str]:
    moved = placement.cpu_expert_layers
    rule = Override(expert_pattern(moved), HOST) if moved else None
    if rule is not None and placement.overrides == (rule,):
        if moved == tuple(range(shape.n_layer)):
            return ["--cpu-moe"]
        if moved == tuple(range(len(moved))):
            return ["--n-cpu-moe", str(len(moved))]
    plain = [
        f"{override.pattern}={override.buffer}"
        for override in placement.overrides
        if override.buffer != CPU_REPACK or placement.devices
    ]
    plain = [text.replace(f"={CPU_REPACK}", f"={HOST}") for text in plain]
    return ["-ot", ",".join(plain)] if plain else []
