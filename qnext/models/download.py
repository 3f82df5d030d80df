"""Fetching all files of a quant into the shared Hugging Face cache, several at a time.

Each file has a thread of its own (`fetch`); this module starts them, watches the disk's free space, adds up
what they have done and ends them. The threads are daemons: one that waits for a silent server is left behind
when the user stops, since the process is about to end and what is on the disk is always a good beginning.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

from qnext.errors import DownloadError, QnextError, UsageError
from qnext.hardware.files import nearest_folder
from qnext.models.fetch import Check, Fetch, Patience, StoppedError, Work
from qnext.models.held import Place, find_places, write_ref
from qnext.models.hub import auth_headers, file_address
from qnext.models.hub_cache import hub_folder
from qnext.models.hub_errors import hub_errors, is_offline
from qnext.models.published import QuantFile, RepoFile
from qnext.units import GIB, MIB, format_bytes

PARALLEL = 4
SPARE_BYTES = 32 * MIB
"""Must stay free beside the file: the filesystem's own bookkeeping."""
_TICK_S = 0.1
_RATE_WINDOW_S = 10.0
_SPACE_EVERY_S = 1.0
_STOP_S = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    """How far it is. `done_bytes` counts what is on the disk and hashed, `rate_bps` the bytes per second over
    the network in the last seconds; `remark` says what it waits for, empty while bytes flow."""

    done_bytes: int
    total_bytes: int
    rate_bps: float
    remark: str = ""


OnProgress = Callable[[Progress], None]


def download(
    quant: QuantFile,
    cache: Path | None = None,
    *,
    on_progress: OnProgress | None = None,
    again: Sequence[Place] = (),
    patience: Patience | None = None,
    ref: str = "main",
) -> tuple[Place, ...]:
    """Fetch what is missing of `quant`; returns the places of its files, whole and with the right digest.

    `cache` is the folder that holds `models--…`, by default the shared one. Files in `again` are fetched
    although they are here, and replaced once the new ones are verified. `ref` is the name under which the
    revision was asked for. With all files here no request is made.

    Raises DownloadError (with what was loaded kept for the next call), ModelError, KeyboardInterrupt.
    """
    cache = cache or hub_folder(os.environ)
    places = find_places(state_digests(quant), cache)
    missing = [
        place for place in places if place in again or place.state() != "here" or not place.path.exists()
    ]
    headers = {}  # where only links are missing
    if any(place.state() != "here" or place in again for place in missing):
        if is_offline():
            raise DownloadError(
                f"{quant.repo} is not here as a whole, and HF_HUB_OFFLINE keeps qnext off the network.",
                hint="Unset HF_HUB_OFFLINE and run the same command again.",
            )
        check_space(missing, again)
        headers = _headers()
    stop = threading.Event()
    work = [
        Fetch(
            place,
            stop,
            file_address(quant, place.file),
            headers,
            patience or Patience(),
            again=place in again,
        )
        for place in missing
    ]
    whole = sum(place.file.size_bytes for place in places if place not in missing)
    try:
        _work_off(work, stop, on_progress, done=whole, space=cache)
    except QnextError as error:
        kept = whole + sum(one.bytes_here() for one in missing)
        words = (
            f" {format_bytes(kept)} of {format_bytes(quant.size_bytes)} are here and kept." if kept else ""
        )
        error.message += words
        raise
    try:
        write_ref(quant, cache, ref)
    except OSError as error:
        raise _disk_error(error, cache) from error
    return places


def verify(places: Sequence[Place], on_progress: OnProgress | None = None) -> dict[Place, bool]:
    """Read the files that are here under their final names: whether each has its digest. Missing ones are
    left out. Raises DownloadError for a file that cannot be read, KeyboardInterrupt."""
    stop = threading.Event()
    work = [Check(place, stop) for place in places if place.state() in ("here", "wrong size")]
    _work_off(work, stop, on_progress)
    return {one.place: bool(one.good) for one in work}


def check_space(places: Sequence[Place], again: Sequence[Place] = ()) -> None:
    """Raise DownloadError when what is missing of `places` does not fit the filesystem, in sum or as a file.

    Parts that are here count; files in `again` need their room a second time until they are replaced.
    """
    if not places:
        return
    folder = nearest_folder(places[0].blob.parent)
    need = sum(place.file.size_bytes - (0 if place in again else place.bytes_here()) for place in places)
    try:
        free = shutil.disk_usage(folder).free
        if need and need + SPARE_BYTES > free:
            raise DownloadError(
                f"{format_bytes(need)} are still to be fetched, but only {format_bytes(free)} are free "
                f"for {places[0].blob.parent}.",
                hint="Free some space, take a smaller quant, or move the cache: HF_HOME=/another/disk",
            )
        largest = max(place.file.size_bytes for place in places)
        if largest >= 4 * GIB:  # what FAT cannot hold; elsewhere this takes no space and no time
            with tempfile.TemporaryFile(dir=folder) as probe:
                probe.truncate(largest)
    except OSError as error:
        raise _disk_error(error, folder) from error


def state_digests(quant: QuantFile) -> QuantFile:
    """`quant` with the digests that its listing lacks, asked from the Hub. Raises QnextError."""
    if quant.repo.startswith(("https://", "http://")) or all(file.digest for file in quant.files):
        return quant
    from huggingface_hub import get_hf_file_metadata

    headers = _headers()

    def ask(file: RepoFile) -> RepoFile:
        if file.digest is not None:
            return file
        with hub_errors(quant.repo, quant.revision):
            return replace(file, digest=get_hf_file_metadata(file_address(quant, file), headers=headers).etag)

    return replace(quant, files=tuple(ask(file) for file in quant.files))


def _headers() -> dict[str, str]:
    """The client's headers with the user's token, if there is one and it can be sent."""
    headers = auth_headers()
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        # The HTTP library would refuse it too, and quote it.
        raise UsageError("The Hub token holds characters that no token has.", hint="hf auth login")
    return headers


def _work_off(
    work: Sequence[Work],
    stop: threading.Event,
    on_progress: OnProgress | None,
    *,
    done: int = 0,
    space: Path | None = None,
) -> None:
    """Run all of `work`, PARALLEL at a time, reporting from this thread. Raises the first error."""
    total = done + sum(one.place.file.size_bytes for one in work)
    waiting, running = deque(work), list[Future[None]]()
    rate, looked_at = _Rate(), time.monotonic()
    try:
        while waiting or running:
            while waiting and len(running) < PARALLEL:
                running.append(_start(waiting.popleft()))
            if running:
                _any_done(running, _TICK_S)
            for future in [one for one in running if one.done()]:
                running.remove(future)
                future.result()
            if space is not None and time.monotonic() - looked_at >= _SPACE_EVERY_S:
                looked_at = time.monotonic()
                # Free space is read first: bytes written in between must not count against us.
                free = shutil.disk_usage(nearest_folder(space)).free
                missing = total - done - sum(one.done for one in work)
                if free < missing:
                    raise DownloadError(
                        f"The disk is filling up: {format_bytes(missing)} are still to be fetched, but only "
                        f"{format_bytes(free)} are left in {space}.",
                        hint="Free some space, then run the same command again: it goes on where it stopped.",
                    )
            if on_progress is not None:
                remark = next((one.remark for one in work if one.remark), "")
                here = done + sum(one.done for one in work)
                on_progress(Progress(here, total, rate.after(sum(one.fetched for one in work)), remark))
    finally:
        # Also on Ctrl-C: what is being written ends with a whole chunk.
        stop.set()
        deadline = time.monotonic() + _STOP_S
        while running and time.monotonic() < deadline:
            running = [one for one in running if not one.done()]
            _any_done(running, 0.05)


def _any_done(futures: Sequence[Future[None]], timeout: float) -> None:
    from concurrent.futures import FIRST_COMPLETED, wait

    wait(futures, timeout, FIRST_COMPLETED)


def _start(one: Work) -> Future[None]:
    """Run it in a daemon thread: an executor's threads would keep the process alive after Ctrl-C."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            one.run()
        except StoppedError:
            future.set_result(None)
        except OSError as error:
            future.set_exception(_disk_error(error, one.place.blob.parent))
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            future.set_exception(error)
        else:
            future.set_result(None)

    threading.Thread(target=run, name=f"fetch {one.place.file.path}", daemon=True).start()
    return future


def _disk_error(error: OSError, folder: Path) -> DownloadError:
    """An error of the filesystem in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what, hint = (
            "is full",
            "Free some space, then run the same command again: it goes on where it stopped.",
        )
    elif error.errno == errno.EFBIG:
        what = "cannot hold a file that large (FAT holds 4 GiB, and `ulimit -f` may limit it)"
        hint = "Move the cache to another filesystem: HF_HOME=/another/disk"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        what = f"cannot be written ({error.strerror})"
        hint = "Correct its rights, or choose another folder: HF_HOME=/another/folder"
    else:
        what = f"failed: {error.strerror or type(error).__name__}"
        hint = "Look at the disk (dmesg), then run the same command again."
    failed = DownloadError(f"The disk of {folder} {what}.", hint=hint)
    failed.__cause__ = error
    return failed


class _Rate:
    """Bytes per second over the last seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def after(self, count: int) -> float:
        now = time.monotonic()
        self._seen.append((now, count))
        while now - self._seen[0][0] > _RATE_WINDOW_S:
            self._seen.popleft()
        began, first = self._seen[0]
        return (count - first) / (now - began) if now > began else 0.0
