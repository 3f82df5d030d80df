"""Random weights for tensors of any size, at the speed of the disk.

Quantising gigabytes of noise would take minutes, and noise has no more to say than its first megabyte. So one
sample of blocks is quantised per type, and everything is made of windows into it, each starting at a
pseudo-random block: blocks are independent, hence rows and experts differ. All values are normal with
standard deviation 0.02, as transformers are initialised: behind RMS norms that keeps every activation and
router logit near 1 for rows of 2048, whatever the depth, so that routing spreads and nothing overflows.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from qnext.errors import EngineError
from qnext.models.gguf_types import GGML_TYPES_BY_NAME
from qnext.models.synth.writer import Buffer, TensorSpec
from qnext.units import MIB

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_POOL_BYTES = 8 * MIB
_WINDOW_BYTES = 4 * MIB
_ROW = 2048
_CHUNK_ROWS = 32
_DEVIATION = 0.02
_ATTENTION_GAIN = 0.05
"""Weight of the norm before attention. Random attention averages over all tokens; undamped, layer after layer
of it makes them alike, and alike tokens go to the same experts."""


class Quantizer(Protocol):
    """ggml's quantisation, which lives in the engine: [rows, columns] of float32 to rows of blocks."""

    def __call__(self, data: NDArray[np.float32], type_name: str) -> bytes:
        """The bytes of `data` as `type_name`."""


class Weights:
    """Data of the tensors of one file; deterministic in `seed`.

    `quantizer` may be None where all types are float or Q8_0. Raises EngineError when needed and absent.
    """

    def __init__(self, tensors: Iterable[TensorSpec], quantizer: Quantizer | None, seed: int) -> None:
        self._quantizer = quantizer
        self._seed = seed
        self._pools: dict[str, memoryview] = {}
        self._needed: dict[str, int] = {}
        for spec in tensors:
            if not _is_computed(spec.name):
                self._needed[spec.type_name] = self._needed.get(spec.type_name, 0) + spec.nbytes
        if quantizer is None and (engine := [name for name in self._needed if name not in _PLAIN_TYPES]):
            raise EngineError(
                f"quantising to {', '.join(engine)} needs the engine, which is not installed",
                hint="Install llama-cpp-python, or choose --quant BF16, F16 or Q8_0, or --header-only.",
            )

    def pieces(self, spec: TensorSpec) -> Iterator[Buffer]:
        """The bytes of one tensor, in windows of a few MiB."""
        import numpy as np

        rng = np.random.Generator(np.random.PCG64([self._seed, zlib.crc32(spec.name.encode())]))
        if _is_computed(spec.name):
            yield _computed(spec, rng).astype(_NUMPY_TYPES.get(spec.type_name, "<f4")).tobytes()
            return
        block = GGML_TYPES_BY_NAME[spec.type_name].block_bytes
        yield from _windows(self._pool(spec.type_name), spec.nbytes, block, rng)

    def _pool(self, type_name: str) -> memoryview:
        """Blocks of noise of one type, more of them than were quantised."""
        import numpy as np

        if type_name not in self._pools:
            kind = GGML_TYPES_BY_NAME[type_name]
            needed = self._needed[type_name]
            values = min(_sample_values(type_name), needed // kind.block_bytes * kind.block_size)
            chunks = range(-(-values // (_CHUNK_ROWS * _ROW)))
            with ThreadPoolExecutor(os.cpu_count()) as threads:
                sample = b"".join(threads.map(lambda chunk: self._noise(type_name, kind.id, chunk), chunks))
            rng = np.random.Generator(np.random.PCG64([self._seed, kind.id]))
            grown = _windows(memoryview(sample), min(_POOL_BYTES, needed), kind.block_bytes, rng)
            self._pools[type_name] = memoryview(sample + b"".join(grown))
        return self._pools[type_name]

    def _noise(self, type_name: str, type_id: int, chunk: int) -> bytes:
        import numpy as np

        from qnext.models.synth.blocks import quantise_q8_0

        rng = np.random.Generator(np.random.PCG64([self._seed, type_id, chunk]))
        values = rng.standard_normal((_CHUNK_ROWS, _ROW), dtype="f4") * np.float32(_DEVIATION)
        if type_name == "BF16":
            return (values.view("<u4") >> 16).astype("<u2").tobytes()
        if type_name in _NUMPY_TYPES:
            return values.astype(_NUMPY_TYPES[type_name]).tobytes()
        if self._quantizer is None:
            return quantise_q8_0(values)
        return self._quantizer(values, type_name)


_NUMPY_TYPES = {"F32": "<f4", "F16": "<f2"}
_PLAIN_TYPES = (*_NUMPY_TYPES, "BF16", "Q8_0")


def _sample_values(type_name: str) -> int:
    """How many values to quantise: what takes about a third of a second, or several for the IQ types."""
    if type_name in _PLAIN_TYPES:
        return 1 << 22
    return 1 << 16 if type_name.startswith("IQ") else 1 << 20


def _windows(pool: memoryview, size: int, block: int, rng: np.random.Generator) -> Iterator[memoryview]:
    """`size` bytes out of `pool`, in windows of at most half of it that start at random blocks."""
    window = max(min(_WINDOW_BYTES, len(pool) // 2) // block, 1) * block
    starts = (len(pool) - window) // block + 1
    for done in range(0, size, window):
        begin = int(rng.integers(starts)) * block
        yield pool[begin : begin + min(window, size - done)]


def _is_computed(name: str) -> bool:
    """Small tensors whose values have a meaning of their own."""
    return name.endswith(("norm.weight", ".bias", "ssm_a", "ssm_conv1d.weight", "attn_sinks.weight"))


def _computed(spec: TensorSpec, rng: np.random.Generator) -> NDArray[np.floating]:
    import numpy as np

    count = int(np.prod(spec.shape))
    if spec.name.endswith("attn_norm.weight"):
        return np.full(count, _ATTENTION_GAIN)
    if spec.name.endswith("norm.weight"):
        return np.ones(count)
    if spec.name.endswith("ssm_a"):
        return -np.linspace(0.05, 1, count)  # decay rates: from a long memory to a short one
    if spec.name.endswith("ssm_conv1d.weight"):
        return rng.normal(0, spec.shape[0] ** -0.5, count)
    return rng.normal(0, _DEVIATION / 20, count)  # biases are common to all tokens: keep them below the rest
