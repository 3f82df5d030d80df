"""What llama.cpp's kernels make of a machine's rated speeds: the constants of the forecast, and how sure it is.

A forecast is a sum of named terms, each a time at rated speed or a count, times one constant of `FITTED`:
`*_read_*` say how many times longer than at full bandwidth reading takes, by kind of tensor type (plain floats
and Q8_0 stream; 2- to 6-bit blocks need unpacking; codebook types need table look-ups), the others are
nanoseconds. Because the sum is linear in the constants, they can be fitted to published measurements:
`scripts/fit_speed.py` does it, from profiles/speeds/published.csv, and writes this table. They are few, bounded by
what is physical and pulled towards stated beliefs, because the measurements are few too.
"""

from __future__ import annotations

from collections.abc import Mapping

ATTENTION_NODES = 60
"""Graph nodes that decoding starts for a layer of attention and experts: norms, projections, routing."""
RECURRENT_NODES = 119
"""The same for a Gated DeltaNet layer: (5013 - 12 x 60) / 36, from the 5013 nodes llama.cpp b9010 reports for
Qwen3-Next (hogeheer499-commits/strix-halo-guide, data/raw/2026-05-03)."""

_LOOKUP = ("IQ1", "IQ2", "IQ3", "TQ")
_PLAIN = ("F32", "F16", "BF16", "Q8_0")
_BACKENDS = {"ROCm": "rocm", "Vulkan": "vulkan", "MTL": "metal", "Metal": "metal"}

# fitted: begin
FITTED: Mapping[str, float] = {
    "gpu_read_plain": 1.232,
    "gpu_read_block": 1.34,
    "gpu_read_lookup": 2.211,
    "cpu_read_plain": 1.239,
    "cpu_read_block": 1.317,
    "cpu_read_lookup": 2.5,
    "gpu_node_cuda": 1141,
    "gpu_node_rocm": 2756,
    "gpu_node_vulkan": 1271,
    "gpu_node_metal": 1712,
    "cpu_node": 1.008e04,
    "crossing": 1.306e05,
    "gpu_hop": 5.549e05,
    "gpu_compute_cuda": 0.05818,
    "gpu_compute_rocm": 0.05154,
    "gpu_compute_vulkan": 0.04577,
    "gpu_compute_metal": 0.0584,
    "cpu_compute": 1.575,
    "gpu_copy": 0.7533,
}
FIT_SOURCE = "fitted on 46 published measurements of 19 machines (profiles/speeds)"
DATA_DIGEST = "261160012fe64a80"
DECODE_RANGE: Mapping[str, tuple[float, float]] = {
    "gpu": (0.696, 1.437),
    "gpus": (0.492, 2.033),
    "mixed": (0.686, 1.457),
    "cpu": (0.689, 1.451),
}
PREFILL_RANGE: Mapping[str, tuple[float, float]] = {
    "gpu": (0.449, 2.229),
    "gpus": (0.346, 2.893),
    "mixed": (0.513, 1.949),
    "cpu": (0.458, 2.185),
}
# fitted: end


def kernel_family(type_name: str) -> str:
    """`plain`, `block` or `lookup`: which kind of kernel reads a tensor type (`Q4_K`, `IQ3_XXS`)."""
    if type_name in _PLAIN:
        return "plain"
    return "lookup" if type_name.startswith(_LOOKUP) else "block"


def backend_of_device(name: str) -> str:
    """`cuda`, `rocm`, `vulkan` or `metal`, from the engine's device name (`CUDA0`, `MTL0`)."""
    return _BACKENDS.get(name.rstrip("0123456789"), "cuda")
