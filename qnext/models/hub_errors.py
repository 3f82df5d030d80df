"""What the Hub's refusals mean to the user, translated once from huggingface_hub's exceptions.

The Hub answers alike for a repository that is missing and one that is private, so both are named. What may
work when tried again is a DownloadError, all else a ModelError. No message holds a signed address or a token.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from qnext.errors import DownloadError, ModelError, QnextError
from qnext.models.ranged import connection_trouble

DEFAULT_ENDPOINT = "https://huggingface.co"


def endpoint() -> str:
    """Address of the Hub, or of the mirror that HF_ENDPOINT names, without a slash at its end."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE forbids the network."""
    stated = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return stated.upper() in {"1", "ON", "YES", "TRUE"}


@contextmanager
def hub_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turns what huggingface_hub and its HTTP client raise into QnextErrors about `repo`."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise ModelError(f"{repo}: offline", hint="Unset HF_HUB_OFFLINE to reach the Hub.") from error
    except errors.HFValidationError as error:
        raise ModelError(
            f"'{repo}' is not the name of a repository", hint="Write USER/REPOSITORY, as on the Hub."
        ) from error
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: its terms have to be accepted first",
            hint=f"Accept them on {endpoint()}/{repo}, then sign in: hf auth login",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise _no_repository(repo) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"{repo} has no revision '{revision or 'main'}'",
            hint=f"Its branches and tags are on {endpoint()}/{repo}/tree/main.",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise ModelError(
            f"{repo} no longer has this file", hint="It was renamed or removed: list the repository again."
        ) from error
    except errors.DisabledRepoError as error:
        raise ModelError(f"{repo} was disabled by the Hub", hint="Take another publisher's.") from error
    except errors.HfHubHTTPError as error:
        raise _by_status(repo, error) from error
    except httpx2.TooManyRedirects as error:
        raise ModelError(f"{repo}: its address redirects without end", hint=endpoint_hint()) from error
    except (httpx2.InvalidURL, httpx2.UnsupportedProtocol) as error:
        raise ModelError(f"{endpoint()} is not an address", hint=endpoint_hint()) from error
    except httpx2.HTTPError as error:
        raise DownloadError(
            f"{repo}: {endpoint()} cannot be reached: {connection_trouble(error)}", hint=endpoint_hint()
        ) from error


def _by_status(repo: str, error: Any) -> QnextError:
    status = error.response.status_code
    if status == 401 and "authorization" in error.response.request.headers:
        return ModelError(
            f"{repo}: the Hub does not accept the token that is set here",
            hint="Make a new one and sign in: hf auth login (or correct HF_TOKEN).",
        )
    if status == 401:
        return _no_repository(repo)
    if status == 403:
        return ModelError(
            f"{repo}: the Hub forbids access to it",
            hint=f"See {endpoint()}/{repo}; the token may lack the permission to read it: hf auth login",
        )
    if status == 429:
        wait = error.response.headers.get("Retry-After", "")
        when = f"in {wait} s" if wait.isdigit() else "in a few minutes"
        return DownloadError(
            f"{repo}: the Hub allows no more requests for now",
            hint=f"Try again {when}; signed in (hf auth login) more are allowed.",
        )
    if status >= 500:
        return DownloadError(f"{repo}: {endpoint()} answered {status}", hint="Try again in a while.")
    return ModelError(f"{repo}: {endpoint()} answered {status}", hint=endpoint_hint())


def _no_repository(repo: str) -> ModelError:
    return ModelError(
        f"there is no repository {repo}, or it is private",
        hint=f"Check the name on {endpoint()}; for a private one sign in: hf auth login",
    )


def endpoint_hint() -> str:
    """What to look at when the Hub is not reached."""
    if os.environ.get("HF_ENDPOINT"):
        return "HF_ENDPOINT is set: check that it names a Hub or a mirror of it, or unset it."
    return "Check the network and the proxy settings."
