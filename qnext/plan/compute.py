"""An estimate of the compute buffers, for when there is no engine to simulate the allocation.

llama.cpp reserves, per device, the most that one ubatch's graph holds at once. Three moments compete, and the
largest counts (sizes per token, in 32-bit values, times the ubatch):

- the feed-forward part of a layer: gate, up and their product, one after another (`used × ff` each), and the
  experts' outputs (`used × embd`) unless they fit in the hole that gate and up left, beside a few rows of
  `embd` and one of the query;
- the attention part: with flash attention little; without, all scores (`heads × context`); a DeltaNet layer
  holds its convolution about 1.5 times and its values about 3.75 times;
- the logits: `vocabulary` for each token that yields an output.

The attention mask (f16, context × ubatch) lies beside the first two. Several devices that hold all layers
work in a pipeline, for which each, and the host, keeps four copies of what it is sent: the mask and the layer
before.

The constants were read off 744 dry runs of llama.cpp 0.5.0 over the shapes of Qwen3-Next-80B, Qwen3-30B-A3B,
gpt-oss-20b and Qwen3-8B, ubatch 128 to 4096, context 4k to 262k, on the CPU and with an RPC device holding
all, half, or all but the experts: the estimate is within 10 % of each (`scripts/bench_memory_exact.py`
measures it); and off two devices in a pipeline, within 4 %. Other shapes may be further off, up to a third,
because best-fit allocation leaves holes or not: so may a second device beside experts on the host. Experts of
the last layer alone on the CPU are overestimated, since the engine drops the tokens without output before
them. What a CUDA device copies of CPU experts for large batches is taken from the scheduler's source, not
measured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from qnext.models.shape import ModelShape, is_expert, layer_of
from qnext.plan.cache import ContextSizes, context_sizes, sliding_cells
from qnext.plan.identity import Same
from qnext.plan.traits import DeviceTraits
from qnext.plan.values import HOST, OFFLOAD_MIN_TOKENS, Placement
from qnext.plan.weights import PlacedTensor

_COPIES = 4
"""GGML_SCHED_MAX_COPIES of ggml-backend.cpp."""

_DOWN = re.compile(r"\.ffn_down(?:_exps)?\.weight$")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Sizes of one ubatch's tensors in bytes."""

    embd: int
    query: int
    gate: int
    experts_out: int
    mask: int
    scores: int
    logits: int
    delta_net: int


def estimate_compute(
    shape: ModelShape,
    placement: Placement,
    placed: tuple[PlacedTensor, ...],
    layer_device: tuple[str, ...],
    devices: Sequence[DeviceTraits],
) -> dict[str, int]:
    """Estimated compute buffer of the host and of each device, in bytes.

    `placed` tells where the feed-forward weights of each layer are, `layer_device` (`layer_devices`) where
    the rest of it and the output run.
    """
    rows = _rows(shape, placement, context_sizes(shape, placement))
    asked = (Same(shape), Same(placed), layer_device, tuple(devices))
    feed_forward = _feed_forward_devices(*asked)
    copies = placement.op_offload and context_sizes(shape, placement).ubatch >= OFFLOAD_MIN_TOKENS
    copied = _copied_experts(*asked) if copies else {}
    pipeline = _works_in_pipeline(placement, layer_device, feed_forward)
    sent = _COPIES * (rows.mask + rows.embd) if pipeline else rows.mask
    estimates = {}
    for name in (HOST, *(device.name for device in devices)):
        here = [il for il in range(shape.n_layer) if layer_device[il] == name]
        both = [il for il in here if feed_forward[il] == name or name in copied]
        visited = [il for il in range(shape.n_layer) if feed_forward[il] == name and il not in here]
        if copied and name == HOST:
            visited = []
        peaks = [0]
        if name == HOST and devices:
            peaks.append(sent + (1 if pipeline else 2) * rows.embd)
        if both:
            own_input = rows.embd if name == HOST and layer_device[0] == HOST else 0
            base = _layer_base(shape, rows) + own_input - rows.embd
            if name != layer_device[0] and shape.experts and not pipeline:
                base += rows.embd
            peaks.append(sent + base + _feed_forward(rows, _hole(shape, rows)))
        if len(both) < len(here):
            peaks.append(sent + _without_experts(shape, rows))
        if here:
            peaks.append(_attention(shape, placement, rows) + sent - rows.mask)
        if visited:
            peaks.append(_visited(rows, mask_waits=min(visited) < _last_mask_reader(shape, layer_device)))
        if layer_device[-1] == name:
            last_elsewhere = feed_forward[-1] != name
            returned = rows.experts_out // (2 if both else 1) if last_elsewhere else 0
            peaks.append(_output(shape, rows, on_host=name == HOST, returned=returned) + sent * pipeline)
        estimates[name] = max(peaks) + copied.get(name, 0)
    return estimates


def _rows(shape: ModelShape, placement: Placement, sizes: ContextSizes) -> _Rows:
    tokens = min(sizes.context, sizes.ubatch)
    mask_width = 2 if placement.flash_attention != "off" else 4
    cells = sizes.context_per_sequence
    if shape.sliding_window:
        cells += sliding_cells(shape, placement, sizes)
    used = shape.experts_used or 1
    width = shape.expert_feed_forward if shape.experts else shape.feed_forward
    heads = max(shape.head_count, default=0)
    value = shape.ssm_heads * shape.ssm_state
    conv = value + 2 * shape.ssm_groups * shape.ssm_state
    word = 4 * tokens
    return _Rows(
        embd=shape.n_embd * word,
        query=heads * shape.key_length * word,
        gate=used * width * word,
        experts_out=used * shape.n_embd * word,
        mask=cells * tokens * mask_width,
        scores=heads * sizes.context_per_sequence * word,
        logits=min(tokens, sizes.outputs) * shape.n_vocab * 4,
        delta_net=(conv * 6 + value * 15) * word // 4,
    )


def _feed_forward(rows: _Rows, hole: int) -> int:
    """Gate, up and product, and the outputs: what of it does not fit into the holes other tensors left."""
    gate, out = rows.gate, rows.experts_out
    fitting = 3 if 3 * gate <= hole + rows.embd else min(2, hole // gate)
    kept = max(0, 2 - fitting) * gate
    return (3 - fitting) * gate + (out if out > kept else 0)


def _hole(shape: ModelShape, rows: _Rows) -> int:
    return rows.embd if any(shape.recurrent) else rows.query


def _layer_base(shape: ModelShape, rows: _Rows) -> int:
    return 3 * rows.embd + _hole(shape, rows)


def _without_experts(shape: ModelShape, rows: _Rows) -> int:
    """A layer whose experts run elsewhere: their outputs come back, beside the shared expert's if any."""
    if any(shape.recurrent):
        return max(2 * rows.experts_out + 2 * rows.embd, rows.embd + rows.delta_net)
    return rows.experts_out + 2 * rows.embd + rows.query


def _visited(rows: _Rows, *, mask_waits: bool) -> int:
    """Experts on the host of layers that run elsewhere; the mask waits there for the first who reads it."""
    work = _feed_forward(rows, rows.embd // 2)
    if mask_waits:
        return rows.mask + 2 * rows.embd + work
    beside_mask = rows.mask + rows.experts_out + rows.embd if rows.mask < work else 0
    return max(work + 3 * rows.embd, beside_mask)


def _attention(shape: ModelShape, placement: Placement, rows: _Rows) -> int:
    peak = rows.mask + 2 * rows.embd + rows.delta_net if any(shape.recurrent) else 0
    if placement.flash_attention == "off":
        peak = max(peak, rows.scores + rows.mask + 8 * rows.embd)
    return peak


def _output(shape: ModelShape, rows: _Rows, *, on_host: bool, returned: int) -> int:
    """`returned` is what other devices' experts sent back last; half of it where the allocator may or may
    not find another place for it."""
    peak = rows.logits + 3 * rows.embd
    if any(shape.recurrent):
        if returned:
            peak += returned
        elif on_host and rows.mask < rows.experts_out:
            peak += rows.mask
        else:
            peak += min(rows.mask, rows.embd)
    return peak


def _last_mask_reader(shape: ModelShape, layer_device: Sequence[str]) -> int:
    """Where the last device first reads the whole context's mask; until then the mask waits on the host."""
    first: dict[str, int] = {}
    for layer in shape.attention_layers:
        if not shape.sliding[layer]:
            first.setdefault(layer_device[layer], layer)
    return max(first.values(), default=0)


def _works_in_pipeline(
    placement: Placement, layer_device: Sequence[str], feed_forward: Sequence[str]
) -> bool:
    """Whether devices take turns at several ubatches (`llama_context`): nothing but the input on the host.

    They must be asynchronous and know events, which is so of CUDA's family, Vulkan, Metal and RPC.
    """
    return (
        len(placement.devices) > 1
        and placement.kv_offload
        and not placement.overrides
        and HOST not in layer_device
        and all(own == experts for own, experts in zip(layer_device, feed_forward, strict=False))
    )


@lru_cache(maxsize=16)
def _feed_forward_devices(
    same_shape: Same[ModelShape],
    placed: Same[tuple[PlacedTensor, ...]],
    layer_device: tuple[str, ...],
    devices: tuple[DeviceTraits, ...],
) -> Sequence[str]:
    """Device that multiplies the down projection of each trunk layer."""
    shape = same_shape.value
    own = {device.buffer_type: device.name for device in devices}
    found = list(layer_device[: shape.n_layer])
    for item in placed.value:
        layer = layer_of(item.tensor.name)
        if layer is not None and layer < shape.n_layer and _DOWN.search(item.tensor.name):
            found[layer] = own.get(item.buffer, HOST)
    return found


@lru_cache(maxsize=16)
def _copied_experts(
    same_shape: Same[ModelShape],
    placed: Same[tuple[PlacedTensor, ...]],
    layer_device: tuple[str, ...],
    devices: tuple[DeviceTraits, ...],
) -> Mapping[str, int]:
    """Room for one expert matrix per GPU that multiplies CPU experts itself for large batches.

    Only matrices in plain or pinned host memory can be copied; one is held at a time (ggml-backend.cpp,
    ggml_backend_sched_split_graph).
    """
    shape = same_shape.value
    gpus = {device.name for device in devices if device.kind == "gpu"}
    plain = {HOST, *(device.host_buffer for device in devices if device.host_buffer)}
    copies: dict[str, int] = {}
    for item in placed.value:
        layer = layer_of(item.tensor.name)
        if layer is None or layer >= shape.n_layer or not is_expert(item.tensor.name):
            continue
        device = layer_device[layer]
        if device in gpus and item.buffer in plain:
            copies[device] = max(copies.get(device, 0), item.tensor.nbytes)
    return copies
