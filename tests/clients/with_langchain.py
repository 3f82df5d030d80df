"""langchain-openai: invoke, stream, structured output, and a tool bound and called.

Arguments as of with_openai.py.
"""

from __future__ import annotations

import sys
from typing import Literal

from langchain_core.messages import ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

demo, listed, sentence = sys.argv[1:]
ASK = "What can you do?"


class Weather(BaseModel):
    """How it is outside."""

    sky: Literal["clear", "cloudy"]
    windy: bool


@tool
def weather(city: str, days: list[int]) -> str:
    """How it will be in a city."""
    return f"rain in {city} for {len(days)} days"


model = ChatOpenAI(base_url=f"{demo}/v1", api_key="none", model="demo", temperature=0, max_retries=0)
answer = model.invoke(ASK)
assert answer.content == sentence and answer.usage_metadata["output_tokens"] > 10, answer
assert "".join(chunk.content for chunk in model.stream(ASK)) == sentence
found = model.with_structured_output(Weather, method="json_schema").invoke(ASK)
assert isinstance(found, Weather), found

talker = ChatOpenAI(base_url=f"{listed}/v1", api_key="none", model="said", max_retries=0).bind_tools(
    [weather]
)
question = ("user", "call it")
called = talker.invoke([question])
assert called.tool_calls[0]["args"] == {"city": "Köln", "days": [1, 2]}, called
result = weather.invoke(called.tool_calls[0])
assert isinstance(result, ToolMessage) and result.content == "rain in Köln for 2 days"
assert talker.invoke([question, called, result]).content == "heard result"
