"""qwen-agent: an assistant that calls a function, with its own way to write calls and with the server's.

Arguments as of with_openai.py.
"""

from __future__ import annotations

import json
import sys

from qwen_agent.agents import Assistant
from qwen_agent.tools.base import BaseTool, register_tool

demo, listed, sentence = sys.argv[1:]
asked = []


@register_tool("weather")
class Weather(BaseTool):
    """Says how the weather is, and remembers what it was asked."""

    description = "How it will be in a city."
    parameters = {  # noqa: RUF012 - the package wants it so
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["city", "days"],
    }

    def call(self, params: str | dict, **_: object) -> str:
        asked.append(json.loads(params) if isinstance(params, str) else params)
        return "rain"


def last_answer(address: str, question: str, **config: object) -> list[dict]:
    llm = {"model": "any", "model_type": "oai", "model_server": f"{address}/v1", "api_key": "none"}
    agent = Assistant(llm={**llm, "generate_cfg": config}, function_list=["weather"])
    return list(agent.run([{"role": "user", "content": question}]))[-1]


assert last_answer(demo, "What can you do?", temperature=0)[-1]["content"] == sentence
for config in ({"use_raw_api": True}, {}):
    said = last_answer(listed, "call it", **config)
    assert [message["role"] for message in said][-2:] == ["function", "assistant"], said
    assert asked.pop() == {"city": "Köln", "days": [1, 2]} and not asked
    assert said[-2]["content"] == "rain" and str(said[-1]["content"]).startswith("heard"), said
