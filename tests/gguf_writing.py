"""A small byte-level GGUF builder for tests: it writes what it is told, sound or not.

Each field it writes is noted with its place and kind, so that a test or `scripts/fuzz_headers.py` can break
exactly that field. Nothing here comes from `qnext`: reader and builder must not share a mistake.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

LETTERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)

Q4_K, F32_TENSOR, Q8_0 = 12, 0, 8
BLOCKS = {F32_TENSOR: (1, 4), Q4_K: (256, 144), Q8_0: (32, 34)}


@dataclass(frozen=True)
class Field:
    """A field of the file: `kind` is count, length, type, dims, size, offset, version or text."""

    kind: str
    at: int
    size: int


@dataclass(frozen=True)
class Value:
    """A metadata value of type id `kind`; for an array `element` is the type id of its elements."""

    kind: int
    value: object
    element: int | None = None


@dataclass(frozen=True)
class Tensor:
    """A tensor table row; `offset` None means where it belongs."""

    name: str
    shape: Sequence[int] = (8,)
    kind: int = F32_TENSOR
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        block, size = BLOCKS.get(self.kind, (1, 4))
        count = 1
        for length in self.shape:
            count *= length
        return count // block * size


@dataclass
class Built:
    """The bytes of a file and where its fields are."""

    data: bytearray = field(default_factory=bytearray)
    fields: list[Field] = field(default_factory=list)
    header_bytes: int = 0

    def number(self, layout: str, value: object, kind: str) -> None:
        raw = struct.pack(layout, value)
        self.fields.append(Field(kind, len(self.data), len(raw)))
        self.data += raw

    def text(self, text: str | bytes, order: str) -> None:
        raw = text.encode() if isinstance(text, str) else text
        self.number(order + "Q", len(raw), "length")
        self.fields.append(Field("text", len(self.data), len(raw)))
        self.data += raw


class MemorySource:
    """A file that is only bytes, for `qnext.models.gguf_parse.read_shard`."""

    def __init__(self, data: bytes, name: str = "memory") -> None:
        self.data, self.name, self.size = data, name, len(data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


def string(text: str | bytes) -> Value:
    return Value(STR, text)


def u32(value: int) -> Value:
    return Value(U32, value)


def array(element: int, values: Sequence[object]) -> Value:
    return Value(ARR, values, element)


def build(
    metadata: Mapping[str, Value] | Sequence[tuple[str, Value]] = (),
    tensors: Sequence[Tensor] = (),
    *,
    version: int = 3,
    alignment: int = 32,
    big_endian: bool = False,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    with_data: bool = True,
) -> Built:
    """A whole file laid out with `alignment`, which `metadata` must declare when it is not 32."""
    pairs = list(metadata.items()) if isinstance(metadata, Mapping) else list(metadata)
    order = ">" if big_endian else "<"
    out = Built(bytearray(b"GGUF"))
    out.number(order + "I", version, "version")
    out.number(order + "Q", len(tensors) if n_tensors is None else n_tensors, "count")
    out.number(order + "Q", len(pairs) if n_pairs is None else n_pairs, "count")
    for key, value in pairs:
        out.text(key, order)
        out.number(order + "I", value.kind, "type")
        _write_value(out, value, order)
    place = 0
    for tensor in tensors:
        out.text(tensor.name, order)
        out.number(order + "I", len(tensor.shape), "dims")
        for length in tensor.shape:
            out.number(order + ("q" if length < 0 else "Q"), length, "size")
        out.number(order + "I", tensor.kind, "type")
        out.number(order + "Q", place if tensor.offset is None else tensor.offset, "offset")
        place += -(-tensor.nbytes // alignment) * alignment
    out.header_bytes = len(out.data)
    if tensors and with_data:
        start = -(-len(out.data) // alignment) * alignment
        padding = -(-tensors[-1].nbytes // alignment) * alignment - tensors[-1].nbytes
        out.data += bytes(start - len(out.data) + place - padding)
    return out


def _write_value(out: Built, value: Value, order: str) -> None:
    if value.kind == ARR:
        assert isinstance(value.value, Sequence)
        assert value.element is not None
        out.number(order + "I", value.element, "type")
        out.number(order + "Q", len(value.value), "count")
        for item in value.value:
            _write_value(out, item if isinstance(item, Value) else Value(value.element, item), order)
    elif value.kind == STR:
        assert isinstance(value.value, str | bytes)
        out.text(value.value, order)
    else:
        out.number(order + LETTERS[value.kind], value.value, "value")


def sample_metadata() -> dict[str, Value]:
    """Metadata of a small model, with every kind of value."""
    return {
        "general.architecture": string("qwen3next"),
        "general.name": string("Sample"),
        "qwen3next.block_count": u32(2),
        "qwen3next.rope.freq_base": Value(F32, 1e7),
        "qwen3next.some_flag": Value(BOOL, True),
        "qwen3next.big": Value(U64, 2**40),
        "qwen3next.small": Value(I8, -3),
        "qwen3next.double": Value(F64, 0.5),
        "qwen3next.per_layer": array(I32, [3, 4]),
        "tokenizer.ggml.tokens": array(STR, [f"token{n}" for n in range(300)]),
        "tokenizer.ggml.scores": array(F32, [0.0] * 2000),
        "tokenizer.chat_template": string("{{ messages }} ünïcode"),
    }


def sample_tensors(layers: range = range(2)) -> list[Tensor]:
    """Tensors of a few layers, quantised and not."""
    return [
        tensor
        for layer in layers
        for tensor in (
            Tensor(f"blk.{layer}.attn_norm.weight", (256,)),
            Tensor(f"blk.{layer}.ffn_up_exps.weight", (256, 2, 4), Q4_K),
            Tensor(f"blk.{layer}.ffn_gate_inp.weight", (32, 3), Q8_0),
        )
    ]


def sample_shards(count: int = 3) -> list[Built]:
    """A split set whose first shard has no tensors."""
    tensors = [sample_tensors(range(n, n + 1)) for n in range(count - 1)]
    total = sum(map(len, tensors))
    shards = []
    for number in range(count):
        split = {
            "split.no": Value(U16, number),
            "split.count": Value(U16, count),
            "split.tensors.count": Value(I32, total),
        }
        metadata = {**sample_metadata(), **split} if number == 0 else split
        shards.append(build(metadata, tensors[number - 1] if number else ()))
    return shards


def write_shards(folder: Path, shards: Sequence[Built], prefix: str = "m") -> list[Path]:
    """The set under the names that llama.cpp expects."""
    paths = [folder / f"{prefix}-{n + 1:05d}-of-{len(shards):05d}.gguf" for n in range(len(shards))]
    for path, shard in zip(paths, shards, strict=True):
        path.write_bytes(shard.data)
    return paths
