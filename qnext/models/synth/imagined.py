"""The header of a published model without its file: true shape, true tensor types, no weights.

What a machine would do with a model can be planned before anything is downloaded or written, offline too.
Checked against the published files' tensor types and sizes (tests/unit/test_synth_types.py).
"""

from __future__ import annotations

from qnext.models.gguf_types import tensor_nbytes
from qnext.models.header import ModelHeader, TensorInfo
from qnext.models.synth.ftypes import FILE_TYPES, choose_types
from qnext.models.synth.shapes import shape_metadata, shape_named, tensor_shapes
from qnext.models.synth.writer import ALIGNMENT


def imagined_header(name: str, quant: str, layers: int | None = None) -> ModelHeader:
    """The header that `name` (a key of SHAPES), or a slice of it, has in file type `quant`; `paths` is empty.

    `file_bytes` counts the tensors; a real file adds some megabytes of vocabulary. Raises ModelError or
    UsageError for names that are not known.
    """
    shape = shape_named(name, layers)
    tensors, offset = [], 0
    for spec in choose_types(shape, tensor_shapes(shape), quant):
        nbytes = tensor_nbytes(spec.type_name, spec.shape)
        tensors.append(TensorInfo(spec.name, spec.shape, spec.type_name, nbytes, 0, offset))
        offset += -(-nbytes // ALIGNMENT) * ALIGNMENT
    metadata = {
        "general.architecture": shape.arch,
        "general.name": name,
        "general.file_type": FILE_TYPES[quant][0],
        **shape_metadata(shape),
    }
    return ModelHeader((), offset, 3, ALIGNMENT, metadata, tuple(tensors))
