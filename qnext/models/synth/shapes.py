"""The true shapes: dimensions of published models, and the tensors llama.cpp expects for them.

Sources: the metadata of the published GGUF files (Qwen3-Next-80B-A3B-Instruct, Qwen3-30B-A3B, gpt-oss-20b,
Qwen3-4B) and `load_arch_tensors` in llama.cpp's src/models/{qwen3next,qwen3moe,openai-moe,qwen3}.cpp. Each
family has a tiny sibling with the same tensors in megabytes, for tests through the real engine.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from qnext.errors import ModelError, UsageError
from qnext.models.synth.writer import MetaValue


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of one model. `layers` counts the trunk, without the MTP block; zero means "has none".

    `ff` is the metadata's feed_forward_length: the dense width where there are no experts. The three last
    flags are the variants of qwen3next files: one `ssm_in` for attn_qkv and attn_gate, one `ffn_gate_up_exps`
    for gate and up, and a block of multi-token prediction after the trunk.
    """

    arch: str
    layers: int
    vocab: int
    embd: int
    heads: int
    heads_kv: int
    head: int
    ff: int
    context: int
    rope_base: float
    rope_dims: int = 0
    eps: float = 1e-6
    experts: int = 0
    used: int = 0
    expert_ff: int = 0
    shared_ff: int = 0
    window: int = 0
    conv: int = 0
    state: int = 0
    groups: int = 0
    rank: int = 0
    tied: bool = False
    ssm_in: bool = False
    fused: bool = False
    mtp: bool = False

    @property
    def blocks(self) -> int:
        """Blocks in the file: the trunk and the MTP block."""
        return self.layers + self.mtp

    def is_recurrent(self, layer: int) -> bool:
        """Whether a layer is Gated DeltaNet: all but every fourth of a qwen3next trunk."""
        return self.arch == "qwen3next" and layer < self.layers and (layer + 1) % 4 != 0


_NEXT = Shape(
    arch="qwen3next", layers=48, vocab=151936, embd=2048, heads=16, heads_kv=2, head=256, ff=5120,
    context=262144, rope_base=1e7, rope_dims=64, experts=512, used=10, expert_ff=512, shared_ff=512,
    conv=4, state=128, groups=16, rank=32,
)  # fmt: skip
_MOE = Shape(
    arch="qwen3moe", layers=48, vocab=151936, embd=2048, heads=32, heads_kv=4, head=128, ff=6144,
    context=262144, rope_base=1e7, experts=128, used=8, expert_ff=768,
)  # fmt: skip
_OSS = Shape(
    arch="gpt-oss", layers=24, vocab=201088, embd=2880, heads=64, heads_kv=8, head=64, ff=2880,
    context=131072, rope_base=150000.0, eps=1e-5, experts=32, used=4, expert_ff=2880, window=128,
)  # fmt: skip
_DENSE = Shape(
    arch="qwen3", layers=36, vocab=151936, embd=2560, heads=32, heads_kv=8, head=128, ff=9728,
    context=262144, rope_base=5e6, tied=True,
)  # fmt: skip


def _tiny(shape: Shape, layers: int) -> Shape:
    """The same family in megabytes; rows stay multiples of 256, so that K types and repacking apply."""
    moe = shape.experts > 0
    return replace(
        shape, layers=layers, vocab=1024, embd=256, heads=4, heads_kv=2, head=64, ff=256, context=32768,
        experts=16 * moe, used=4 * moe, expert_ff=256 * moe,
    )  # fmt: skip


_TINY_NEXT = replace(_tiny(_NEXT, 8), rope_dims=16, shared_ff=256, state=64, groups=2, rank=4)

SHAPES: dict[str, Shape] = {
    "qwen3-next-80b-a3b": _NEXT,
    "qwen3-next-80b-a3b-ssm-in": replace(_NEXT, ssm_in=True),
    "qwen3-next-80b-a3b-fused": replace(_NEXT, fused=True),
    "qwen3-next-80b-a3b-mtp": replace(_NEXT, mtp=True),
    "qwen3-30b-a3b": _MOE,
    "gpt-oss-20b": _OSS,
    "qwen3-4b": _DENSE,
    "tiny-qwen3next": _TINY_NEXT,
    "tiny-qwen3next-ssm-in": replace(_TINY_NEXT, ssm_in=True),
    "tiny-qwen3next-fused": replace(_TINY_NEXT, fused=True),
    "tiny-qwen3next-mtp": replace(_TINY_NEXT, mtp=True),
    "tiny-qwen3moe": _tiny(_MOE, 6),
    "tiny-gpt-oss": _tiny(_OSS, 6),
    "tiny-qwen3": _tiny(_DENSE, 6),
}
"""Every shape that can be made, by the name it is asked for with."""


def shape_named(name: str, layers: int | None = None) -> Shape:
    """A shape, cut or stretched to `layers` trunk layers.

    Raises ModelError for an unknown name, UsageError for a number of layers that the engine would refuse.
    """
    shape = SHAPES.get(name)
    if shape is None:
        near = difflib.get_close_matches(name, SHAPES, 1, 0.4)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise ModelError(f"no shape is called '{name}'", hint=f"{hint}There are: {', '.join(SHAPES)}.")
    if layers is None:
        return shape
    if not 1 <= layers <= MAX_LAYERS:
        raise UsageError(
            f"{layers} layers are out of range",
            hint=f"Ask for 1 to {MAX_LAYERS} with --layers; {name} has {shape.layers}.",
        )
    cut = replace(shape, layers=layers)
    if all(cut.is_recurrent(layer) for layer in range(layers)):
        raise UsageError(
            f"{layers} layers of {name} hold no attention layer, which llama.cpp cannot run",
            hint="Ask for 4 layers or more: every fourth is one.",
        )
    return cut


MAX_LAYERS = 256
"""Half of LLAMA_MAX_LAYERS, room enough for any published model of these families."""


def tensor_shapes(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and dimensions (ggml's order) of every tensor of the file, in the order of the layers."""
    yield "token_embd.weight", (shape.embd, shape.vocab)
    yield "output_norm.weight", (shape.embd,)
    if not shape.tied:
        yield "output.weight", (shape.embd, shape.vocab)
    for layer in range(shape.blocks):
        block = f"blk.{layer}."
        parts = [_recurrent(shape) if shape.is_recurrent(layer) else _attention(shape), _feed_forward(shape)]
        if layer >= shape.layers:
            parts.append(_next_token(shape))
        for part in parts:
            for name, dims in part.items():
                yield block + name, dims


def shape_metadata(shape: Shape) -> dict[str, MetaValue]:
    """The architecture's keys of the metadata, as the published files have them."""
    values: dict[str, MetaValue] = {
        "block_count": shape.blocks,
        "context_length": shape.context,
        "embedding_length": shape.embd,
        "feed_forward_length": shape.ff,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.heads_kv,
        "attention.key_length": shape.head,
        "attention.value_length": shape.head,
        "attention.layer_norm_rms_epsilon": shape.eps,
        "rope.freq_base": shape.rope_base,
    }
    present: dict[str, MetaValue] = {
        "rope.dimension_count": shape.rope_dims,
        "expert_count": shape.experts,
        "expert_used_count": shape.used,
        "expert_feed_forward_length": shape.expert_ff,
        "expert_shared_feed_forward_length": shape.shared_ff,
        "attention.sliding_window": shape.window,
        "ssm.conv_kernel": shape.conv,
        "ssm.state_size": shape.state,
        "ssm.group_count": shape.groups,
        "ssm.time_step_rank": shape.rank,
        "ssm.inner_size": shape.state * shape.rank,
        "nextn_predict_layers": int(shape.mtp),
    }
    values |= {key: value for key, value in present.items() if value}
    if shape.arch == "gpt-oss":
        values |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 32.0,
            "rope.scaling.original_context_length": 4096,
        }
    return {f"{shape.arch}.{key}": value for key, value in values.items()}


Part = dict[str, tuple[int, ...]]


def _attention(shape: Shape) -> Part:
    queries, keys = shape.heads * shape.head, shape.heads_kv * shape.head
    gated = 2 if shape.arch == "qwen3next" else 1  # qwen3next: the query projection holds a gate as well
    part: Part = {
        "attn_norm.weight": (shape.embd,),
        "attn_q.weight": (shape.embd, gated * queries),
        "attn_k.weight": (shape.embd, keys),
        "attn_v.weight": (shape.embd, keys),
        "attn_output.weight": (queries, shape.embd),
    }
    if shape.arch != "gpt-oss":
        return part | {"attn_q_norm.weight": (shape.head,), "attn_k_norm.weight": (shape.head,)}
    return part | {
        "attn_q.bias": (queries,),
        "attn_k.bias": (keys,),
        "attn_v.bias": (keys,),
        "attn_output.bias": (shape.embd,),
        "attn_sinks.weight": (shape.heads,),
    }


def _recurrent(shape: Shape) -> Part:
    inner = shape.state * shape.rank
    mixed = 2 * shape.state * shape.groups + inner
    projections: Part = {"attn_qkv.weight": (shape.embd, mixed), "attn_gate.weight": (shape.embd, inner)}
    if shape.ssm_in:
        projections = {"ssm_in.weight": (shape.embd, mixed + inner)}
    return {"attn_norm.weight": (shape.embd,)} | projections | {
        "ssm_conv1d.weight": (shape.conv, mixed),
        "ssm_dt.bias": (shape.rank,),
        "ssm_a": (shape.rank,),
        "ssm_ba.weight": (shape.embd, 2 * shape.rank),
        "ssm_norm.weight": (shape.state,),
        "ssm_out.weight": (inner, shape.embd),
    }  # fmt: skip


def _feed_forward(shape: Shape) -> Part:
    embd, experts, wide = shape.embd, shape.experts, shape.expert_ff
    if not experts:
        return {
            "ffn_norm.weight": (embd,),
            "ffn_gate.weight": (embd, shape.ff),
            "ffn_up.weight": (embd, shape.ff),
            "ffn_down.weight": (shape.ff, embd),
        }
    norm = "ffn_norm.weight" if shape.arch == "qwen3moe" else "post_attention_norm.weight"
    part: Part = {norm: (embd,), "ffn_gate_inp.weight": (embd, experts)}
    if shape.fused:
        part["ffn_gate_up_exps.weight"] = (embd, 2 * wide, experts)
    else:
        part |= {"ffn_gate_exps.weight": (embd, wide, experts), "ffn_up_exps.weight": (embd, wide, experts)}
    part["ffn_down_exps.weight"] = (wide, embd, experts)
    if shape.arch == "gpt-oss":
        part |= {
            "ffn_gate_inp.bias": (experts,),
            "ffn_gate_exps.bias": (wide, experts),
            "ffn_up_exps.bias": (wide, experts),
            "ffn_down_exps.bias": (embd, experts),
        }
    if shape.shared_ff:
        part |= {
            "ffn_gate_inp_shexp.weight": (embd,),
            "ffn_gate_shexp.weight": (embd, shape.shared_ff),
            "ffn_up_shexp.weight": (embd, shape.shared_ff),
            "ffn_down_shexp.weight": (shape.shared_ff, embd),
        }
    return part


def _next_token(shape: Shape) -> Part:
    return {
        "nextn.eh_proj.weight": (2 * shape.embd, shape.embd),
        "nextn.enorm.weight": (shape.embd,),
        "nextn.hnorm.weight": (shape.embd,),
        "nextn.shared_head_norm.weight": (shape.embd,),
    }
