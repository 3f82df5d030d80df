"""What the server tells of itself: health, model, the plan it runs on, slots; and the counting of tokens."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from qnext.pipeline.serve_values import ServedModel, Unavailable
from qnext.serve.body import StrictRoute
from qnext.serve.errors import ApiError
from qnext.serve.generating import Server
from qnext.serve.openapi import answers
from qnext.serve.schemas import DetokenizeRequest, TokenizeRequest

INSTANCE_HEADER = "X-Qnext-Instance"


def make_routes(server: Server) -> APIRouter:
    """The routes that generate nothing."""
    router = APIRouter(route_class=StrictRoute)

    @router.get("/v1/health", include_in_schema=False)
    @router.get("/health", tags=["Server"], **answers("status", streams=False))
    async def health() -> Response:
        """`ok`, or 503 with `loading` (and how far), `restarting` or `failed` (and why)."""
        return _health(server)

    @router.get("/models", include_in_schema=False)
    @router.get("/v1/models", tags=["OpenAI"], **answers("list", streams=False))
    async def models() -> Response:
        """The one model that is served."""
        model = _known(server)
        return JSONResponse({"object": "list", "data": [_describe(model)]})

    @router.get("/v1/models/{name:path}", tags=["OpenAI"], **answers("model", streams=False))
    async def one_model(name: str) -> Response:
        """The model of that name."""
        model = _known(server)
        if name != model.name:
            raise ApiError(
                404, f"the model served here is {model.name}", param="model", code="model_not_found"
            )
        return JSONResponse(_describe(model))

    @router.get("/props", tags=["Server"], **answers("props", streams=False))
    async def props() -> Response:
        """The active plan, and what llama-server tells under this address."""
        model = _known(server)
        return JSONResponse(
            {
                "default_generation_settings": {"params": dict(model.sampling), "n_ctx": model.context},
                "total_slots": model.slots,
                "model_alias": model.name,
                "modalities": {"vision": False, "video": False, "audio": False},
                "endpoint_slots": True,
                "endpoint_props": False,
                "endpoint_metrics": True,
                "chat_template": model.template.source if model.template else "",
                "bos_token": model.bos,
                "eos_token": model.eos,
                "build_info": model.engine,
                "status": server.backend.status.state,
                "plan": dict(model.plan),
                "plan_in_words": list(model.words),
            }
        )

    @router.get("/slots", tags=["Server"], **answers("slots", streams=False))
    async def slots() -> Response:
        """Every slot and what it does; nothing of what is said in it."""
        server.model()
        state = await server.backend.state()
        model = _known(server)
        return JSONResponse(
            [
                {
                    "id": slot.get("slot"),
                    "n_ctx": model.context,
                    "is_processing": slot.get("id") is not None,
                    "id_task": slot.get("id"),
                    "n_prompt_tokens": slot.get("prompt"),
                    "n_prompt_tokens_processed": slot.get("done"),
                    "n_prompt_tokens_cache": slot.get("cached"),
                    "n_decoded": slot.get("generated"),
                }
                for slot in state.get("slots", ())
            ]
        )

    @router.get("/metrics", tags=["Server"], **answers("metrics", streams=False, media="text/plain"))
    async def metrics() -> Response:
        """Prometheus' text format."""
        state: Any = None
        if server.backend.status.state == "ok":
            try:
                state = await server.backend.state()
            except Unavailable:
                state = None
        text = server.meters.text(server.backend.status, state, server.gate.turned_away)
        headers = {"Process-Start-Time-Unix": str(server.meters.started_s)}
        return Response(text, headers=headers, media_type="text/plain; version=0.0.4")

    @router.post("/v1/tokenize", include_in_schema=False)
    @router.post("/tokenize", tags=["Server"], **answers("tokens", streams=False))
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text; with `with_pieces` each with its text."""
        server.model()
        found = await server.backend.tokenize(
            body.content, special=body.parse_special, add_bos=body.add_special
        )
        if not body.with_pieces:
            return JSONResponse({"tokens": found})
        pieces = [{"id": token, "piece": await server.backend.detokenize([token])} for token in found]
        return JSONResponse({"tokens": pieces})

    @router.post("/v1/detokenize", include_in_schema=False)
    @router.post("/detokenize", tags=["Server"], **answers("text", streams=False))
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        check_tokens(body.tokens, server.model(), "tokens")
        return JSONResponse({"content": await server.backend.detokenize(body.tokens)})

    return router


async def count_tokens(server: Server, model: ServedModel, text: str) -> int:
    """Tokens of a prompt as the engine would count them."""
    add_bos = not (model.bos and text.startswith(model.bos))
    return len(await server.backend.tokenize(text, special=True, add_bos=add_bos))


def check_tokens(tokens: list[int], model: ServedModel, param: str) -> None:
    """Raises ApiError for an id that the vocabulary does not have."""
    if tokens and max(tokens) >= model.vocabulary:
        raise ApiError(400, f"{param}: token ids go up to {model.vocabulary - 1}", param=param)


def _health(server: Server) -> Response:
    status = server.backend.status
    told: dict[str, Any] = {"status": status.state}
    if status.state == "loading":
        told["progress"] = round(status.progress, 4)
    if status.why:
        told["why"] = status.why
    headers = {INSTANCE_HEADER: server.settings.instance} if server.settings.instance else {}
    if status.state == "ok":
        return JSONResponse(told, headers=headers)
    if status.state != "failed":
        headers["Retry-After"] = "1"
    # llama-server's form beside our own: clients look for `error.message`.
    message = status.why or ("Loading model" if status.state == "loading" else status.state)
    told["error"] = {"message": message, "type": "unavailable_error", "param": None, "code": status.state}
    return JSONResponse(told, 503, headers=headers)


def _known(server: Server) -> ServedModel:
    model = server.backend.model
    return model if model is not None else server.model()


def _describe(model: ServedModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "qnext",
        "meta": {"n_ctx": model.context, "n_vocab": model.vocabulary, "slots": model.slots},
    }
