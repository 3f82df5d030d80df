"""The anthropic package: messages, streams, thinking, tools and their results, counts, errors.

Arguments as of with_openai.py.
"""

from __future__ import annotations

import sys

import anthropic

demo, listed, sentence = sys.argv[1:]
client = anthropic.Anthropic(base_url=demo, api_key="none", max_retries=0)
ASK = {
    "model": "any",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "What can you do?"}],
}

message = client.messages.create(**ASK, system="Be kind.")
assert message.content[0].text == sentence and message.stop_reason == "end_turn", message
assert message.usage.output_tokens > 10
with client.messages.stream(**ASK) as stream:
    assert "".join(stream.text_stream) == sentence
    assert stream.get_final_message().usage.output_tokens == message.usage.output_tokens
cut = client.messages.create(**{**ASK, "max_tokens": 3})
assert cut.stop_reason == "max_tokens" and cut.usage.output_tokens == 3
stopped = client.messages.create(**ASK, stop_sequences=["demo"])
assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "demo"
counted = client.messages.count_tokens(model="any", messages=ASK["messages"])
assert counted.input_tokens > 5
try:
    client.messages.create(model="any", max_tokens=5, messages=[{"role": "user", "content": "why? " * 3000}])
    raise AssertionError("a prompt longer than the context was taken")
except anthropic.BadRequestError as error:
    assert error.body["error"]["type"] == "invalid_request_error", error.body

talker = anthropic.Anthropic(base_url=listed, api_key="none", max_retries=0)
TOOLS = [{"name": "weather", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}]
ASK = {"model": "said", "max_tokens": 100, "tools": TOOLS}
question = {"role": "user", "content": "call it"}
called = talker.messages.create(**ASK, messages=[question])
assert [block.type for block in called.content] == ["thinking", "tool_use"], called.content
assert called.stop_reason == "tool_use" and called.content[1].input == {"city": "Köln", "days": [1, 2]}
with talker.messages.stream(**ASK, messages=[question]) as stream:
    assert stream.get_final_message().content[1].input == called.content[1].input
result = {"type": "tool_result", "tool_use_id": called.content[1].id, "content": "rain"}
told = talker.messages.create(
    **ASK,
    messages=[
        question,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ],
)
assert told.content[0].text == "heard result", told.content
