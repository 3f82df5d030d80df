"""What a server's refusals and failures mean to the person who wants it measured, and what to try next."""

from __future__ import annotations

from qnext.bench.endpoint import Exchange
from qnext.errors import EngineError, QnextError, UsageError

NO_SUCH_PLACE = (404, 405, 501)
"""HTTP's ways of saying that there is nothing to ask at this address."""


def explain(one: Exchange, url: str, api_key_env: str | None) -> QnextError:
    """The error that a failed exchange with the server at `url` is, when nothing works without it."""
    code, said = one.http_status, one.error or "no reason given"
    if code in (401, 403):
        if api_key_env is None:
            hint = "Put its key into an environment variable and name that: --api-key-env NAME"
        else:
            hint = f"Look at what {api_key_env} holds."
        return UsageError(f"{url} does not let us in ({said})", hint=hint)
    if code in NO_SUCH_PLACE:
        at_v1 = url.endswith("/v1")
        return UsageError(
            f"{url} has no chat/completions and no completions ({said})",
            hint="Give the address of its API, as its documents name it."
            if at_v1
            else f"Most servers have their API below /v1: --url {url}/v1",
        )
    if code is not None and 300 <= code < 400:
        return UsageError(
            f"{url}: {said}, which is not followed: load tests address only this machine",
            hint="Give the address that answers itself.",
        )
    if one.status == "unreachable":
        return EngineError(
            f"nothing answers at {url} ({said})", hint="Start the server, or look at its port."
        )
    if one.status == "foreign-server":
        return EngineError(
            f"{url} is a foreign server: it answers, but not as an OpenAI-compatible one ({said})",
            hint="Give the address of a server's API, for example llama-server's http://127.0.0.1:8080/v1.",
        )
    return EngineError(f"{url}: {said}", hint=_HINTS.get(one.status, _HINTS["refused"]))


_HINTS: dict[str, str] = {
    "hung": "Give it longer with --deadline SECONDS, or look at the server's log.",
    "server-error": "It may still be loading its model: try again in a moment, or look at its log.",
    "rate-limited": "Raise the server's limit of requests; a limited server cannot be measured.",
    "cut": "The server may have died: look at its log.",
    "garbage": "Its stream is not what the OpenAI protocol asks for; look at the server's log.",
    "refused": "Ask for less (-p, -n), or start the server with a larger context.",
}
