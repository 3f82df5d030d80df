"""Inherited environment variables that change what an engine does, and what each of them changes.

llama.cpp's programs take every flag from `LLAMA_ARG_*` as well; the engine child does not get those. `GGML_*`
and the other `LLAMA_*` are read deep inside the library (`getenv` in ggml/src and src of the pinned release),
so they reach the child, as do the variables of the CUDA and ROCm drivers, OpenMP and the C library. Values go
into reports: only small numbers and a few known words are kept, because a value may be a secret or a path.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Inherited:
    """A variable that is set. `value` is None where it is none of the harmless ones.

    `reaches_engine`: the engine child gets it and acts on it. `effect` is one sentence.
    """

    name: str
    value: str | None
    reaches_engine: bool
    effect: str


_ENGINE = {
    "GGML_OP_OFFLOAD_MIN_BATCH": "Sets from how many tokens a prompt is multiplied on the GPU with weights "
    "that live in RAM (32 by default).",
    "GGML_CUDA_DEVICES": "Shows this many CUDA devices, imagined ones included.",
    "GGML_CUDA_DISABLE_GRAPHS": "Switches CUDA graphs off: each token waits for more launches.",
    "GGML_CUDA_DISABLE_FUSION": "Switches fused CUDA kernels off.",
    "GGML_CUDA_ENABLE_UNIFIED_MEMORY": "Lets VRAM spill into RAM: nothing runs out, and what spills is slow.",
    "GGML_CUDA_NO_PINNED": "Takes ordinary instead of page-locked RAM: copies to the GPU are slower.",
    "GGML_CUDA_REGISTER_HOST": "Page-locks the mapped model file: copies to the GPU are faster.",
    "GGML_CUDA_P2P": "Lets GPUs copy to each other without passing through RAM.",
    "GGML_CUDA_CUBLAS_COMPUTE_TYPE": "Sets the precision of CUDA matrix multiplication.",
    "GGML_CUDA_MMQ_PREC": "Sets the precision of quantised CUDA matrix multiplication.",
    "GGML_DISABLE_VULKAN": "Hides all Vulkan devices.",
    "GGML_VK_VISIBLE_DEVICES": "Chooses and numbers the Vulkan devices.",
    "GGML_VK_PREFER_HOST_MEMORY": "Puts Vulkan buffers into RAM instead of VRAM.",
    "GGML_VK_ALLOW_SYSMEM_FALLBACK": "Lets Vulkan buffers spill into RAM when VRAM is full.",
    "GGML_METAL_DEVICES": "Shows this many Metal devices.",
    "GGML_CPU_DISABLE_FUSION": "Switches fused CPU kernels off.",
    "GGML_CPU_TILED_MM": "Switches the tiled CPU matrix multiplication, and with it the speed of prompts.",
    "GGML_BACKEND_PATH": "Loads one more backend library from a file.",
    "GGML_SCHED_DEBUG": "Logs every graph, which slows each token.",
    "GGML_NO_BACKTRACE": "Leaves out the stack trace of a crash; qnext sets it itself.",
    "GGML_RPC_NO_RDMA": "Keeps RPC workers on plain TCP.",
    "LLAMA_ATTN_ROT_DISABLE": "Stores a quantised KV cache without rotation: the same size, less exact.",
    "LLAMA_GRAPH_REUSE_DISABLE": "Builds the graph anew for every token, which slows each.",
    "LLAMA_CPP_LIB_PATH": "Loads llama.cpp from another folder than the installed engine's.",
    "CUDA_VISIBLE_DEVICES": "Chooses and numbers the NVIDIA GPUs.",
    "CUDA_DEVICE_ORDER": "Sets the order in which CUDA numbers the GPUs.",
    "CUDA_LAUNCH_BLOCKING": "Makes every CUDA kernel wait for its end.",
    "HIP_VISIBLE_DEVICES": "Chooses and numbers the AMD GPUs.",
    "ROCR_VISIBLE_DEVICES": "Chooses and numbers the AMD GPUs, below HIP.",
    "HSA_OVERRIDE_GFX_VERSION": "Makes ROCm take the AMD GPU for another model.",
    "ONEAPI_DEVICE_SELECTOR": "Chooses the Intel GPUs.",
    "OMP_NUM_THREADS": "Sets OpenMP's threads where nothing else does; the planned threads win.",
    "OMP_THREAD_LIMIT": "Bounds the engine's threads, whatever was planned.",
    "OMP_DYNAMIC": "Lets OpenMP take fewer threads than planned.",
    "OMP_PROC_BIND": "Ties the engine's threads to CPUs.",
    "OMP_PLACES": "Names the CPUs that the engine's threads are tied to.",
    "OMP_WAIT_POLICY": "Sets whether the engine's threads spin or sleep between tokens.",
    "GOMP_CPU_AFFINITY": "Ties the engine's threads to the CPUs it lists.",
    "GOMP_SPINCOUNT": "Sets how long the engine's threads spin before they sleep.",
    "LD_PRELOAD": "Loads another library into every program, the engine included.",
    "DYLD_INSERT_LIBRARIES": "Loads another library into every program, the engine included.",
}
"""Variables the engine child acts on."""

_ENGINE_FAMILIES = {
    "GGML_CUDA_": "Is a switch of the CUDA backend.",
    "GGML_VK_": "Is a switch of the Vulkan backend.",
    "GGML_VULKAN_": "Is a switch of the Vulkan backend.",
    "GGML_METAL_": "Is a switch of the Metal backend.",
    "GGML_SYCL_": "Is a switch of the SYCL backend.",
    "GGML_OPENCL_": "Is a switch of the OpenCL backend.",
    "GGML_CANN_": "Is a switch of the CANN backend.",
    "GGML_OPENVINO_": "Is a switch of the OpenVINO backend.",
    "GGML_HEXAGON_": "Is a switch of the Hexagon backend.",
    "GGML_KLEIDIAI_": "Is a switch of the KleidiAI kernels of Arm CPUs.",
    "GGML_SCHED_": "Is a debugging switch of the scheduler.",
    "GGML_RPC_": "Is a switch of the RPC backend.",
    "GGML_RDMA_": "Chooses the network device of RPC.",
    "GGML_": "Is a switch of ggml.",
    "LLAMA_": "Is a switch of llama.cpp; not every release knows it.",
    "KMP_": "Is a switch of Intel's OpenMP: threads, their places and how long they spin.",
    "MALLOC_": "Is a switch of the C library's memory allocation.",
}
"""The same by prefix, the longest that fits."""

_ELSEWHERE = {
    "LLAMA_SET_ROWS": "Chose how older llama.cpp wrote the KV cache; this release does not read it.",
    "LLAMA_API_KEY": "Is the key llama-server asks clients for; qnext's engine has none.",
    "LLAMA_CACHE": "Moves llama.cpp's downloads.",
    "LLAMA_SERVER_": "Is a switch of llama-server; qnext's engine is none.",
    "LLAMA_ARG_": "Is a flag for llama-server and its relatives; qnext keeps it from its engine.",
    "OLLAMA_": "Is a setting of Ollama; qnext's engine does not read it.",
    "HF_HOME": "Moves the Hugging Face cache, where models are looked for and downloaded.",
    "HF_HUB_CACHE": "Moves the Hugging Face cache, where models are looked for and downloaded.",
    "HUGGINGFACE_HUB_CACHE": "Moves the Hugging Face cache, where models are looked for and downloaded.",
    "HF_HUB_OFFLINE": "Forbids downloads from Hugging Face.",
    "HF_ENDPOINT": "Downloads from another host than Hugging Face's.",
    "HF_TOKEN": "Is the key for Hugging Face.",
}
"""Names, or prefixes ending in `_`, of what changes other programs, or where models are."""

_SAFE_VALUE = re.compile(
    r"-?\d{1,6}(,-?\d{1,4}){0,15}|on|off|true|false|yes|no|close|spread|master|primary|active|passive"
    r"|PCI_BUS_ID|FASTEST_FIRST|",
    re.IGNORECASE,
)
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|AUTH")


def inherited(environ: Mapping[str, str] | None = None) -> tuple[Inherited, ...]:
    """The variables set in `environ` (default: this process's) that matter to an engine, sorted by name."""
    environ = os.environ if environ is None else environ
    found = []
    for name, value in sorted(environ.items()):
        known = _look_up(name)
        if known is not None:
            harmless = not _SECRET.search(name) and _SAFE_VALUE.fullmatch(value)
            found.append(Inherited(name, value if harmless else None, *known))
    return tuple(found)


def _look_up(name: str) -> tuple[bool, str] | None:
    """(whether it reaches the engine, its effect) of a variable; None for one that is none of ours."""
    for reaches, table in ((False, _ELSEWHERE), (True, _ENGINE), (True, _ENGINE_FAMILIES)):
        if name in table and not name.endswith("_"):
            return reaches, table[name]
        fitting = [known for known in table if known.endswith("_") and name.startswith(known)]
        if fitting:
            return reaches, table[max(fitting, key=len)]
    return None
