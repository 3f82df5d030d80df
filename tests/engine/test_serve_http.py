"""The server over the real engine: what the demo says through every API, and what happens when clients leave.

In process through ASGI where the socket plays no role; through a real port where it does.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import httpx2
import pytest

from qnext.config import find_paths
from qnext.models.answer import AnswerParser, gather_answer
from qnext.models.response_grammar import response_grammar
from qnext.pipeline.request import Request
from qnext.pipeline.serving import Supervisor
from qnext.serve.app import make_app
from qnext.serve.forcing import call_grammar, either
from qnext.serve.listening import HttpServer
from qnext.serve.port import address_of, bind
from qnext.serve.settings import ServeSettings

pytestmark = pytest.mark.engine

T = TypeVar("T")
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0, "max_tokens": 12}
SLOTS, CONTEXT = 2, 256


@pytest.fixture(scope="module")
def backend(demo_model: object) -> Iterator[Supervisor]:
    request = Request(
        model="demo", threads=1, threads_batch=1, context=SLOTS * CONTEXT, parallel=SLOTS, repack="off"
    )
    supervisor = Supervisor(request, find_paths(), lambda text: None)
    supervisor.start()
    ends = time.monotonic() + 60
    while supervisor.status.state == "loading" and time.monotonic() < ends:
        time.sleep(0.02)
    assert supervisor.status.state == "ok", supervisor.status.why
    yield supervisor
    supervisor.close()


Ask = Callable[[httpx2.AsyncClient], Awaitable[T]]


def ask(backend: Supervisor, question: Ask[T], **settings: Any) -> T:
    """`question` of a server in this process."""

    async def run() -> T:
        transport = httpx2.ASGITransport(app=make_app(backend, ServeSettings(**settings)))
        async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
            return await question(http)

    return asyncio.run(run())


def post(backend: Supervisor, path: str, body: dict[str, Any]) -> httpx2.Response:
    return ask(backend, lambda http: http.post(path, json=body))


def on_a_port(backend: Supervisor, question: Ask[T]) -> T:
    """`question` of a server on a free port of loopback."""

    async def run() -> T:
        with bind("127.0.0.1", 0, has_key=False) as bound:
            server = HttpServer(make_app(backend, ServeSettings()), bound, 1.0)
            serving = asyncio.create_task(server.run(lambda grace: asyncio.sleep(0)))
            async with httpx2.AsyncClient(base_url=address_of(bound), trust_env=False) as http:
                found = await question(http)
            server.stop()
            await serving
            return found

    return asyncio.run(run())


def said(answer: httpx2.Response) -> str:
    assert answer.status_code == 200, answer.text
    return said_in(answer.json())


def said_in(told: dict[str, Any]) -> str:
    return str(told["choices"][0]["message"]["content"])


def data(answer: httpx2.Response) -> list[dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]


def test_every_api_says_the_same_at_temperature_0(backend: Supervisor) -> None:
    text = said(post(backend, "/v1/chat/completions", CHAT))
    assert text
    streamed = data(post(backend, "/chat/completions", CHAT | {"stream": True}))
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in streamed) == text
    response = post(backend, "/v1/responses", {"input": "Hello", "temperature": 0, "max_output_tokens": 12})
    assert response.json()["output"][0]["content"][0]["text"] == text
    assert response.json()["status"] == "incomplete"
    message = post(backend, "/v1/messages", CHAT | {"top_k": 1}).json()
    assert message["content"] == [{"type": "text", "text": text}] and message["stop_reason"] == "max_tokens"
    prompt = "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    plain = {"prompt": prompt, "temperature": 0, "max_tokens": 12}
    assert post(backend, "/v1/completions", plain).json()["choices"][0]["text"] == text
    tokens = post(backend, "/tokenize", {"content": prompt}).json()["tokens"]
    told = post(backend, "/v1/completions", plain | {"prompt": tokens}).json()
    assert told["choices"][0]["text"] == text
    assert told["usage"]["prompt_tokens"] == len(tokens) and told["usage"]["completion_tokens"] == 12
    counted = post(backend, "/v1/messages/count_tokens", {"messages": CHAT["messages"]}).json()
    assert counted["input_tokens"] == len(tokens)
    assert post(backend, "/detokenize", {"tokens": tokens}).json()["content"] == prompt


def test_an_answer_that_ends_by_itself_says_stop_and_a_stop_string_is_cut_off(backend: Supervisor) -> None:
    whole = post(backend, "/v1/chat/completions", CHAT | {"max_tokens": 400}).json()["choices"][0]
    assert whole["finish_reason"] == "stop"
    text = str(whole["message"]["content"])
    word = text[5:12]
    cut = post(backend, "/v1/chat/completions", CHAT | {"max_tokens": 400, "stop": [word]}).json()["choices"][
        0
    ]
    assert cut["finish_reason"] == "stop" and cut["message"]["content"] == text[: text.index(word)]
    told = post(backend, "/v1/messages", CHAT | {"max_tokens": 400, "stop_sequences": [word]}).json()
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", word)


def test_probabilities_name_every_token_of_the_text(backend: Supervisor) -> None:
    told = post(backend, "/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 3}).json()
    entries = told["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == told["choices"][0]["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] <= 0 for entry in entries)
    wild = {"prompt": "Hello", "logprobs": 0, "max_tokens": 8, "temperature": 5, "seed": 1}
    plain = post(backend, "/v1/completions", wild).json()["choices"][0]
    assert len(plain["logprobs"]["tokens"]) == len(plain["logprobs"]["token_logprobs"]) == 8


def test_a_seed_repeats_itself_and_choices_differ(backend: Supervisor) -> None:
    wild = {"temperature": 20, "top_k": 0, "top_p": 1, "min_p": 0}
    asked = wild | {"prompt": "Hello", "max_tokens": 16, "seed": 11, "n": 2}
    first, again = (post(backend, "/v1/completions", asked).json()["choices"] for _ in range(2))
    assert [choice["text"] for choice in first] == [choice["text"] for choice in again]
    assert first[0]["text"] != first[1]["text"]


def test_a_format_is_kept_whatever_the_model_would_say(backend: Supervisor) -> None:
    schema = {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    told = json.loads(
        said(post(backend, "/v1/chat/completions", CHAT | {"response_format": wanted, "max_tokens": 80}))
    )
    assert set(told) == {"ok", "n"} and type(told["ok"]) is bool and 1 <= told["n"] <= 9
    bad = CHAT | {"grammar": "root ::= nothing"}
    assert post(backend, "/v1/chat/completions", bad).json()["error"]["code"] == "invalid_grammar"


def test_a_forced_call_is_a_call_of_that_tool(backend: Supervisor) -> None:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": "count", "parameters": parameters}}]
    free = response_grammar({"type": "json_object"})
    for style in ("json", "xml"):
        forced = call_grammar(tools, style, parallel=False)
        asked = {"prompt": "Hello", "max_tokens": 60, "temperature": 0, "grammar": forced}
        parser = AnswerParser("", tools=tools, style=style)
        text = post(backend, "/v1/completions", asked).json()["choices"][0]["text"]
        calls = gather_answer([*parser.feed(text), *parser.finish()]).calls
        assert [call.name for call in calls] == ["count"], text
        if style == "json":
            assert type(json.loads(calls[0].arguments)["n"]) is int
        both = post(
            backend, "/v1/completions", asked | {"grammar": either(str(free), forced), "max_tokens": 2}
        )
        assert both.status_code == 200, "llama.cpp reads the two as one"


def test_the_second_turn_of_a_chat_reads_only_what_is_new(backend: Supervisor) -> None:
    system = {"role": "system", "content": "You are a demo. " * 8}
    first = [system, {"role": "user", "content": "Hello"}]
    told = post(backend, "/v1/chat/completions", CHAT | {"messages": first}).json()
    second = [*first, told["choices"][0]["message"], {"role": "user", "content": "And now?"}]
    again = post(backend, "/v1/chat/completions", CHAT | {"messages": second}).json()
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached >= told["usage"]["prompt_tokens"] - 8
    assert again["timings"]["prompt_n"] == again["usage"]["prompt_tokens"] - cached
    fresh = post(backend, "/v1/chat/completions", CHAT | {"messages": second, "cache_prompt": False}).json()
    assert fresh["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert said_in(fresh) == said_in(again)


def test_the_servers_limit_of_time_ends_an_answer_with_an_error(backend: Supervisor) -> None:
    endless = CHAT | {"max_tokens": -1, "ignore_eos": True}
    answer = ask(backend, lambda http: http.post("/v1/chat/completions", json=endless), deadline_s=0.1)
    assert answer.status_code == 504 and answer.json()["error"]["code"] == "deadline"


def test_a_prompt_over_the_context_is_a_400_with_the_numbers(backend: Supervisor) -> None:
    long = {"messages": [{"role": "user", "content": "Hello " * CONTEXT}]}
    for stream in (False, True):
        answer = post(backend, "/v1/chat/completions", long | {"stream": stream})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded" and str(CONTEXT) in error["message"]


def test_an_answer_may_fill_the_context_and_not_more(backend: Supervisor) -> None:
    asked = {"prompt": "Hello", "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    told = post(backend, "/v1/completions", asked).json()
    assert told["choices"][0]["finish_reason"] == "length"
    assert CONTEXT - 2 <= told["usage"]["total_tokens"] <= CONTEXT + 1


def test_more_requests_than_slots_are_all_answered_alike(backend: Supervisor) -> None:
    async def crowd(http: httpx2.AsyncClient) -> list[httpx2.Response]:
        asked = [http.post("/v1/chat/completions", json=CHAT | {"stream": bool(n % 2)}) for n in range(8)]
        return await asyncio.gather(*asked)

    answers = ask(backend, crowd)
    streamed = [
        "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in data(answer))
        for answer in answers[1::2]
    ]
    assert len({*map(said, answers[::2]), *streamed}) == 1


def test_slots_and_metrics_tell_what_was_done(backend: Supervisor) -> None:
    async def look(http: httpx2.AsyncClient) -> tuple[str, Any, Any]:
        told = (await http.post("/v1/chat/completions", json=CHAT)).json()
        return (await http.get("/metrics")).text, (await http.get("/slots")).json(), told

    text, slots, told = ask(backend, look)
    found = dict(line.split(" ") for line in text.splitlines() if not line.startswith("#"))
    assert int(found["llamacpp:tokens_predicted_total"]) == told["usage"]["completion_tokens"] == 12
    assert float(found["llamacpp:n_decode_total"]) > 0 and len(slots) == SLOTS
    assert told["timings"]["predicted_ms"] > 0


def test_a_client_that_leaves_frees_its_slot(backend: Supervisor) -> None:
    endless = CHAT | {"max_tokens": -1, "ignore_eos": True, "temperature": 1}

    async def leave(http: httpx2.AsyncClient) -> float:
        async with http.stream("POST", "/v1/chat/completions", json=endless | {"stream": True}) as answer:
            async for _ in answer.aiter_lines():
                break
        address = http.base_url
        with socket.create_connection((address.host, address.port or 80)) as raw:  # leaves while it waits
            body = json.dumps(endless).encode()
            raw.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            while not backend.running:
                await asyncio.sleep(0.002)
        began = time.monotonic()
        while backend.running or any(slot["is_processing"] for slot in (await http.get("/slots")).json()):
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.005)
        text = (await http.get("/metrics")).text
        assert "qnext:answers_left_total 2" in text and "llamacpp:requests_processing 0" in text
        return time.monotonic() - began

    assert on_a_port(backend, leave) < 1.0


def test_a_client_of_an_unread_stream_gets_whole_events(backend: Supervisor) -> None:
    async def read(http: httpx2.AsyncClient) -> list[str]:
        async with http.stream("POST", "/v1/chat/completions", json=CHAT | {"stream": True}) as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert answer.headers["server"] == "qnext"
            return [line async for line in answer.aiter_lines()]

    lines = on_a_port(backend, read)
    assert lines[-2:] == ["data: [DONE]", ""] and all(line.startswith("data: ") for line in lines[::2])
