"""The page at `/`: a chat for people, made of plain files beside this module.

The files have no build step and ask nothing of any other server. What a model says is text to the page, and
the policy here holds it to that: no script or style but the page's own runs, nothing is asked elsewhere, and
in browsers that know Trusted Types no text can become markup at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import PurePath

from fastapi import FastAPI, Request
from starlette.responses import Response

from qnext.serve.security import OPEN_FOLDER

INDEX = "index.html"

POLICY = "; ".join(
    (
        "default-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, but asked for anew: another version may answer here tomorrow
}


def add_page(app: FastAPI) -> None:
    """Answer `/` with the page and `/page/…` with its files, to everybody: the page asks for a key itself."""
    for file in (files("qnext.serve") / "page").iterdir():
        kind = _TYPES.get(PurePath(file.name).suffix)
        if kind is not None:
            path = "/" if file.name == INDEX else OPEN_FOLDER + file.name
            app.add_api_route(
                path, _sender(file.read_bytes(), kind), methods=["GET", "HEAD"], include_in_schema=False
            )


def _sender(content: bytes, kind: str) -> Callable[[Request], Awaitable[Response]]:
    """What sends a file, or 304 to who has it already."""
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = _HEADERS | {"ETag": tag}

    async def send(request: Request) -> Response:
        if tag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=kind)

    return send
