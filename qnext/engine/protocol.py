"""Framed messages between qnext and its engine child: a 4-byte big-endian length, then as much JSON.

The channel is the child's standard input and output. Native code that prints to standard output would break
the framing, so the child moves its real standard output aside first (see `qnext.engine.llama.worker`).
"""

from __future__ import annotations

import json
import struct
from typing import BinaryIO

Message = dict[str, object]

_LENGTH = struct.Struct(">I")
MAX_FRAME_BYTES = 64 << 20
LOG_MARK = "\x1e"
"""A line `\\x1e<n>` on the child's standard error: everything logged before reply number n has been seen."""


def frame(message: Message) -> bytes:
    """The bytes of one message."""
    payload = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(payload)) + payload


def write_frame(stream: BinaryIO, data: bytes) -> None:
    """Write the bytes of a frame and flush. Raises BrokenPipeError or ValueError when the reader is gone."""
    stream.write(data)
    stream.flush()


def read_message(stream: BinaryIO) -> Message | None:
    """Read one frame; None when the stream ended, even in the middle of a frame (the writer died).

    Raises ValueError for bytes that are no frame of ours.
    """
    head = _read_exactly(stream, _LENGTH.size)
    if head is None:
        return None
    (length,) = _LENGTH.unpack(head)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"a frame of {length} bytes")
    payload = _read_exactly(stream, length)
    if payload is None:
        return None
    message = json.loads(payload)
    if not isinstance(message, dict):
        raise ValueError("a frame that holds no object")
    return message


def _read_exactly(stream: BinaryIO, count: int) -> bytes | None:
    data = bytearray()
    while len(data) < count:
        chunk = stream.read(count - len(data))
        if not chunk:
            return None
        data += chunk
    return bytes(data)
