"""What a GGUF file says about itself: the values that every other room reasons about.

A header is everything but the weights: metadata, tensor names, shapes, types and where the bytes lie.
`read_header` in `qnext.models.gguf_reader` makes one from a file; `qnext.models.shape` reads the model's
dimensions out of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of the file.

    `shape` is in ggml's order (fastest dimension first, as the file stores it); `nbytes` is what the tensor
    takes in the file and in a buffer before the buffer's own alignment; `offset` counts from the start of
    shard number `shard`.
    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    shard: int
    offset: int


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """Stands in the metadata for an array whose contents were not read (a vocabulary, say)."""

    element_type: str
    count: int


@dataclass(frozen=True, slots=True)
class ModelHeader:
    """Metadata and tensor table of one model, over all its shards.

    `metadata` maps keys to int, float, bool, str, a tuple of those (short arrays) or `SkippedArray`.
    `file_bytes` is the sum over shards. `version` is the GGUF version (2 or 3).
    """

    paths: tuple[Path, ...]
    file_bytes: int
    version: int
    alignment: int
    metadata: Mapping[str, object]
    tensors: tuple[TensorInfo, ...]
