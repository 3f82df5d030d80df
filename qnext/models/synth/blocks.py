"""Bytes of quantised rows that need no engine: Q8_0 from floats, and Q4_K blocks composed directly.

Block layouts: llama.cpp, ggml/src/ggml-common.h (`block_q8_0`, `block_q4_K`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def quantise_q8_0(values: NDArray[np.float32]) -> bytes:
    """`values` (rows a multiple of 32) as Q8_0: per 32 values one f16 scale, max |x| / 127, and int8s."""
    import numpy as np

    groups = values.astype(np.float32).reshape(-1, 32)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    blocks = np.empty(len(groups), dtype=[("d", "<f2"), ("qs", "i1", 32)])
    blocks["d"] = scale[:, 0]
    blocks["qs"] = np.rint(groups * inverse)
    return blocks.tobytes()


def random_q4_k(rng: np.random.Generator, count: int, exponent: int) -> bytes:
    """`count` Q4_K blocks (256 values each), uniform around 0 with standard deviation 147.5 * 2**exponent.

    A value is d * scale * q - dmin * minimum with q in 0..15. Scale 32 and minimum 30 with dmin = 8 d centre
    it: 32 d * (q - 7.5). The twelve bytes are those two numbers, eight times each, packed in six bits.
    """
    import numpy as np

    packed = [32 | (2 << 6)] * 4 + [30 | (1 << 6)] * 4 + [(30 & 15) << 4] * 4
    blocks = np.empty(count, dtype=[("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])
    blocks["d"] = 2.0**exponent
    blocks["dmin"] = 8 * 2.0**exponent
    blocks["scales"] = packed
    blocks["qs"] = rng.integers(0, 256, (count, 128), dtype=np.uint8)
    return blocks.tobytes()
