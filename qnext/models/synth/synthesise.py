"""True-shape files: a published model's header and tensors, the data random or a hole of the true size."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from qnext.models.synth.ftypes import FILE_TYPES, choose_types
from qnext.models.synth.shapes import Shape, shape_metadata, shape_named, tensor_shapes
from qnext.models.synth.tokenizer import CHATML, GPT_OSS_SPECIAL, HARMONY, QWEN_SPECIAL, syllable_vocabulary
from qnext.models.synth.weights import Quantizer, Weights
from qnext.models.synth.writer import Buffer, Layout, MetaValue, TensorSpec, lay_out, write_file


@dataclass(frozen=True, slots=True)
class SynthReport:
    """What was written. A header-only file stores `header_bytes` of its logical size, `file_bytes`."""

    path: Path
    shape: str
    quant: str
    layers: int
    tensors: int
    file_bytes: int
    header_bytes: int
    header_only: bool
    elapsed_ns: int


def synthesise(
    shape: str,
    path: Path,
    *,
    quant: str,
    layers: int | None = None,
    header_only: bool = False,
    quantizer: Quantizer | None = None,
    progress: Callable[[int, int], None] | None = None,
    seed: int = 0,
) -> SynthReport:
    """Write a GGUF of `shape` (a key of SHAPES) in file type `quant` (a key of FILE_TYPES) to `path`.

    `layers` replaces the number of trunk layers. `quantizer` is needed for all but float types and Q8_0,
    unless `header_only`. `progress` is called with bytes of data written and in all. The same arguments and
    `seed` give the same bytes. Raises ModelError (unknown shape, file exists, disk full), UsageError (quant,
    layers) or EngineError (no quantizer).
    """
    began = time.perf_counter_ns()
    dims = shape_named(shape, layers)
    layout = _layout(shape, dims, quant)
    data = None
    if not header_only:
        weights = Weights(layout.tensors, quantizer, seed)
        data = weights.pieces if progress is None else _counted(weights, layout, progress)
    write_file(path, layout, data)
    return SynthReport(
        path=path,
        shape=shape,
        quant=quant,
        layers=dims.layers,
        tensors=len(layout.tensors),
        file_bytes=layout.file_bytes,
        header_bytes=len(layout.header),
        header_only=header_only,
        elapsed_ns=time.perf_counter_ns() - began,
    )


def _layout(name: str, shape: Shape, quant: str) -> Layout:
    tensors = choose_types(shape, tensor_shapes(shape), quant)
    metadata: dict[str, MetaValue] = {
        "general.architecture": shape.arch,
        "general.type": "model",
        "general.name": f"{name} with random weights",
        "general.description": "True shape, made by qnext for measuring; it says nothing of sense.",
        "general.file_type": FILE_TYPES[quant][0],
        "general.quantization_version": 2,
    }
    return lay_out(metadata | shape_metadata(shape) | _tokenizer(shape), tensors)


def _tokenizer(shape: Shape) -> dict[str, MetaValue]:
    """A vocabulary of the family's size, with its special tokens at the ids of the full one."""
    special, full_id = (GPT_OSS_SPECIAL, 199998) if shape.arch == "gpt-oss" else (QWEN_SPECIAL, 151643)
    first = full_id if shape.vocab > full_id else shape.vocab - len(special)
    vocabulary = syllable_vocabulary(shape.vocab, special, first)
    if shape.arch == "gpt-oss":
        return vocabulary.metadata(pre="gpt-4o", eos="<|return|>", bos="<|startoftext|>", template=HARMONY)
    return vocabulary.metadata(pre="qwen2", eos="<|im_end|>", bos="<|endoftext|>", template=CHATML)


def _counted(
    weights: Weights, layout: Layout, progress: Callable[[int, int], None]
) -> Callable[[TensorSpec], Iterator[Buffer]]:
    done, total = 0, sum(spec.nbytes for spec in layout.tensors)

    def pieces(spec: TensorSpec) -> Iterator[Buffer]:
        nonlocal done
        for piece in weights.pieces(spec):
            yield piece
            done += len(piece)
            progress(done, total)

    return pieces
