"""The tensor types a GGUF file may hold, and how many bytes each takes.

A type stores elements in blocks: `block_size` elements of a row in `block_bytes` bytes. The numbers are
those of `type_traits` in ggml.c and the block structs in ggml-common.h (llama.cpp 0.5.0). They are written
down here because the `gguf` package pulls numpy, too slow for `qnext plan`, and differs from the engine in
two rows (`tests/unit/test_gguf_reader.py` names them). Ids that ggml has removed (4, 5, 31 to 33, 36 to 38)
are absent on purpose: the engine refuses such files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from qnext.errors import ModelError


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One tensor type: `id` as the file stores it, `block_size` in elements, `block_bytes` in bytes."""

    id: int
    name: str
    block_size: int
    block_bytes: int


GGML_TYPES = {
    row[0]: GgmlType(*row)
    for row in (
        (0, "F32", 1, 4),
        (1, "F16", 1, 2),
        (2, "Q4_0", 32, 18),
        (3, "Q4_1", 32, 20),
        (6, "Q5_0", 32, 22),
        (7, "Q5_1", 32, 24),
        (8, "Q8_0", 32, 34),
        (9, "Q8_1", 32, 36),
        (10, "Q2_K", 256, 84),
        (11, "Q3_K", 256, 110),
        (12, "Q4_K", 256, 144),
        (13, "Q5_K", 256, 176),
        (14, "Q6_K", 256, 210),
        (15, "Q8_K", 256, 292),
        (16, "IQ2_XXS", 256, 66),
        (17, "IQ2_XS", 256, 74),
        (18, "IQ3_XXS", 256, 98),
        (19, "IQ1_S", 256, 50),
        (20, "IQ4_NL", 32, 18),
        (21, "IQ3_S", 256, 110),
        (22, "IQ2_S", 256, 82),
        (23, "IQ4_XS", 256, 136),
        (24, "I8", 1, 1),
        (25, "I16", 1, 2),
        (26, "I32", 1, 4),
        (27, "I64", 1, 8),
        (28, "F64", 1, 8),
        (29, "IQ1_M", 256, 56),
        (30, "BF16", 1, 2),
        (34, "TQ1_0", 256, 54),
        (35, "TQ2_0", 256, 66),
        (39, "MXFP4", 32, 17),
        (40, "NVFP4", 64, 36),
        (41, "Q1_0", 128, 18),
        (42, "Q2_0", 64, 18),
    )
}
"""Every type this llama.cpp reads, by its id in the file."""

GGML_TYPES_BY_NAME = {kind.name: kind for kind in GGML_TYPES.values()}


def tensor_nbytes(type_name: str, shape: Sequence[int]) -> int:
    """Bytes of a contiguous tensor: elements / block_size * block_bytes (`ggml_nbytes`).

    `shape` is in ggml's order, the row length first. Raises ModelError for a type that llama.cpp does not
    know or a row that is no whole number of blocks.
    """
    kind = GGML_TYPES_BY_NAME.get(type_name)
    if kind is None:
        raise ModelError(
            f"'{type_name}' is not a tensor type of llama.cpp",
            hint="Use one of " + ", ".join(GGML_TYPES_BY_NAME) + ".",
        )
    row = shape[0] if shape else 1
    if row % kind.block_size:
        raise ModelError(
            f"rows of {row} elements cannot be stored as {type_name}, whose blocks hold {kind.block_size}",
            hint="Choose a type with a smaller block, F16 or Q8_0 for example.",
        )
    return prod(shape) // kind.block_size * kind.block_bytes
