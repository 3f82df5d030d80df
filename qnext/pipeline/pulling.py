"""The trip of `qnext pull`: from a reference to files in the shared Hugging Face cache."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qnext.config import Paths
from qnext.errors import DoesNotFitError, ModelError, UsageError
from qnext.hardware.files import nearest_folder
from qnext.models.catalogue import find_model, matching_repo, nearest_models
from qnext.models.download import OnProgress, check_space, download, state_digests, verify
from qnext.models.held import Place, find_places
from qnext.models.hub import list_repo
from qnext.models.hub_cache import hub_folder
from qnext.models.hub_ref import HubRef, parse_ref
from qnext.models.published import Listing, QuantFile
from qnext.models.quant_names import pick_quant
from qnext.pipeline.locate import OnHeaders
from qnext.pipeline.request import Request
from qnext.pipeline.surroundings import Notice
from qnext.units import format_bytes


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is to be fetched, and where it goes. `ref` is the branch or tag that was asked for."""

    quant: QuantFile
    places: tuple[Place, ...]
    cache: Path
    ref: str

    @property
    def bytes_here(self) -> int:
        """Bytes that need not be fetched, parts of files included."""
        return sum(place.bytes_here() for place in self.places)

    @property
    def complete(self) -> bool:
        """Whether all files are here, by their sizes."""
        return all(place.state() == "here" for place in self.places)

    @property
    def path(self) -> Path:
        """The first file, which is the one to load."""
        return self.places[0].contents

    @property
    def free_bytes(self) -> int | None:
        """Room on the cache's disk; None where it cannot be read."""
        try:
            return shutil.disk_usage(nearest_folder(self.cache)).free
        except OSError:
            return None


def find_wanted(
    model: str,
    paths: Paths,
    environ: Mapping[str, str] | None = None,
    choose: Callable[[], str] | None = None,
) -> Wanted:
    """The files that `model` (`user/repo:QUANT`, or a name of the catalogue) names on the Hub.

    Of several quants `choose` names one; without it one has to be named. Raises UsageError, ModelError,
    DownloadError and what `choose` raises.
    """
    ref = _hub_ref(model)
    listing = list_repo(ref, paths.listings_dir)
    wanted = ref.path or ref.quant
    if wanted is None and len(listing.quants) > 1:
        try:
            wanted = choose() if choose is not None else None
        except ModelError as error:
            raise _unnamed(listing, f"; none could be chosen: {error.message}") from error
        if wanted is None:
            raise _unnamed(listing, "")
    quant = pick_quant(listing, wanted) if wanted else listing.quants[0]
    cache = hub_folder(os.environ if environ is None else environ)
    return Wanted(quant, find_places(state_digests(quant), cache), cache, ref.revision or "main")


def fetch_wanted(wanted: Wanted, on_progress: OnProgress, *, again: tuple[Place, ...] = ()) -> dict[str, Any]:
    """Fetch what is missing, and `again` what is there; returns the report that `--json` prints."""
    began = time.perf_counter()
    missing = sum(p.file.size_bytes - (0 if p in again else p.bytes_here()) for p in wanted.places)
    download(wanted.quant, wanted.cache, on_progress=on_progress, again=again, ref=wanted.ref)
    return {**describe(wanted), "fetched_bytes": missing, "elapsed_s": round(time.perf_counter() - began, 3)}


def check_wanted(wanted: Wanted, on_progress: OnProgress) -> dict[Place, bool]:
    """Read what is here under a final name: whether each file has the digest that the Hub lists."""
    return verify(wanted.places, on_progress)


def check_room(wanted: Wanted) -> None:
    """Raise DownloadError when what is missing does not fit the disk."""
    check_space(wanted.places)


def describe(wanted: Wanted, good: Mapping[Place, bool] | None = None) -> dict[str, Any]:
    """What is wanted and what is here, for JSON. `good` adds what a check found: None for an unread file."""
    files = []
    for place in wanted.places:
        one: dict[str, Any] = {
            "file": place.file.path,
            "path": str(place.path),
            "size_bytes": place.file.size_bytes,
            "sha256": place.digest,
            "state": place.state(),
            "bytes_here": place.bytes_here(),
        }
        files.append(one if good is None else {**one, "good": good.get(place)})
    return {
        "repo": wanted.quant.repo,
        "revision": wanted.quant.revision,
        "quant": wanted.quant.quant,
        "cache": str(wanted.cache),
        "path": str(wanted.places[0].path),
        "size_bytes": wanted.quant.size_bytes,
        "bytes_here": wanted.bytes_here,
        "free_bytes": wanted.free_bytes,
        "complete": wanted.complete,
        "files": files,
    }


def choose_here(request: Request, paths: Paths, notice: Notice, on_headers: OnHeaders | None = None) -> str:
    """The quant of `request.model` that `qnext plan` takes on this machine; `notice` is told which and why.

    Raises DoesNotFitError when none fits, and what `plan_model` raises.
    """
    from qnext.pipeline.planning import plan_model

    planned = plan_model(request, paths, notice, on_headers)
    assert planned.model.published is not None
    quant = planned.model.published.quant
    if not planned.plan.fits:
        missing = ", ".join(f"{format_bytes(size)} on {name}" for name, size in planned.plan.missing.items())
        raise DoesNotFitError(
            f"no quant of {request.model} fits this machine: {quant} lacks {missing}",
            hint=f"To fetch one for another machine, name it: qnext pull {request.model}:{quant}",
        )
    why = next((one.because for one in planned.plan.reasons if one.what.startswith("quant ")), "")
    notice(f"taking {quant}: {why or 'the only one with a header that can be read'}")
    return quant


def _hub_ref(model: str) -> HubRef:
    name, _, quant = model.partition(":")
    ref = parse_ref(model)
    known = find_model(name) if ref is None else matching_repo(ref.repo)
    if ref is not None:
        if known is not None and ref.repo.lower() == known.original.lower():
            raise ModelError(
                f"{ref.repo} holds no GGUF: it is the makers' own repository",
                hint=f"qnext pull {known.repo}",
            )
        return ref
    if known is not None:
        return HubRef(known.repo, quant=quant or None)
    near = nearest_models(name)
    raise UsageError(
        f"'{model}' names neither a repository on the Hub nor a model of the catalogue",
        hint=(f"Did you mean {near[0]}? " if near else "") + "Write USER/REPO:QUANT, as on the Hub.",
    )


def _unnamed(listing: Listing, why: str) -> ModelError:
    names = [quant.quant for quant in listing.quants]
    common = next((name for name in names if re.search("Q4_K_M", name)), names[0])
    return ModelError(
        f"{listing.repo} has {len(names)} quants: {', '.join(names)}{why}",
        hint=f"Name one: qnext pull {listing.repo}:{common}",
    )
