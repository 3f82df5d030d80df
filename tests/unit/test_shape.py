"""Dimensions are read as llama.cpp reads them, and what it would refuse is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qnext.errors import ModelError
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader, SkippedArray, TensorInfo
from qnext.models.shape import is_expert, layer_of, quant_label, read_shape
from qnext.models.synth.synthesise import synthesise


def header_of(shape: str, folder: Path, quant: str = "Q4_K_M") -> ModelHeader:
    path = folder / f"{shape}.gguf"
    synthesise(shape, path, quant=quant, header_only=True)
    return read_header(path)


def minimal(**metadata: object) -> ModelHeader:
    """A dense two-layer header; keys are given without the architecture's prefix."""
    values: dict[str, object] = {
        "general.architecture": "llama",
        "tokenizer.ggml.tokens": SkippedArray("str", 8),
    }
    base: dict[str, object] = {
        "block_count": 2,
        "context_length": 64,
        "embedding_length": 64,
        "feed_forward_length": 128,
        "attention.head_count": 4,
    }
    values |= {f"llama.{key.replace('__', '.')}": value for key, value in (base | metadata).items()}
    tensors = [TensorInfo("token_embd.weight", (64, 8), "F32", 2048, 0, 0)]
    tensors += [TensorInfo(f"blk.{i}.attn_norm.weight", (64,), "F32", 256, 0, 2048 + 256 * i) for i in (0, 1)]
    return ModelHeader((Path("m.gguf"),), 4096, 3, 32, values, tuple(tensors))


def with_metadata(header: ModelHeader, **changes: Any) -> ModelHeader:
    values = dict(header.metadata) | {f"qwen3next.{key}": value for key, value in changes.items()}
    return replace(header, metadata=values)


def test_the_80b_attends_in_every_fourth_layer_only(tmp_path: Path) -> None:
    shape = read_shape(header_of("qwen3-next-80b-a3b", tmp_path))
    assert shape.attention_layers == (3, 7, 11, 15, 19, 23, 27, 31, 35, 39, 43, 47)
    assert len(shape.recurrent_layers) == 36
    assert (shape.experts, shape.experts_used, shape.n_vocab, shape.context_train) == (
        512,
        10,
        151936,
        262144,
    )
    assert (shape.quant, shape.dense, shape.n_layer_nextn) == ("Q4_K_M", False, 0)


def test_the_mtp_block_is_no_part_of_the_trunk_and_not_recurrent(tmp_path: Path) -> None:
    shape = read_shape(header_of("tiny-qwen3next-mtp", tmp_path))
    assert (shape.n_layer, shape.n_layer_nextn, shape.n_layer_all) == (8, 1, 9)
    assert len(shape.recurrent) == 9
    assert not shape.recurrent[8]
    assert shape.attention_layers == (3, 7)


def test_an_explicit_list_of_recurrent_layers_wins_over_the_interval(tmp_path: Path) -> None:
    header = header_of("tiny-qwen3next", tmp_path)
    flags = (True,) * 7 + (False,)
    shape = read_shape(with_metadata(header, **{"attention.recurrent_layers": flags}))
    assert shape.attention_layers == (7,)
    assert read_shape(with_metadata(header, full_attention_interval=2)).attention_layers == (1, 3, 5, 7)


def test_gpt_oss_slides_in_even_layers(tmp_path: Path) -> None:
    shape = read_shape(header_of("tiny-gpt-oss", tmp_path))
    assert shape.sliding == (True, False) * 3
    assert shape.sliding_window == 128


@pytest.mark.parametrize("name", ["tiny-qwen3next", "tiny-qwen3next-fused", "tiny-qwen3moe", "tiny-gpt-oss"])
def test_layers_sum_to_the_tensors_and_experts_outweigh_the_rest(name: str, tmp_path: Path) -> None:
    header = header_of(name, tmp_path)
    shape = read_shape(header)
    blocks = sum(t.nbytes for t in header.tensors if t.name.startswith("blk."))
    assert sum(layer.total_bytes for layer in shape.layer_bytes) == blocks
    assert all(layer.expert_bytes > layer.other_bytes > 0 for layer in shape.layer_bytes)


def test_a_dense_model_has_no_expert_bytes(tmp_path: Path) -> None:
    shape = read_shape(header_of("tiny-qwen3", tmp_path))
    assert shape.dense
    assert all(layer.expert_bytes == 0 for layer in shape.layer_bytes)


def test_heads_default_as_the_engine_defaults_them() -> None:
    shape = read_shape(minimal())
    assert shape.head_count_kv == shape.head_count == (4, 4)
    assert (shape.key_length, shape.value_length) == (16, 16)


def test_heads_may_differ_per_layer() -> None:
    assert read_shape(minimal(attention__head_count_kv=(2, 1))).head_count_kv == (2, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"block_count": 0},
        {"block_count": 3},
        {"nextn_predict_layers": 2},
        {"expert_count": 4},
        {"expert_count": 4, "expert_used_count": 5},
        {"expert_count": 4096, "expert_used_count": 5},
        {"attention__head_count_kv": (2, 1, 1)},
        {"embedding_length": None},
        {"embedding_length": "64"},
    ],
)
def test_what_the_engine_would_refuse_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ModelError) as caught:
        read_shape(minimal(**change))
    assert caught.value.hint


def test_a_vocabulary_that_does_not_match_the_embedding_is_refused() -> None:
    header = minimal()
    values = dict(header.metadata) | {"tokenizer.ggml.tokens": SkippedArray("str", 9)}
    with pytest.raises(ModelError, match="vocabulary of 9"):
        read_shape(replace(header, metadata=values))


def test_an_unknown_memory_layout_is_refused_rather_than_guessed() -> None:
    header = minimal()
    values = dict(header.metadata) | {"general.architecture": "mamba2"}
    with pytest.raises(ModelError, match="mamba2"):
        read_shape(replace(header, metadata=values))


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("Qwen3-Next-80B-A3B-Instruct-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("Qwen3-Coder-Next-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("model.IQ2_XXS.gguf", "IQ2_XXS"),
        ("model-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("model-bf16.gguf", "BF16"),
        ("weights.gguf", "Q4_K_M"),
    ],
)
def test_the_quant_is_named_by_the_file_and_else_by_the_file_type(name: str, label: str) -> None:
    header = minimal()
    values = dict(header.metadata) | {"general.file_type": 15}
    assert quant_label(replace(header, paths=(Path(name),), metadata=values)) == label


def test_experts_are_told_from_shared_experts_and_norms() -> None:
    assert is_expert("blk.3.ffn_gate_up_exps.weight")
    assert is_expert("blk.3.ffn_down_chexps.weight")
    assert not is_expert("blk.3.ffn_down_shexp.weight")
    assert not is_expert("blk.3.ffn_gate_inp.weight")
    assert (layer_of("blk.12.attn_q.weight"), layer_of("output.weight")) == (12, None)
