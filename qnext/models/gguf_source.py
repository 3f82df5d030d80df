"""Bytes of a GGUF file, wherever it lies, and a cursor that walks its header through a small window.

The header's length is not written anywhere: it is known only after the last tensor entry. So it is read in
windows that grow while the reading is sequential (64 KiB up to 4 MiB): a small header costs one read, a
vocabulary of 6 MiB about eight, and memory never exceeds one window plus what is kept. Anything that knows
its size and can read a range is a source: a file here, an HTTP address elsewhere.
"""

from __future__ import annotations

import re
import struct
from functools import cache
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self

from qnext.errors import ModelError

HEADER_LIMIT = 128 << 20
"""Bytes a header may take. The largest published ones take about 20 MiB; a broken count must not make us
walk through gigabytes of weights."""

_FIRST_WINDOW = 64 << 10
_LARGEST_WINDOW = 4 << 20
_RUN = 64

DAMAGED = "The file is damaged: download it again, or make it again if you converted it."
UNFINISHED = "The download did not finish: resume it with the program that began it."

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class ByteSource(Protocol):
    """A file of known size whose ranges can be read. `name` is how errors call it."""

    @property
    def name(self) -> str: ...

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; fewer than `length` only where the file ends."""
        ...


class FileSource:
    """A local regular file, as a context manager. Raises ModelError for whatever cannot be opened or read."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        try:
            status = path.stat()  # before opening: a named pipe would block there
            if S_ISDIR(status.st_mode):
                raise ModelError(
                    f"{self.name} is a folder, not a GGUF file",
                    hint="Name the .gguf file in it; of a split model, the first shard.",
                )
            if not S_ISREG(status.st_mode):
                raise ModelError(
                    f"{self.name} is not a regular file", hint="Name a .gguf file on a local disk."
                )
            self._file: BinaryIO = path.open("rb", buffering=0)
        except FileNotFoundError as error:
            dangling = path.is_symlink()
            raise ModelError(
                f"{self.name} is a link to a file that is gone"
                if dangling
                else f"{self.name} does not exist",
                hint="Check the path; for a model that is always there: qnext run demo",
            ) from error
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            raise ModelError(
                f"{self.name!r} cannot be opened: {_reason(error)}",
                hint="Check the path and your permission to read it.",
            ) from error
        self.size = status.st_size

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; fewer than `length` only where the file ends."""
        parts: list[bytes] = []
        try:
            self._file.seek(offset)
            while length > 0 and (part := self._file.read(length)):
                parts.append(part)
                length -= len(part)
        except OSError as error:
            raise ModelError(
                f"{self.name}, byte {offset}: cannot be read: {_reason(error)}",
                hint="Check the disk that holds the file, then try again.",
            ) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Cursor:
    """Walks a source from its start, checking every length against the end before it reads."""

    def __init__(self, source: ByteSource) -> None:
        self.name = source.name
        self.size = source.size
        self.position = 0
        self._source = source
        self._end = min(source.size, HEADER_LIMIT)
        self._window = b""
        self._start = 0
        self._step = 0

    @property
    def remaining(self) -> int:
        """Bytes from here to the end of the file, or of the largest header allowed."""
        return self._end - self.position

    def broken(self, offset: int, expected: str, found: str, *, hint: str = DAMAGED) -> ModelError:
        """The one form of every complaint about contents."""
        return ModelError(f"{self.name}, byte {offset}: expected {expected}, found {found}", hint=hint)

    def require(self, length: int, what: str, at: int | None = None) -> None:
        """Raises unless `length` more bytes exist; `at` is the byte to blame (the length field, say)."""
        if length <= self.remaining:
            return
        offset = self.position if at is None else at
        if self.position + length <= self.size:
            limit = f"{what} within the first {HEADER_LIMIT >> 20} MiB"
            raise self.broken(offset, limit, f"one that ends at byte {self.position + length}")
        found = f"the end of the file {self.size - self.position} bytes on (size {self.size})"
        hint = UNFINISHED if length <= HEADER_LIMIT else DAMAGED
        raise self.broken(offset, f"{length} bytes for {what}", found, hint=hint)

    def skip(self, length: int, what: str, at: int) -> None:
        """Moves on without reading."""
        self.require(length, what, at)
        self.position += length

    def take(self, length: int, what: str, at: int | None = None) -> bytes:
        """The next `length` bytes."""
        self.require(length, what, at)
        start = self._fill(length)
        self.position += length
        return self._window[start : start + length]

    def unpack(self, layout: struct.Struct, what: str) -> tuple[Any, ...]:
        """The next values of a fixed layout."""
        self.require(layout.size, what)
        start = self._fill(layout.size)
        values = layout.unpack_from(self._window, start)
        self.position += layout.size
        return values

    def u32(self, what: str) -> int:
        """The next unsigned 32-bit number."""
        return int(self.unpack(_U32, what)[0])

    def u64(self, what: str) -> int:
        """The next unsigned 64-bit number."""
        return int(self.unpack(_U64, what)[0])

    def text(self, length: int, what: str, at: int) -> str:
        """The next `length` bytes as UTF-8; `at` is where the length was written."""
        start = self.position
        raw = self.take(length, f"the text of {what}", at)
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            found = f"byte 0x{raw[error.start]:02x}"
            raise self.broken(start + error.start, f"UTF-8 in {what}", found) from error

    def skip_strings(self, count: int, what: str) -> None:
        """Walks over `count` strings by their lengths, the only way to find where the array ends.

        A vocabulary has 300,000 of them. Runs of short strings are matched by one regular expression, at
        about half the cost of a loop; the loop takes what is longer or crosses the window's end.
        """
        match_run = _short_strings().match
        length_at = _U64.unpack_from
        while count > 0:
            self.require(8, f"{count} more strings of {what}")
            before = at = self._fill(8)
            window = self._window
            while count >= _RUN and (run := match_run(window, at)):
                before = at = run.end()
                count -= _RUN
            for _ in range(min(count, _RUN)):
                if at > len(window) - 8:
                    break
                before, at = at, at + 8 + length_at(window, at)[0]
                count -= 1
            self.position = self._start + at
            if self.position > self._end:
                self.position = self._start + before + 8
                self.require(at - before - 8, f"a string of {what}", at=self._start + before)

    def _fill(self, length: int) -> int:
        """Makes the window hold the next `length` bytes; returns where in it they start."""
        start = self.position - self._start
        if start + length <= len(self._window):
            return start
        sequential = start <= len(self._window)
        grown = min(max(self._step * 2, _FIRST_WINDOW), _LARGEST_WINDOW)
        self._step = grown if sequential else _FIRST_WINDOW
        self._window = b""  # let go of it before the next one is made
        self._start = self.position
        self._window = self._source.read(self.position, min(max(length, self._step), self.remaining))
        if len(self._window) < length:
            end = self.position + len(self._window)
            raise self.broken(end, f"a file of {self.size} bytes", "its end", hint=UNFINISHED)
        return 0


@cache
def _short_strings() -> re.Pattern[bytes]:
    """Matches `_RUN` strings of under 64 bytes, each its 64-bit length and that many bytes. Possessive: the
    first byte decides the branch, so there is nothing to try again."""
    branches = (rb"\x%02x\0{7}.{%d}" % (length, length) for length in range(64))
    return re.compile(rb"(?s:%b){%d}+" % (b"|".join(branches), _RUN))


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
