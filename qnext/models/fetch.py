"""One published file on its way into the cache: ranges, retries, and the digest before the final name.

Why not `hf_hub_download`: huggingface_hub 2.4 (file_download.py) compares the number of bytes only, never
the contents, so that wrong bytes of the right length get the name of a digest they do not have; it loads into
a file with a random name that it deletes on every failure, so that the next process resumes nothing; and it
refuses more than 50 GB over plain HTTP. Its session (proxies, certificates, offline mode), its headers (the
token), its addresses, locks and folder layout are used here; only the loop over the bytes is ours.

xet is not used although the Hub offers it: the client hands it a temporary file too and keeps no part of it,
and its hash is not the SHA-256 that the Hub lists. The resolve address gives the same file over plain HTTP,
with ranges, and no variable has to be set for it.

- Bytes are hashed as they arrive. The part of an earlier run is hashed from the disk first; if the digest is
  wrong in the end, it is the first suspect, and the file is fetched once more from its start.
- A request asks for at most 4 GiB: links of the CDN expire, and some servers send no more than 50 GB at once.
  Each request starts from the resolve address and so gets a fresh link. The session drops the token where a
  redirect leaves the host.
- Every 64 MiB are brought to the disk. After a loss of power what was written last can be zeros although the
  size is right, so a part older than the machine's start loses its last 128 MiB.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import re
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from qnext.errors import DownloadError
from qnext.models.held import Place
from qnext.models.hub_errors import endpoint_hint
from qnext.units import GIB, KIB, MIB

if TYPE_CHECKING:
    import httpx2

RANGE_BYTES = 4 * GIB
SYNC_BYTES = 64 * MIB
_READ_BYTES = 4 * MIB
_SLOWEST_BPS = KIB
"""A connection slower than this is cut and made anew."""
_WORTH = 64 * KIB
"""An attempt that brought this much counts as success for the patience with the next one."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """`attempts` in a row may bring nothing, with waits that double from `first_wait_s` to `longest_wait_s`.

    `idle_s`: so long may a connection be silent; None takes HF_HUB_DOWNLOAD_TIMEOUT (10 s). `asked_s`: the
    longest wait that a server may ask for (Retry-After). Without any answer since the start, three attempts
    are enough to say that there is no connection.
    """

    attempts: int = 10
    first_wait_s: float = 1.0
    longest_wait_s: float = 30.0
    asked_s: float = 600.0
    idle_s: float | None = None


class StoppedError(Exception):
    """The work was called off from outside."""


class _AgainError(Exception):
    """This attempt failed, the next one may not. `answered`: a server gave it as its answer, after which it
    asked to wait for `wait_s`."""

    def __init__(self, reason: str, wait_s: float | None = None, *, answered: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.answered = answered


class Work:
    """One file being worked on in a thread; others read the counters.

    `done` bytes are on the disk and hashed, `fetched` came over the network in this run. `remark` says what
    it waits for, empty while bytes flow.
    """

    def __init__(self, place: Place, stop: threading.Event) -> None:
        self.place = place
        self.done = 0
        self.fetched = 0
        self.remark = ""
        self._stop = stop
        self._hash = hashlib.sha256()

    def run(self) -> None:
        """Do it. Raises QnextError, OSError of the disk, StoppedError."""
        raise NotImplementedError

    def _go_on(self) -> None:
        if self._stop.is_set():
            raise StoppedError

    def _read(self, file: BinaryIO, length: int) -> None:
        """Hash the first `length` bytes of `file`."""
        self._hash, self.done = hashlib.sha256(), 0
        file.seek(0)
        while self.done < length:
            self._go_on()
            piece = file.read(min(_READ_BYTES, length - self.done))
            if not piece:
                break
            self._hash.update(piece)
            self.done += len(piece)


class Check(Work):
    """Reading a file that is here. `good` after `run`: whether its bytes have the digest."""

    good: bool | None = None

    def run(self) -> None:
        self.remark = "checking what is here"
        with self.place.contents.open("rb") as file:
            status = os.fstat(file.fileno())
            self._read(file, status.st_size)
        self.good = self._hash.hexdigest() == self.place.digest
        self.remark = ""


class Fetch(Work):
    """Fetching one file; `again` fetches it although a file has its name, and replaces that one."""

    def __init__(
        self,
        place: Place,
        stop: threading.Event,
        url: str,
        headers: dict[str, str],
        patience: Patience,
        again: bool = False,
    ) -> None:
        super().__init__(place, stop)
        self._url, self._headers, self._patience, self._again = url, headers, patience, again
        self._answered = False
        self._synced = 0

    def run(self) -> None:
        place = self.place
        with ExitStack() as stack:
            self._take_lock(stack)
            if place.state() != "here" or self._again:
                place.blob.parent.mkdir(parents=True, exist_ok=True)
                self._fetch()
            self.done = place.file.size_bytes
            place.link()

    def _take_lock(self, stack: ExitStack) -> None:
        """The client's own lock of this blob: waits for a process that is fetching it."""
        from filelock import Timeout
        from huggingface_hub.utils._fixes import WeakFileLock

        self.place.lock.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._go_on()
            try:
                stack.enter_context(WeakFileLock(self.place.lock, timeout=0.3))
            except Timeout:
                self.remark = "another process is fetching it"
                self.done = self.place.bytes_here()
            else:
                self.remark = ""
                return

    def _fetch(self) -> None:
        """The part becomes the blob once it is whole and its digest is right."""
        place = self.place
        handle = os.open(place.part, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            while True:
                resumed = self._read_part(file)
                self._fetch_rest(file)
                if self._hash.hexdigest() == place.digest:
                    break
                file.truncate(0)
                if not resumed:
                    place.part.unlink(missing_ok=True)
                    raise DownloadError(
                        f"{place.file.path} arrived with other contents than the Hub lists: its SHA-256 is "
                        f"{self._hash.hexdigest()[:12]}…, not {place.digest[:12]}…. It was not kept.",
                        hint="Try again later, over another network, or without a mirror (HF_ENDPOINT).",
                    )
                _log.info("%s: the part that was here is damaged; starting over", place.file.path)
            os.fsync(file.fileno())
            if not os.path.samestat(place.part.stat(), os.fstat(file.fileno())):
                raise DownloadError(
                    f"{place.part} was replaced by another program while it was written.",
                    hint="Let one program at a time fetch it, then run the same command again.",
                )
        place.part.replace(place.blob)
        _sync_folder(place)

    def _read_part(self, file: BinaryIO) -> int:
        """Hash what an earlier run left; returns its bytes."""
        import psutil

        status = os.fstat(file.fileno())
        kept = min(status.st_size, self.place.file.size_bytes)
        if status.st_mtime < psutil.boot_time():
            kept = max(0, kept - 2 * SYNC_BYTES)
        file.truncate(kept)
        if kept:
            self.remark = "checking what is here"
        self._read(file, kept)
        self._synced, self.remark = kept, ""
        return kept

    def _fetch_rest(self, file: BinaryIO) -> None:
        failures, reached = 0, self.done
        while self.done < self.place.file.size_bytes:
            try:
                self._attempt(file)
                failures = 0
            except _AgainError as again:
                failures = 1 if self.done - reached >= _WORTH else failures + 1
                reached = self.done
                if failures >= (
                    self._patience.attempts if self._answered else min(3, self._patience.attempts)
                ):
                    first = "Wait a while." if again.answered else endpoint_hint()
                    raise DownloadError(
                        f"{self.place.file.path}: {again}, {failures} times in a row.",
                        hint=f"{first} The same command goes on where it stopped.",
                    ) from again
                self._wait(again, failures)

    def _wait(self, again: _AgainError, failures: int) -> None:
        patience = self._patience
        longest = min(patience.longest_wait_s, patience.first_wait_s * 2 ** (failures - 1))
        # Spread, so that shards cut at the same moment do not come back at the same moment.
        seconds = longest * random.uniform(0.75, 1.0) if again.wait_s is None else again.wait_s
        if seconds > patience.asked_s:
            raise DownloadError(
                f"{self.place.file.path}: {again} and asks to wait for {seconds / 60:.0f} minutes.",
                hint="Run the same command again then; with a token (hf auth login) the Hub allows more.",
            )
        _log.info("%s: %s; again in %.1f s", self.place.file.path, again, seconds)
        self.remark = f"{again}; again in {seconds:.0f} s"
        self._stop.wait(seconds)
        self._go_on()
        self.remark = ""

    def _attempt(self, file: BinaryIO) -> None:
        """One request, from `done` on. Raises _AgainError or DownloadError unless it brought all of it."""
        import httpx2
        from huggingface_hub import constants, get_session

        from qnext.models.answers import judge_answer

        idle_s = self._patience.idle_s or float(constants.HF_HUB_DOWNLOAD_TIMEOUT)
        start, size = self.done, self.place.file.size_bytes
        end = min(size, start + RANGE_BYTES)
        headers = {**self._headers, "Accept-Encoding": "identity", "Range": f"bytes={start}-{end - 1}"}
        self._go_on()
        try:
            request = get_session().stream(
                "GET", self._url, headers=headers, timeout=idle_s, follow_redirects=True
            )
            with request as response:
                self._answered = True
                verdict = judge_answer(response, self.place, start)
                if verdict.again:
                    raise _AgainError(verdict.again, verdict.wait_s, answered=True)
                if verdict.whole:  # ranges are ignored here: let the bytes that we have pass by
                    self._receive(response, file, size, idle_s, skip=start)
                else:
                    self._receive(response, file, end, idle_s, skip=0)
        except httpx2.TooManyRedirects as error:
            raise DownloadError(
                f"{self.place.file.path}: the server redirects in circles.", hint="Check HF_ENDPOINT."
            ) from error
        except (httpx2.UnsupportedProtocol, httpx2.LocalProtocolError, httpx2.InvalidURL) as error:
            # The error's own text may quote a header, and with it the token.
            raise DownloadError(
                f"{self.place.file.path}: its address cannot be asked for ({type(error).__name__}).",
                hint="Check HF_ENDPOINT and the proxy variables.",
            ) from None
        except httpx2.RequestError as error:
            raise _AgainError(_connection_words(error, idle_s)) from error

    def _receive(self, response: httpx2.Response, file: BinaryIO, end: int, idle_s: float, skip: int) -> None:
        """Write the body up to offset `end`, without its first `skip` bytes."""
        began, since = time.monotonic(), 0
        for chunk in response.iter_raw():
            self._go_on()
            since += len(chunk)
            if (elapsed := time.monotonic() - began) >= idle_s:
                if since < _SLOWEST_BPS * elapsed:
                    raise _AgainError(f"only {since:,} bytes came in {elapsed:.1f} s")
                began, since = time.monotonic(), 0
            if skip:
                passed = min(skip, len(chunk))
                skip, chunk = skip - passed, chunk[passed:]
            if chunk := chunk[: end - self.done]:
                self._write(file, chunk)
            elif not skip and self.done == end:
                return  # more than was asked for
        if self.done < end:
            raise _AgainError("the connection was closed early")

    def _write(self, file: BinaryIO, chunk: bytes) -> None:
        rest = memoryview(chunk)
        while rest:
            rest = rest[file.write(rest) :]
        self._hash.update(chunk)
        self.done += len(chunk)
        self.fetched += len(chunk)
        if self.done - self._synced >= SYNC_BYTES:
            os.fsync(file.fileno())
            self._synced = self.done


def _connection_words(error: httpx2.RequestError, idle_s: float) -> str:
    import httpx2

    if isinstance(error, httpx2.ConnectTimeout):
        return f"no connection within {idle_s:g} s"
    if isinstance(error, httpx2.TimeoutException):
        return f"nothing came for {idle_s:g} s"
    if isinstance(error, httpx2.ProxyError):
        return "the proxy refused the connection"
    if isinstance(error, httpx2.ConnectError):
        reason = re.sub(r"^\[[^]]*\]\s*", "", str(error)).partition("\n")[0]
        return f"no connection to {error.request.url.host} ({reason or 'refused'})"
    return "the connection was cut"


def _sync_folder(place: Place) -> None:
    """Bring the new name itself to the disk."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(place.blob.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
