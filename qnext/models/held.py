"""Where a published file lies in the shared Hugging Face cache, and how much of it is there.

The layout is the one that every program reads: `models--ORG--NAME/blobs/SHA256` holds the contents,
`snapshots/COMMIT/FILE` links to it, `refs/main` holds the commit (llama.cpp finds no file without it), and
`.locks/models--ORG--NAME/SHA256.lock` is held by whoever writes that blob. What is not whole yet is
`blobs/SHA256.incomplete`. Where the filesystem knows no links the file itself stands in the snapshot.

Names come from a server, so each is checked before it becomes part of a path here.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from qnext.errors import ModelError
from qnext.models.published import QuantFile, RepoFile

State = Literal["here", "part", "wrong size", "absent"]

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Place:
    """One file's place in the cache. `digest` is the SHA-256 that its contents must have."""

    repo: str
    file: RepoFile
    digest: str
    path: Path
    blob: Path
    lock: Path

    @property
    def part(self) -> Path:
        """What has been fetched of a file that is not whole yet."""
        return self.blob.with_name(f"{self.digest}.incomplete")

    @property
    def contents(self) -> Path:
        """The file under a final name; it need not exist."""
        return self.path if self.path.exists() else self.blob

    def state(self) -> State:
        """By size alone: a file has its final name only after its digest was right, if we fetched it."""
        found = _size(self.contents)
        if found == self.file.size_bytes:
            return "here"
        if found is not None:
            return "wrong size"
        return "part" if _size(self.part) else "absent"

    def bytes_here(self) -> int:
        """Bytes that need not be fetched again, if they are right."""
        size = self.file.size_bytes
        return size if self.state() == "here" else min(_size(self.part) or 0, size)

    def link(self) -> None:
        """Give the blob its name in the snapshot. Call it with the lock held. Raises OSError."""
        if not self.blob.exists() or (self.path.exists() and self.path.samefile(self.blob)):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        try:
            self.path.symlink_to(os.path.relpath(self.blob, self.path.parent))
        except FileExistsError:
            raise
        except OSError:  # FAT and some network filesystems know no links
            self.blob.replace(self.path)


def find_places(quant: QuantFile, cache: Path) -> tuple[Place, ...]:
    """The places of all files of `quant` below `cache`, whether there or not.

    Raises ModelError for names that are no plain names (a path that leaves the repository) and for a file
    without a SHA-256, since it could not be verified.
    """
    if quant.repo.startswith(("https://", "http://")):
        raise ModelError(
            f"{quant.repo} is no repository, so it states no digests to verify a download against.",
            hint="Download the file with another program and give its path.",
        )
    if not _REPO.fullmatch(quant.repo) or ".." in quant.repo or "--" in quant.repo:
        raise ModelError(f"'{quant.repo}' is not a repository's name.", hint="Write USER/REPO.")
    if not _COMMIT.fullmatch(quant.revision):
        raise ModelError(f"'{quant.revision}' is not a commit of {quant.repo}.", hint="Check HF_ENDPOINT.")
    folder = f"models--{quant.repo.replace('/', '--')}"
    return tuple(_find_place(file, quant, cache, folder) for file in quant.files)


def write_ref(quant: QuantFile, cache: Path, ref: str = "main") -> None:
    """Note that `ref` is the commit of `quant`, for programs that ask for `ref` offline. Raises OSError."""
    if not _plain(ref) or _COMMIT.fullmatch(ref):
        return
    note = cache / f"models--{quant.repo.replace('/', '--')}" / "refs" / ref
    if note.is_file() and note.read_text(encoding="ascii", errors="replace") == quant.revision:
        return
    note.parent.mkdir(parents=True, exist_ok=True)
    new = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    new.write_text(quant.revision, encoding="ascii")
    new.replace(note)


def _find_place(file: RepoFile, quant: QuantFile, cache: Path, folder: str) -> Place:
    if not _plain(file.path):
        raise ModelError(
            f"{quant.repo} lists '{file.path}', which is not a file's name.", hint="Check HF_ENDPOINT."
        )
    if file.digest is None or not _SHA256.fullmatch(file.digest):
        raise ModelError(
            f"{quant.repo} states no SHA-256 for {file.path}, so what arrives could not be verified.",
            hint="Ask the Hub itself instead of a mirror: unset HF_ENDPOINT.",
        )
    return Place(
        repo=quant.repo,
        file=file,
        digest=file.digest,
        path=cache / folder / "snapshots" / quant.revision / file.path,
        blob=cache / folder / "blobs" / file.digest,
        lock=cache / ".locks" / folder / f"{file.digest}.lock",
    )


def _plain(path: str) -> bool:
    """Whether `path` stays inside the folder that it is put in, on every system."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and not set(path) & set("\\:\0")


def _size(path: Path) -> int | None:
    """Bytes of the file behind `path`; None where there is no regular file."""
    try:
        return path.stat().st_size if path.is_file() else None
    except OSError:
        return None
