"""Which type llama-quantize gives each tensor, for the file types people download.

The rule of llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type_impl`, `tensor_type_fallback`) for the
families made here (none has exactly 8 experts, which that rule treats apart). File types with IQ in the name
are made with an importance matrix, as published ones are; the others without. Checked against the types of
all 843 tensors of Qwen3-Next-80B-A3B (tests/unit/test_synth_types.py holds the counts).
"""

from __future__ import annotations

from collections.abc import Iterable

from qnext.errors import UsageError
from qnext.models.gguf_types import GGML_TYPES_BY_NAME
from qnext.models.synth.shapes import Shape
from qnext.models.synth.writer import TensorSpec

FILE_TYPES: dict[str, tuple[int, str]] = {
    "F32": (0, "F32"),
    "F16": (1, "F16"),
    "BF16": (32, "BF16"),
    "Q8_0": (7, "Q8_0"),
    "Q6_K": (18, "Q6_K"),
    "Q5_K_M": (17, "Q5_K"),
    "Q5_K_S": (16, "Q5_K"),
    "Q4_K_M": (15, "Q4_K"),
    "Q4_K_S": (14, "Q4_K"),
    "Q4_0": (2, "Q4_0"),
    "Q3_K_L": (13, "Q3_K"),
    "Q3_K_M": (12, "Q3_K"),
    "Q3_K_S": (11, "Q3_K"),
    "Q2_K": (10, "Q2_K"),
    "IQ4_NL": (25, "IQ4_NL"),
    "IQ4_XS": (30, "IQ4_XS"),
    "IQ3_XXS": (23, "IQ3_XXS"),
    "IQ2_XXS": (19, "IQ2_XXS"),
    "IQ1_S": (24, "IQ1_S"),
    "MXFP4_MOE": (38, "MXFP4"),
}
"""File type to (its number in `general.file_type`, the type most tensors get)."""

_FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""For rows that are no multiple of 256; the IQ types all fall back to IQ4_NL."""

_TINY_IQ = ("IQ1_S", "IQ2_XXS")


def choose_types(
    shape: Shape, tensors: Iterable[tuple[str, tuple[int, ...]]], quant: str
) -> tuple[TensorSpec, ...]:
    """Give every tensor its type. `quant` is a key of FILE_TYPES. Raises UsageError for any other.

    The engine counts attention values and feed-forward downs in the order of layers while it goes, and so
    does this: `tensors` must come layer by layer.
    """
    if quant not in FILE_TYPES:
        raise UsageError(f"no file type is called '{quant}'", hint=f"There are: {', '.join(FILE_TYPES)}.")
    listed = list(tensors)
    values = sum(_is_value(name) for name, _ in listed)
    seen_values = seen_downs = 0
    specs = []
    for name, dims in listed:
        kind = _kept_type(shape, name, dims, quant)
        if kind is None:
            kind = _mixed_type(shape, name, dims, quant, (seen_values, values), seen_downs)
            kind = _fitting(kind, dims[0])
            seen_values += _is_value(name)
            seen_downs += "ffn_down" in name
        specs.append(TensorSpec(name, dims, kind))
    return tuple(specs)


def _kept_type(shape: Shape, name: str, dims: tuple[int, ...], quant: str) -> str | None:
    """Type of a tensor that quantising leaves alone, or of any tensor when `quant` is a float type."""
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return quant if quant in ("F32", "F16") else "BF16"  # one row, but the converter keeps it 16-bit
    if len(dims) < 2 or not name.endswith(".weight") or "ssm_conv1d" in name or "ffn_gate_inp." in name:
        return "F32"
    if shape.arch == "gpt-oss" and "_exps" in name:
        return "MXFP4"  # as trained; published files of any type keep it
    return quant if quant in ("F32", "F16", "BF16") else None


def _mixed_type(
    shape: Shape, name: str, dims: tuple[int, ...], quant: str, value: tuple[int, int], downs: int
) -> str:
    """The mixture's choice. `value` is (index, count) over attention values, `downs` a running count."""
    default = FILE_TYPES[quant][1]
    if name == "output.weight" or (shape.tied and name == "token_embd.weight"):
        return _output_type(default, dims[0], quant)
    if quant == "MXFP4_MOE":
        return "MXFP4" if len(dims) == 3 else "Q8_0"
    if name == "token_embd.weight":
        return {"IQ1_S": "Q2_K", "IQ2_XXS": "Q2_K", "IQ3_XXS": "IQ3_S"}.get(quant, default)
    if _is_value(name):
        return _value_type(shape, default, quant, *value)
    if "attn_k.weight" in name or "attn_q.weight" in name:
        return "IQ2_S" if quant == "IQ3_XXS" else default
    if "ffn_down" in name:
        return _down_type(shape, default, quant, int(name.split(".")[1]), downs)
    if "attn_output.weight" in name:
        return {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ3_XXS": "IQ3_S",
            "IQ1_S": "IQ2_XXS",
        }.get(quant, default)
    return default


def _output_type(default: str, columns: int, quant: str) -> str:
    if quant == "MXFP4_MOE" or columns % GGML_TYPES_BY_NAME[default].block_size:
        return "Q8_0"
    if quant in (*_TINY_IQ, "IQ3_XXS"):
        return "Q5_K"
    return "Q8_0" if default == "Q8_0" else "Q6_K"


def _value_type(shape: Shape, default: str, quant: str, index: int, count: int) -> str:
    grouped = shape.heads // shape.heads_kv >= 4
    if quant in _TINY_IQ:
        return "Q4_K" if grouped or shape.experts >= 4 else "Q2_K"
    if quant in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(index, count) else default
    if quant == "Q4_K_S":
        return "Q5_K" if index < 4 else default
    if quant == "Q3_K_M":
        return "Q5_K" if index < 2 else "Q4_K"
    if quant == "Q3_K_L":
        return "Q5_K"
    if quant == "Q2_K":
        return "Q4_K" if grouped else "Q3_K"
    return {"IQ3_XXS": "Q4_K", "IQ4_NL": "Q5_K", "IQ4_XS": "Q5_K"}.get(quant, default) if grouped else default


def _down_type(shape: Shape, default: str, quant: str, layer: int, downs: int) -> str:
    blocks = shape.blocks
    index = layer if shape.experts > 1 else downs
    if quant in _TINY_IQ:
        return "Q2_K" if downs < blocks // 8 else default
    if quant in ("Q4_K_M", "Q5_K_M"):
        return "Q6_K" if _more_bits(index, blocks) else default
    if quant == "Q4_K_S":
        return "Q5_K" if index < blocks // 8 else default
    if quant == "Q3_K_M":
        return "Q5_K" if index < blocks // 16 else "Q4_K"
    return {"Q3_K_L": "Q5_K", "Q2_K": "Q3_K"}.get(quant, default)


def _is_value(name: str) -> bool:
    return name.endswith(("attn_v.weight", "attn_qkv.weight"))


def _more_bits(index: int, count: int) -> bool:
    """Every third layer of the middle, and all of the first and last eighth (`use_more_bits`)."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2


def _fitting(kind: str, columns: int) -> str:
    """`kind`, or what llama-quantize falls back to when rows of `columns` are no whole number of blocks."""
    block = GGML_TYPES_BY_NAME[kind].block_size
    if columns % block == 0:
        return kind
    smaller = _FALLBACK.get(kind, "IQ4_NL") if block > 32 else kind
    return "F16" if columns % 32 else smaller
