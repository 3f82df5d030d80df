"""What llama.cpp's kernels make of a machine's rated speeds: the forecast's constants, and how sure it is.

A forecast is a sum of named terms, each a time at rated speed or a count, times one constant of `FITTED`:

- `*_read_*`: how many times longer than at full bandwidth reading takes, by kind of tensor type (floats and
  Q8_0 stream, blocks of 2 to 6 bits need unpacking, codebook types need look-ups in tables);
- `*_node*`, `crossing`, `gpu_hop`: nanoseconds for a graph node, for a layer whose experts are in RAM, for
  each further GPU;
- `gpu_compute_*`: bytes of bandwidth per operation of prefill; `cpu_compute`: times longer than at
  `GFLOPS_PER_CORE`; `gpu_copy`: times longer than the link's rate, for all experts chosen evenly (below 1,
  because tokens do not choose evenly and fewer are copied).

Because the sum is linear in the constants, they can be fitted to published measurements:
`scripts/fit_speed.py` does it, from profiles/speeds/published.csv, and writes this table. They are few,
bounded by what is physical and pulled towards stated beliefs, because the measurements are few too. The
ranges are as wide as 80 % of the measurements need whose machine was left out of the fit, by where the
weights are (`qnext.plan.speed.situation`).
"""

from __future__ import annotations

from collections.abc import Mapping

from qnext.plan.speed_history import Spread

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
    "gpu_read_block": 1.337,
    "gpu_read_lookup": 2.187,
    "cpu_read_plain": 1.24,
    "cpu_read_block": 1.39,
    "cpu_read_lookup": 2.5,
    "gpu_node_cuda": 1125,
    "gpu_node_rocm": 2786,
    "gpu_node_vulkan": 1279,
    "gpu_node_metal": 1771,
    "cpu_node": 1402,
    "crossing": 1.255e05,
    "gpu_hop": 5.194e05,
    "gpu_compute_cuda": 0.05955,
    "gpu_compute_rocm": 0.05083,
    "gpu_compute_vulkan": 0.04412,
    "gpu_compute_metal": 0.06023,
    "cpu_compute": 1.367,
    "gpu_copy": 0.7478,
}
FIT_SOURCE = "fitted 2026-11-21 on 52 measurements of 20 machines (profiles/speeds)"
DATA_DIGEST = "71f6a26fd25ab9fc"
DECODE_RANGE: Mapping[str, tuple[float, float]] = {
    "gpu": (0.651, 1.536),
    "gpus": (0.486, 2.059),
    "mixed": (0.668, 1.497),
    "cpu": (0.535, 1.870),
}
PREFILL_RANGE: Mapping[str, tuple[float, float]] = {
    "gpu": (0.452, 2.215),
    "gpus": (0.348, 2.877),
    "mixed": (0.521, 1.920),
    "cpu": (0.520, 1.922),
}
# fitted: end

# How alike the errors of one machine are, by `scripts/fit_history.py` from the same measurements.
# fitted history: begin
DECODE_SPREAD = Spread(machine=0.335, model=0.136, test=0.063)
PREFILL_SPREAD = Spread(machine=0.497, model=0.179, test=0.107)
HISTORY_DIGEST = "71f6a26fd25ab9fc"
# fitted history: end


def kernel_family(type_name: str) -> str:
    """`plain`, `block` or `lookup`: which kind of kernel reads a tensor type (`Q4_K`, `IQ3_XXS`)."""
    if type_name in _PLAIN:
        return "plain"
    return "lookup" if type_name.startswith(_LOOKUP) else "block"


def backend_of_device(name: str) -> str:
    """`cuda`, `rocm`, `vulkan` or `metal`, from the engine's device name (`CUDA0`, `MTL0`)."""
    return _BACKENDS.get(name.rstrip("0123456789"), "cuda")
