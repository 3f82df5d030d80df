"""Reads the header of a model: one GGUF file, or a split set whose shards are checked against each other.

A split set is named `PREFIX-00001-of-00004.gguf` and so on; llama.cpp finds the other shards by that name
and takes the metadata of the first (`llama_model_loader`, `llama_split_path`). The first shard may hold no
tensors at all. Reading from elsewhere (an HTTP address) takes three steps with the same parts: `shard_names`,
`read_shard` of each source, `join_shards`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from qnext.errors import ModelError
from qnext.models.gguf_parse import ShardHeader, read_shard
from qnext.models.gguf_source import DAMAGED, FileSource
from qnext.models.header import ModelHeader, TensorInfo

_SHARD_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


def read_header(path: Path, *, check_data: bool = True) -> ModelHeader:
    """Metadata and tensor table of the model at `path`, a GGUF file or any shard of a split set.

    Arrays of up to 1,024 numbers are read, longer ones and all arrays of strings stand as `SkippedArray`,
    as does a string over 1 MiB (element type `u8`). With `check_data` a file shorter than its tensors need
    is an error, as it is for llama.cpp. Raises ModelError for whatever llama.cpp would not load.
    """
    names = shard_names(path.name)
    paths = [path.with_name(name) for name in names] if len(names) > 1 else [path]
    if len(paths) > 1:
        _require_all(path, paths)
    shards = []
    for number, shard_path in enumerate(paths):
        with FileSource(shard_path) as source:
            shards.append(read_shard(source, number, check_data=check_data))
    return join_shards(shards, paths)


def read_array(path: Path, key: str) -> tuple[object, ...]:
    """All elements of the array `key`, which `read_header` may have skipped, from the file at `path` (the
    first shard of a split set). Raises ModelError when there is no such array."""
    with FileSource(path) as source:
        value = read_shard(source, check_data=False, whole=key).metadata.get(key)
    if not isinstance(value, tuple):
        raise ModelError(
            f"{path} has no array '{key}'", hint="Use a model whose GGUF holds it, or a newer conversion."
        )
    return value


def shard_names(name: str) -> list[str]:
    """File names of the whole split set that `name` belongs to, in order; just `name` for a single file."""
    match = _SHARD_NAME.fullmatch(name)
    if match is None:
        return [name]
    number, count = int(match["number"]), int(match["count"])
    if not 1 <= number <= count:
        raise ModelError(
            f"'{name}' names shard {number} of {count}, which cannot be",
            hint="Give the file the name it was published under.",
        )
    return [f"{match['prefix']}-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]


def join_shards(shards: Sequence[ShardHeader], paths: Sequence[Path]) -> ModelHeader:
    """One header from those of all shards, in order, after checking that they belong together."""
    first = shards[0]
    _check_numbers(shards)
    architecture = first.metadata.get("general.architecture")
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        other = shard.metadata.get("general.architecture", architecture)
        if other != architecture:
            raise _mismatch(shard, f"general.architecture {architecture!r} as in {first.name}", f"{other!r}")
        for tensor in shard.tensors:
            if tensor.name in tensors:
                twin = shards[tensors[tensor.name].shard].name
                raise _mismatch(shard, "each tensor once in the set", f"{tensor.name!r} also in {twin}")
            tensors[tensor.name] = tensor
    if len(shards) > 1:
        _check_tensor_count(shards, len(tensors))
    return ModelHeader(
        paths=tuple(paths),
        file_bytes=sum(shard.size for shard in shards),
        version=first.version,
        alignment=first.alignment,
        metadata=first.metadata,
        tensors=tuple(tensors.values()),
    )


def _require_all(path: Path, paths: Sequence[Path]) -> None:
    with FileSource(path):  # its own error first: everything after concerns the others
        pass
    missing = [shard.name for shard in paths if not (shard.is_symlink() or shard.exists())]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{path}: expected {len(paths)} shards beside each other, "
            f"found no {', '.join(missing[:3])}{more} in {path.parent}",
            hint="Download the missing shards; all of them must lie in one folder.",
        )


def _check_numbers(shards: Sequence[ShardHeader]) -> None:
    """split.count and split.no against the names. A merged file keeps split.count 0, which means single."""
    for number, shard in enumerate(shards):
        count = shard.metadata.get("split.count", 0 if number == 0 else len(shards))
        if len(shards) == 1 and isinstance(count, int) and count > 1:
            raise ModelError(
                f"{shard.name}: expected a whole model, found one shard of {count} (split.count) "
                "whose name does not say so",
                hint=f"Name the shards PREFIX-00001-of-{count:05d}.gguf and so on: llama.cpp needs that.",
            )
        if len(shards) > 1 and count != len(shards):
            raise _mismatch(shard, f"split.count {len(shards)} as the name says", f"{count}")
        if len(shards) > 1 and shard.metadata.get("split.no") != number:
            raise _mismatch(
                shard, f"split.no {number} as the name says", f"{shard.metadata.get('split.no', 'none')}"
            )


def _check_tensor_count(shards: Sequence[ShardHeader], found: int) -> None:
    if "split.tensors.count" not in shards[0].metadata:
        raise _mismatch(shards[0], "the key split.tensors.count", "none")
    for shard in shards:
        count = shard.metadata.get("split.tensors.count", found)
        if count != found:
            raise _mismatch(shard, f"split.tensors.count to be the {found} tensors of all shards", f"{count}")


def _mismatch(shard: ShardHeader, expected: str, found: str) -> ModelError:
    return ModelError(
        f"{shard.name}: expected {expected}, found {found}",
        hint="The shards are not of one set: download them again. " + DAMAGED,
    )
