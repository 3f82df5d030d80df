"""From the MODEL argument to headers: a local file, one quant of a repository, or all its quants."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
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
    from qnext.models.ranged import Deadline

Notice = Callable[[str], None]
OnHeaders = Callable[[int, int], None]
"""Hears how many headers have been read, and of how many."""

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


def locate_models(
    ref: str,
    paths: Paths,
    notice: Notice,
    *,
    on_headers: OnHeaders | None = None,
    on_listed: Callable[[], object] | None = None,
    on_model: Callable[[LocatedModel], None] | None = None,
    within: Deadline | None = None,
) -> tuple[LocatedModel, ...]:
    """`demo` (made on first use), a local GGUF, a catalogue name or a repository, with `:QUANT` or without.

    Several only for a repository whose quant is left open. Of a published model `on_listed` is called when it
    is known to be there and before its headers are read, and `on_model` with each of several quants while the
    headers of the others are fetched; another thread may end that by the deadline `within`. Raises
    ModelError, UsageError, DownloadError.
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
    quants = _list(ref, paths)
    if on_listed is not None:
        on_listed()
    on_model = on_model if len(quants) > 1 else None
    return _read(quants, paths, notice, on_headers, on_model, within)


def find_here(ref: str, paths: Paths) -> Path | None:
    """The file to load of the published quant that `ref` names, where all of it is on this disk.

    Nothing is asked of the network: the list kept from an earlier time counts, or what lies in the Hugging
    Face cache. None where `ref` leaves the quant open, or anything of it is not here or not known.
    """
    if is_address(ref) and parse_ref(ref) is None:
        return None
    from qnext.models.held import find_places
    from qnext.models.hub import list_repo
    from qnext.models.hub_cache import hub_folder
    from qnext.models.quant_names import pick_quant

    hub_ref = _hub_ref(ref)
    wanted = hub_ref.path or hub_ref.quant
    if wanted is None:
        return None
    try:
        quant = pick_quant(list_repo(hub_ref, paths.listings_dir, offline=True), wanted)
        places = find_places(quant, hub_folder(os.environ))
    except ModelError:
        return None
    return places[0].path if all(place.state() == "here" for place in places) else None


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


def _list(ref: str, paths: Paths) -> dict[str, QuantFile]:
    """The published quant that `ref` names, or all it leaves open, by a reference that names each."""
    from qnext.models.hub import list_address, list_repo
    from qnext.models.quant_names import pick_quant

    if is_address(ref) and parse_ref(ref) is None:
        return {ref: list_address(ref).quants[0]}
    hub_ref = _hub_ref(ref)
    listing = list_repo(hub_ref, paths.listings_dir)
    if wanted := hub_ref.path or hub_ref.quant:
        return {ref: pick_quant(listing, wanted)}
    return {f"{ref}:{quant.quant}": quant for quant in listing.quants[:MOST_QUANTS]}


def _read(
    quants: Mapping[str, QuantFile],
    paths: Paths,
    notice: Notice,
    on_headers: OnHeaders | None,
    on_model: Callable[[LocatedModel], None] | None,
    within: Deadline | None,
) -> tuple[LocatedModel, ...]:
    """`quants` with their headers, without those whose header cannot be read; `notice` hears of them."""
    from qnext.models.remote_header import read_remote_headers

    refs = {quant: ref for ref, quant in quants.items()}
    models: dict[str, LocatedModel] = {}
    failures: dict[str, ModelError] = {}

    def take(quant: QuantFile, header: ModelHeader) -> None:
        model = LocatedModel(refs[quant], header, read_shape(header), quant)
        models[model.ref] = model
        if on_model is not None:
            on_model(model)

    def give_up(quant: QuantFile, error: ModelError) -> None:
        failures[refs[quant]] = error

    read_remote_headers(
        tuple(quants.values()),
        paths.headers_dir,
        on_progress=on_headers,
        on_failure=give_up,
        on_header=take,
        within=within,
    )
    if not models:
        raise next(failures[ref] for ref in quants)
    for ref, quant in quants.items():
        if ref in failures:
            notice(f"{quant.quant} is left out: {failures[ref].message}")
    return tuple(models[ref] for ref in quants if ref in models)


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
