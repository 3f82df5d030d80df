"""Types of tensors as llama-quantize gives them, and sizes of whole files as they are published."""

from __future__ import annotations

from collections import Counter

import pytest

from qnext.errors import ModelError, QnextError, UsageError
from qnext.models.synth.ftypes import FILE_TYPES, choose_types
from qnext.models.synth.shapes import SHAPES, shape_named, tensor_shapes
from qnext.units import MIB

CLASSES = (
    "output token_embd attn_qkv attn_gate attn_v attn_q attn_output"
    " ffn_down_exps ffn_down_shexp ffn_up_exps ssm_ba ffn_gate_inp_shexp"
)

PUBLISHED_TYPES = """
BF16 BF16 BF16 BF16 BF16 BF16 BF16 BF16 BF16 BF16 BF16 BF16 BF16
Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 BF16
Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K Q6_K BF16
Q5_K_M Q6_K Q5_K Q5_K*18+Q6_K*18 Q5_K Q5_K*6+Q6_K*6 Q5_K Q5_K Q5_K*24+Q6_K*24 Q5_K*24+Q6_K*24 Q5_K Q5_K BF16
Q4_K_M Q6_K Q4_K Q4_K*18+Q6_K*18 Q4_K Q4_K*6+Q6_K*6 Q4_K Q4_K Q4_K*24+Q6_K*24 Q4_K*24+Q6_K*24 Q4_K Q4_K BF16
Q4_K_S Q6_K Q4_K Q4_K*33+Q5_K*3 Q4_K Q4_K*11+Q5_K*1 Q4_K Q4_K Q4_K*42+Q5_K*6 Q4_K*42+Q5_K*6 Q4_K Q4_K BF16
MXFP4_MOE Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 Q8_0 MXFP4 Q8_0 MXFP4 Q8_0 BF16
IQ4_XS Q6_K IQ4_XS Q5_K IQ4_XS Q5_K IQ4_XS IQ4_XS IQ4_XS IQ4_XS IQ4_XS IQ4_XS BF16
Q3_K_M Q6_K Q3_K Q4_K*34+Q5_K*2 Q3_K Q4_K Q3_K Q4_K Q4_K*45+Q5_K*3 Q4_K*45+Q5_K*3 Q3_K Q3_K BF16
IQ3_XXS Q5_K IQ3_S Q4_K IQ3_XXS Q4_K IQ2_S IQ3_S IQ3_XXS IQ3_XXS IQ3_XXS IQ3_XXS BF16
Q2_K Q6_K Q2_K Q4_K Q2_K Q4_K Q2_K Q3_K Q3_K Q3_K Q2_K Q2_K BF16
IQ2_XXS Q5_K Q2_K Q4_K IQ2_XXS Q4_K IQ2_XXS IQ2_XXS IQ2_XXS*45+Q2_K*3 IQ2_XXS*45+Q2_K*3 IQ2_XXS IQ2_XXS BF16
IQ1_S Q5_K Q2_K Q4_K IQ1_S Q4_K IQ1_S IQ2_XXS IQ1_S*45+Q2_K*3 IQ1_S*45+Q2_K*3 IQ1_S IQ1_S BF16
"""
"""Types of the tensors of published Qwen3-Next-80B-A3B files by class, read from their headers.

The columns are the file type and CLASSES; type*tensors where a class has more than one type.
"""

PUBLISHED_BYTES = {
    ("qwen3-next-80b-a3b", "Q8_0"): 84812055520,
    ("qwen3-next-80b-a3b", "BF16"): 159458215232,
    ("gpt-oss-20b", "F16"): 13792639168,
    ("gpt-oss-20b", "Q8_0"): 12109567168,
    ("gpt-oss-20b", "Q5_K_M"): 11717357248,
    ("gpt-oss-20b", "Q4_K_M"): 11624759488,
    ("gpt-oss-20b", "Q4_0"): 11501495488,
    ("gpt-oss-20b", "Q3_K_M"): 11506103488,
}
"""Bytes of files on the Hub: unsloth's Qwen3-Next-80B-A3B-Instruct-GGUF and gpt-oss-20b-GGUF."""

TOKENIZER_BYTES = {"qwen3-next-80b-a3b": 5.75 * MIB, "gpt-oss-20b": 12.45 * MIB}
"""What the header of those files takes, nearly all of it vocabulary and merges."""


def _types_by_class(quant: str) -> dict[str, str]:
    shape = SHAPES["qwen3-next-80b-a3b"]
    counts: dict[str, Counter[str]] = {}
    for spec in choose_types(shape, tensor_shapes(shape), quant):
        name = spec.name.split(".")[-2]
        counts.setdefault(name, Counter())[spec.type_name] += 1
    return {
        name: "+".join(sorted(f"{kind}*{count}" if len(kinds) > 1 else kind for kind, count in kinds.items()))
        for name, kinds in counts.items()
    }


@pytest.mark.parametrize("line", PUBLISHED_TYPES.split("\n")[1:-1], ids=lambda line: line.split()[0])
def test_types_are_those_of_published_files(line: str) -> None:
    quant, *expected = line.split()
    got = _types_by_class(quant)
    assert {name: got[name] for name in CLASSES.split()} == dict(zip(CLASSES.split(), expected, strict=True))


@pytest.mark.parametrize(("name", "quant"), PUBLISHED_BYTES)
def test_files_have_their_published_size_but_for_the_tokenizer(name: str, quant: str) -> None:
    shape = SHAPES[name]
    data = sum(-(-spec.nbytes // 32) * 32 for spec in choose_types(shape, tensor_shapes(shape), quant))
    header = PUBLISHED_BYTES[name, quant] - data
    assert 0.98 * TOKENIZER_BYTES[name] < header < TOKENIZER_BYTES[name]


def test_tensor_counts_are_those_of_published_files() -> None:
    counts = {name: sum(1 for _ in tensor_shapes(shape)) for name, shape in SHAPES.items()}
    assert counts["qwen3-next-80b-a3b"] == 843
    assert counts["qwen3-next-80b-a3b-ssm-in"] == 807
    assert counts["qwen3-next-80b-a3b-fused"] == 795
    assert counts["qwen3-next-80b-a3b-mtp"] == 863
    assert counts["qwen3-30b-a3b"] == 579
    assert counts["gpt-oss-20b"] == 459
    assert counts["qwen3-4b"] == 398


@pytest.mark.parametrize("name", SHAPES)
def test_every_type_fits_the_rows_it_is_given_to(name: str) -> None:
    shape = SHAPES[name]
    for quant in FILE_TYPES:
        assert all(spec.nbytes > 0 for spec in choose_types(shape, tensor_shapes(shape), quant))


def test_a_slice_keeps_half_its_downs_at_more_bits_as_the_whole_does() -> None:
    shape = shape_named("qwen3-next-80b-a3b", 8)
    downs = [s for s in choose_types(shape, tensor_shapes(shape), "Q4_K_M") if "down_exps" in s.name]
    assert [spec.type_name for spec in downs].count("Q6_K") == 4


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: shape_named("qwen3-next-80b"), ModelError),
        (lambda: shape_named("qwen3-4b", 0), UsageError),
        (lambda: shape_named("qwen3-4b", 1000), UsageError),
        (lambda: shape_named("qwen3-next-80b-a3b", 3), UsageError),
        (lambda: choose_types(SHAPES["qwen3-4b"], [], "Q4_K_XL"), UsageError),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_choices(make: object, kind: type[QnextError]) -> None:
    with pytest.raises(kind) as caught:
        make()  # type: ignore[operator]
    assert caught.value.hint
