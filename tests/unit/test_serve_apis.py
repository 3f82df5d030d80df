"""Thinking, text and tool calls as chats, responses and messages tell them; whole and streamed alike."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import httpx2
import pytest

from qnext.models.chat import ChatTemplate
from qnext.serve.forcing import call_grammar
from tests.serve_http import CHAT, ListBackend, check_error, events, post

TEMPLATE = """{%- if tools %}{% for t in tools %}{{ t | tojson }}{% endfor %}
Write <tool_call>{"name": …, "arguments": …}</tool_call>.{% endif %}
{%- for m in messages %}<|{{ m.role }}|>{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}
{%- endfor %}<|assistant|>{% if enable_thinking %}<think>
{% endif %}"""
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
SAID = (
    "<think>",
    "hm",
    "m</th",
    "ink>\n\n",
    "I ",
    "look.\n<tool",
    '_call>\n{"name": "weather", "argu',
    'ments": ',
)
SAID += ('{"city": ', '"Bern"}}\n</tool_call>',)  # fmt: skip


def backend(*pieces: str) -> ListBackend:
    found = ListBackend(pieces or SAID)
    found.model = found.model.__class__(
        **{name: getattr(found.model, name) for name in found.model.__slots__ if name != "template"},
        template=ChatTemplate(TEMPLATE),
    )
    return found


def named_events(answer: httpx2.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        told = json.loads(data.removeprefix("data: "))
        assert name == f"event: {told['type']}"
        found.append((told["type"], told))
    return found


# Chats


def test_a_chat_tells_thinking_text_and_calls_apart() -> None:
    asked = CHAT | {"tools": [TOOL]}
    choice = post("/v1/chat/completions", asked, backend=backend()).json()["choices"][0]
    message = choice["message"]
    assert message["reasoning_content"] == "hmm" and message["content"] == "I look."
    assert message["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Bern"}'}
    assert choice["finish_reason"] == "tool_calls"
    streamed = events(post("/v1/chat/completions", asked | {"stream": True}, backend=backend()))
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hmm"
    assert "".join(delta.get("content", "") for delta in deltas) == "I look."
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "weather" and calls[0]["id"]
    assert "".join(call["function"]["arguments"] for call in calls) == '{"city": "Bern"}'
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_a_call_that_is_none_stays_text_with_a_warning() -> None:
    told = post(
        "/v1/chat/completions", CHAT | {"tools": [TOOL]}, backend=backend("<tool_call>", "no</tool_call>")
    )
    assert "no" in told.json()["choices"][0]["message"]["content"]
    assert told.json()["warnings"] and told.json()["choices"][0]["finish_reason"] == "stop"


def test_a_chosen_tool_is_the_only_one_shown_and_is_forced() -> None:
    other = {"type": "function", "function": {"name": "other"}}
    held = backend()
    choice = {"type": "function", "function": {"name": "weather"}}
    post("/v1/chat/completions", CHAT | {"tools": [TOOL, other], "tool_choice": choice}, backend=held)
    assert "other" not in str(held.jobs[0].text) and "<tool_call>" in str(held.jobs[0].grammar)
    held = backend()
    post("/v1/chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "none"}, backend=held)
    assert "weather" not in str(held.jobs[0].text) and held.jobs[0].grammar is None


def test_a_format_holds_only_after_thinking_that_the_template_opens() -> None:
    asked = CHAT | {"response_format": {"type": "json_object"}}
    held = backend("{}")
    post("/v1/chat/completions", asked, backend=held)
    assert held.jobs[0].grammar and held.jobs[0].grammar_after == ()
    held = backend("</think>{}")

    async def one_token(text: str, *, special: bool = True, add_bos: bool = False) -> list[int]:
        return [42]

    held.tokenize = one_token  # type: ignore[method-assign]
    post("/v1/chat/completions", asked | {"enable_thinking": True}, backend=held)
    assert held.jobs[0].grammar_after == (42,)


@pytest.mark.parametrize("name", ["thinking_budget", "reasoning_budget_tokens", "thinking_budget_tokens"])
def test_thinking_may_have_a_budget(name: str) -> None:
    opened = backend("</think>hm")
    post("/v1/chat/completions", CHAT | {name: 7, "enable_thinking": True}, backend=opened)
    thought = opened.jobs[0].thought
    assert thought and thought.budget == 7 and thought.opening == () and thought.closing
    left_to_it = backend("hm")
    post("/v1/chat/completions", CHAT | {name: 7}, backend=left_to_it)
    thought = left_to_it.jobs[0].thought
    assert thought and thought.opening
    for more in ({name: -1}, {name: 7, "response_format": {"type": "json_object"}}):
        free = backend("{}")
        post("/v1/chat/completions", CHAT | more, backend=free)
        assert free.jobs[0].thought is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
            "response_format",
        ),
        ({"grammar": "no"}, "grammar"),
        ({"chat_template_kwargs": {"enable_thinking": "no"}}, "chat_template_kwargs.enable_thinking"),
    ],
)
def test_wishes_that_cannot_be_kept_are_refused(more: dict[str, Any], param: str) -> None:
    assert check_error(post("/v1/chat/completions", CHAT | more, backend=backend()), 400)["param"] == param


def test_a_model_whose_template_takes_no_tools_says_so() -> None:
    told = check_error(post("/v1/chat/completions", CHAT | {"tools": [TOOL]}), 400)
    assert told["code"] == "unsupported_tools"


def test_a_forced_call_has_the_arguments_of_its_tool() -> None:
    grammar = call_grammar([TOOL], "json", parallel=False)
    assert grammar.startswith("root ::= call\n") and '\\"city\\":' in grammar
    unheard = {
        "type": "function",
        "function": {"name": "f", "parameters": {"type": "object", "minProperties": 3}},
    }
    assert "arguments" in call_grammar([unheard], "json", parallel=True)
    assert '("weather")' in call_grammar([TOOL], "xml", parallel=True)


@pytest.mark.parametrize("stream", [False, True])
def test_without_parallel_calls_an_answer_ends_with_the_first(stream: bool) -> None:
    held = backend(*SAID[:-1], '"Bern"}}\n')
    held.ended = replace(held.ended, reason="stop", stop_text="</tool_call>")
    asked = CHAT | {"tools": [TOOL], "parallel_tool_calls": False, "stop": "x", "stream": stream}
    answer = post("/v1/chat/completions", asked, backend=held)
    assert held.jobs[0].stop == ("x", "</tool_call>")
    last = events(answer)[-1] if stream else answer.json()
    assert last["choices"][0]["finish_reason"] == "tool_calls" and "warnings" not in last


def test_a_format_and_tools_together_leave_the_model_the_choice() -> None:
    held = backend()
    asked = CHAT | {"tools": [TOOL], "response_format": {"type": "json_object"}}
    assert post("/v1/chat/completions", asked, backend=held).status_code == 200
    grammar = str(held.jobs[0].grammar)
    assert grammar.startswith("root ::= a-root | b-root\n") and 'b-call ::= "<tool_call>' in grammar
    named = {line.partition(" ::=")[0] for line in grammar.splitlines() if line}
    assert all(name == "root" or name.startswith(("a-", "b-")) for name in named)


def test_the_prompt_can_be_seen_and_counted_without_an_answer() -> None:
    held = backend()
    told = post("/apply-template", CHAT, backend=held).json()["prompt"]
    assert told == "<|user|>hi<|assistant|>"
    assert post("/v1/chat/completions/input_tokens", CHAT, backend=held).json()["input_tokens"] == len(told)
    assert post("/v1/responses/input_tokens", {"input": "hi"}, backend=held).json()["input_tokens"] == len(
        told
    )
    assert not held.jobs


# Responses

RESPONSE_TOOL = {"type": "function", "name": "weather", "parameters": WEATHER}


def test_a_response_has_an_item_for_each_thing_said() -> None:
    asked = {"input": "hi", "tools": [RESPONSE_TOOL], "instructions": "be brief"}
    told = post("/v1/responses", asked, backend=backend()).json()
    assert [item["type"] for item in told["output"]] == ["reasoning", "message", "function_call"]
    assert told["output"][1]["content"][0]["text"] == "I look."
    assert told["output"][2]["arguments"] == '{"city": "Bern"}'
    assert told["status"] == "completed" and told["usage"]["input_tokens_details"] == {"cached_tokens": 1}
    assert told["instructions"] == "be brief"


def test_events_of_a_response_are_numbered_and_end_with_the_same_response() -> None:
    asked = {"input": "hi", "tools": [RESPONSE_TOOL]}
    told = named_events(post("/v1/responses", asked | {"stream": True}, backend=backend()))
    assert [event["sequence_number"] for _, event in told] == list(range(len(told)))
    kinds = [kind for kind, _ in told]
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"
    text = "".join(event["delta"] for kind, event in told if kind == "response.output_text.delta")
    assert text == "I look."
    arguments = [event for kind, event in told if kind == "response.function_call_arguments.delta"]
    assert "".join(event["delta"] for event in arguments) == '{"city": "Bern"}'
    assert {event["output_index"] for event in arguments} == {2}
    last = told[-1][1]["response"]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == 3
    assert [item["type"] for item in last["output"]] == ["reasoning", "message", "function_call"]
    assert all(item["status"] == "completed" for item in last["output"])


def test_items_of_one_turn_become_one_message() -> None:
    held = backend("ok")
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Bern"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    post("/v1/responses", {"input": items, "tools": [RESPONSE_TOOL]}, backend=held)
    said = str(held.jobs[0].text).partition("</tool_call>.")[2]
    assert said == '<|user|>weather?<|assistant|>I look.weather{"city": "Bern"}<|tool|>sunny<|assistant|>'


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "input[0].call_id"),
        ({"input": "x", "max_output_tokens": 1.5}, "max_output_tokens"),
        ({"input": "x", "text": {"format": {"type": "json_schema"}}}, "response_format"),
    ],
)
def test_responses_name_what_they_cannot_do(body: Any, param: str) -> None:
    assert check_error(post("/v1/responses", body, backend=backend()), 400)["param"] == param


# Messages

MESSAGE_TOOL = {"name": "weather", "input_schema": WEATHER}
MESSAGE = {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}


def test_a_message_has_a_block_for_each_thing_said() -> None:
    told = post("/v1/messages", MESSAGE | {"tools": [MESSAGE_TOOL]}, backend=backend()).json()
    assert [block["type"] for block in told["content"]] == ["thinking", "text", "tool_use"]
    assert told["content"][2]["input"] == {"city": "Bern"} and told["stop_reason"] == "tool_use"
    assert told["usage"]["input_tokens"] == 2 and told["usage"]["cache_read_input_tokens"] == 1


def test_blocks_of_a_streamed_message_open_and_close_in_turn() -> None:
    asked = MESSAGE | {"tools": [MESSAGE_TOOL], "stream": True}
    told = named_events(post("/v1/messages", asked, backend=backend()))
    kinds = [kind for kind, _ in told]
    assert kinds[:2] == ["message_start", "ping"] and kinds[-2:] == ["message_delta", "message_stop"]
    assert told[0][1]["message"]["usage"]["input_tokens"] == 2
    opened: list[int] = []
    for kind, event in told:
        if kind == "content_block_start":
            opened.append(event["index"])
        elif kind.startswith("content_block"):
            assert event["index"] == opened[-1]
    assert opened == [0, 1, 2] and kinds.count("content_block_stop") == 3
    deltas = [event["delta"] for kind, event in told if kind == "content_block_delta"]
    assert "".join(delta.get("text", "") for delta in deltas) == "I look."
    assert json.loads("".join(delta.get("partial_json", "") for delta in deltas)) == {"city": "Bern"}


def test_blocks_of_earlier_turns_reach_the_template_as_calls_and_results() -> None:
    held = backend("ok")
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "weather?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "c1", "name": "weather", "input": {"city": "Bern"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "c1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "thanks"},
            ],
        },
    ]
    post(
        "/v1/messages", MESSAGE | {"messages": turns, "system": [{"type": "text", "text": "s"}]}, backend=held
    )
    expected = (
        '<|system|>s<|user|>weather?<|assistant|>I look.weather{"city": "Bern"}<|tool|>sunny<|user|>thanks'
    )
    assert str(held.jobs[0].text) == expected + "<|assistant|>"


def test_errors_of_messages_have_anthropics_form() -> None:
    told = post(
        "/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, backend=backend()
    )
    assert told.status_code == 400 and told.json()["type"] == "error"
    assert (
        told.json()["error"]["type"] == "invalid_request_error" and "image" in told.json()["error"]["message"]
    )
    refused = post("/v1/messages", MESSAGE, api_keys=("k",))
    assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"


def test_tokens_of_a_message_are_counted_without_answering_it() -> None:
    held = backend()
    told = post("/v1/messages/count_tokens", {"messages": MESSAGE["messages"]}, backend=held).json()
    assert told == {"input_tokens": len("<|user|>hi<|assistant|>")} and not held.jobs
