"""A file behind an HTTP address as a source of bytes, fetched by ranges (RFC 9110, section 14).

The Hub answers a file's address with a redirect to a signed address on another host that holds for minutes:
it is followed once and remembered, and asked for again when the signed one answers 403. A token goes to the
first host only (httpx2 drops it on a redirect elsewhere). What is read ahead grows from `first` to 4 MiB, so
that a header of 6 MiB takes three requests and a small one does not cost megabytes. A server that ignores
ranges would send 48 GB: the connection is closed as soon as its status is seen.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from qnext.errors import DownloadError, ModelError, QnextError

if TYPE_CHECKING:
    import httpx2

DEADLINE_S = 180.0
REQUEST_S = 15.0
"""How long a server may stay silent."""
ATTEMPTS = 5
_LONGEST_WAIT_S = 20.0
_LARGEST_STEP = 4 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_REPEATABLE = frozenset({408, 425, 429, 500, 502, 503, 504})
_STALE = frozenset({401, 403, 404, 410})
"""What an address that was signed for a while answers afterwards."""


class Deadline:
    """A time to be done by, which another thread may bring forward to now."""

    def __init__(self, seconds: float = DEADLINE_S) -> None:
        self._end = time.monotonic() + seconds
        self._cancelled = threading.Event()

    @property
    def left_s(self) -> float:
        """Seconds left, 0 or less when it has passed."""
        return 0.0 if self._cancelled.is_set() else self._end - time.monotonic()

    def cancel(self) -> None:
        """Nobody waits for the answer any more."""
        self._cancelled.set()

    def wait(self, seconds: float) -> bool:
        """Sleeps; False where the deadline comes first."""
        return seconds < self.left_s and not self._cancelled.wait(seconds)


class HttpSource:
    """A ByteSource over HTTP. One thread at a time may read.

    `client` gives the shared httpx2 client, `name` is how errors call the file, `size` is what it is known to
    have (None: asked for). `explain` may turn a refusing answer into a better error than the status alone.
    Raises ModelError where the file is not to be had or is not the one expected, DownloadError where trying
    again may help.
    """

    def __init__(
        self,
        client: Callable[[], httpx2.Client],
        url: str,
        *,
        name: str,
        size: int | None = None,
        headers: Mapping[str, str] | None = None,
        first: int = 1 << 20,
        deadline: Deadline | None = None,
        explain: Callable[[httpx2.Response], QnextError | None] | None = None,
    ) -> None:
        self.name = name
        self.fetched = 0
        self.requests = 0
        self._client = client
        self._url = url
        self._headers = {**(headers or {}), "Accept-Encoding": "identity"}
        self._address: str | None = None
        self._size = size
        self._step = first
        self._deadline = deadline or Deadline()
        self._explain = explain
        self._start = 0
        self._held = b""
        self._trouble = ""

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        if self._size is None:
            self.read(0, 1)
        assert self._size is not None
        return self._size

    def read(self, offset: int, length: int) -> bytes:
        """The bytes at `offset`; fewer than `length` only where the file ends."""
        if self._size is not None:
            length = max(0, min(length, self._size - offset))
        if length == 0:
            return b""
        held_end = self._start + len(self._held)
        if not self._start <= offset <= held_end:  # a jump: what is held is of no more use
            self._start, self._held = offset, b""
        elif offset + length > held_end:
            self._start, self._held = offset, self._held[offset - self._start :]
        missing = offset + length - self._start - len(self._held)
        if missing > 0:
            self._held += self._fetch(self._start + len(self._held), max(missing, self._step))
            self._step = min(2 * self._step, _LARGEST_STEP)
        at = offset - self._start
        return self._held[at : at + length]

    def _fetch(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, or up to the file's end, over as many attempts as it takes."""
        parts = bytearray()
        attempt = 0
        while True:
            end = start + length if self._size is None else min(start + length, self._size)
            if start + len(parts) >= end:
                return bytes(parts)
            before = len(parts)
            wait_s = self._attempt(start + before, end, parts)
            if len(parts) > before:
                attempt = 0
            if wait_s is None:
                continue
            attempt += 1
            wait_s = min(wait_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
            if attempt >= ATTEMPTS or not self._deadline.wait(wait_s):
                raise DownloadError(
                    f"{self.name}: {self._trouble}, {attempt} times in a row",
                    hint="Try again in a while; what was read is remembered.",
                )

    def _attempt(self, start: int, end: int, parts: bytearray) -> float | None:
        """One request. None when it brought what was asked, else the seconds to wait before the next."""
        import httpx2

        url = self._address or self._url
        headers = {**self._headers, "Range": f"bytes={start}-{end - 1}"}
        if self._address is not None and not _same_origin(self._address, self._url):
            headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
        timeout = min(REQUEST_S, max(self._left(), 0.1))
        self.requests += 1
        try:
            with self._client().stream(
                "GET", url, headers=headers, timeout=timeout, follow_redirects=True
            ) as response:
                if response.status_code in _STALE and self._address is not None:
                    self._address = None
                    self._trouble = f"the server answered {response.status_code}"
                    return 0.0
                if response.status_code in _REPEATABLE:
                    self._trouble = f"the server answered {response.status_code}"
                    return retry_after_s(response.headers)
                if response.status_code != 206:
                    raise self._refused(response, start)
                expected = self._check_range(response, start, end)
                if response.history:
                    self._address = str(response.url)
                return self._receive(response, expected, parts)
        except httpx2.TooManyRedirects as error:
            raise ModelError(
                f"{self.name}: the address redirects without end", hint="Check the address."
            ) from error
        except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
            raise ModelError(f"{self.name}: {error}", hint="Check the address.") from error
        except httpx2.TransportError as error:
            self._address = None
            self._trouble = connection_trouble(error)
            return 0.5

    def _receive(self, response: httpx2.Response, expected: int, parts: bytearray) -> float | None:
        got = 0
        for chunk in response.iter_raw():
            got += len(chunk)
            self.fetched += len(chunk)
            if got > expected:
                raise ModelError(
                    f"{self.name}: the server sent more than the {expected} bytes it had announced",
                    hint="A proxy may be in between; try another network.",
                )
            parts += chunk
            self._left()
        if got < expected:
            self._trouble = "the connection was cut"
            return 0.5
        return None

    def _check_range(self, response: httpx2.Response, start: int, end: int) -> int:
        """The length of what follows, after seeing that it is of the place and file that was asked for."""
        stated = response.headers.get("Content-Range", "")
        match = _CONTENT_RANGE.fullmatch(stated.strip())
        if match is None or int(match[1]) != start or not start <= int(match[2]) < end:
            raise ModelError(
                f"{self.name}: asked for bytes {start} to {end - 1}, was sent '{stated or 'no range'}'",
                hint="The server or a proxy handles ranges wrongly: download the file and give its path.",
            )
        if match[3] != "*":
            self._check_size(int(match[3]))
        elif self._size is None:
            raise ModelError(f"{self.name}: the server does not say how large the file is", hint=_FETCH_IT)
        return int(match[2]) - start + 1

    def _check_size(self, total: int) -> None:
        if self._size is None:
            self._size = total
        elif self._size != total:
            raise ModelError(
                f"{self.name}: expected {self._size} bytes, the server has {total}",
                hint="The file was replaced, or a mirror is behind: list the repository again.",
            )

    def _refused(self, response: httpx2.Response, start: int) -> QnextError:
        status = response.status_code
        better = self._explain(response) if self._explain and status >= 400 else None
        if better is not None:
            return better
        if status == 200:
            return ModelError(
                f"{self.name}: the server ignores ranges and sends the whole file", hint=_FETCH_IT
            )
        if status == 416:
            return ModelError(
                f"{self.name}: the file ends before byte {start}",
                hint="The file was replaced, or a mirror is behind: list the repository again.",
            )
        return ModelError(
            f"{self.name}: the server answered {status}",
            hint="Check the address, and whether it needs to be signed in to.",
        )

    def _left(self) -> float:
        left = self._deadline.left_s
        if left <= 0:
            raise DownloadError(
                f"{self.name}: not read within the time allowed",
                hint="The connection is slow: try again; what was read is remembered.",
            )
        return left


_FETCH_IT = "Download the file with another program and give its path."


def retry_after_s(headers: Mapping[str, str], default: float = 0.5) -> float:
    """Seconds that a server asks to wait, 20 at most; `default` where it does not say."""
    stated = headers.get("Retry-After", "").strip()
    return min(float(stated), _LONGEST_WAIT_S) if stated.isdigit() else default


def connection_trouble(error: Exception) -> str:
    """What went wrong on the way to a server, in a few words and without the address."""
    import httpx2

    if isinstance(error, httpx2.ProxyError):
        return "the proxy refused the connection"
    if isinstance(error, httpx2.TimeoutException):
        return "the server did not answer in time"
    if isinstance(error, httpx2.ConnectError):
        return f"no connection ({error})" if str(error) else "no connection"
    return "the connection was cut"


def _same_origin(one: str, other: str) -> bool:
    from urllib.parse import urlsplit

    return urlsplit(one)[:2] == urlsplit(other)[:2]
