"""The openai package: chats, streams, structured output, tools, responses, completions, errors.

Arguments: the address of the demo, that of a server that answers from a list, what the demo says.
"""

from __future__ import annotations

import json
import sys
from typing import Literal

import openai
from pydantic import BaseModel

demo, listed, sentence = sys.argv[1:]
client = openai.OpenAI(base_url=f"{demo}/v1", api_key="none", max_retries=0)
ASK = [{"role": "user", "content": "What can you do?"}]

# Models, chats and streams.
model = client.models.list().data[0].id
answer = client.chat.completions.create(model=model, messages=ASK, temperature=0)
assert answer.choices[0].message.content == sentence, answer
assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 10
chunks = list(
    client.chat.completions.create(
        model=model, messages=ASK, temperature=0, stream=True, stream_options={"include_usage": True}
    )
)
assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == sentence
assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens
short = client.chat.completions.create(
    model=model, messages=ASK, temperature=0, max_completion_tokens=3, n=2, logprobs=True, top_logprobs=2
)
assert [c.finish_reason for c in short.choices] == ["length", "length"]
assert len(short.choices[1].logprobs.content) == 3
assert len(short.choices[0].logprobs.content[0].top_logprobs) == 2
stopped = client.chat.completions.create(model=model, messages=ASK, temperature=0, stop=["demo"])
assert stopped.choices[0].message.content == sentence.partition("demo")[0]


# Structured output, by the client's own way of asking for it.
class Weather(BaseModel):
    sky: Literal["clear", "cloudy"]
    degrees: Literal[7, 19]
    windy: bool


parsed = client.chat.completions.parse(model=model, messages=ASK, response_format=Weather, temperature=0)
assert isinstance(parsed.choices[0].message.parsed, Weather), parsed
as_object = client.chat.completions.create(
    model=model,
    messages=ASK,
    temperature=0,
    response_format={
        "type": "json_schema",
        "json_schema": {"name": "w", "schema": Weather.model_json_schema(), "strict": True},
    },
)
assert set(json.loads(as_object.choices[0].message.content)) == {"sky", "degrees", "windy"}

# Responses, whole, streamed and structured.
response = client.responses.create(model=model, input="What can you do?", temperature=0)
assert response.output_text == sentence and response.status == "completed", response
with client.responses.stream(model=model, input="What can you do?", temperature=0) as stream:
    kinds = [event.type for event in stream]
    assert stream.get_final_response().output_text == sentence
assert kinds[0] == "response.created" and kinds[-1] == "response.completed", kinds
structured = client.responses.parse(model=model, input="What can you do?", text_format=Weather, temperature=0)
assert isinstance(structured.output_parsed, Weather)

# Completions and errors.
text = client.completions.create(model=model, prompt="Once", max_tokens=4, temperature=0)
assert text.usage.completion_tokens == 4
try:
    client.chat.completions.create(model=model, messages=[{"role": "user", "content": "why? " * 3000}])
    raise AssertionError("a prompt longer than the context was taken")
except openai.BadRequestError as error:
    assert error.code == "context_length_exceeded", error.body

# Tools: called by the model, whole and streamed, and the result given back.
talker = openai.OpenAI(base_url=f"{listed}/v1", api_key="none", max_retries=0)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
ASK_TOOL = [{"role": "user", "content": "call it"}]
called = talker.chat.completions.create(model="said", messages=ASK_TOOL, tools=TOOLS)
message = called.choices[0].message
assert called.choices[0].finish_reason == "tool_calls" and message.reasoning_content == "I ask."
call = message.tool_calls[0]
assert json.loads(call.function.arguments) == {"city": "Köln", "days": [1, 2]}
with talker.chat.completions.stream(model="said", messages=ASK_TOOL, tools=TOOLS) as stream:
    final = stream.get_final_completion().choices[0].message
assert final.tool_calls[0].function.arguments == call.function.arguments
told = talker.chat.completions.create(
    model="said",
    messages=[*ASK_TOOL, message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}],
    tools=TOOLS,
)
assert told.choices[0].message.content == "heard result"
made = talker.responses.create(
    model="said",
    input="call it",
    tools=[{"type": "function", "name": "weather", "parameters": {}, "strict": False}],
)
kinds = [item.type for item in made.output]
assert kinds == ["reasoning", "function_call"], made.output
assert json.loads(made.output[1].arguments) == {"city": "Köln", "days": [1, 2]}
