"""Megabyte-sized files of families that qnext plans but does not generate: headers with a hole, for benches.

Their tensors and keys are those that llama.cpp's src/models/{llama,glm4-moe,deepseek2,qwen35moe}.cpp ask for:
Mixtral, GLM-4.5 with its first layer dense and its block of multi-token prediction, DeepSeek with compressed
attention, Qwen3.5 with its own names for what qwen3next has. Rows are multiples of 256, so that K types and
repacking apply.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from qnext.models.gguf_types import GGML_TYPES_BY_NAME
from qnext.models.synth.ftypes import FILE_TYPES
from qnext.models.synth.tokenizer import CHATML, QWEN_SPECIAL, syllable_vocabulary
from qnext.models.synth.writer import MetaValue, TensorSpec, lay_out, write_file

LAYERS, EMBD, VOCAB, HEADS, HEADS_KV, HEAD = 6, 256, 1024, 4, 2, 64
DENSE, EXPERTS, USED, WIDE = 512, 16, 4, 256
STATE, GROUPS, RANK, CONV = 64, 2, 4, 4
LATENT, ROPE, PLAIN = 256, 64, 128
"""Of compressed attention: the row kept per token, and the two parts of a head, with and without rotation."""

Dims = dict[str, tuple[int, ...]]

_ATTENTION: Dims = {
    "attn_norm.weight": (EMBD,),
    "attn_q.weight": (EMBD, HEADS * HEAD),
    "attn_k.weight": (EMBD, HEADS_KV * HEAD),
    "attn_v.weight": (EMBD, HEADS_KV * HEAD),
    "attn_output.weight": (HEADS * HEAD, EMBD),
}
_GATED: Dims = _ATTENTION | {
    "attn_q.weight": (EMBD, 2 * HEADS * HEAD),
    "attn_q_norm.weight": (HEAD,),
    "attn_k_norm.weight": (HEAD,),
    "post_attention_norm.weight": (EMBD,),
}
_COMPRESSED: Dims = {
    "attn_norm.weight": (EMBD,),
    "attn_q_a.weight": (EMBD, EMBD),
    "attn_q_a_norm.weight": (EMBD,),
    "attn_q_b.weight": (EMBD, HEADS * (PLAIN + ROPE)),
    "attn_kv_a_mqa.weight": (EMBD, LATENT + ROPE),
    "attn_kv_a_norm.weight": (LATENT,),
    "attn_k_b.weight": (PLAIN, LATENT, HEADS),
    "attn_v_b.weight": (LATENT, PLAIN, HEADS),
    "attn_output.weight": (HEADS * PLAIN, EMBD),
    "ffn_norm.weight": (EMBD,),
}
_MIXED = STATE * (2 * GROUPS + RANK)
_DELTA_NET: Dims = {
    "attn_norm.weight": (EMBD,),
    "post_attention_norm.weight": (EMBD,),
    "attn_qkv.weight": (EMBD, _MIXED),
    "attn_gate.weight": (EMBD, STATE * RANK),
    "ssm_conv1d.weight": (CONV, _MIXED),
    "ssm_dt.bias": (RANK,),
    "ssm_a": (RANK,),
    "ssm_beta.weight": (EMBD, RANK),
    "ssm_alpha.weight": (EMBD, RANK),
    "ssm_norm.weight": (STATE,),
    "ssm_out.weight": (STATE * RANK, EMBD),
}
_ROUTED: Dims = {
    "ffn_gate_inp.weight": (EMBD, EXPERTS),
    "ffn_gate_exps.weight": (EMBD, WIDE, EXPERTS),
    "ffn_up_exps.weight": (EMBD, WIDE, EXPERTS),
    "ffn_down_exps.weight": (WIDE, EMBD, EXPERTS),
}
_SHARED: Dims = {
    "ffn_gate_shexp.weight": (EMBD, WIDE),
    "ffn_up_shexp.weight": (EMBD, WIDE),
    "ffn_down_shexp.weight": (WIDE, EMBD),
}
_DENSE: Dims = {
    "ffn_gate.weight": (EMBD, DENSE),
    "ffn_up.weight": (EMBD, DENSE),
    "ffn_down.weight": (DENSE, EMBD),
}
_NEXT_TOKEN: Dims = {
    "nextn.eh_proj.weight": (2 * EMBD, EMBD),
    "nextn.enorm.weight": (EMBD,),
    "nextn.hnorm.weight": (EMBD,),
    "nextn.shared_head_norm.weight": (EMBD,),
}
_BIASED: Dims = {"exp_probs_b.bias": (EXPERTS,)}
_GLM: Dims = _ATTENTION | {"post_attention_norm.weight": (EMBD,)}


def _glm(layer: int) -> Dims:
    last = _NEXT_TOKEN if layer == LAYERS else {}
    return _GLM | (_ROUTED | _BIASED | _SHARED if layer else _DENSE) | last


def _deepseek(layer: int) -> Dims:
    return _COMPRESSED | (_ROUTED | _BIASED | _SHARED if layer else _DENSE)


def _qwen35(layer: int) -> Dims:
    block = _GATED if layer % 4 == 3 else _DELTA_NET
    return block | _ROUTED | _SHARED | {"ffn_gate_inp_shexp.weight": (EMBD,)}


FAMILIES: dict[str, tuple[str, int, Callable[[int], Dims], dict[str, MetaValue]]] = {
    "tiny-mixtral": (
        "llama",
        LAYERS,
        lambda layer: _ATTENTION | {"ffn_norm.weight": (EMBD,)} | _ROUTED,
        {"feed_forward_length": WIDE, "rope.dimension_count": HEAD},
    ),
    "tiny-glm4moe": (
        "glm4moe",
        LAYERS + 1,
        _glm,
        {
            "nextn_predict_layers": 1,
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "rope.dimension_count": HEAD // 2,
        },
    ),
    "tiny-deepseek2": (
        "deepseek2",
        LAYERS,
        _deepseek,
        {
            "leading_dense_block_count": 1,
            "expert_shared_count": 1,
            "attention.head_count_kv": 1,
            "attention.q_lora_rank": EMBD,
            "attention.kv_lora_rank": LATENT,
            "attention.key_length": LATENT + ROPE,
            "attention.value_length": LATENT,
            "attention.key_length_mla": PLAIN + ROPE,
            "attention.value_length_mla": PLAIN,
            "rope.dimension_count": ROPE,
        },
    ),
    "tiny-qwen35moe": (
        "qwen35moe",
        LAYERS + 2,
        _qwen35,
        {
            "expert_shared_feed_forward_length": WIDE,
            "rope.dimension_count": 16,
            "rope.dimension_sections": [4, 2, 2, 0],
            "ssm.conv_kernel": CONV,
            "ssm.state_size": STATE,
            "ssm.group_count": GROUPS,
            "ssm.time_step_rank": RANK,
            "ssm.inner_size": STATE * RANK,
        },
    ),
}
"""llama.cpp's name of the architecture, blocks, tensors of a block, and the keys that others have not."""


def write_family(name: str, path: Path, quant: str) -> None:
    """Write the file of a family with its matrices in the type of `quant`; the weights are a hole."""
    arch, blocks, tensors_of, keys = FAMILIES[name]
    own: dict[str, MetaValue] = {
        "block_count": blocks,
        "context_length": 32_768,
        "embedding_length": EMBD,
        "feed_forward_length": DENSE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": HEADS_KV,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 1e6,
        "expert_count": EXPERTS,
        "expert_used_count": USED,
        "expert_feed_forward_length": WIDE,
        "vocab_size": VOCAB,
        **keys,
    }
    kind = FILE_TYPES[quant][1]
    tensors = [
        TensorSpec("token_embd.weight", (EMBD, VOCAB), _type("token_embd.weight", (EMBD, VOCAB), kind)),
        TensorSpec("output_norm.weight", (EMBD,), "F32"),
        TensorSpec("output.weight", (EMBD, VOCAB), "Q8_0"),
    ]
    for layer in range(blocks):
        for part, dims in tensors_of(layer).items():
            tensors.append(TensorSpec(f"blk.{layer}.{part}", dims, _type(part, dims, kind)))
    vocabulary = syllable_vocabulary(VOCAB, QWEN_SPECIAL, VOCAB - len(QWEN_SPECIAL))
    metadata: dict[str, MetaValue] = {
        "general.architecture": arch,
        "general.name": name,
        "general.file_type": FILE_TYPES[quant][0],
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in own.items()},
        **vocabulary.metadata(pre="qwen2", eos="<|im_end|>", bos="<|endoftext|>", template=CHATML),
    }
    write_file(path, lay_out(metadata, tensors), None)


def _type(name: str, dims: tuple[int, ...], kind: str) -> str:
    """F32 for what is small, `kind` for matrices; MXFP4 is for experts, beside attention in Q8_0."""
    if len(dims) < 2 or "ssm_conv1d" in name or "ffn_gate_inp" in name:
        return "F32"
    if kind == "MXFP4" and "_exps" not in name:
        kind = "Q8_0"
    return kind if dims[0] % GGML_TYPES_BY_NAME[kind].block_size == 0 else "Q8_0"
