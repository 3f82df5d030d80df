"""Headers of published models: every shard of every quant at once, kept by the digest of its contents.

Twelve connections are enough to hide the latency and few enough for a server. One file is read whole while
the others are begun; its vocabulary then stands for theirs (`vocabulary_twin`). What is kept is the parsed
header of each file, 15 KB compressed: twenty are read in a tenth of a second, and a digest never goes stale.
Files that lie in the Hugging Face cache are read there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.errors import ModelError
from qnext.models.gguf_parse import ShardHeader, read_shard
from qnext.models.gguf_reader import join_shards
from qnext.models.gguf_source import FileSource
from qnext.models.header import ModelHeader, SkippedArray, TensorInfo
from qnext.models.hub import cached_file, open_remote
from qnext.models.published import QuantFile, RepoFile
from qnext.models.ranged import Deadline, HttpSource
from qnext.models.vocabulary_twin import HEAD_BYTES, RecordedSource, TwinSource, Vocabulary, find_vocabulary

log = logging.getLogger(__name__)

CONNECTIONS = 12
_WHOLE_BYTES = 2 << 20
"""Asked for at first of the file that is read whole; then 4 MiB at a time. Its header is 5 to 10 MB."""
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class _Wanted:
    """One file to read: shard `number` of `quant`."""

    quant: QuantFile
    number: int

    @property
    def file(self) -> RepoFile:
        return self.quant.files[self.number]

    @property
    def name(self) -> str:
        return f"{self.quant.repo}/{_path(self.file)}"


class _Within(Deadline):
    """A deadline of its own, which passes with another one at the latest."""

    def __init__(self, outer: Deadline | None) -> None:
        super().__init__()
        self._outer = outer

    @property
    def left_s(self) -> float:
        """Seconds left, 0 or less when it has passed."""
        own = super().left_s
        return own if self._outer is None else min(own, self._outer.left_s)


def read_remote_headers(
    quants: Sequence[QuantFile],
    cache_dir: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_failure: Callable[[QuantFile, ModelError], None] | None = None,
    on_header: Callable[[QuantFile, ModelHeader], None] | None = None,
    within: Deadline | None = None,
) -> dict[QuantFile, ModelHeader]:
    """The headers of `quants`, in their order; `paths` are the names in the repository.

    `on_progress` hears of files done and of all files, `on_header` of each header as soon as it is whole:
    what it does is done while the others are fetched. A quant that cannot be read, or not by llama.cpp, is
    told to `on_failure` and left out; without it the first such ModelError is raised. All three are called in
    this thread. DownloadError, which concerns all of them, is always raised. It ends `within` that
    deadline, which another thread may bring forward.
    """
    wanted = [_Wanted(quant, number) for quant in quants for number in range(len(quant.files))]
    done: dict[_Wanted, ShardHeader | ModelError] = {}
    headers: dict[QuantFile, ModelHeader] = {}

    def take(one: _Wanted, header: ShardHeader | ModelError) -> None:
        done[one] = header
        if isinstance(header, ModelError) and on_failure is None:
            raise header
        if on_progress:
            on_progress(len(done), len(wanted))
        shards = [done[part] for n in range(len(one.quant.files)) if (part := _Wanted(one.quant, n)) in done]
        if len(shards) == len(one.quant.files):
            finish(one.quant, shards)

    def finish(quant: QuantFile, shards: Sequence[ShardHeader | ModelError]) -> None:
        try:
            headers[quant] = _join(quant, shards)
        except ModelError as error:
            if on_failure is None:
                raise
            on_failure(quant, error)
        else:
            if on_header:
                on_header(quant, headers[quant])

    kept, missing = [], []
    for one in wanted:
        header = _read_kept(one, cache_dir) or _read_cached_file(one, cache_dir)
        if header is None:
            missing.append(one)
        else:
            kept.append((one, header))
    _fetch(missing, kept, cache_dir, take, _Within(within))
    return {quant: headers[quant] for quant in quants if quant in headers}


def _join(quant: QuantFile, shards: Sequence[ShardHeader | ModelError]) -> ModelHeader:
    whole = []
    for shard in shards:
        if isinstance(shard, ModelError):
            raise shard
        whole.append(shard)
    return join_shards(whole, [Path(_path(file)) for file in quant.files])


def _fetch(
    missing: Sequence[_Wanted],
    kept: Sequence[tuple[_Wanted, ShardHeader]],
    cache_dir: Path,
    take: Callable[[_Wanted, ShardHeader | ModelError], None],
    deadline: Deadline,
) -> None:
    """Hands over what is kept, and what is missing as it comes from the network."""
    pool = ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="header")
    try:
        firsts = [one for one in missing if one.number == 0]
        first_bytes = dict.fromkeys(firsts[:1], _WHOLE_BYTES)
        begun = {one: pool.submit(_begin, one, first_bytes.get(one, HEAD_BYTES), deadline) for one in missing}
        # One file whole, and with it the vocabulary of all; a file that cannot be read has none to give.
        known: Vocabulary | None = None
        ready: list[tuple[_Wanted, ShardHeader | ModelError]] = list(kept)
        while firsts:
            first = firsts.pop(0)
            header, known = _read_whole(first, begun.pop(first), cache_dir)
            ready.append((first, header))
            if isinstance(header, ShardHeader):
                break
        waiting = {pool.submit(_read, one, source, cache_dir, known): one for one, source in begun.items()}
        for one, header in ready:
            take(one, header)
        for future in as_completed(waiting):
            take(waiting[future], future.result())
    finally:
        deadline.cancel()  # after an error or Ctrl-C the others need not go on
        pool.shutdown(cancel_futures=True)


def _begin(one: _Wanted, first: int, deadline: Deadline) -> HttpSource:
    """A file with its beginning read, for which no vocabulary is needed."""
    source = open_remote(one.quant, one.file, first=first, deadline=deadline)
    source.read(0, HEAD_BYTES)
    return source


def _read_whole(
    one: _Wanted, begun: Future[HttpSource], cache_dir: Path
) -> tuple[ShardHeader | ModelError, Vocabulary | None]:
    try:
        source = begun.result()
        recorded = RecordedSource(source)
        header = read_shard(recorded, one.number)
    except ModelError as error:
        return error, None
    log.info("%s: %d bytes in %d requests", one.name, source.fetched, source.requests)
    _keep(one, header, cache_dir)
    return header, find_vocabulary(recorded, header.metadata)


def _read(
    one: _Wanted, begun: Future[HttpSource], cache_dir: Path, known: Vocabulary | None
) -> ShardHeader | ModelError:
    vocabulary = known if one.number == 0 else None
    try:
        source = begun.result()
        twin = TwinSource(source, vocabulary) if vocabulary else None
        try:
            header = read_shard(twin or source, one.number)
        except ModelError:
            if twin is None or not twin.borrowed:
                raise
            # Let the file speak for itself before it is called broken.
            header = read_shard(source, one.number)
    except ModelError as error:
        return error
    log.info("%s: %d bytes in %d requests", one.name, source.fetched, source.requests)
    _keep(one, header, cache_dir)
    return header


def _read_cached_file(one: _Wanted, cache_dir: Path) -> ShardHeader | None:
    """From the Hugging Face cache, where the whole file lies."""
    path = cached_file(one.quant, one.file)
    if path is None:
        return None
    try:
        with FileSource(path) as source:
            header = read_shard(source, one.number)
    except ModelError as error:
        log.info("%s in the cache is passed over: %s", one.name, error)
        return None
    _keep(one, header, cache_dir)
    return header


def _kept_at(one: _Wanted, cache_dir: Path) -> Path | None:
    """Where the header is kept: by digest, or by commit and path. A plain address has neither: None."""
    key = one.file.digest
    if key is None and one.quant.revision:
        key = hashlib.sha256(f"{one.quant.repo}@{one.quant.revision}/{one.file.path}".encode()).hexdigest()
    return cache_dir / f"{key}.header" if key and key.isalnum() else None


def _read_kept(one: _Wanted, cache_dir: Path) -> ShardHeader | None:
    """The header kept earlier; None when there is none, or it is damaged or of another format."""
    place = _kept_at(one, cache_dir)
    try:
        if place is None or not place.is_file():
            return None
        kept = json.loads(zlib.decompress(place.read_bytes()))
        if kept["format"] != _FORMAT or kept["size"] != one.file.size_bytes:
            return None
        tensors = tuple(
            TensorInfo(name, tuple(shape), type_name, nbytes, one.number, offset)
            for name, shape, type_name, nbytes, offset in kept["tensors"]
        )
        metadata = {key: _unpacked(value) for key, value in kept["metadata"].items()}
        return ShardHeader(
            one.name, kept["size"], kept["version"], kept["alignment"], metadata, tensors, kept["data_end"]
        )
    except (OSError, ValueError, KeyError, TypeError, zlib.error) as error:
        log.info("%s is passed over: %s", place, error)
        return None


def _keep(one: _Wanted, header: ShardHeader, cache_dir: Path) -> None:
    """Keeps a header; a disk that is full or read-only only costs the next one's time."""
    place = _kept_at(one, cache_dir)
    if place is None:
        return
    packed = {
        "format": _FORMAT,
        "size": header.size,
        "version": header.version,
        "alignment": header.alignment,
        "data_end": header.data_end,
        "metadata": {key: _packed(value) for key, value in header.metadata.items()},
        "tensors": [[t.name, t.shape, t.type_name, t.nbytes, t.offset] for t in header.tensors],
    }
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}.new")
        unfinished.write_bytes(zlib.compress(json.dumps(packed, separators=(",", ":")).encode(), 1))
        unfinished.replace(place)
    except OSError as error:
        log.info("the header of %s is not kept: %s", one.name, error)


def _packed(value: object) -> object:
    return {"skipped": [value.element_type, value.count]} if isinstance(value, SkippedArray) else value


def _unpacked(value: Any) -> object:
    if isinstance(value, dict):
        return SkippedArray(*value["skipped"])
    return tuple(value) if isinstance(value, list) else value


def _path(file: RepoFile) -> str:
    """The path in the repository, without the query of a plain address."""
    return file.path.partition("?")[0]
