"""The application: every route over one backend, behind one guard."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import qnext
from qnext.pipeline.serve_values import Backend
from qnext.serve import chat, completions, info, messages, responses
from qnext.serve.errors import install_handlers
from qnext.serve.generating import Server
from qnext.serve.logprobs import TokenTexts
from qnext.serve.metrics import Meters
from qnext.serve.openapi import make_document_true
from qnext.serve.page import add_page
from qnext.serve.queue import Gate
from qnext.serve.security import Guard
from qnext.serve.settings import ServeSettings

_NO_TELEMETRY: Any = {
    "tracing": False,
    "metrics": False,
    "logs": False,
    "operation_spans": False,
    "auto_configure": False,
}
"""FastAPI's own, of later versions; its records of failed validation hold what was sent."""


def make_app(backend: Backend, settings: ServeSettings) -> FastAPI:
    """An ASGI application that answers at once, whatever the state of `backend`."""
    app = FastAPI(
        title="qnext",
        version=qnext.__version__,
        docs_url=None,  # the usual pages load scripts from elsewhere
        redoc_url=None,
        openapi_url=None,  # `make_document_true` serves it
        telemetry=_NO_TELEMETRY,
    )
    server = Server(backend, settings, Gate(settings.queue_limit), Meters())
    app.state.server = server
    texts = TokenTexts(backend)
    for routes in (
        info.make_routes(server),
        chat.make_routes(server, texts),
        completions.make_routes(server, texts),
        responses.make_routes(server, texts),
        messages.make_routes(server, texts),
    ):
        app.include_router(routes)
    add_page(app)
    install_handlers(app)
    make_document_true(app)
    app.add_middleware(Guard, settings=settings)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            max_age=3600,
        )
    return app
