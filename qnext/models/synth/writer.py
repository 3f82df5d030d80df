"""Writes GGUF v3: header bytes, tensor offsets, and the file, whole or not at all.

Own writer because the header of a 152k-token vocabulary has to cost a fraction of a second (the gguf package
packs arrays value by value), because the demo must be byte-identical whatever package version is installed,
and because a header-only file is a header plus a hole. Layout: llama.cpp, ggml/include/gguf.h.
"""

from __future__ import annotations

import os
import shutil
import struct
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qnext.errors import ModelError
from qnext.models.gguf_types import GGML_TYPES_BY_NAME, tensor_nbytes
from qnext.units import format_bytes

ALIGNMENT = 32

Buffer = bytes | memoryview


class U16(int):
    """A whole number that is written in 16 bits."""


class I32(int):
    """A whole number that is written in 32 bits with a sign."""


MetaValue = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]

_U16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 2, 4, 5, 6, 7, 8, 9


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to be written. `shape` is in ggml's order, fastest dimension first."""

    name: str
    shape: tuple[int, ...]
    type_name: str

    @property
    def nbytes(self) -> int:
        """Bytes of the data, without padding."""
        return tensor_nbytes(self.type_name, self.shape)


@dataclass(frozen=True, slots=True)
class Layout:
    """An encoded header and where each tensor's data begins and the file ends (absolute byte positions)."""

    header: bytes
    tensors: tuple[TensorSpec, ...]
    positions: tuple[int, ...]
    file_bytes: int


def lay_out(metadata: Mapping[str, MetaValue], tensors: Iterable[TensorSpec]) -> Layout:
    """Encode metadata and tensor table in the order given; int becomes u32 (i32 in arrays) unless it is a
    U16 or I32, float f32."""
    specs = tuple(tensors)
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(specs), len(metadata))]
    for key, value in metadata.items():
        parts += [_string(key), _encode(value)]
    offsets, end = [], 0
    for spec in specs:
        offsets.append(end)
        parts.append(_string(spec.name))
        number = GGML_TYPES_BY_NAME[spec.type_name].id
        dims = len(spec.shape)
        parts.append(struct.pack(f"<I{dims}QIQ", dims, *spec.shape, number, end))
        end += _aligned(spec.nbytes)
    header = b"".join(parts)
    header += bytes(_aligned(len(header)) - len(header))
    positions = tuple(len(header) + offset for offset in offsets)
    return Layout(header, specs, positions, len(header) + end)


def write_file(
    path: Path,
    layout: Layout,
    data: Callable[[TensorSpec], Iterable[Buffer]] | None,
    *,
    overwrite: bool = False,
) -> None:
    """Write `layout` to `path` through a temporary file beside it, renamed when complete.

    `data` yields the bytes of each tensor in turn, in pieces of any size; without it the data is one hole of
    the full logical size. Raises ModelError when `path` exists (unless `overwrite`), its folder cannot be
    written, or the disk has too little room.
    """
    if path.exists() and not overwrite:
        raise ModelError(f"{path} exists already", hint="Choose another name with -o, or remove the file.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(path.parent).free
    except OSError as error:
        raise _unwritable(path, error) from error
    needed = layout.file_bytes if data else len(layout.header)
    if needed > free:
        raise ModelError(
            f"{path.parent} has {format_bytes(free)} free, the file takes {format_bytes(needed)}",
            hint="Choose another folder with -o, fewer layers with --layers, or --header-only.",
        )
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    try:
        with temporary.open("wb") as out:
            out.write(layout.header)
            if data:
                for spec in layout.tensors:
                    for piece in data(spec):
                        out.write(piece)
                    out.write(bytes(_aligned(spec.nbytes) - spec.nbytes))
            out.truncate(layout.file_bytes)
        temporary.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _unwritable(path: Path, error: OSError) -> ModelError:
    return ModelError(
        f"cannot write {path}: {error.strerror or error}",
        hint="Check the folder's rights and free space, or choose another folder.",
    )


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(8, "little") + data


def _encode(value: MetaValue) -> bytes:
    if isinstance(value, bool):
        return struct.pack("<IB", _BOOL, value)
    if isinstance(value, U16):
        return struct.pack("<IH", _U16, value)
    if isinstance(value, I32):
        return struct.pack("<Ii", _I32, value)
    if isinstance(value, int):
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    first = value[0]
    head = (_ARRAY, {bool: _BOOL, int: _I32, float: _F32, str: _STRING}[type(first)], len(value))
    if isinstance(first, str):
        return struct.pack("<IIQ", *head) + b"".join(map(_string, value))  # type: ignore[arg-type]
    code = "?" if isinstance(first, bool) else "i" if isinstance(first, int) else "f"
    return struct.pack(f"<IIQ{len(value)}{code}", *head, *value)
