"""The plan for programs that place a model by themselves: Ollama and LM Studio. Only a part can be said.

Ollama: server settings are environment variables (envconfig/config.go), a model's own are PARAMETER lines of
a Modelfile (docs/modelfile, api/types.go: num_ctx, num_gpu, num_batch, num_thread). `num_ctx` counts one
conversation and is multiplied by OLLAMA_NUM_PARALLEL. It has no setting that keeps experts in RAM while their
layer is on the GPU (ollama issue 11772). LM Studio: the load settings of its SDK (LLMLoadModelConfig); its
dialog changes its labels between versions, so each stands beside the SDK's key. Its experts setting is
llama.cpp's `--n-cpu-moe`, which starts at the first layer.
"""

from __future__ import annotations

from qnext.plan.flags import server_warnings
from qnext.plan.plan import Plan
from qnext.plan.values import HOST, Placement

OLLAMA_KV_TYPES = ("f16", "q8_0", "q4_0")

MODELFILE_PREFIX = "#| "
"""Begins a line of the Modelfile, so that the whole is an environment file all the same."""


def ollama_env(plan: Plan, model: str) -> tuple[str, tuple[str, ...]]:
    """Environment variables for `ollama serve`, a Modelfile in comment lines; and what they leave out."""
    placement = plan.placement
    notes = []
    settings = {
        "OLLAMA_CONTEXT_LENGTH": str(_per_slot(placement)),
        "OLLAMA_NUM_PARALLEL": str(placement.parallel),
        "OLLAMA_MAX_LOADED_MODELS": "1",
    }
    if placement.flash_attention != "auto":
        settings["OLLAMA_FLASH_ATTENTION"] = "1" if placement.flash_attention == "on" else "0"
    if placement.kv_type_k == placement.kv_type_v and placement.kv_type_k in OLLAMA_KV_TYPES:
        settings["OLLAMA_KV_CACHE_TYPE"] = placement.kv_type_k
    else:
        notes.append(
            f"Ollama keeps the cache's keys and values alike, in one of {', '.join(OLLAMA_KV_TYPES)}, not "
            f"in {placement.kv_type_k}/{placement.kv_type_v}"
        )
    parameters = [f"FROM {_modelfile_path(model)}", f"PARAMETER num_ctx {_per_slot(placement)}"]
    parameters += [f"PARAMETER num_batch {placement.ubatch}", f"PARAMETER num_thread {placement.threads}"]
    if placement.overrides and placement.devices:
        notes.append(
            f"{_moved(plan)}: Ollama has no setting for that and would load the experts with their layers; "
            "num_gpu is left out, so that it counts the layers that fit by itself"
        )
    else:
        parameters.append(f"PARAMETER num_gpu {placement.n_gpu_layers if placement.devices else 0}")
    if len(plan.header.paths) > 1:
        notes.append("Ollama takes a model from one file: join the parts with llama-gguf-split --merge first")
    notes += _left_out(placement, ("separate threads for prefill", "the batch beside the ubatch"), "Ollama")
    body = [f"{name}={value}" for name, value in settings.items()]
    body += [
        "",
        f"# Modelfile: sed -n 's/^{MODELFILE_PREFIX}//p' FILE > Modelfile && ollama create NAME -f Modelfile",
        *(f"{MODELFILE_PREFIX}{line}" for line in parameters),
    ]
    return "".join(f"{line}\n" for line in body), tuple(notes)


def _modelfile_path(path: str) -> str:
    """A Modelfile takes the rest of the line, or what stands between double quotes."""
    return f'"{path}"' if any(one.isspace() for one in path) and '"' not in path else path


def lmstudio_notes(plan: Plan) -> tuple[str, tuple[str, ...]]:
    """What to choose in LM Studio's load dialog, and what it has no switch for."""
    placement, shape = plan.placement, plan.shape
    notes = []
    layers = min(placement.n_gpu_layers, shape.n_layer) if placement.devices else 0
    rows = [
        ("Context Length", "contextLength", str(_per_slot(placement))),
        ("GPU Offload", "gpu.ratio", f"{layers} of {shape.n_layer} layers"),
        ("CPU Thread Pool Size", "cpuThreadPoolSize", str(placement.threads)),
        ("Evaluation Batch Size", "evalBatchSize", str(placement.batch)),
        ("Physical Batch Size", "physicalBatchSize", str(placement.ubatch)),
        ("Max Concurrent Predictions", "maxParallelPredictions", str(placement.parallel)),
        ("Unified KV Cache", "useUnifiedKvCache", _switch(placement.kv_unified)),
        (
            "Offload KV Cache to GPU Memory",
            "offloadKVCacheToGpu",
            _switch(placement.kv_offload and layers > 0),
        ),
        ("Keep Model in Memory", "keepModelInMemory", _switch("mlock" in placement.load_mode)),
        ("Try mmap()", "tryMmap", _switch("mmap" in placement.load_mode)),
        ("Flash Attention", "flashAttention", _switch(placement.flash_attention != "off")),
        ("K Cache Quantization Type", "llamaKCacheQuantizationType", _cache(placement.kv_type_k)),
        ("V Cache Quantization Type", "llamaVCacheQuantizationType", _cache(placement.kv_type_v)),
    ]
    moved = placement.cpu_expert_layers
    if moved and placement.devices:
        share = f"{len(moved)} of {shape.n_layer} layers ({len(moved) / shape.n_layer:.3g})"
        rows.insert(2, ("MoE weights forced onto CPU", "gpu.numCpuExpertLayersRatio", share))
        if moved != tuple(range(len(moved))):
            notes.append(
                f"{_moved(plan)}: LM Studio takes as many from the first layer on; they weigh about the same"
            )
    elif placement.overrides and placement.devices:
        notes.append("the tensor overrides of this plan have no setting in LM Studio")
    if placement.tensor_split is not None:
        notes.append("LM Studio splits layers evenly or in order of the GPUs, not by the shares of this plan")
    notes += _left_out(placement, ("separate threads for prefill",), "LM Studio")
    width = max(len(label) + len(key) for label, key, _ in rows) + 3
    body = [f"{f'{label} ({key})':<{width}}  {value}" for label, key, value in rows]
    return "".join(f"{line}\n" for line in ("", *body)), tuple(notes)


def _per_slot(placement: Placement) -> int:
    return placement.context // placement.parallel


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _cache(kv_type: str) -> str:
    return "off (f16)" if kv_type == "f16" else kv_type


def _moved(plan: Plan) -> str:
    """`experts of 12 of 48 layers (36–47) stay in RAM`."""
    moved = plan.placement.cpu_expert_layers
    if not moved:
        return "the plan overrides where single tensors go"
    run = moved == tuple(range(moved[0], moved[-1] + 1))
    which = f"{moved[0]}–{moved[-1]}" if run else ", ".join(map(str, moved))
    return f"experts of {len(moved)} of {plan.shape.n_layer} layers ({which}) stay in RAM"


def _left_out(placement: Placement, always: tuple[str, ...], program: str) -> list[str]:
    """One note on everything of a llama-server line that these programs have no word for."""
    parts = list(always)
    if placement.rpc_servers:
        parts.append("the RPC workers")
    if placement.load_mode == "dio":
        parts.append("direct reads (load mode dio)")
    if any(override.buffer != HOST for override in placement.overrides) and server_warnings(placement):
        parts.append("the layout of the weights (CPU_REPACK)")
    parts.append("budgets for prompt cache and checkpoints")
    return [f"{program} has no setting for: {', '.join(parts)}"]
