"""What the OpenAPI document says of answers: the pydantic models describe only what comes in."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI
from starlette.responses import JSONResponse, Response

ANTHROPIC_ERROR_SCHEMA = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
    },
}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}

_ERRORS = {
    400: "the request is not valid, or too long for the context",
    401: "the key is missing or wrong",
    403: "the host or the origin is not allowed",
    408: "the body did not come",
    413: "the body is too large",
    404: "there is nothing of that name",
    415: "the body is not JSON by its type",
    431: "the headers are too large",
    429: "all slots and the queue are taken; Retry-After says when to try again",
    500: "a fault of the server or the engine",
    503: "the model is loading, restarting or has failed",
    504: "the answer was not ready within the server's limit",
}


def answers(
    kind: str,
    *,
    streams: bool = True,
    media: str = "application/json",
    errors: dict[str, Any] = ERROR_SCHEMA,
) -> dict[str, Any]:
    """Keyword arguments of a route that answers with an object of `kind`, or with its stream of events."""
    schema = {"type": "string"} if media.startswith("text/") else {"type": "object"}
    content: dict[str, Any] = {media: {"schema": schema}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    told: dict[int, Any] = {200: {"description": f"{kind}", "content": content}}
    for status, why in _ERRORS.items():
        told[status] = {"description": why, "content": {"application/json": {"schema": errors}}}
    return {"response_model": None, "responses": told}


def make_document_true(app: FastAPI) -> None:
    """Take FastAPI's 422 out of the document, which here is a 400, name the key, and serve it.

    Making it takes a third of a second, during which answers go on: so it is made in a thread.
    """
    usual = app.openapi

    def document() -> dict[str, Any]:
        told = usual()
        parts = told.setdefault("components", {})
        for name in ("HTTPValidationError", "ValidationError"):
            parts.get("schemas", {}).pop(name, None)
        parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        told["security"] = [{"key": []}, {}]
        for path in told["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        return told

    async def send() -> Response:
        return JSONResponse(await asyncio.to_thread(app.openapi))

    app.openapi = document  # type: ignore[method-assign]
    app.add_api_route("/openapi.json", send, include_in_schema=False)
