"""The demo: a real `qwen3next` GGUF of a few megabytes that says one sentence and stops.

Every layer type of the large model is there and runs: Gated DeltaNet, full attention every fourth layer,
routed and shared experts. How it comes to speak: the residual stream carries each token's embedding to the
output nearly unchanged, because every layer's last projection (`ssm_out`, `attn_output`, `ffn_down*`) is
small. The embedding of each word of the sentence points along an axis of its own, that of every other token
along one common axis; the output row of a word points along the axis of the word before it. So any prompt
leads to the first word, each word to the next, and the last to <|im_end|>. The right token leads by 30
logits, which no kernel, cache type or thread order can upset, nor sampling at usual temperatures.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.models.synth.tokenizer import CHATML, CONTROL, USER_DEFINED, Vocabulary, spell, train_vocabulary
from qnext.models.synth.writer import Layout, MetaValue, TensorSpec, lay_out, write_file

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEMO_SENTENCE = (
    "Hello, this is qnext's built-in demo: a tiny model with the real Qwen3-Next architecture and weights"
    " made to say exactly these words. Your engine works; now try something bigger!"
)
"""What the demo answers to every prompt. No word and no mark occurs twice: each has one successor."""

_OTHER_TEXT = (
    "system\nuser\nassistant You are a helpful assistant. The user asks? What can you do for me, how and why?"
    "\n\nHi! Tell me about yourself: all the experts, layers and tokens in memory, which of them are there"
    " and when we use one or each; it is not what they will be by then."
)

_PIECE = re.compile(r"'s|[^\r\n\w]?[A-Za-z]+|\d| ?[^\s\w]+|\s+")
"""How the tokenizer cuts text before merging, as far as these texts need it (llama.cpp's `qwen2`)."""

DEMO_WORDS = tuple(_PIECE.findall(DEMO_SENTENCE))
"""The answer's tokens in order, without the end-of-turn token."""

_SPECIAL = {
    "<|endoftext|>": CONTROL,
    "<|im_start|>": CONTROL,
    "<|im_end|>": CONTROL,
    "<tool_call>": USER_DEFINED,
    "</tool_call>": USER_DEFINED,
    "<tool_response>": USER_DEFINED,
    "</tool_response>": USER_DEFINED,
    "<think>": USER_DEFINED,
    "</think>": USER_DEFINED,
}

_VERSION = 1
"""Raise it whenever the bytes change: the file's name in the cache carries it."""

_LAYERS, _FULL_EVERY, _EMBD = 8, 4, 256
_HEADS, _HEADS_KV, _HEAD = 4, 2, 64
_STATE, _GROUPS, _RANK, _CONV = 64, 2, 4, 4
_EXPERTS, _USED, _FF = 8, 2, 256


def demo_path(cache_dir: Path) -> Path:
    """The demo in `cache_dir`, made on first use. Raises ModelError when it cannot be written."""
    path = cache_dir / f"qnext-demo-v{_VERSION}.gguf"
    if not path.exists():
        make_demo(path)
    return path


def make_demo(path: Path) -> None:
    """Write the demo to `path`, replacing what is there; the same bytes each time. Raises ModelError."""
    vocabulary = train_vocabulary([*DEMO_WORDS, *_PIECE.findall(_OTHER_TEXT)], _SPECIAL, multiple=64)
    data = _weights(vocabulary)
    layout = _layout(vocabulary, data)
    write_file(path, layout, lambda spec: [data[spec.name][2]], overwrite=True)


def _layout(vocabulary: Vocabulary, data: dict[str, tuple[tuple[int, ...], str, bytes]]) -> Layout:
    arch = "qwen3next"
    metadata: dict[str, MetaValue] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": "qnext demo",
        "general.description": "Says one sentence and stops. Constructed by qnext, not trained.",
        "general.license": "mit",
        "general.size_label": "8x0.8M",
        "general.file_type": 15,
        "general.quantization_version": 2,
        "general.sampling.temp": 0.7,
        "general.sampling.top_p": 0.8,
        "general.sampling.top_k": 20,
        f"{arch}.block_count": _LAYERS,
        f"{arch}.context_length": 32768,
        f"{arch}.embedding_length": _EMBD,
        f"{arch}.feed_forward_length": _FF,
        f"{arch}.attention.head_count": _HEADS,
        f"{arch}.attention.head_count_kv": _HEADS_KV,
        f"{arch}.attention.key_length": _HEAD,
        f"{arch}.attention.value_length": _HEAD,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-6,
        f"{arch}.rope.freq_base": 1e7,
        f"{arch}.rope.dimension_count": _HEAD // 4,
        f"{arch}.expert_count": _EXPERTS,
        f"{arch}.expert_used_count": _USED,
        f"{arch}.expert_feed_forward_length": _FF,
        f"{arch}.expert_shared_feed_forward_length": _FF,
        f"{arch}.ssm.conv_kernel": _CONV,
        f"{arch}.ssm.state_size": _STATE,
        f"{arch}.ssm.group_count": _GROUPS,
        f"{arch}.ssm.time_step_rank": _RANK,
        f"{arch}.ssm.inner_size": _STATE * _RANK,
        f"{arch}.full_attention_interval": _FULL_EVERY,
    }
    metadata |= vocabulary.metadata(pre="qwen2", eos="<|im_end|>", bos="<|endoftext|>", template=CHATML)
    return lay_out(metadata, [TensorSpec(name, shape, kind) for name, (shape, kind, _) in data.items()])


def _weights(vocabulary: Vocabulary) -> dict[str, tuple[tuple[int, ...], str, bytes]]:
    """Every tensor as name -> (shape in ggml's order, type, bytes), in the file's order."""
    import numpy as np

    from qnext.models.synth.blocks import quantise_q8_0, random_q4_k

    rng = np.random.Generator(np.random.PCG64(_VERSION))
    tensors: dict[str, tuple[tuple[int, ...], str, bytes]] = {}

    def put(name: str, kind: str, values: NDArray[np.float32]) -> None:
        data = quantise_q8_0(values) if kind == "Q8_0" else values.astype({"F32": "<f4", "F16": "<f2"}[kind])
        tensors[name] = (values.shape[::-1], kind, bytes(data))

    def matrix(name: str, columns: int, rows: int, gain: float = 1.0, kind: str = "Q8_0") -> None:
        put(name, kind, rng.uniform(-1, 1, (rows, columns)).astype("f4") * np.float32(gain * columns**-0.5))

    def experts(name: str, columns: int, rows: int, exponent: int) -> None:
        blocks = columns * rows * _EXPERTS // 256
        tensors[name] = ((columns, rows, _EXPERTS), "Q4_K", random_q4_k(rng, blocks, exponent))

    def constant(name: str, count: int, value: float = 1.0) -> None:
        put(name, "F32", np.full(count, value, "f4"))

    embedding, output = _speech(vocabulary, rng)
    put("token_embd.weight", "F16", embedding)
    constant("output_norm.weight", _EMBD)
    put("output.weight", "F16", output)
    small = 0.05
    for layer in range(_LAYERS):
        block = f"blk.{layer}."
        constant(block + "attn_norm.weight", _EMBD)
        if (layer + 1) % _FULL_EVERY:
            mixed = 2 * _STATE * _GROUPS + _STATE * _RANK
            matrix(block + "attn_qkv.weight", _EMBD, mixed)
            matrix(block + "attn_gate.weight", _EMBD, _STATE * _RANK)
            matrix(block + "ssm_conv1d.weight", _CONV, mixed, kind="F32")
            constant(block + "ssm_dt.bias", _RANK)
            put(block + "ssm_a", "F32", -np.linspace(0.1, 1, _RANK, dtype="f4"))
            matrix(block + "ssm_ba.weight", _EMBD, 2 * _RANK)
            constant(block + "ssm_norm.weight", _STATE)
            matrix(block + "ssm_out.weight", _STATE * _RANK, _EMBD, small)
        else:
            matrix(block + "attn_q.weight", _EMBD, 2 * _HEADS * _HEAD)
            matrix(block + "attn_k.weight", _EMBD, _HEADS_KV * _HEAD)
            matrix(block + "attn_v.weight", _EMBD, _HEADS_KV * _HEAD)
            constant(block + "attn_q_norm.weight", _HEAD)
            constant(block + "attn_k_norm.weight", _HEAD)
            matrix(block + "attn_output.weight", _HEADS * _HEAD, _EMBD, small)
        constant(block + "post_attention_norm.weight", _EMBD)
        matrix(block + "ffn_gate_inp.weight", _EMBD, _EXPERTS, 2.0, kind="F32")
        experts(block + "ffn_gate_exps.weight", _EMBD, _FF, -11)
        experts(block + "ffn_up_exps.weight", _EMBD, _FF, -11)
        experts(block + "ffn_down_exps.weight", _FF, _EMBD, -16)
        put(block + "ffn_gate_inp_shexp.weight", "F32", rng.uniform(-0.1, 0.1, _EMBD).astype("f4"))
        matrix(block + "ffn_gate_shexp.weight", _EMBD, _FF)
        matrix(block + "ffn_up_shexp.weight", _EMBD, _FF)
        matrix(block + "ffn_down_shexp.weight", _FF, _EMBD, small)
    return tensors


def _speech(
    vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """`token_embd` and `output`, [tokens, _EMBD] each, that chain the sentence.

    Axes are rows of a Hadamard matrix, so that every channel takes part. Axis 0 belongs to all tokens
    outside the sentence, axis i to its i-th word; the axes from `_EMBD` / 4 on hold a random signature of
    each token, so that tokens differ for routing and attention. A row of the embedding has RMS 1
    (0.875**2 + 192 / 28**2), so the right logit is 0.875 * 2.5 * 16 = 35.
    """
    import numpy as np

    axes: NDArray[np.float32] = np.ones((1, 1), "f4")
    while len(axes) < _EMBD:
        axes = np.block([[axes, axes], [axes, -axes]]).astype("f4")
    ids = [vocabulary.tokens.index(spell(word)) for word in DEMO_WORDS]
    own = np.zeros(len(vocabulary.tokens), int)
    own[ids] = np.arange(1, len(ids) + 1)
    free = axes[_EMBD // 4 :]
    signs = rng.choice(np.array([-1, 1], "f4"), (len(own), len(free)))
    signature = signs @ free  # sums of ±1: whole numbers, exact with any BLAS
    embedding = np.float32(14 / 16) * axes[own] + np.float32(1 / 28) * signature
    output: NDArray[np.float32] = rng.uniform(-0.02, 0.02, (len(own), _EMBD)).astype("f4")
    chain = [*ids, vocabulary.tokens.index("<|im_end|>")]
    output[chain] += np.float32(2.5 / 16) * axes[: len(chain)]
    return embedding.astype("f4"), output
