"""Reads a header without fetching its vocabulary, where a sister file of the same repository has it.

Of a published header 5 to 10 MB are tokens and merges, the same bytes in every quant of the model, and only
their lengths matter to us: where the arrays end. So the first file is read whole, and of each other one the
beginning and what follows the vocabulary. The bytes between are taken from the first file only if 4 KiB or
more at its beginning and 16 KiB at its end, with the key that follows, are the very same at the same distance
from each other. The parser then walks over them as over its own; the keys and the whole tensor table that
follow are read from the file itself. Taken on trust are only the counts of the arrays after the first, from
which nothing is planned. Anything unlike falls back to reading it all.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from qnext.models.gguf_source import ByteSource
from qnext.models.header import SkippedArray

HEAD_BYTES = 128 << 10
"""Read first of every file: what stands before the vocabulary is some 2 to 20 KB."""
_SAME_HEAD = 4 << 10
_SAME_TAIL = 16 << 10
_LARGE_ARRAY = 10_000
_MOST_KEPT = 32 << 20


class RecordedSource:
    """A source that remembers all it has read, without gaps, up to 32 MiB."""

    def __init__(self, source: ByteSource) -> None:
        self.name, self.size = source.name, source.size
        self.data = bytearray()
        self._source = source

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; fewer than `length` only where the file ends."""
        end = min(offset + length, self.size)
        if end > _MOST_KEPT:
            return self._source.read(offset, length)
        if end > len(self.data):
            self.data += self._source.read(len(self.data), end - len(self.data))
        return bytes(self.data[offset:end])


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The large arrays of a header that was read whole: `data[start:end]`, which begins with a key. Where it
    ends the next key is stored, `after` in length: an array may repeat one number, so that its last bytes
    alone would be the same at another distance too."""

    data: bytes
    start: int
    end: int
    after: int


def find_vocabulary(recorded: RecordedSource, metadata: Mapping[str, object]) -> Vocabulary | None:
    """The first run of large arrays in a header, None where it has none. Small keys never are among them."""
    keys = list(metadata)
    large = [_is_large(metadata[key]) for key in keys]
    if True not in large:
        return None
    first = large.index(True)
    after = next((n for n in range(first, len(keys)) if not large[n]), None)
    if after is None:
        return None
    data = bytes(recorded.data)
    start = data.find(_stored(keys[first]))
    following = _stored(keys[after])
    end = data.find(following, start)
    if start < 0 or end - start < 2 * HEAD_BYTES:
        return None
    return Vocabulary(data, start, end, len(following))


class TwinSource:
    """A file whose vocabulary is taken from `known` where the bytes around it agree."""

    def __init__(self, source: ByteSource, known: Vocabulary) -> None:
        self.name, self.size = source.name, source.size
        self._source = source
        self._known = known
        self._head = source.read(0, HEAD_BYTES)
        self._shift = 0
        self._borrowed_end = self._find_end()

    @property
    def borrowed(self) -> bool:
        """Whether the vocabulary is the known one."""
        return self._borrowed_end > len(self._head)

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; fewer than `length` only where the file ends."""
        end = min(offset + length, self.size)
        parts = [self._head[offset:end]]
        offset = max(offset, len(self._head))
        if offset < min(end, self._borrowed_end):
            upto = min(end, self._borrowed_end)
            parts.append(self._known.data[offset - self._shift : upto - self._shift])
            offset = upto
        if offset < end:
            parts.append(self._source.read(offset, end - offset))
        return b"".join(parts)

    def _find_end(self) -> int:
        """How far the known bytes may stand for the file's; 0 where they are not the same."""
        known, head = self._known, self._head
        place = head.find(known.data[known.start : known.start + 64])
        if place < 0 or len(head) - place < _SAME_HEAD:
            return 0
        self._shift = place - known.start
        if head[place:] != known.data[known.start : len(head) - self._shift]:
            return 0
        end = known.end + self._shift - _SAME_TAIL
        same = known.data[known.end - _SAME_TAIL : known.end + known.after]
        if end <= len(head) or self._source.read(end, len(same)) != same:
            return 0
        return end


def _is_large(value: object) -> bool:
    return isinstance(value, SkippedArray) and value.count >= _LARGE_ARRAY


def _stored(key: str) -> bytes:
    raw = key.encode()
    return struct.pack("<Q", len(raw)) + raw
