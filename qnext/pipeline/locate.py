"""From the MODEL argument to headers: a local file, one quant of a repository, or all its quants."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qnext.config import Paths
from qnext.errors import ModelError, UsageError
from qnext.models.gguf_reader import read_header
from qnext.models.header import ModelHeader
from qnext.models.hub_ref import HubRef, is_address, parse_ref
from qnext.models.published import QuantFile
from qnext.models.shape import ModelShape, read_shape

if TYPE_CHECKING:
    from qnext.models.held import Place

Notice = Callable[[str], None]

MOST_QUANTS = 40
"""Headers read of one repository at most, the largest files first: no published ladder has more steps."""


@dataclass(frozen=True, slots=True)
class LocatedModel:
    """A model with its header and dimensions; `published` is what can be fetched, None for a local file."""

    ref: str
    header: ModelHeader
    shape: ModelShape
    published: QuantFile | None = None

    @property
    def path(self) -> str:
        """The file llama.cpp is given, the first shard: where it is, or where fetching would put it."""
        return str(self._places()[0].path if self.published else self.header.paths[0])

    @property
    def here(self) -> bool:
        """Whether all of it is on this disk."""
        return all(place.state() == "here" for place in self._places())

    def _places(self) -> tuple[Place, ...]:
        """Where the files of a published model are kept; none for a local one."""
        if self.published is None:
            return ()
        from qnext.models.held import find_places
        from qnext.models.hub_cache import hub_folder

        return find_places(self.published, hub_folder(os.environ))


def locate_models(ref: str, paths: Paths, notice: Notice) -> tuple[LocatedModel, ...]:
    """`demo` (made on first use), a local GGUF, a catalogue name or a repository, with `:QUANT` or without.

    Several only for a repository whose quant is left open. Raises ModelError, UsageError, DownloadError.
    """
    if ref == "demo":
        from qnext.models.synth import demo_path

        return (_local(ref, demo_path(paths.demo_dir)),)
    try:
        path = Path(ref).expanduser()
        found = path.exists()
    except (OSError, RuntimeError) as error:
        raise ModelError(f"'{ref}' cannot be looked at: {error}", hint="Check the path.") from error
    if found:
        return (_local(ref, path),)
    return _published(ref, paths, notice)


def locate_model(ref: str, paths: Paths) -> LocatedModel:
    """The one model that `ref` names. Raises UsageError where it leaves the quant open."""
    models = locate_models(ref, paths, lambda _: None)
    if len(models) > 1:
        quants = ", ".join(model.published.quant for model in models if model.published)
        raise UsageError(f"'{ref}' has several quants: {quants}", hint=f"Name one, such as {ref}:Q4_K_M.")
    return models[0]


def _local(ref: str, path: Path) -> LocatedModel:
    header = read_header(path)
    return LocatedModel(ref, header, read_shape(header))


def _published(ref: str, paths: Paths, notice: Notice) -> tuple[LocatedModel, ...]:
    from qnext.models.hub import list_address, list_repo
    from qnext.models.quant_names import pick_quant
    from qnext.models.remote_header import read_remote_headers

    if is_address(ref) and parse_ref(ref) is None:
        listing, wanted = list_address(ref), None
    else:
        hub_ref = _hub_ref(ref)
        listing = list_repo(hub_ref, paths.listings_dir)
        wanted = hub_ref.path or hub_ref.quant
    quants = (pick_quant(listing, wanted),) if wanted else listing.quants[:MOST_QUANTS]
    failures: list[tuple[QuantFile, ModelError]] = []
    headers = read_remote_headers(
        quants, paths.headers_dir, on_failure=lambda quant, error: failures.append((quant, error))
    )
    if not headers:
        raise failures[0][1]
    for quant, error in failures:
        notice(f"{quant.quant} is left out: {error.message}")
    return tuple(
        LocatedModel(ref if wanted else f"{ref}:{quant.quant}", header, read_shape(header), quant)
        for quant, header in headers.items()
    )


def _hub_ref(ref: str) -> HubRef:
    """The repository that a name or a reference stands for. Raises ModelError for one that is none."""
    from qnext.models.catalogue import find_model, matching_repo, nearest_models

    name, _, quant = ref.partition(":")
    known = find_model(name) if "/" not in name else None
    if known is not None:
        return HubRef(known.repo, quant=quant or None)
    hub_ref = parse_ref(ref)
    if hub_ref is not None:
        model = matching_repo(hub_ref.repo)
        if model is not None and hub_ref.repo.lower() == model.original.lower():
            raise ModelError(
                f"{hub_ref.repo} holds no GGUF: it is the makers' own repository",
                hint=f"Use {model.repo}, or the name {model.name}.",
            )
        return hub_ref
    near = nearest_models(name)
    meant = f"Did you mean {near[0]}? " if near else ""
    raise ModelError(
        f"there is no file '{ref}'",
        hint=f"{meant}Give the path of a GGUF file, a repository (user/repo), or try: qnext run demo",
    )
