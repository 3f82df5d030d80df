"""The memory a context holds on to: attention cache, recurrent state and the output buffer, to the byte.

Sources: the constructor of `llama_context` (how `-c`, `-b`, `-ub` and `-np` become sizes), `llama_kv_cache`,
`llama_kv_cache_iswa` (sliding windows), `llama_memory_hybrid` and `llama_memory_recurrent`. Layers keep
their cache on the device that holds their weights by rank, whatever tensor overrides say, or all on the
host with `--no-kv-offload`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qnext.config import KV_TYPES
from qnext.errors import UsageError
from qnext.models.gguf_types import GGML_TYPES_BY_NAME
from qnext.models.shape import ModelShape
from qnext.plan.traits import FLOAT_TYPES, DeviceTraits, host_traits, pad
from qnext.plan.values import HOST, Placement

_PLAIN = host_traits()
_STEP = 256  # contexts and sliding windows are multiples of this


@dataclass(frozen=True, slots=True)
class ContextSizes:
    """What llama.cpp makes of the wished-for context: tokens in total and per sequence, batch and ubatch.

    `streams` is the number of separate caches (1 when unified); `outputs` the most logits rows of a batch.
    """

    context: int
    context_per_sequence: int
    batch: int
    ubatch: int
    streams: int
    outputs: int


def context_sizes(shape: ModelShape, placement: Placement) -> ContextSizes:
    """The engine's own sizes for a placement. Context 0 means the model's trained context."""
    wished = placement.context or shape.context_train
    sequences = max(1, placement.parallel)
    batch = min(wished, placement.batch)
    ubatch = min(batch, placement.ubatch or placement.batch)
    context = pad(wished, _STEP)
    per_sequence = context
    if not placement.kv_unified:
        per_sequence = pad(context // sequences, _STEP)
        context = per_sequence * sequences
    return ContextSizes(
        context=context,
        context_per_sequence=per_sequence,
        batch=batch,
        ubatch=ubatch,
        streams=1 if placement.kv_unified else sequences,
        outputs=placement.outputs_max or batch,
    )


def kv_bytes(
    shape: ModelShape,
    placement: Placement,
    layer_device: Sequence[str],
    traits: Mapping[str, DeviceTraits],
) -> dict[str, int]:
    """Attention cache per device: sum of the engine's "KV buffer size" lines.

    `layer_device` is `layer_devices(...)`, `traits` maps device names to traits. Raises UsageError for a
    cache type the engine has not, or cannot use with this model.
    """
    sizes = context_sizes(shape, placement)
    totals: dict[str, int] = defaultdict(int)
    for layer in shape.attention_layers:
        sliding = shape.sliding[layer]
        cells = sliding_cells(shape, placement, sizes) if sliding else sizes.context_per_sequence
        heads = shape.head_count_kv[layer]
        k_row = heads * (shape.key_length_swa if sliding else shape.key_length)
        v_row = heads * (shape.value_length_swa if sliding else shape.value_length)
        device = layer_device[layer] if placement.kv_offload else HOST
        rows = cells * sizes.streams
        totals[device] += _cache_bytes(k_row, heads, rows, placement.kv_type_k, placement, traits[device])
        if not shape.latent_attention:
            totals[device] += _cache_bytes(v_row, heads, rows, placement.kv_type_v, placement, traits[device])
    if placement.flash_attention == "off" and placement.kv_type_v.upper() not in FLOAT_TYPES:
        raise UsageError(
            f"a {placement.kv_type_v} V cache needs flash attention",
            hint="Use -fa on, or -ctv f16.",
        )
    return dict(totals)


def recurrent_bytes(
    shape: ModelShape,
    placement: Placement,
    layer_device: Sequence[str],
    traits: Mapping[str, DeviceTraits],
) -> dict[str, int]:
    """Recurrent state per device: the convolution's last columns and the DeltaNet matrix, F32, per sequence.

    Per layer and sequence (conv - 1) × (inner + 2 × groups × state) + state × inner values; whatever the
    context. Speculative rollback keeps more copies, for architectures that can.
    """
    copies = 1
    if placement.recurrent_rollback and shape.arch in ("qwen35", "qwen35moe"):
        copies += placement.recurrent_rollback
    rows = max(1, placement.parallel) * copies
    conv = max(0, shape.ssm_conv - 1) * (shape.ssm_inner + 2 * shape.ssm_groups * shape.ssm_state)
    state = shape.ssm_state * shape.ssm_inner
    totals: dict[str, int] = defaultdict(int)
    for layer in shape.recurrent_layers:
        device = layer_device[layer] if placement.kv_offload else HOST
        for width in (conv, state):
            totals[device] += traits[device].alloc_bytes((width, rows), "F32", width * rows * 4)
    return dict(totals)


def snapshot_bytes(shape: ModelShape, placement: Placement) -> int:
    """What a snapshot of one slot holds of a conversation that cannot be rewound: recurrent state, windows.

    The cells of sliding windows are counted full (`llama_kv_cache_iswa::state_write`, its windowed part).
    """
    alone = replace(placement, parallel=1, recurrent_rollback=0)
    plain = {HOST: _PLAIN}
    homes = (HOST,) * (shape.n_layer_all + 1)
    size = sum(recurrent_bytes(shape, alone, homes, plain).values())
    sizes = context_sizes(shape, placement)
    cells = min(shape.sliding_window, sizes.context_per_sequence)
    for layer in shape.attention_layers:
        if shape.sliding[layer] and not placement.swa_full:
            heads = shape.head_count_kv[layer]
            k_row, v_row = heads * shape.key_length_swa, heads * shape.value_length_swa
            size += _cache_bytes(k_row, heads, cells, placement.kv_type_k, placement, _PLAIN)
            size += _cache_bytes(v_row, heads, cells, placement.kv_type_v, placement, _PLAIN)
    return size


def output_bytes(shape: ModelShape, placement: Placement) -> int:
    """Host memory for the logits of one token per sequence ("output buffer size")."""
    return shape.n_vocab * max(1, placement.parallel) * 4


def sliding_cells(shape: ModelShape, placement: Placement, sizes: ContextSizes) -> int:
    """Cells per sequence of a sliding-window layer's cache."""
    if placement.swa_full:
        return sizes.context_per_sequence
    windows = max(1, placement.parallel) if placement.kv_unified else 1
    return pad(min(sizes.context_per_sequence, shape.sliding_window * windows + sizes.ubatch), _STEP)


def _cache_bytes(
    row: int, heads: int, rows: int, type_name: str, placement: Placement, traits: DeviceTraits
) -> int:
    if type_name not in KV_TYPES:
        raise UsageError(f"'{type_name}' is not a cache type", hint=f"Choose one of: {', '.join(KV_TYPES)}.")
    kind = GGML_TYPES_BY_NAME[type_name.upper()]
    if heads and (row // heads) % kind.block_size:
        raise UsageError(
            f"cache type {type_name} stores blocks of {kind.block_size}, which do not divide heads of "
            f"{row // heads}",
            hint="Use f16 for the cache of this model.",
        )
    nbytes = row // kind.block_size * kind.block_bytes * rows
    return traits.alloc_bytes((row, rows), type_name, nbytes)
