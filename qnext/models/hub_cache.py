"""GGUF files that are on the disk already, in the folders where downloads of other programs end.

The Hugging Face cache keeps `models--ORG--NAME/snapshots/REVISION/FILE`, a link to `../../blobs/HASH`; an
unfinished download is a blob named `HASH.incomplete` (llama.cpp: `….downloadInProgress`) that no link names.
llama.cpp shares that cache, and `LLAMA_CACHE` moves it; its older downloads lie flat in `~/.cache/llama.cpp`.
LM Studio keeps `ORG/NAME/FILE`. Names and sizes only are read, in a thread that is left behind at the
deadline, because a folder on a dead network disk never answers. huggingface_hub is slow to import and reads
every revision, so the documented layout is read directly.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qnext.errors import ModelError
from qnext.models.gguf_reader import shard_names
from qnext.models.shape import quant_in_name

DEADLINE_S = 1.0
MOST_MODELS = 500
MOST_ENTRIES = 50_000
_MOST_DEPTH = 5
_UNFINISHED = (".incomplete", ".downloadInProgress")
_HUB_FOLDERS = ("models--", "datasets--", "spaces--", "kernels--", ".locks")
"""Folders of the Hugging Face layout: models are read by that layout, the others hold no models."""
_NO_MODEL = ("mmproj", "imatrix")
"""Parts of file names of GGUFs that hold no language model: image projectors and importance matrices."""


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A GGUF or a split set. `path` is its first shard; `size_bytes` sums the shards that are there.

    `store` says whose folder it is (`Hugging Face`, `llama.cpp`, `LM Studio`), `repo` is `org/name` where the
    folder tells, `file` the first shard's path within it. `partial`: a blob whose download has not ended; it
    has no name yet, so `file` and `quant` are None.
    """

    store: str
    path: Path
    repo: str | None
    file: str | None
    quant: str | None
    size_bytes: int
    shards: int = 1
    shards_missing: int = 0
    partial: bool = False

    @property
    def complete(self) -> bool:
        """Whether it can be loaded."""
        return not self.partial and self.shards_missing == 0


@dataclass(frozen=True, slots=True)
class CachedModels:
    """`models` as found, folder by folder. `cut` says what ended the search early; empty when nothing did."""

    models: tuple[CachedModel, ...]
    cut: str = ""


def find_cached(
    environ: Mapping[str, str] | None = None, deadline_s: float = DEADLINE_S, most: int = MOST_MODELS
) -> CachedModels:
    """Language models in GGUF files on this disk. Never raises; what cannot be read is passed over.

    Of a file that several revisions hold, the newest complete one is given.
    """
    search = _Search(most, time.monotonic() + deadline_s)
    roots = cache_folders(os.environ if environ is None else environ)
    thread = threading.Thread(target=search.run, args=(roots,), daemon=True)
    thread.start()
    thread.join(timeout=deadline_s + 0.05)
    hung = "" if not thread.is_alive() else f"a folder did not answer within {deadline_s:g} s"
    return CachedModels(tuple(search.found[:most]), search.cut or hung)


def cache_folders(environ: Mapping[str, str]) -> tuple[tuple[str, Path], ...]:
    """(whose, folder) in the order to look, as each program finds its own; they need not exist."""
    home, cache = _home_and_cache(environ)
    folders = (
        ("Hugging Face", hub_folder(environ)),
        ("llama.cpp", _folder(environ, "LLAMA_CACHE") or cache / "llama.cpp"),
        ("LM Studio", home / ".lmstudio" / "models"),
        ("LM Studio", home / ".cache" / "lm-studio" / "models"),
    )
    unique: dict[Path, str] = {}
    for store, folder in folders:
        unique.setdefault(folder, store)
    return tuple((store, folder) for folder, store in unique.items())


def hub_folder(environ: Mapping[str, str]) -> Path:
    """Where downloads from the Hugging Face Hub are kept, by every program; it need not exist."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if folder := _folder(environ, name):
            return folder
    return (_folder(environ, "HF_HOME") or _home_and_cache(environ)[1] / "huggingface") / "hub"


def _home_and_cache(environ: Mapping[str, str]) -> tuple[Path, Path]:
    home = Path(environ.get("HOME") or os.path.expanduser("~"))  # noqa: PTH111 - Path.home() may raise
    return home, _folder(environ, "XDG_CACHE_HOME") or home / ".cache"


def _folder(environ: Mapping[str, str], name: str) -> Path | None:
    value = environ.get(name)
    return Path(os.path.expanduser(os.path.expandvars(value))) if value else None  # noqa: PTH111


class _CutError(Exception):
    """The search has looked at enough."""


@dataclass(slots=True)
class _Search:
    """One walk. `found` grows while it runs, so that what was found before a hang is not lost."""

    most: int
    deadline: float
    found: list[CachedModel] = field(default_factory=list)
    cut: str = ""
    _entries: int = 0

    def run(self, roots: tuple[tuple[str, Path], ...]) -> None:
        try:
            for store, root in roots:
                for entry in self._list(root):
                    if entry.name.startswith("models--") and _is_folder(entry):
                        self._read_repo(store, Path(entry.path))
                for files in self._walk(root):
                    for model in _group(store, root, files, _repo_of(store, root, files)):
                        self._keep(model)
        except _CutError as reason:
            self.cut = str(reason)

    def _read_repo(self, store: str, folder: Path) -> None:
        """A repository of the Hugging Face layout: each file of the newest snapshot that has all of it."""
        repo = folder.name.removeprefix("models--").replace("--", "/")
        best: dict[str, CachedModel] = {}
        snapshots = sorted(self._list(folder / "snapshots"), key=_changed, reverse=True)
        for snapshot in snapshots:
            for files in self._walk(Path(snapshot.path)):
                for model in _group(store, Path(snapshot.path), files, repo):
                    known = best.get(str(model.file))
                    if known is None or (model.complete and not known.complete):
                        best[str(model.file)] = model
        for model in best.values():
            self._keep(model)
        for blob in self._list(folder / "blobs"):
            size = _size(blob)
            if blob.name.endswith(_UNFINISHED) and size and (_is_gguf(blob.path) or "gguf" in repo.lower()):
                self._keep(CachedModel(store, Path(blob.path), repo, None, None, size, partial=True))

    def _keep(self, model: CachedModel) -> None:
        self.found.append(model)
        if len(self.found) > self.most:
            raise _CutError(f"more than {self.most} models")

    def _walk(self, root: Path) -> Iterator[list[os.DirEntry[str]]]:
        """The GGUF files of each folder below `root` that has any. Links to folders are not followed."""
        pending = [(root, 0)]
        while pending:
            folder, depth = pending.pop()
            files = []
            for entry in self._list(folder):
                if entry.name.lower().endswith(".gguf"):
                    files.append(entry)
                elif depth < _MOST_DEPTH and not entry.name.startswith(_HUB_FOLDERS) and _is_folder(entry):
                    pending.append((Path(entry.path), depth + 1))
            if files:
                yield files

    def _list(self, folder: Path) -> list[os.DirEntry[str]]:
        """Entries by name; none of a folder that cannot be read. Raises _CutError when it has been enough."""
        entries: list[os.DirEntry[str]] = []
        try:
            with os.scandir(folder) as listing:
                for entry in listing:
                    self._entries += 1
                    if self._entries > MOST_ENTRIES:
                        raise _CutError(f"more than {MOST_ENTRIES} files")
                    if time.monotonic() > self.deadline:
                        raise _CutError("the folders took too long to read")
                    entries.append(entry)
        except OSError:
            return entries
        return sorted(entries, key=lambda entry: entry.name)


def _group(store: str, root: Path, files: list[os.DirEntry[str]], repo: str | None) -> Iterator[CachedModel]:
    """The models among the GGUF files of one folder, shards of a set together."""
    sizes = {
        entry.name: size
        for entry in files
        if not any(part in entry.name.lower() for part in _NO_MODEL) and (size := _size(entry))
    }
    taken: set[str] = set()
    for name in sizes:
        if name in taken:
            continue
        try:
            shards = shard_names(name)
        except ModelError:  # shard 5 of 4
            continue
        here = [shard for shard in shards if shard in sizes]
        taken.update(here)
        path = Path(files[0].path).with_name(shards[0])
        yield CachedModel(
            store=store,
            path=path,
            repo=repo,
            file=path.relative_to(root).as_posix(),
            quant=quant_in_name(name),
            size_bytes=sum(sizes[shard] for shard in here),
            shards=len(shards),
            shards_missing=len(shards) - len(here),
        )


def _repo_of(store: str, root: Path, files: list[os.DirEntry[str]]) -> str | None:
    """`org/name` of a folder of LM Studio's."""
    inside = Path(files[0].path).parent.relative_to(root).parts
    return "/".join(inside[:2]) if store == "LM Studio" and len(inside) >= 2 else None


def _size(entry: os.DirEntry[str]) -> int | None:
    """Bytes of the file behind the entry; None for a broken or circular link and whatever is no file."""
    try:
        status = entry.stat()
    except OSError:
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def _changed(entry: os.DirEntry[str]) -> float:
    try:
        return entry.stat().st_mtime
    except OSError:
        return 0.0


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir(follow_symlinks=False)
    except OSError:
        return False


def _is_gguf(path: str) -> bool:
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read(4) == b"GGUF"
    except OSError:
        return False
