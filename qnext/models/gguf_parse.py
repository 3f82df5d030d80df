"""Parses the header of one GGUF file: magic, counts, key-value pairs, tensor table, where the data lies.

The layout is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what is refused is what llama.cpp's
own loader refuses (ggml/src/gguf.cpp, src/llama-model-loader.cpp), so that a header accepted here loads
there, plus limits that no real model comes near and that keep a broken file from costing time or memory.
Version 2 and 3 have the same layout; 1 is no longer loaded by anyone.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from qnext.models.gguf_source import DAMAGED, UNFINISHED, ByteSource, Cursor
from qnext.models.gguf_types import GGML_TYPES
from qnext.models.header import SkippedArray, TensorInfo
from qnext.units import format_bytes

_STRING, _ARRAY = 8, 9
_VALUE_TYPES = {  # id: (the engine's name, struct letter)
    0: ("u8", "B"),
    1: ("i8", "b"),
    2: ("u16", "H"),
    3: ("i16", "h"),
    4: ("u32", "I"),
    5: ("i32", "i"),
    6: ("f32", "f"),
    7: ("bool", "?"),
    _STRING: ("str", ""),
    _ARRAY: ("arr", ""),
    10: ("u64", "Q"),
    11: ("i64", "q"),
    12: ("f64", "d"),
}
_REQUIRED_TYPES = {  # llama.cpp stops, at times with an assertion, on any other type
    "general.architecture": "str",
    "general.alignment": "u32",
    "split.no": "u16",
    "split.count": "u16",
    "split.tensors.count": "i32",
}

_I32 = struct.Struct("<i")
_COUNTS = struct.Struct("<qq")

_SHORT_ARRAY = 1024  # elements; per-layer settings are this short, vocabularies are not
_LONG_STRING = 1 << 20  # bytes; chat templates are 100 times shorter
_KEPT_LIMIT = 32 << 20  # bytes of values held in memory
_MOST_ENTRIES = 1 << 16  # pairs or tensors; real files have some 100 and some 1,000
_LONGEST_KEY = 65535  # the format's own limit
_NAME_LIMIT = 64  # GGML_MAX_NAME, with the final zero byte
_MAX_DIMS = 4  # GGML_MAX_DIMS
_DEFAULT_ALIGNMENT = 32  # GGUF_DEFAULT_ALIGNMENT
_POWERS_OF_TWO = frozenset(1 << bit for bit in range(32))
_I64_MAX = 2**63 - 1
_SMALLEST_PAIR = 14  # an empty key's length, one byte of it, the type and a one-byte value
_SMALLEST_TENSOR = 24  # an empty name's length, no dimensions, type and offset


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The header of one file. `data_end` is the first byte after the last tensor's data."""

    name: str
    size: int
    version: int
    alignment: int
    metadata: Mapping[str, object]
    tensors: tuple[TensorInfo, ...]
    data_end: int


@dataclass(frozen=True, slots=True)
class _Entry:
    """A row of the tensor table as stored: `offset` counts from the start of the data, `at` is its place."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    nbytes: int
    offset: int
    at: int


def read_shard(
    source: ByteSource, shard: int = 0, *, check_data: bool = True, whole: str | None = None
) -> ShardHeader:
    """The header of one file, whose tensors are numbered as being in `shard`.

    `check_data` demands that the file be as long as its tensors need; `whole` names an array to be read
    with all its elements. Raises ModelError for anything that llama.cpp would not load.
    """
    cursor = Cursor(source)
    version, tensor_count, pair_count = _read_counts(cursor)
    metadata = _read_metadata(cursor, pair_count, whole)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)  # _REQUIRED_TYPES
    entries = [_read_entry(cursor, number, tensor_count) for number in range(tensor_count)]
    tensors, data_end = _place(cursor, entries, alignment, shard)
    if check_data and data_end > source.size:
        missing = data_end - source.size
        raise cursor.broken(
            source.size,
            f"{data_end} bytes as its tensors need",
            f"the end of the file: {missing} bytes ({format_bytes(missing)}) are missing",
            hint=UNFINISHED,
        )
    return ShardHeader(source.name, source.size, version, alignment, metadata, tensors, data_end)


def _read_counts(cursor: Cursor) -> tuple[int, int, int]:
    if cursor.size == 0:
        raise cursor.broken(0, "a GGUF file", "an empty file", hint=UNFINISHED)
    start = cursor.take(min(cursor.remaining, 64), "the first bytes")
    if not start.startswith(b"GGUF"):
        found, hint = _what_instead(start)
        raise cursor.broken(0, "the letters GGUF", found, hint=hint)
    cursor.position = 4
    version = cursor.u32("the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.broken(
            4,
            "a little-endian GGUF of version 2 or 3",
            f"a big-endian one (version {int.from_bytes(version.to_bytes(4, 'little'))})",
            hint="Get the little-endian file, or convert it with gguf-py's gguf_convert_endian.py.",
        )
    if version not in (2, 3):
        raise cursor.broken(
            4, "GGUF version 2 or 3", f"version {version}", hint="Get a newer conversion of this model."
        )
    tensor_count, pair_count = cursor.unpack(_COUNTS, "the numbers of tensors and keys")
    for at, count, smallest, what in (
        (8, tensor_count, _SMALLEST_TENSOR, "tensors"),
        (16, pair_count, _SMALLEST_PAIR, "keys"),
    ):
        most = min(cursor.remaining // smallest, _MOST_ENTRIES)
        if not 0 <= count <= most:
            expected = f"0 to {most} {what} in a file of {cursor.size} bytes"
            raise cursor.broken(at, expected, f"a count of {count}")
    return version, tensor_count, pair_count


def _what_instead(start: bytes) -> tuple[str, str]:
    """What a file that is no GGUF seems to be, and what to do about it."""
    head = start.lstrip().lower()
    if head.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page", "The server sent a page instead of the model: sign in or check the address."
    if head.startswith(b"version https://git-lfs"):
        return "a git-LFS pointer", "Only the pointer was cloned: run `git lfs pull`."
    if head.startswith(b'{"error'):
        return "an error message of a server", "Read the file, then download the model again."
    if head.startswith(b"pk\x03\x04") or start[8:9] == b"{":
        return (
            "PyTorch or safetensors weights",
            "llama.cpp needs a GGUF: get one, or convert with convert_hf_to_gguf.py.",
        )
    return repr(start[:4])[1:], DAMAGED


def _read_metadata(cursor: Cursor, count: int, whole: str | None) -> dict[str, object]:
    metadata: dict[str, object] = {}
    kept = 0
    for number in range(count):
        at = cursor.position
        length = cursor.u64(f"the length of key {number}")
        if not 0 < length <= _LONGEST_KEY:
            raise cursor.broken(at, f"key {number} of {count} to have 1 to {_LONGEST_KEY} bytes", str(length))
        key = cursor.text(length, f"key {number}", at)
        shown = _quoted(key)
        if key in metadata:
            raise cursor.broken(at, "each key once", f"{shown} again")
        value_at = cursor.position
        kind = cursor.u32(f"the type of {shown}")
        if kind not in _VALUE_TYPES:
            raise cursor.broken(value_at, f"a value type from 0 to 12 for {shown}", str(kind))
        required = _REQUIRED_TYPES.get(key)
        if required and _VALUE_TYPES[kind][0] != required:
            raise cursor.broken(value_at, f"{shown} to be {required}", _VALUE_TYPES[kind][0])
        if kind == _ARRAY:
            value = _read_array(cursor, shown, key == whole)
        elif kind == _STRING:
            value = _read_string(cursor, shown)
        else:
            value = cursor.unpack(struct.Struct("<" + _VALUE_TYPES[kind][1]), f"the value of {shown}")[0]
        if key == "general.alignment" and value not in _POWERS_OF_TWO:
            raise cursor.broken(value_at + 4, f"{shown} to be a power of two", str(value))
        metadata[key] = value
        if key != whole:
            kept += len(key) + _weight(value)
        if kept > _KEPT_LIMIT:
            raise cursor.broken(
                value_at, f"at most {_KEPT_LIMIT >> 20} MiB of metadata before the vocabulary", "more"
            )
    return metadata


def _read_string(cursor: Cursor, shown: str) -> object:
    at = cursor.position
    length = cursor.u64(f"the length of {shown}")
    if length > _LONG_STRING:
        cursor.skip(length, f"the text of {shown}", at)
        return SkippedArray("u8", length)
    return cursor.text(length, shown, at)


def _read_array(cursor: Cursor, shown: str, whole: bool) -> object:
    at = cursor.position
    kind = cursor.u32(f"the element type of {shown}")
    if kind not in _VALUE_TYPES or kind == _ARRAY:
        found = "an array, which llama.cpp does not load" if kind == _ARRAY else str(kind)
        raise cursor.broken(at, f"a plain element type for the array {shown}", found)
    count_at = cursor.position
    count = cursor.u64(f"the length of {shown}")
    name, letter = _VALUE_TYPES[kind]
    size = struct.calcsize("<" + letter) if letter else 8
    cursor.require(count * size, f"{count} elements of {shown}", count_at)
    if kind == _STRING:
        if whole:
            return tuple(_array_string(cursor, f"string {n} of {shown}") for n in range(count))
        cursor.skip_strings(count, shown)
        return SkippedArray(name, count)
    if count <= _SHORT_ARRAY or whole:
        return struct.unpack(f"<{count}{letter}", cursor.take(count * size, f"the elements of {shown}"))
    cursor.skip(count * size, f"the elements of {shown}", count_at)
    return SkippedArray(name, count)


def _array_string(cursor: Cursor, what: str) -> str:
    at = cursor.position
    return cursor.text(cursor.u64(f"the length of {what}"), what, at)


def _weight(value: object) -> int:
    """About the bytes a value takes in memory."""
    if isinstance(value, str):
        return 4 * len(value)
    return 40 * len(value) if isinstance(value, tuple) else 100


def _read_entry(cursor: Cursor, number: int, count: int) -> _Entry:
    at = cursor.position
    length = cursor.u64(f"the length of the name of tensor {number}")
    if length >= _NAME_LIMIT:
        expected = f"the name of tensor {number} of {count} to have under {_NAME_LIMIT} bytes"
        raise cursor.broken(at, expected, str(length))
    name = cursor.text(length, f"the name of tensor {number}", at)
    shown = _quoted(name)
    dims_at = cursor.position
    dims = cursor.u32(f"the number of dimensions of {shown}")
    if dims > _MAX_DIMS:
        raise cursor.broken(dims_at, f"at most {_MAX_DIMS} dimensions of {shown}", str(dims))
    shape = cursor.unpack(struct.Struct(f"<{dims}q"), f"the shape of {shown}")
    if any(size <= 0 for size in shape) or prod(shape) > _I64_MAX:
        expected = f"sizes from 1 and under 2^63 elements in {shown}"
        raise cursor.broken(dims_at + 4, expected, f"shape {list(shape)}")
    type_at = cursor.position
    kind_id = cursor.unpack(_I32, f"the type of {shown}")[0]
    kind = GGML_TYPES.get(kind_id)
    if kind is None:
        raise cursor.broken(
            type_at,
            f"a tensor type of llama.cpp for {shown}",
            f"{kind_id}",
            hint="The file is damaged, or its quantisation is newer or older than this llama.cpp.",
        )
    row = shape[0] if shape else 1
    if row % kind.block_size:
        expected = f"rows of {shown} to be whole {kind.name} blocks of {kind.block_size}"
        raise cursor.broken(dims_at + 4, expected, f"rows of {row}")
    nbytes = prod(shape) // kind.block_size * kind.block_bytes
    offset = cursor.u64(f"the offset of {shown}")
    return _Entry(name, shape, kind.name, nbytes, offset, at)


def _place(
    cursor: Cursor, entries: list[_Entry], alignment: int, shard: int
) -> tuple[tuple[TensorInfo, ...], int]:
    """Turns stored offsets into places in the file. They must follow each other in the table's order, each
    padded to the alignment: llama.cpp refuses any other layout."""
    data_start = -(-cursor.position // alignment) * alignment
    tensors: dict[str, TensorInfo] = {}
    expected, end = 0, cursor.position
    for entry in entries:
        shown = _quoted(entry.name)
        if entry.name in tensors:
            raise cursor.broken(entry.at, "each tensor name once", f"{shown} again")
        if entry.offset != expected:
            fault = "overlaps the tensor before it" if entry.offset < expected else "leaves a gap"
            if entry.offset % alignment:
                fault = f"is not aligned to {alignment}"
            raise cursor.broken(
                entry.at, f"{shown} at data offset {expected}", f"{entry.offset}, which {fault}"
            )
        offset = data_start + entry.offset
        end = offset + entry.nbytes
        expected += -(-entry.nbytes // alignment) * alignment
        if end > _I64_MAX:
            raise cursor.broken(entry.at, f"{shown} to end before byte 2^63", str(end))
        tensors[entry.name] = TensorInfo(
            entry.name, entry.shape, entry.type_name, entry.nbytes, shard, offset
        )
    return tuple(tensors.values()), end


def _quoted(text: str) -> str:
    """A name from the file, safe to print: control characters escaped, cut at 80."""
    return repr(text if len(text) <= 80 else text[:77] + "...")
