"""ggml's own quantisation, through ctypes: the bytes llama-quantize would write.

Only libggml-base is loaded, which holds the quantisation kernels and no backend: nothing in it looks at the
machine or can crash on a CPU's extensions, so this may run in the parent process.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.errors import EngineError
from qnext.models.gguf_types import GGML_TYPES_BY_NAME, tensor_nbytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def quantise_rows(data: NDArray[np.float32], type_name: str) -> bytes:
    """`data` [rows, columns] as `type_name`, row by row; columns must be a multiple of the type's block.

    Types that cannot do without an importance matrix get an even one. Safe to call from several threads: the
    call releases the interpreter lock. Raises EngineError when llama-cpp-python is not installed.
    """
    import numpy as np

    library = _ggml_base()
    values = np.ascontiguousarray(data, dtype=np.float32)
    rows, columns = values.shape
    number = GGML_TYPES_BY_NAME[type_name].id
    out = ctypes.create_string_buffer(tensor_nbytes(type_name, (columns, rows)))
    even = np.ones(columns, np.float32) if library.ggml_quantize_requires_imatrix(number) else None
    written = library.ggml_quantize_chunk(
        number, values.ctypes.data, out, 0, rows, columns, None if even is None else even.ctypes.data
    )
    if written != len(out):
        raise EngineError(
            f"ggml wrote {written} bytes of {type_name} where {len(out)} were due",
            hint="This build of llama-cpp-python is not the one qnext knows: run ./scripts/qnext again.",
        )
    return out.raw


@cache
def _ggml_base() -> ctypes.CDLL:
    spec = importlib.util.find_spec("llama_cpp")
    places = list(spec.submodule_search_locations or []) if spec else []
    for folder in places:
        for name in ("libggml-base.so.0", "libggml-base.so", "libggml-base.dylib", "ggml-base.dll"):
            path = Path(folder) / "lib" / name
            if path.exists():
                return _declared(ctypes.CDLL(str(path)))
    raise EngineError(
        "quantising needs llama-cpp-python, which is not installed",
        hint="Run ./scripts/qnext, which installs it, or choose --quant BF16, F16 or Q8_0.",
    )


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Signatures from ggml/include/ggml.h."""
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    return library
