"""Errors as clients know them: OpenAI's `{"error": {message, type, param, code}}`, Anthropic's under
`/v1/messages`.

Messages name the field and the numbers, and never repeat what was sent.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from qnext.pipeline.serve_values import Refused, Unavailable

_log = logging.getLogger(__name__)

_TYPES = {429: "rate_limit_error", 403: "permission_error"}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
_CODES = {404: "unknown_url", 405: "method_not_allowed"}
_KINDS_OF_VALUE = ("str", "int", "float", "bool", "dict", "body")


class ApiError(HTTPException):
    """An answer that is an error. `param` names the field at fault, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        close: bool = False,
    ) -> None:
        headers = {"Retry-After": str(math.ceil(retry_after_s))} if retry_after_s is not None else {}
        if status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if close:
            headers["Connection"] = "close"
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self, path: str = "") -> bytes:
        """The JSON of the error in the words of the API that `path` belongs to."""
        status = self.status_code
        if _is_anthropic(path):
            kind = _ANTHROPIC_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
            error: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": self.detail}}
        else:
            kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
            error = {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code}}
        return json.dumps(error).encode()


def error_response(error: ApiError, path: str) -> Response:
    """The whole answer to a request for `path`."""
    return Response(error.body(path), error.status_code, error.headers, media_type="application/json")


def explain_refusal(refused: Refused) -> ApiError:
    """What the engine would not begin, as the client's mistake that it is."""
    numbers = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in refused.numbers.items())
    message = f"{refused.message} ({numbers})" if numbers else refused.message
    code = {"context_full": "context_length_exceeded", "grammar": "invalid_grammar", "empty": "empty_prompt"}
    return ApiError(400, message, code=code.get(refused.kind, "invalid_value"))


def explain_absence(unavailable: Unavailable) -> ApiError:
    """No model answers: 503, with the time after which to try again where there is hope."""
    wait = unavailable.retry_after_s
    code = "model_unavailable" if wait is None else "model_not_ready"
    return ApiError(503, unavailable.why, code=code, retry_after_s=wait)


def explain_invalid(errors: Sequence[Any]) -> ApiError:
    """The first field at fault; of a field that may take several forms, the form that came closest."""
    first = errors[0]
    field = first["loc"][:2]
    closest = max((e for e in errors if e["loc"][:2] == field), key=lambda error: len(error["loc"]))
    param = _field_name(closest["loc"])
    message = str(closest["msg"])
    if closest["type"] == "missing" and not param:
        message = "a JSON object is required as the body"
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def install_handlers(app: FastAPI) -> None:
    """Make every error of the application one of these."""

    async def known(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error_response(error, request.url.path)
        code = _CODES.get(error.status_code, "bad_request")
        told = {404: f"there is nothing at {request.url.path[:200]}"}.get(error.status_code, error.detail)
        plain = ApiError(error.status_code, told, code=code)
        plain.headers = error.headers
        return error_response(plain, request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return error_response(explain_invalid(error.errors()), request.url.path)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return error_response(explain_refusal(error), request.url.path)

    async def absent(request: Request, error: Exception) -> Response:
        assert isinstance(error, Unavailable)
        return error_response(explain_absence(error), request.url.path)

    async def bug(request: Request, error: Exception) -> Response:
        return error_response(ApiError(500, "the server has a fault; its log says more"), request.url.path)

    app.add_exception_handler(HTTPException, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(Unavailable, absent)
    app.add_exception_handler(Exception, bug)


def _field_name(place: Sequence[int | str]) -> str | None:
    """`messages[0].content` of pydantic's path, without the names of the types that it tried."""
    name = ""
    for step in place[1:]:
        if isinstance(step, int):
            name += f"[{step}]"
        elif step.isidentifier() and step not in _KINDS_OF_VALUE and not step[0].isupper():
            name += f".{step}" if name else step
    return name or None


def _is_anthropic(path: str) -> bool:
    return path.removeprefix("/v1").startswith("/messages")
