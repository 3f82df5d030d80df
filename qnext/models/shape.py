"""What a model's header says about its dimensions, as llama.cpp reads it.

Everything a plan needs is in the metadata: which layers attend over a growing cache, which carry a state of
fixed size, which look at a sliding window only, and how wide each is. The engine's readers are
`llama_model_base::load_hparams` and `src/models/<arch>.cpp`; a key that the engine defaults is defaulted
here the same way. An architecture whose memory we do not know is refused rather than planned wrong: counting
the cache of Qwen3-Next for all of its 48 layers, say, would be four times too much.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from qnext.errors import ModelError
from qnext.models.header import ModelHeader, SkippedArray

# Gated DeltaNet layers between full-attention layers (llama_memory_hybrid).
_DELTA_NET = frozenset({"qwen3next", "qwen35", "qwen35moe"})

# Sliding window in a fixed pattern: the period that holds one full layer (llama_kv_cache_iswa).
_SLIDING = {"gpt-oss": 2}

# Compressed attention: one latent row per token, no separate V (llama_hparams::is_mla).
_LATENT = frozenset({"deepseek2"})

# Every layer keeps K and V for the whole context.
_PLAIN_NAMES = """
arcee arctic bailingmoe bailingmoe2 dbrx deepseek dots1 ernie4_5 ernie4_5-moe glm4 glm4moe granite granitemoe
grovemoe hunyuan-dense hunyuan-moe internlm2 llama minicpm minimax-m2 mistral3 nemotron olmo olmoe qwen2
qwen2moe qwen3 qwen3moe qwen3vl qwen3vlmoe refact seed_oss smollm3 stablelm starcoder2 xverse
"""
_PLAIN = frozenset(_PLAIN_NAMES.split())

_MAX_LAYERS = 512
_MAX_EXPERTS = 1024

# enum llama_ftype of llama.h in order: the labels people know quants by.
_FILE_TYPE_NAMES = """
F32 F16 Q4_0 Q4_1 - - - Q8_0 Q5_0 Q5_1 Q2_K Q3_K_S Q3_K_M Q3_K_L Q4_K_S Q4_K_M Q5_K_S Q5_K_M Q6_K IQ2_XXS
IQ2_XS Q2_K_S IQ3_XS IQ3_XXS IQ1_S IQ4_NL IQ3_S IQ3_M IQ2_S IQ2_M IQ4_XS IQ1_M BF16 - - - TQ1_0 TQ2_0
MXFP4_MOE NVFP4
"""
_FILE_TYPES = {code: name for code, name in enumerate(_FILE_TYPE_NAMES.split()) if name != "-"}
_QUANT_IN_NAME = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q\d(?:_[A-Z0-9]+)*|TQ\d_\d|MXFP4(?:_MOE)?|NVFP4|BF16|F16|F32))"
    r"(?:-\d{5}-of-\d{5})?\.gguf$",
    re.IGNORECASE,
)
_BLOCK = re.compile(r"^blk\.(\d+)\.(.+)$")
_EXPERT = re.compile(r"^ffn_(?:up|down|gate_up|gate)_(?:ch)?exps\b")


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Bytes of one layer in the file: routed experts apart, because they may live elsewhere than the rest."""

    expert_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """The whole layer."""
        return self.expert_bytes + self.other_bytes


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Dimensions of one model. Per-layer tuples cover the trunk and then the `n_layer_nextn` MTP blocks.

    `n_layer` counts the trunk only (what decodes a token); `key_length` and `value_length` are per head;
    `recurrent` marks layers with a DeltaNet state, `sliding` those that look back `sliding_window` tokens
    only. `latent_attention` means one compressed row per token and no V. Sizes are in elements, except
    `layer_bytes`.
    """

    arch: str
    name: str | None
    quant: str | None
    n_layer: int
    n_layer_nextn: int
    n_embd: int
    n_vocab: int
    context_train: int
    head_count: tuple[int, ...]
    head_count_kv: tuple[int, ...]
    key_length: int
    value_length: int
    key_length_swa: int
    value_length_swa: int
    feed_forward: int
    experts: int
    experts_used: int
    expert_feed_forward: int
    shared_feed_forward: int
    recurrent: tuple[bool, ...]
    sliding: tuple[bool, ...]
    sliding_window: int
    latent_attention: bool
    ssm_conv: int
    ssm_inner: int
    ssm_state: int
    ssm_heads: int
    ssm_groups: int
    layer_bytes: tuple[LayerBytes, ...]

    @property
    def n_layer_all(self) -> int:
        """Trunk and MTP blocks: what `-ngl` counts, before the output layer."""
        return self.n_layer + self.n_layer_nextn

    @property
    def dense(self) -> bool:
        """No routed experts: only whole layers can be moved."""
        return self.experts == 0

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Trunk layers with a K/V cache."""
        return tuple(il for il in range(self.n_layer) if not self.recurrent[il])

    @property
    def recurrent_layers(self) -> tuple[int, ...]:
        """Trunk layers with a state of fixed size."""
        return tuple(il for il in range(self.n_layer) if self.recurrent[il])


@lru_cache(maxsize=8192)
def layer_of(tensor_name: str) -> int | None:
    """Layer number of `blk.N.…`, None for input and output tensors."""
    match = _BLOCK.match(tensor_name)
    return int(match.group(1)) if match else None


@lru_cache(maxsize=8192)
def is_expert(tensor_name: str) -> bool:
    """Whether this is a routed-expert tensor (fused and chunked variants too, shared experts not)."""
    match = _BLOCK.match(tensor_name)
    return match is not None and _EXPERT.match(match.group(2)) is not None


def quant_in_name(file_name: str) -> str | None:
    """The quant a GGUF's file name ends with (`Q4_K_M`, `UD-IQ2_XXS`), in upper case."""
    match = _QUANT_IN_NAME.search(file_name)
    return match.group(1).upper() if match else None


def quant_label(header: ModelHeader) -> str | None:
    """The quant's name: from the file name (`UD-Q4_K_XL` has no code), else from `general.file_type`."""
    if header.paths and (named := quant_in_name(header.paths[0].name)):
        return named
    code = header.metadata.get("general.file_type")
    return _FILE_TYPES.get(code) if isinstance(code, int) else None


def read_shape(header: ModelHeader) -> ModelShape:
    """Read the dimensions out of a header.

    Raises ModelError where llama.cpp would refuse the metadata, and for an architecture whose memory layout
    is not known here.
    """
    metadata = _Metadata(header.metadata)
    arch = metadata.arch
    if arch not in _PLAIN | _DELTA_NET | _LATENT | _SLIDING.keys():
        raise ModelError(
            f"the memory layout of architecture '{arch}' is not known to qnext",
            hint="Start this model with llama-server, or plan one of: "
            + ", ".join(sorted(_DELTA_NET | _SLIDING.keys() | {"qwen3moe", "llama"}))
            + ".",
        )
    n_all = metadata.integer("block_count")
    n_nextn = metadata.integer("nextn_predict_layers", 0)
    if not 0 < n_all <= _MAX_LAYERS or n_nextn >= n_all:
        raise _refused(f"block_count {n_all} with nextn_predict_layers {n_nextn}")
    n_layer = n_all - n_nextn

    experts = metadata.integer("expert_count", 0)
    experts_used = max(metadata.per_layer("expert_used_count", n_all, 0))
    if experts > _MAX_EXPERTS or experts_used > experts or (experts > 0) != (experts_used > 0):
        raise _refused(f"expert_used_count {experts_used} of expert_count {experts}")

    n_embd = metadata.integer("embedding_length")
    heads = metadata.per_layer("attention.head_count", n_all, 0)
    head_width = n_embd // heads[0] if heads[0] else 0
    key_length = metadata.integer("attention.key_length", head_width)
    value_length = metadata.integer("attention.value_length", head_width)
    recurrent = _recurrent_layers(metadata, n_all, n_layer)
    window, sliding = _sliding_layers(metadata, n_all, n_layer)
    needs_ssm = arch in _DELTA_NET
    return ModelShape(
        arch=arch,
        name=metadata.text("general.name"),
        quant=quant_label(header),
        n_layer=n_layer,
        n_layer_nextn=n_nextn,
        n_embd=n_embd,
        n_vocab=_vocabulary(header, arch),
        context_train=metadata.integer("context_length"),
        head_count=heads,
        head_count_kv=metadata.per_layer("attention.head_count_kv", n_all, heads),
        key_length=key_length,
        value_length=value_length,
        key_length_swa=metadata.integer("attention.key_length_swa", key_length),
        value_length_swa=metadata.integer("attention.value_length_swa", value_length),
        feed_forward=max(metadata.per_layer("feed_forward_length", n_all, 0)),
        experts=experts,
        experts_used=experts_used,
        expert_feed_forward=max(metadata.per_layer("expert_feed_forward_length", n_all, 0)),
        shared_feed_forward=metadata.integer("expert_shared_feed_forward_length", 0),
        recurrent=recurrent,
        sliding=sliding,
        sliding_window=window,
        latent_attention=arch in _LATENT and metadata.integer("attention.key_length_mla", 0) > 0,
        ssm_conv=metadata.integer("ssm.conv_kernel", None if needs_ssm else 0),
        ssm_inner=metadata.integer("ssm.inner_size", None if needs_ssm else 0),
        ssm_state=metadata.integer("ssm.state_size", None if needs_ssm else 0),
        ssm_heads=metadata.integer("ssm.time_step_rank", None if needs_ssm else 0),
        ssm_groups=metadata.integer("ssm.group_count", None if needs_ssm else 0),
        layer_bytes=_layer_bytes(header, n_all, n_layer),
    )


def _recurrent_layers(metadata: _Metadata, n_all: int, n_layer: int) -> tuple[bool, ...]:
    if metadata.arch not in _DELTA_NET:
        return (False,) * n_all
    if "attention.recurrent_layers" in metadata:
        return tuple(bool(flag) for flag in metadata.per_layer("attention.recurrent_layers", n_all, 0))
    interval = metadata.integer("full_attention_interval", 4)
    if interval <= 0:
        raise _refused(f"full_attention_interval {interval}")
    return tuple(il < n_layer and (il + 1) % interval != 0 for il in range(n_all))


def _sliding_layers(metadata: _Metadata, n_all: int, n_layer: int) -> tuple[int, tuple[bool, ...]]:
    if metadata.arch not in _SLIDING:
        return 0, (False,) * n_all
    window = metadata.integer("attention.sliding_window")
    pattern = metadata.values("attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return window, tuple(bool(flag) for flag in pattern)[:n_all]
    period = metadata.integer("attention.sliding_window_pattern", _SLIDING[metadata.arch])
    return window, tuple(il < n_layer and (period == 0 or il % period < period - 1) for il in range(n_all))


def _vocabulary(header: ModelHeader, arch: str) -> int:
    embedding = next((t for t in header.tensors if t.name == "token_embd.weight"), None)
    rows = embedding.shape[1] if embedding is not None and len(embedding.shape) > 1 else None
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    declared = header.metadata.get(f"{arch}.vocab_size")
    if isinstance(tokens, SkippedArray):
        count: int | None = tokens.count
    elif isinstance(tokens, tuple):
        count = len(tokens)
    else:
        count = declared if isinstance(declared, int) else rows
    if count is None:
        raise _refused("a file without tokens and without token_embd.weight")
    if rows is not None and rows != count:
        raise _refused(f"token_embd.weight with {rows} rows for a vocabulary of {count}")
    return count


def _layer_bytes(header: ModelHeader, n_all: int, n_layer: int) -> tuple[LayerBytes, ...]:
    expert, other = [0] * n_all, [0] * n_all
    for tensor in header.tensors:
        layer = layer_of(tensor.name)
        if layer is None:
            continue
        if layer >= n_all:
            raise _refused(f"tensor {tensor.name} in a model of {n_all} blocks")
        (expert if is_expert(tensor.name) else other)[layer] += tensor.nbytes
    for layer in range(n_layer):
        if expert[layer] + other[layer] == 0:
            raise _refused(f"a file without the tensors of layer {layer}")
    return tuple(map(LayerBytes, expert, other))


def _refused(what: str) -> ModelError:
    return ModelError(
        f"the model's header is not one llama.cpp would load: {what}",
        hint="Download the file again, or pick another quant of this model.",
    )


class _Metadata:
    """Typed look-ups of `<arch>.<key>`."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self._values = values
        arch = values.get("general.architecture")
        if not isinstance(arch, str):
            raise _refused("general.architecture is missing")
        self.arch = arch

    def __contains__(self, key: str) -> bool:
        return f"{self.arch}.{key}" in self._values

    def text(self, key: str) -> str | None:
        """A whole key's string, or None."""
        value = self._values.get(key)
        return value if isinstance(value, str) else None

    def values(self, key: str) -> object:
        """The value as stored, None when absent."""
        return self._values.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        """A non-negative integer; `default` when absent, ModelError when there is none."""
        value = self.values(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or value < 0:
            raise _refused(f"{self.arch}.{key} is {'missing' if value is None else value!r}")
        return int(value)

    def per_layer(self, key: str, n_all: int, default: int | tuple[int, ...]) -> tuple[int, ...]:
        """One integer for each layer, from an array or from a single value."""
        value = self.values(key)
        if value is None:
            return default if isinstance(default, tuple) else (default,) * n_all
        if isinstance(value, tuple):
            if len(value) != n_all or not all(isinstance(one, int) for one in value):
                raise _refused(f"{self.arch}.{key} has {len(value)} values for {n_all} layers")
            return tuple(int(one) for one in value)
        return (self.integer(key),) * n_all
