"""Digests that say what was measured: the same digest, the same configuration.

A model file of 45 GB takes half a minute to hash whole, longer than most benchmarks run. Its digest is
therefore *sampled*, and says so in its prefix. It covers what tells two models apart in practice: the size of
every shard, the beginning with the vocabulary, chat template and tensor table, and 1 MiB of weights spread
evenly. It does not notice a few flipped bytes between the samples, nor a new chat template of the same length
that lies beyond the beginning: it is an identity, not a checksum.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from qnext.errors import ModelError
from qnext.units import KIB, MIB

SAMPLED_PREFIX = "sampled-sha256:"

_FIRST_HEAD = 8 * MIB
"""Holds the whole header of a Qwen model: 152k tokens and their merges take about 6 MiB. Vocabularies of
200k and more do not end here; SHA-256 without CPU support (0.3 GiB/s) sets the bound."""

_LATER_HEAD = 256 * KIB
"""Later shards repeat no vocabulary: this holds two thousand tensor entries."""

_CHUNKS = 64
_CHUNK_BYTES = 16 * KIB


def digest_of(mapping: Mapping[str, object]) -> str:
    """16 hex digits of the SHA-256 of the mapping as canonical JSON (sorted keys, no blanks).

    Takes JSON values only (NaN is a ValueError, other types a TypeError); the order of keys does not matter,
    the order in lists does, and tuples count as lists.
    """
    text = json.dumps(mapping, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_digest(paths: Sequence[Path]) -> str:
    """Identity of a model's shards, in order: `sampled-sha256:` and 32 hex digits. Names do not matter.

    Per shard: its size, its first 8 MiB (256 KiB from the second shard on) and 64 chunks of 16 KiB spread
    evenly over the file, the last one at its end. Raises ModelError when a shard cannot be read.
    """
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        try:
            _add_shard(digest, path, _LATER_HEAD if number else _FIRST_HEAD)
        except OSError as error:
            raise ModelError(
                f"cannot read {path}: {error.strerror or error}", hint="Check the path and its permissions."
            ) from error
    return SAMPLED_PREFIX + digest.hexdigest()[:32]


def new_record_id() -> str:
    """Twelve random hex digits: short prefixes stay unique, as with commits."""
    return secrets.token_hex(6)


def utc_now() -> str:
    """The present as ISO-8601 in UTC with seconds, `2026-10-01T12:00:00+00:00`; sorts as text."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _add_shard(digest: hashlib._Hash, path: Path, head: int) -> None:
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        digest.update(size.to_bytes(8, "little"))
        file.seek(0)
        left = min(head, size)
        while left and (block := file.read(min(left, MIB))):
            digest.update(block)
            left -= len(block)
        last = max(0, size - _CHUNK_BYTES)
        for index in range(_CHUNKS):
            file.seek(last * index // (_CHUNKS - 1))
            digest.update(file.read(_CHUNK_BYTES))
