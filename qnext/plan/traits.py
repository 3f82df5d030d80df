"""What llama.cpp's memory arithmetic needs to know of a device, beside how much memory it has.

Every buffer type pads each tensor to its alignment; CUDA's family also pads the rows of quantised tensors to
512 elements; the CPU offers extra buffer types that hold weights interleaved for its SIMD width, each only
for certain types and shapes; and a GPU may offer pinned host memory that then holds the CPU's share.
Sources: `ggml_backend_*_buffer_type_get_alignment` and `…_get_alloc_size`,
`ggml_repack_get_optimal_repack_type` (ggml-cpu/repack.cpp), `ggml-cpu/amx/amx.cpp`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from qnext.models.header import TensorInfo
from qnext.plan.values import CPU_REPACK, HOST, Budget

AMX = "AMX"
"""llama.cpp's extra CPU buffer type for Intel's matrix units; it holds no expert tensors."""

CPU_ALIGNMENT = 32
"""TENSOR_ALIGNMENT of ggml-impl.h."""

FLOAT_TYPES = frozenset({"F32", "F16", "BF16", "F64", "I8", "I16", "I32", "I64"})

_CUDA_FAMILY = ("CUDA", "ROCm", "MUSA")
_CUDA_ALIGNMENT = 128
_CUDA_ROW_PADDING = 512

# Bytes that AMX adds to each block of a packed row: type -> (elements of a block, extra bytes).
_AMX_BLOCKS = {
    "Q4_0": (32, 0),
    "Q4_1": (32, 0),
    "Q8_0": (32, 4),
    "Q4_K": (256, 4),
    "Q5_K": (256, 4),
    "Q6_K": (256, 0),
    "IQ4_XS": (256, 2),
}


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """How one device stores tensors.

    `name` is the engine's device name, `buffer_type` the name of its own buffer type. `alignment` is in
    bytes. `row_padding` is the number of elements quantised rows are padded to (0: none). `host_buffer` names
    the pinned host memory the device offers. `extra_buffers` are the CPU's extra buffer types in the order
    llama.cpp tries them and `features` its instruction sets, which decide what repacks. `free_bytes` splits
    the layers between devices when a placement has no tensor split.
    """

    name: str
    kind: Literal["host", "gpu", "rpc"]
    buffer_type: str
    alignment: int = CPU_ALIGNMENT
    row_padding: int = 0
    host_buffer: str | None = None
    extra_buffers: tuple[str, ...] = ()
    features: frozenset[str] = frozenset()
    free_bytes: int = 0

    def alloc_bytes(self, shape: Sequence[int], type_name: str, nbytes: int) -> int:
        """Bytes one tensor takes in this device's own buffer, row padding and alignment included."""
        if self.row_padding and type_name.upper() not in FLOAT_TYPES and shape[0] % self.row_padding:
            elements = 1
            for length in shape:
                elements *= length
            nbytes += nbytes * (self.row_padding - shape[0] % self.row_padding) // elements
        return pad(nbytes, self.alignment)


def pad(size: int, to: int) -> int:
    """`size` rounded up to a multiple of `to`."""
    return -(-size // to) * to


def host_traits(features: Iterable[str] = ()) -> DeviceTraits:
    """The CPU with these instruction sets (names as in /proc/cpuinfo, or ggml's own)."""
    known = frozenset(feature.lower().replace(".", "_") for feature in features)
    amx = {"amx_int8", "amx_tile"} <= known and bool({"avx512_vnni", "avx512vnni"} & known)
    extra = (AMX, CPU_REPACK) if amx else (CPU_REPACK,)
    return DeviceTraits(name=HOST, kind="host", buffer_type=HOST, extra_buffers=extra, features=known)


def device_traits(budget: Budget, free_bytes: int = 0) -> DeviceTraits:
    """What is known of an offload device by the name of its backend.

    An RPC worker answers with the alignment of whatever runs behind it; a CPU worker is assumed, whose
    figures differ from a CUDA worker's by the padding alone.
    """
    name = budget.name
    if budget.kind == "gpu" and name.startswith(_CUDA_FAMILY):
        family = next(prefix for prefix in _CUDA_FAMILY if name.startswith(prefix))
        return DeviceTraits(
            name=name,
            kind="gpu",
            buffer_type=budget.buffer_type,
            alignment=_CUDA_ALIGNMENT,
            row_padding=_CUDA_ROW_PADDING,
            host_buffer=f"{family}_Host",
            free_bytes=free_bytes,
        )
    host_buffer = "Vulkan_Host" if name.startswith("Vulkan") else None
    return DeviceTraits(
        name=name,
        kind=budget.kind,
        buffer_type=budget.buffer_type,
        host_buffer=host_buffer,
        free_bytes=free_bytes,
    )


def repack_rows(type_name: str, features: frozenset[str]) -> int:
    """The number of rows that must divide a tensor's row count for `CPU_REPACK` to take it; 0 if it cannot.

    x86 and ARM rules of ggml_repack_get_optimal_repack_type; other processors are taken not to repack.
    """
    avx2, avx512 = "avx2" in features, bool({"avx512", "avx512f"} & features)
    arm = "neon" in features or "asimd" in features
    int8 = arm and bool({"i8mm", "matmul_int8"} & features)
    dot = arm and bool({"asimddp", "dotprod"} & features)
    rules: dict[str, tuple[tuple[bool, int], ...]] = {
        "Q4_0": ((avx2, 8), (int8 or dot, 4)),
        "Q4_K": ((avx2, 8), (int8 or dot, 8)),
        "Q2_K": ((avx512, 8),),
        "Q5_K": ((int8 or dot, 8),),
        "Q6_K": ((int8 or dot, 8),),
        "IQ4_NL": ((avx2, 8), (dot, 4)),
        "MXFP4": ((avx2, 8), (dot, 4)),
        "Q8_0": ((int8 or dot, 4),),
        "Q1_0": ((int8 or dot, 4),),
    }
    return next((rows for usable, rows in rules.get(type_name.upper(), ()) if usable), 0)


def extra_buffer_accepts(buffer: str, tensor: TensorInfo, expert: bool, features: frozenset[str]) -> bool:
    """Whether an extra CPU buffer type takes a weight that is multiplied (`expert`: by MUL_MAT_ID)."""
    shape = tensor.shape
    rows = shape[1] if len(shape) > 1 else 1
    dimensions = max((axis + 1 for axis, length in enumerate(shape) if length > 1), default=1)
    if buffer == CPU_REPACK:
        multiple = repack_rows(tensor.type_name, features)
        return multiple > 0 and rows % multiple == 0 and dimensions == (3 if expert else 2)
    if buffer == AMX:
        block = (
            16 if tensor.type_name.upper() == "F16" else _AMX_BLOCKS.get(tensor.type_name.upper(), (0, 0))[0]
        )
        return not expert and block > 0 and rows % 32 == 0 and shape[0] % block == 0
    return False


def amx_bytes(tensor: TensorInfo) -> int:
    """Bytes of one tensor in the AMX buffer, whose packed blocks are a little larger than the file's."""
    block, extra = _AMX_BLOCKS.get(tensor.type_name.upper(), (1, 0))
    elements = 1
    for length in tensor.shape:
        elements *= length
    return pad(tensor.nbytes + elements // block * extra, CPU_ALIGNMENT)
