"""From a list of published files to the quants among them, by the names that people publish under.

The quant stands at the end of the file's name (`model-UD-Q4_K_XL.gguf`, `model.i1-Q4_K_M.gguf`), before a
suffix of the publisher's (`-Q4_K_M-v2`), or only in the folder's name (`Q4_K_M/model-00001-of-00002.gguf`).
Not every GGUF is a model to run: image projectors, importance matrices, vocabularies, and heads that draft
for the model beside them. A head is told by its name together with its size, because whole models with MTP
layers are named `MTP` too.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from qnext.errors import ModelError
from qnext.models.gguf_reader import shard_names
from qnext.models.published import Listing, QuantFile, RepoFile
from qnext.models.shape import quant_in_name

_SHARD_SUFFIX = re.compile(r"-\d{5}-of-\d{5}$")
_IMATRIX_QUANT = re.compile(r"[-_.]i1[-_.]?$", re.IGNORECASE)
_ADAPTERS = frozenset({"lora", "adapter", "controlvector"})
_HEADS = frozenset({"mtp", "nextn", "draft", "drafter", "assistant", "eagle", "eagle3", "dflash", "medusa"})


@dataclass(frozen=True, slots=True)
class _Model:
    """A file or complete split set. `extra` is what the name holds besides model and quant."""

    files: tuple[RepoFile, ...]
    quant: str

    @property
    def path(self) -> str:
        return self.files[0].path

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def group_quants(repo: str, revision: str, files: Iterable[RepoFile]) -> Listing:
    """The quants among a repository's files, largest first, each under a name of its own; see Listing."""
    ggufs = sorted((f for f in files if f.path.lower().endswith(".gguf")), key=lambda f: f.path)
    left_out: list[tuple[str, str]] = []
    models: list[_Model] = []
    for shards in _split_sets(ggufs, left_out):
        if reason := _no_model(shards[0].path):
            left_out.append((shards[0].path, reason))
        else:
            models.append(_Model(shards, _quant_of(shards[0].path)))
    models = _without_helpers(models, left_out)
    models = _without_copies(models, left_out)
    models.sort(key=lambda model: (-model.size_bytes, model.path))
    quants = tuple(
        QuantFile(repo, revision, name, model.files)
        for model, name in zip(models, _own_names(models), strict=True)
    )
    return Listing(repo, revision, quants, tuple(sorted(left_out)))


def pick_quant(listing: Listing, wanted: str) -> QuantFile:
    """The quant of that name, whatever its case, or the one that holds the file `wanted`.

    `Q6_K` is not `UD-Q6_K_XL`; `Q4_K_M` is `i1-Q4_K_M` where there is no other. Raises ModelError.
    """
    asked = wanted.casefold()
    for quant in listing.quants:
        if quant.quant.casefold() == asked or any(file.path == wanted for file in quant.files):
            return quant
    for quant in listing.quants:
        if quant.quant.casefold() == f"i1-{asked}":
            return quant
    for path, reason in listing.left_out:
        if path == wanted:
            raise ModelError(f"{listing.repo}: {path} is {reason}", hint=_offer(listing))
    names = [quant.quant for quant in listing.quants]
    by_case = {name.casefold(): name for name in names}
    near = [by_case[name] for name in difflib.get_close_matches(asked, by_case, n=2, cutoff=0.5)]
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    what = "file" if wanted.lower().endswith(".gguf") else "quant"
    raise ModelError(f"{listing.repo} has no {what} '{wanted}'", hint=meant + _offer(listing))


def _offer(listing: Listing) -> str:
    if not listing.quants:
        return "It has no model file that could be run."
    return "It has " + ", ".join(quant.quant for quant in listing.quants) + "."


def _split_sets(files: Sequence[RepoFile], left_out: list[tuple[str, str]]) -> Iterable[tuple[RepoFile, ...]]:
    """Single files and complete split sets in order; the others are noted."""
    by_path = {file.path: file for file in files}
    taken: set[str] = set()
    for file in files:
        if file.path in taken:
            continue
        path = PurePosixPath(file.path)
        try:
            names = [str(path.with_name(name)) for name in shard_names(path.name)]
        except ModelError:
            left_out.append((file.path, "a shard with an impossible number"))
            continue
        taken.update(names)
        missing = [number for number, name in enumerate(names, 1) if name not in by_path]
        if missing:
            numbers = ", ".join(map(str, missing[:5])) + (" …" if len(missing) > 5 else "")
            left_out.append((file.path, f"an incomplete set: shard {numbers} of {len(names)} is missing"))
        elif any(by_path[name].size_bytes == 0 for name in names):
            left_out.append((file.path, "an empty file"))
        else:
            yield tuple(by_path[name] for name in names)


def _no_model(path: str) -> str:
    """Why this is no language model, by its name alone; empty when it may be one."""
    stem = _stem(path).lower()
    if "mmproj" in stem:
        return "an image projector"
    if stem.startswith("imatrix") or stem.endswith("imatrix"):
        return "an importance matrix"
    words = _words(stem)
    if "vocab" in words:
        return "a vocabulary without weights"
    return ""


def _without_helpers(models: list[_Model], left_out: list[tuple[str, str]]) -> list[_Model]:
    """Takes away draft heads and adapters: named so, and under half the smallest model not named so."""
    named = {model: (_ADAPTERS | _HEADS).intersection(_words(model.path.lower())) for model in models}
    smallest = min((model.size_bytes for model, words in named.items() if not words), default=0)
    kept = []
    for model, words in named.items():
        if words and 2 * model.size_bytes < smallest:
            kind = "an adapter" if words & _ADAPTERS else "a draft head"
            left_out.append((model.path, f"{kind}, not a whole model"))
        else:
            kept.append(model)
    return kept


def _without_copies(models: list[_Model], left_out: list[tuple[str, str]]) -> list[_Model]:
    first: dict[object, _Model] = {}
    for model in models:
        digests = tuple(file.digest or file.path for file in model.files)
        twin = first.setdefault(digests, model)
        if twin is not model:
            left_out.append((model.path, f"the same file as {twin.path}"))
    return list(first.values())


def _quant_of(path: str) -> str:
    """The quant's published name; the file's own name where it tells none."""
    parts = [_stem(path), *reversed(PurePosixPath(path).parent.parts)]
    for part in parts:
        words = re.split(r"(?<=[-.])", part)
        for count in range(len(words), 0, -1):
            head = "".join(words[:count]).rstrip("-.")
            if quant := quant_in_name(head + ".gguf"):
                return f"i1-{quant}" if _IMATRIX_QUANT.search(head[: -len(quant)]) else quant
    return parts[0]


def _own_names(models: Sequence[_Model]) -> list[str]:
    """The quants' names, those of one quant told apart by the words of the path that not all of them have."""
    names = [model.quant for model in models]
    for quant in {name for name in names if names.count(name) > 1}:
        same = [n for n, model in enumerate(models) if model.quant == quant]
        words = {n: _words(models[n].path.removesuffix(".gguf"), quant) for n in same}
        common = set.intersection(*(set(found) for found in words.values()))
        for n in same:
            own = dict.fromkeys(word for word in words[n] if word not in common)
            names[n] = "-".join([quant, *own])
    seen: dict[str, int] = {}
    for n, name in enumerate(names):  # one folder's file beside another's of the same words
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            names[n] = f"{name}-{seen[name]}"
    return names


def _words(path: str, quant: str = "") -> list[str]:
    """The words of a path, without the quant and the shard's number."""
    bare = re.sub(r"-\d{5}-of-\d{5}(?=\.|$)", "", path)
    if quant:
        bare = re.sub(re.escape(quant), "", bare, flags=re.IGNORECASE)
    return [word for word in re.split(r"[-_./ ]+", bare) if word]


def _stem(path: str) -> str:
    """The file's name without `.gguf` and shard number."""
    return _SHARD_SUFFIX.sub("", PurePosixPath(path).name[: -len(".gguf")])
