"""What holds for every request, whatever the model says: framing, errors, keys, the queue.

The backend here answers from a list: the engine plays no role in these rules. What it says for real is in
tests/engine/test_serve_http.py.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
import pytest

from qnext.pipeline.serve_values import Refused, Status, Unavailable
from tests.serve_http import CHAT, ListBackend, check_error, client, events, get, post

# Framing


def test_a_chat_answers_with_text_counts_and_timings() -> None:
    told = post("/v1/chat/completions", CHAT).json()
    assert told["object"] == "chat.completion" and told["model"] == "demo"
    assert told["choices"][0]["message"] == {"role": "assistant", "content": "Hello"}
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["total_tokens"] == 5
    assert told["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert told["timings"]["prompt_n"] == 2 and told["timings"]["predicted_per_second"] == 500


def test_a_streamed_chat_opens_with_the_role_and_closes_with_the_counts() -> None:
    asked = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    told = events(post("/v1/chat/completions", asked))
    assert {chunk["id"] for chunk in told} == {told[0]["id"]}
    assert told[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in told[:-1]) == "Hello"
    assert [c["choices"][0]["finish_reason"] for c in told[:-1]] == [None, None, None, "stop"]
    assert all(chunk["usage"] is None for chunk in told[:-1])
    assert told[-1]["choices"] == [] and told[-1]["usage"]["completion_tokens"] == 2
    assert told[-1]["timings"]["predicted_n"] == 2


def test_without_being_asked_for_counts_the_timings_come_with_the_last_chunk() -> None:
    told = events(post("/v1/chat/completions", CHAT | {"stream": True}))
    assert "usage" not in told[0] and told[-1]["timings"]["cache_n"] == 1
    assert told[-1]["choices"][0]["finish_reason"] == "stop"


def test_several_choices_are_all_told_and_count_the_prompt_once() -> None:
    told = post("/v1/chat/completions", CHAT | {"n": 3}).json()
    assert [choice["index"] for choice in told["choices"]] == [0, 1, 2]
    assert told["usage"]["prompt_tokens"] == 3 and told["usage"]["completion_tokens"] == 6
    streamed = events(post("/v1/chat/completions", CHAT | {"n": 3, "stream": True}))
    ended = [c["choices"][0]["index"] for c in streamed if c["choices"][0]["finish_reason"]]
    assert sorted(ended) == [0, 1, 2]


def test_probabilities_of_a_stream_are_those_of_the_whole_answer() -> None:
    asked = CHAT | {"logprobs": True, "top_logprobs": 2}
    whole = post("/v1/chat/completions", asked).json()["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in whole] == ["Hel", "lo"]
    assert whole[0]["top_logprobs"][1]["bytes"] == [255]
    streamed = events(post("/v1/chat/completions", asked | {"stream": True}))
    found = [c["choices"][0]["logprobs"] for c in streamed]
    assert [entry for each in found if each for entry in each["content"]] == whole


def test_a_list_of_prompts_gets_an_answer_each_and_echo_repeats_the_prompt() -> None:
    told = post("/v1/completions", {"prompt": ["a", "b"], "echo": True}).json()
    assert [choice["text"] for choice in told["choices"]] == ["aHello", "bHello"]
    assert told["usage"]["prompt_tokens"] == 6
    one = post("/v1/completions", {"prompt": [1, 2], "echo": True}).json()
    assert one["choices"][0]["text"] == "bcHello"
    streamed = events(post("/v1/completions", {"prompt": "a", "stream": True, "echo": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "aHello"


# What reaches the engine


def test_sampling_is_what_was_asked_over_the_models_defaults() -> None:
    backend = ListBackend()
    asked = CHAT | {"top_k": 3, "seed": 7, "n": 2, "stop": ["a", "", "b"], "max_completion_tokens": 5}
    post("/v1/chat/completions", asked | {"logit_bias": {"5": -100}}, backend=backend)
    first, second = backend.jobs
    assert first.sampling == {"temperature": 0.5, "top_k": 3, "seed": 7, "logit_bias": {"5": -100}}
    assert second.sampling["seed"] == 8
    assert first.stop == ("a", "b") and first.max_tokens == 5
    assert first.text == "<|user|>hi<|assistant|>"


def test_fields_that_clients_send_as_null_or_empty_mean_nothing() -> None:
    backend = ListBackend()
    names = (
        "stop",
        "seed",
        "tools",
        "tool_choice",
        "response_format",
        "stream",
        "stream_options",
        "n",
        "max_tokens",
    )
    empty = {
        "stop": "",
        "tools": [],
        "logit_bias": {},
        "top_logprobs": 0,
        "response_format": {"type": "text"},
    }
    for more in (dict.fromkeys(names), empty, {"user": "me", "store": True, "metadata": {"a": [1]}}):
        assert post("/v1/chat/completions", CHAT | more, backend=backend).status_code == 200
    assert all(job == backend.jobs[0] for job in backend.jobs)


def test_minus_one_token_is_no_limit() -> None:
    backend = ListBackend()
    post("/v1/chat/completions", CHAT | {"max_tokens": -1}, backend=backend)
    assert backend.jobs[0].max_tokens is None


# Errors


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "king", "content": ""}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT | {"max_tokens": "5"}, "max_tokens"),
        (CHAT | {"max_tokens": 0}, "max_tokens"),
        (CHAT | {"max_tokens": 10**30}, "max_tokens"),
        (CHAT | {"max_tokens": True}, "max_tokens"),
        (CHAT | {"temperature": -1}, "temperature"),
        (CHAT | {"stream": "yes"}, "stream"),
        (CHAT | {"n": 1000}, "n"),
        (CHAT | {"stop": ["a", 1]}, "stop[1]"),
        (CHAT | {"logit_bias": {"x": 1}}, "logit_bias"),
        (CHAT | {"logit_bias": {"50": 1}}, "logit_bias"),
        (CHAT | {"top_logprobs": 3}, "top_logprobs"),
        (CHAT | {"tools": [{"type": "function"}]}, "tools[0].function"),
    ],
)
def test_a_wrong_field_is_named(body: Any, param: str) -> None:
    told = check_error(post("/v1/chat/completions", body), 400)
    assert told["param"] == param and told["type"] == "invalid_request_error"


def test_parts_that_are_not_text_are_refused_by_name() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    told = check_error(
        post("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}), 400
    )
    assert "image_url" in told["message"] and told["param"] == "messages[0].content[0].type"


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe",
        b'{"messages": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"messages": [{"role":"user","content":"x"}], "tools": '
        + b'[{"a":' * 99
        + b"1"
        + b"}]" * 99
        + b"}",
        b'{"messages": [{"role":"user","content":"x"}], "chat_template_kwargs": {"\\udfff": 1}}',
    ],
)
def test_what_is_no_request_is_a_400_and_never_a_500(raw: bytes) -> None:
    check_error(post("/v1/chat/completions", raw=raw), 400)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "a", "", ";;", b"\xff"])
def test_another_type_of_body_is_refused_with_the_way_out(kind: str | bytes) -> None:
    told = check_error(post("/v1/chat/completions", CHAT, headers={"Content-Type": kind}), 415)
    assert "application/json" in told["message"]


def test_what_the_engine_refuses_is_told_with_its_numbers() -> None:
    backend = ListBackend()
    backend.failure = Refused(
        "context_full", "the prompt is too long", {"prompt_tokens": 900, "context": 512}
    )
    for stream in (False, True):
        told = check_error(post("/v1/chat/completions", CHAT | {"stream": stream}, backend=backend), 400)
        assert told["code"] == "context_length_exceeded"
        assert "900" in told["message"] and "512" in told["message"]


def test_a_model_that_loads_or_failed_is_a_503() -> None:
    backend = ListBackend()
    backend.status = Status("loading", 0.25)
    answer = post("/v1/chat/completions", CHAT, backend=backend)
    assert check_error(answer, 503)["code"] == "model_not_ready" and answer.headers["retry-after"] == "2"
    health = get("/health", backend)
    assert health.status_code == 503
    assert health.json()["status"] == "loading" and health.json()["progress"] == 0.25
    backend.status = Status("failed", why="no memory")
    answer = post("/v1/chat/completions", CHAT, backend=backend)
    assert check_error(answer, 503)["message"] == "no memory" and "retry-after" not in answer.headers
    assert get("/health", backend).json()["status"] == "failed"


def test_an_engine_that_dies_while_streaming_ends_the_stream_with_an_error() -> None:
    backend = ListBackend()
    backend.fails_after = Unavailable("the engine died", 3.0)
    answer = post("/v1/chat/completions", CHAT | {"stream": True}, backend=backend)
    assert answer.status_code == 200
    last = answer.text.rstrip().split("\n\n")[-1]
    assert json.loads(last[6:])["error"]["message"] == "the engine died"
    whole = post("/v1/chat/completions", CHAT, backend=backend)
    check_error(whole, 503)
    assert whole.headers["retry-after"] == "3"


def test_a_bug_is_a_500_that_tells_nothing_of_the_request() -> None:
    backend = ListBackend()
    backend.failure = RuntimeError("secret")
    told = post("/v1/chat/completions", CHAT, backend=backend)
    check_error(told, 500)
    assert "secret" not in told.text


def test_unknown_addresses_and_methods_have_error_objects_too() -> None:
    assert check_error(get("/v1/nothing"), 404)["code"] == "unknown_url"
    check_error(get("/v1/chat/completions"), 405)
    assert check_error(get("/v1/models/gpt-9"), 404)["code"] == "model_not_found"


# Keys, pages of others, sizes


def test_without_a_key_of_the_server_only_its_health_is_told() -> None:
    keys = {"api_keys": ("right", "other")}
    assert get("/health", **keys).status_code == 200
    for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic right"}, {"x-api-key": ""}):
        told = check_error(get("/v1/models", headers=given, **keys), 401)
        assert told["code"] == "invalid_api_key" and "wrong" not in told["message"]
    for given in ({"Authorization": "Bearer other"}, {"x-api-key": "right"}):
        assert get("/v1/models", headers=given, **keys).status_code == 200


def test_without_a_key_a_name_that_is_not_loopback_is_refused() -> None:
    rebound = {"Host": "evil.example"}
    assert check_error(get("/v1/models", headers=rebound), 403)["code"] == "host_not_allowed"
    assert check_error(get("/health", headers=rebound), 403)
    assert get("/v1/models", headers=rebound, api_keys=("k",)).status_code == 401
    assert get("/v1/models", headers=rebound | {"x-api-key": "k"}, api_keys=("k",)).status_code == 200
    for fine in ("localhost:8080", "127.0.0.1", "[::1]:80", "LOCALHOST"):
        assert get("/v1/models", headers={"Host": fine}).status_code == 200


def test_pages_of_other_origins_are_refused_unless_they_are_named() -> None:
    page = {"Origin": "https://app.example"}
    assert check_error(get("/v1/models", headers=page), 403)["code"] == "origin_not_allowed"
    assert get("/v1/models", headers={"Origin": "http://127.0.0.1"}).status_code == 200
    allowed = get("/v1/models", headers=page, cors_origins=("https://app.example",))
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"


def test_a_body_over_the_limit_is_refused_whether_its_length_is_stated_or_not() -> None:
    body = json.dumps({"messages": [{"role": "user", "content": "x" * 2000}]}).encode()
    check_error(post("/v1/chat/completions", raw=body, body_limit_bytes=1000), 413)

    async def chunked() -> httpx2.Response:
        async def parts() -> AsyncGenerator[bytes, None]:
            for at in range(0, len(body), 100):
                yield body[at : at + 100]

        async with client(ListBackend(), body_limit_bytes=1000) as http:
            return await http.post(
                "/v1/chat/completions", content=parts(), headers={"Content-Type": "application/json"}
            )

    check_error(asyncio.run(chunked()), 413)


def test_too_many_headers_are_refused() -> None:
    check_error(get("/v1/models", headers={f"x-{n}": "1" for n in range(200)}), 431)


# The queue


def test_over_the_limit_of_the_queue_is_a_429_and_places_come_back() -> None:
    async def race() -> tuple[list[httpx2.Response], httpx2.Response, httpx2.Response]:
        backend = ListBackend()
        backend.hold = asyncio.Event()
        async with client(backend, queue_limit=1) as http:
            waiting = [asyncio.create_task(http.post("/v1/chat/completions", json=CHAT)) for _ in range(3)]
            while len(backend.jobs) < 3:
                await asyncio.sleep(0)
            refused = await http.post("/v1/chat/completions", json=CHAT | {"stream": True})
            backend.hold.set()
            taken = [await each for each in waiting]
            after = await http.post("/v1/chat/completions", json=CHAT)
        assert backend.open == 0
        return taken, refused, after

    taken, refused, after = asyncio.run(race())
    assert [answer.status_code for answer in (*taken, after)] == [200] * 4
    assert check_error(refused, 429)["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1


def test_metrics_have_the_names_of_llama_server() -> None:
    async def ask() -> str:
        async with client(ListBackend()) as http:
            await http.post("/v1/chat/completions", json=CHAT)
            return (await http.get("/metrics")).text

    text = asyncio.run(ask())
    found = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert found["llamacpp:prompt_tokens_total"] == "2"
    assert found["llamacpp:tokens_predicted_total"] == "2"
    assert found["llamacpp:predicted_tokens_seconds"] == "500"
    assert found["llamacpp:n_busy_slots_per_decode"] == "1.5"
    assert found["llamacpp:requests_processing"] == found["llamacpp:requests_deferred"] == "0"


def test_the_openapi_document_names_every_address() -> None:
    told = get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health"} <= set(told["paths"])
    body = told["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]
    assert list(body) == ["application/json"]
    operations = [operation for path in told["paths"].values() for operation in path.values()]
    assert all("422" not in operation["responses"] for operation in operations)
    assert "ValidationError" not in json.dumps(told)


def test_slots_and_tokens_are_told_as_llama_server_does() -> None:
    slot = get("/slots").json()[0]
    assert slot["id"] == 0 and slot["is_processing"] is True and slot["n_decoded"] == 1
    assert post("/tokenize", {"content": "ab"}).json() == {"tokens": [0, 1]}
    assert post("/detokenize", {"tokens": [0, 1]}).json() == {"content": "ab"}
    check_error(post("/detokenize", {"tokens": [50]}), 400)
