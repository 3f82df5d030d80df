"""The Hugging Face Hub: what a reference means, what a repository holds, how its files are reached.

With `hub_errors` the only importer of huggingface_hub besides the download. That library finds the token
(`HF_TOKEN`, `hf auth login`), the proxy and the certificates. The endpoint and the offline switch are read
from the environment when they are needed, not when the library happened to be imported.

The last list of each repository is kept, so that a plan can be made again without a network.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnext.errors import DownloadError, ModelError, QnextError
from qnext.models.gguf_reader import shard_names
from qnext.models.hub_cache import find_cached, hub_folder
from qnext.models.hub_errors import endpoint, endpoint_hint, hub_errors, is_offline
from qnext.models.hub_ref import HubRef
from qnext.models.published import Listing, QuantFile, RepoFile
from qnext.models.quant_names import group_quants
from qnext.models.ranged import Deadline, HttpSource, retry_after_s

if TYPE_CHECKING:
    import httpx2

log = logging.getLogger(__name__)

_TIMEOUT_S = 15.0
_ATTEMPTS = 3
_LONGEST_WAIT_S = 10.0
_HEX = frozenset("0123456789abcdef")


def auth_headers() -> dict[str, str]:
    """Who we are, with the user's token where there is one. Never to be shown or logged."""
    from huggingface_hub import constants, get_token

    headers = {"User-Agent": "qnext"}
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    if token and not (token.isascii() and token.isprintable()):
        raise ModelError("the Hugging Face token holds characters that none has", hint="hf auth login")
    return {**headers, "Authorization": f"Bearer {token}"} if token else headers


def list_repo(ref: HubRef, cache_dir: Path, *, offline: bool | None = None) -> Listing:
    """The quants of a repository at `ref.revision`; of a renamed one under its new name.

    `cache_dir` keeps the last list. Offline (None: as HF_HUB_OFFLINE says) that list is given with its age,
    or what of the repository lies in the Hugging Face cache. Raises ModelError where there is no such
    repository, no access or no model in it, DownloadError where the Hub cannot be reached.
    """
    key = hashlib.sha256(f"{endpoint()} {ref.repo}@{ref.revision}".encode()).hexdigest()
    place = cache_dir / f"list-{key[:32]}.json"
    kept = _read_kept(place)
    if is_offline() if offline is None else offline:
        kept = kept or _in_hub_cache(ref)
        if kept is None:
            raise ModelError(
                f"{ref.repo}: offline, and no list of its files is kept from an earlier time",
                hint="Unset HF_HUB_OFFLINE to read it, or give the path of a GGUF file.",
            )
        return _listing(kept)
    try:
        fetched = _ask(ref)
    except DownloadError as error:
        if kept is not None:
            error.hint += " HF_HUB_OFFLINE=1 goes on with the list read earlier."
        raise
    listing = _listing(fetched)
    _keep(place, fetched)
    return replace(listing, age_s=None)


def file_address(quant: QuantFile, file: RepoFile) -> str:
    """Where a published file is read from: the Hub's resolve address at the listed commit, or as given."""
    if quant.repo.startswith(("https://", "http://")):
        return f"{quant.repo}/{file.path}"
    from huggingface_hub import hf_hub_url

    # Whatever the library took for the endpoint when it was imported, ours is in force.
    return hf_hub_url(quant.repo, file.path, revision=quant.revision, endpoint=endpoint())


def cached_file(quant: QuantFile, file: RepoFile) -> Path | None:
    """The file in the shared Hugging Face cache, whole and of the same contents by its name there."""
    if file.digest is None:
        return None
    blob = hub_folder(os.environ) / f"models--{quant.repo.replace('/', '--')}" / "blobs" / file.digest
    try:
        return blob if blob.stat().st_size == file.size_bytes else None
    except OSError:
        return None


def open_remote(
    quant: QuantFile, file: RepoFile, *, first: int = 1 << 20, deadline: Deadline | None = None
) -> HttpSource:
    """The bytes of a published file. Nothing is asked before the first read. Raises ModelError offline."""
    name = f"{quant.repo}/{file.path.partition('?')[0]}"
    if is_offline():
        raise ModelError(
            f"{name}: offline, and its header is not kept from an earlier time",
            hint="Unset HF_HUB_OFFLINE to read it.",
        )
    from huggingface_hub import get_session

    on_hub = not quant.repo.startswith(("https://", "http://"))
    return HttpSource(
        get_session,
        file_address(quant, file),
        name=name,
        size=file.size_bytes or None,
        headers=auth_headers() if on_hub else None,
        first=first,
        deadline=deadline,
        explain=(lambda response: _explain(quant.repo, response)) if on_hub else None,
    )


def list_address(url: str) -> Listing:
    """The one quant behind a plain `https://` address of a GGUF, with the other shards of its set beside it.

    Sizes are asked from the server; there is no digest. Raises ModelError and DownloadError.
    """
    if is_offline():
        raise ModelError(f"{_shown(url)}: offline", hint="Unset HF_HUB_OFFLINE to read it.")
    from huggingface_hub import get_session

    bare, _, query = url.partition("?")
    folder, _, name = bare.rpartition("/")
    suffix = f"?{query}" if query else ""
    files = []
    for shard in shard_names(name):
        source = HttpSource(get_session, f"{folder}/{shard}{suffix}", name=f"{folder}/{shard}", first=1 << 10)
        files.append(RepoFile(shard, source.size, None))
    listing = group_quants(folder, "", files)
    if not listing.quants:
        raise ModelError(f"{_shown(url)} is no model file", hint="Name a .gguf file that holds a model.")
    if not suffix:
        return listing
    quants = tuple(
        replace(quant, files=tuple(replace(file, path=file.path + suffix) for file in quant.files))
        for quant in listing.quants
    )
    return replace(listing, quants=quants)


def _explain(repo: str, response: httpx2.Response) -> QnextError | None:
    """What a refusing answer of the Hub means; None when the storage behind it answered."""
    from huggingface_hub import hf_raise_for_status

    if not str(response.url).startswith(endpoint()):
        return None
    try:
        with hub_errors(repo):
            hf_raise_for_status(response)
    except QnextError as error:
        return error
    return None


def _ask(ref: HubRef) -> dict[str, Any]:
    """The files of the repository with sizes and digests, as kept on disk, over a few attempts.

    `/api/models/…?blobs=true` as HfApi.model_info asks it; HfApi itself takes 0.2 s to import and asks the
    Hub for a list of coding agents first.
    """
    from urllib.parse import quote

    from huggingface_hub import errors, get_session, hf_raise_for_status

    url = f"{endpoint()}/api/models/{ref.repo}"
    if ref.revision is not None:
        url += f"/revision/{quote(ref.revision, safe='')}"
    for attempt in range(_ATTEMPTS):
        try:
            with hub_errors(ref.repo, ref.revision):
                response = get_session().get(
                    url, params={"blobs": True}, headers=auth_headers(), timeout=_TIMEOUT_S
                )
                hf_raise_for_status(response)
                return _from_answer(response.json())
        except DownloadError as error:
            cause = error.__cause__
            wait_s = 0.5 * 2**attempt
            if isinstance(cause, errors.HfHubHTTPError):
                wait_s = retry_after_s(cause.response.headers, wait_s)
            if attempt + 1 == _ATTEMPTS or wait_s > _LONGEST_WAIT_S:
                raise
            log.info("%s; again in %.1f s", error.message, wait_s)
            time.sleep(wait_s)
        except (ValueError, KeyError, TypeError, AttributeError) as error:  # a page of something else's
            raise ModelError(f"{endpoint()} does not answer as the Hub does", hint=endpoint_hint()) from error
    raise AssertionError("unreachable")


def _from_answer(answer: dict[str, Any]) -> dict[str, Any]:
    files = []
    for one in answer["siblings"]:
        lfs = one.get("lfs") or {}
        files.append([str(one["rfilename"]), int(lfs.get("size") or one.get("size") or 0), lfs.get("sha256")])
    return {"repo": answer["id"], "revision": answer["sha"], "listed": time.time(), "files": files}


def _listing(kept: dict[str, Any]) -> Listing:
    files = [RepoFile(path, size, digest) for path, size, digest in kept["files"]]
    listing = group_quants(kept["repo"], kept["revision"], files)
    if not listing.quants:
        raise _no_gguf(listing, files)
    return replace(listing, age_s=max(0.0, time.time() - kept["listed"]))


def _no_gguf(listing: Listing, files: list[RepoFile]) -> ModelError:
    repo = listing.repo
    if listing.left_out:
        path, reason = listing.left_out[0]
        more = f" and {len(listing.left_out) - 1} more" if len(listing.left_out) > 1 else ""
        return ModelError(
            f"{repo} has no GGUF that is a model to run: {path} is {reason}{more}",
            hint="Take another publisher's repository of this model.",
        )
    if any(file.path.endswith((".safetensors", ".bin")) for file in files):
        user, _, name = repo.partition("/")
        known = f"{user}/{name}-GGUF"
        return ModelError(
            f"{repo} has no GGUF files: it holds the original weights, which llama.cpp does not load",
            hint=f"Publishers of GGUFs name theirs so: {known}, unsloth/{name}-GGUF, bartowski/{name}-GGUF.",
        )
    return ModelError(f"{repo} has no GGUF files", hint="Look for a repository whose name ends in -GGUF.")


def _in_hub_cache(ref: HubRef) -> dict[str, Any] | None:
    """A list of what other programs downloaded of the repository."""
    rows: list[list[object]] = []
    revision, listed = "", 0.0
    for model in find_cached().models:
        if model.repo != ref.repo or model.store != "Hugging Face" or not model.complete or not model.file:
            continue
        for name in shard_names(model.path.name):
            path = model.path.with_name(name)
            digest = path.resolve().name
            known = digest if len(digest) == 64 and set(digest) <= _HEX else None
            try:
                status = path.stat()
            except OSError:  # removed just now
                continue
            rows.append([Path(model.file).with_name(name).as_posix(), status.st_size, known])
            listed = max(listed, status.st_mtime)
        revision = model.path.parts[-1 - len(Path(model.file).parts)]
    return {"repo": ref.repo, "revision": revision, "listed": listed, "files": rows} if rows else None


def _read_kept(place: Path) -> dict[str, Any] | None:
    """A list kept earlier; None when there is none, or it is damaged."""
    try:
        kept = json.loads(place.read_text())
        _listing(kept)
    except (OSError, ValueError, KeyError, TypeError, ModelError):
        return None
    return dict(kept)


def _keep(place: Path, fetched: dict[str, Any]) -> None:
    """Keeps a list; a disk that is full or read-only only costs the next one's time."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished = place.with_suffix(f".{os.getpid()}.new")
        unfinished.write_text(json.dumps(fetched))
        unfinished.replace(place)
    except OSError as error:
        log.info("the list of %s is not kept: %s", fetched["repo"], error)


def _shown(url: str) -> str:
    return url.partition("?")[0]
