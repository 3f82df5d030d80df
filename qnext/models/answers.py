"""What a server's answer to a request for bytes of a file means: good, try again, or give up and say why.

The Hub answers `resolve` with a redirect that carries the file's digest and size (`X-Linked-Etag`,
`X-Linked-Size`) and names its errors in `X-Error-Code`. The CDN behind it refuses expired links with 403,
which a fresh link mends; 403 from the Hub itself is about rights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qnext.errors import DownloadError, QnextError
from qnext.models.held import Place
from qnext.models.hub_errors import hub_errors

if TYPE_CHECKING:
    import httpx2

_RANGE = re.compile(r"bytes\s+(?:(\d+)-\d+|\*)/(\d+|\*)")
_PASSING = (408, 425, 429)


@dataclass(frozen=True, slots=True)
class Verdict:
    """`again` is why the same request may succeed later, empty for an answer to read. `whole`: the body is
    the file from its first byte, whatever range was asked for."""

    again: str = ""
    wait_s: float | None = None
    whole: bool = False


def judge_answer(response: httpx2.Response, place: Place, start: int) -> Verdict:
    """Raises DownloadError or ModelError for an answer that will not get better by itself."""
    for hop in (*response.history, response):
        _compare(hop, place)
    status, headers = response.status_code, response.headers
    host = response.url.host
    encoding = headers.get("Content-Encoding", "identity").lower()
    if status in (200, 206) and encoding != "identity":
        return Verdict(f"{host} compressed the file ({encoding})")
    if status == 206:
        first, total = _content_range(headers)
        _same_size(total, place)
        return Verdict() if first == start else Verdict(f"{host} sent another range than asked for")
    if status == 200:
        stated = headers.get("Content-Length", "")
        _same_size(int(stated) if stated.isdigit() else None, place)
        return Verdict(whole=True)
    if status == 416:
        _same_size(_content_range(headers)[1], place)
        return Verdict(f"{host} refused the range (416)")
    if status in _PASSING or status >= 500:
        return Verdict(f"{host} answers {status}", _asked_wait(response))
    if status < 400 or (status == 403 and _left_the_hub(response)):
        return Verdict(f"{host} answers {status}")
    raise _refusal(response, place)


def _compare(hop: httpx2.Response, place: Place) -> None:
    """What the Hub says of the file against what it listed."""
    etag = hop.headers.get("X-Linked-Etag", "").removeprefix("W/").strip('"')
    if re.fullmatch(r"[0-9a-f]{64}", etag) and etag != place.digest:
        raise DownloadError(
            f"{place.file.path} has changed on the server since it was listed.",
            hint="Run the same command again: it lists the files anew.",
        )
    size = hop.headers.get("X-Linked-Size", "")
    _same_size(int(size) if size.isdigit() else None, place)


def _same_size(stated: int | None, place: Place) -> None:
    if stated is not None and stated != place.file.size_bytes:
        raise DownloadError(
            f"{place.file.path} has {stated:,} bytes on the server, but the Hub lists "
            f"{place.file.size_bytes:,}.",
            hint="Check for a login page of the network, a proxy or a mirror (HF_ENDPOINT), then try again.",
        )


def _content_range(headers: httpx2.Headers) -> tuple[int | None, int | None]:
    """(first byte, size of the file) of Content-Range; None for what it does not say."""
    found = _RANGE.fullmatch(headers.get("Content-Range", "").strip())
    if found is None:
        return None, None
    first, total = found.groups()
    return int(first) if first else None, int(total) if total != "*" else None


def _asked_wait(response: httpx2.Response) -> float | None:
    """Seconds that the server asks to wait: its rate limit's reset, or Retry-After as seconds or a date."""
    import time
    from email.utils import parsedate_to_datetime

    from huggingface_hub.utils._http import parse_ratelimit_headers

    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = response.headers.get("Retry-After", "").strip()
    if asked.isdigit():
        return float(asked)
    try:
        return max(0.0, parsedate_to_datetime(asked).timestamp() - time.time()) if asked else None
    except ValueError:
        return None


def _refusal(response: httpx2.Response, place: Place) -> QnextError:
    """What a 4xx means: in the words of `hub` where the Hub itself answers."""
    from huggingface_hub.utils._http import hf_raise_for_status

    if not _left_the_hub(response):
        try:
            with hub_errors(place.repo):
                hf_raise_for_status(response)
        except QnextError as error:
            return error
    return DownloadError(
        f"{place.file.path}: {response.url.host} answers {response.status_code}.", hint="Try again later."
    )


def _left_the_hub(response: httpx2.Response) -> bool:
    """Whether a redirect led to another host, which is a CDN's."""
    first = (*response.history, response)[0].url
    return (first.host, first.port) != (response.url.host, response.url.port)
