"""What a repository on the Hub offers: files with size and digest, and the quants they make up."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RepoFile:
    """One file. `digest` is the SHA-256 of its contents in hex, None where the Hub does not state it."""

    path: str
    size_bytes: int
    digest: str | None


@dataclass(frozen=True, slots=True)
class QuantFile:
    """One quant of a repository: a single file, or all shards in order.

    `quant` is as published (`UD-Q4_K_XL`).

    `revision` is the commit that was listed, so that header, plan and download are of the same files.
    """

    repo: str
    revision: str
    quant: str
    files: tuple[RepoFile, ...]

    @property
    def size_bytes(self) -> int:
        """All shards together."""
        return sum(file.size_bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository's model files by quant, largest first. `left_out` are GGUFs that are no model to run
    (mmproj, imatrix, draft heads, incomplete shard sets), with the reason. `age_s` is how long ago a
    list that was kept had been read, None for one read now."""

    repo: str
    revision: str
    quants: tuple[QuantFile, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    age_s: float | None = None
