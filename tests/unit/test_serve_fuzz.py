"""Whatever is sent, the answer is one that the OpenAPI document names, and never a fault of the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from qnext.serve.app import make_app
from qnext.serve.settings import ServeSettings
from tests.serve_http import ListBackend

pytestmark = pytest.mark.thorough

NUMBERS = some.one_of(some.integers(-3, 70), some.integers(), some.floats(), some.just(10**400))
VALUES = some.recursive(
    some.one_of(some.none(), some.booleans(), NUMBERS, some.text(max_size=8)),
    lambda inner: some.one_of(
        some.lists(inner, max_size=3), some.dictionaries(some.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=8,
)
KNOWN = {
    "messages": some.lists(
        some.fixed_dictionaries(
            {"role": some.sampled_from(["system", "user", "assistant", "tool", "x"])},
            optional={
                "content": some.one_of(
                    VALUES,
                    some.text(max_size=5),
                    some.lists(some.fixed_dictionaries({"type": VALUES}), max_size=2),
                ),
                "tool_calls": VALUES,
            },
        ),
        max_size=3,
    ),
    "prompt": some.one_of(some.text(max_size=9), some.lists(NUMBERS, max_size=3)),
    "input": some.one_of(
        some.text(max_size=9),
        some.lists(some.fixed_dictionaries({}, optional={"type": VALUES, "role": VALUES, "content": VALUES})),
    ),
    "stream": some.one_of(some.booleans(), VALUES),
    "n": NUMBERS,
    "max_tokens": NUMBERS,
    "temperature": NUMBERS,
    "seed": NUMBERS,
    "stop": VALUES,
    "logprobs": VALUES,
    "logit_bias": VALUES,
    "tools": some.one_of(
        VALUES, some.lists(some.fixed_dictionaries({"type": some.just("function"), "name": VALUES}))
    ),
    "tool_choice": some.one_of(VALUES, some.sampled_from(["auto", "none", "required"])),
    "response_format": some.fixed_dictionaries(
        {"type": some.sampled_from(["json_object", "json_schema", "x"])},
        optional={"schema": VALUES, "json_schema": some.dictionaries(some.just("schema"), VALUES)},
    ),
    "chat_template_kwargs": VALUES,
    "system": VALUES,
    "content": VALUES,
    "tokens": VALUES,
}
BODIES = some.one_of(some.fixed_dictionaries({}, optional=KNOWN), VALUES)
PATHS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/tokenize",
    "/detokenize",
)


@pytest.fixture(scope="module")
def documented() -> dict[str, set[str]]:
    told = make_app(ListBackend(), ServeSettings()).openapi()
    return {path: set(told["paths"][path]["post"]["responses"]) for path in PATHS}


@given(path=some.sampled_from(PATHS), body=BODIES)
@settings(max_examples=80)
def test_any_json_gets_a_documented_answer(path: str, body: Any, documented: dict[str, set[str]]) -> None:
    check(path, json.dumps(body).encode(), documented)


@given(path=some.sampled_from(PATHS), body=some.binary(max_size=40))
@settings(max_examples=40)
def test_any_bytes_get_a_documented_answer(path: str, body: bytes, documented: dict[str, set[str]]) -> None:
    check(path, body, documented)


def check(path: str, body: bytes, documented: dict[str, set[str]]) -> None:
    async def ask() -> httpx2.Response:
        async with httpx2.AsyncClient(transport=TRANSPORT, base_url="http://127.0.0.1") as http:
            return await http.post(path, content=body, headers={"Content-Type": "application/json"})

    answer = asyncio.run(ask())
    assert str(answer.status_code) in documented[path]
    assert answer.status_code < 500, answer.text


TRANSPORT = httpx2.ASGITransport(app=make_app(ListBackend(), ServeSettings()))
