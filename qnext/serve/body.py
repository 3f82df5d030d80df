"""Reading a request's JSON: only what is JSON by the standard, and nothing that could stall or break the
server.

Python's parser takes `NaN`, halves of surrogate pairs and any depth; the first two cannot be sent on as text,
the last ends in a RecursionError somewhere below. All three are the client's mistakes and become a 400 here,
once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response

from qnext.serve.errors import ApiError

MOST_DEPTH = 64
"""Objects and lists inside each other. JSON Schemas of real tools stay below 20."""


class StrictRequest(Request):
    """A request whose JSON is read by `parse_body`."""

    async def json(self) -> Any:
        """Raises ApiError (400)."""
        return parse_body(await self.body())


class StrictRoute(APIRoute):
    """A route that reads its body strictly and says so where the type of the body is another one."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def handle(request: Request) -> Response:
            if self.body_field is not None:
                _check_type(request.headers.get("content-type"))
            return await handler(StrictRequest(request.scope, request.receive))

        return handle


def parse_body(raw: bytes) -> Any:
    """The value of a JSON text in UTF-8. Raises ApiError (400) that says where it breaks off."""
    try:
        value = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8 (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # a number of thousands of digits
        raise _invalid("the body has a number that is too long") from error
    _check_value(value, check_text=b"\\u" in raw)
    return value


def _check_value(value: Any, *, check_text: bool) -> None:
    level, depth = [value], 0
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                below.extend(item.values())
                if check_text:
                    below.extend(item.keys())
            elif isinstance(item, list):
                below.extend(item)
            elif check_text and isinstance(item, str):
                _check_text(item)
        level, depth = below, depth + 1
        if depth > MOST_DEPTH:
            raise _too_deep()


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _invalid("a text of the body has half of a surrogate pair") from error


def _check_type(stated: str | None) -> None:
    kind = (stated or "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415,
            f"the body has the type {kind[:80] or '(none)'}, but this address takes application/json; "
            "with curl: -H 'Content-Type: application/json'",
            code="unsupported_content_type",
        )


def _refuse_constant(name: str) -> None:
    raise _invalid(f"{name} is not a JSON number")


def _too_deep() -> ApiError:
    return _invalid(f"the body is nested deeper than {MOST_DEPTH} levels")


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")
