"""Bodies of the OpenAI requests. Wrong types are refused, unknown fields ignored: clients send many that
others know.

Only what is listed has an effect. Fields with the names of llama-server mean what they mean there: -1 tokens
is no limit, `seed` -1 a random one.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MOST_CHOICES, MOST_STOPS, MOST_TOP_LOGPROBS, MOST_TOOLS = 16, 64, 20, 256

Count = Annotated[int, Field(ge=-1, le=2**31 - 1)]
Penalty = Annotated[float, Field(ge=-10, le=10)]
StopText = Annotated[str, StringConstraints(max_length=1024)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Json: TypeAlias = dict[str, Any]


class Strict(BaseModel):
    """A value of JSON that is taken as it is: no `"1"` for 1, no infinities."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, hide_input_in_errors=True)


class StreamOptions(Strict):
    """`include_usage`: a last chunk with the counts."""

    include_usage: bool = False


class SamplingFields(Strict):
    """How tokens are chosen, and when an answer ends. What is left out is the model's own default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Count | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repeat_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    repeat_last_n: Annotated[int, Field(ge=-1, le=2**20)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**64 - 1)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-1000, le=1000)]] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    cache_prompt: bool | None = None
    grammar: Annotated[str, StringConstraints(max_length=200_000)] | None = None


class ContentPart(Strict):
    """A part of a message. Only text is read; what else there may be is refused by name."""

    type: str
    text: str | None = None
    refusal: str | None = None


class CalledFunction(Strict):
    """`arguments` is JSON as text."""

    name: Name
    arguments: str = "{}"


class ToolCall(Strict):
    """A call that the assistant made before."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Strict):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[ContentPart] | None = None
    reasoning_content: str | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class FunctionDefinition(Strict):
    """A function that may be called; `parameters` is its JSON Schema."""

    name: Name
    description: str | None = None
    parameters: Json | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool of type `function`, the only type there is."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class NamedFunction(Strict):
    """The function that has to be called."""

    name: Name


class ToolChoice(Strict):
    """A choice of one tool."""

    type: Literal["function"] = "function"
    function: NamedFunction


class NamedSchema(Strict):
    """A JSON Schema that the answer keeps to."""

    name: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Strict):
    """`json_object` (with llama-server's optional `schema`), `json_schema`, or `text`."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None


class ChatRequest(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Json | None = None
    enable_thinking: bool | None = None
    thinking_budget: Count | None = None
    reasoning_budget_tokens: Count | None = None
    thinking_budget_tokens: Count | None = None
    reasoning_effort: str | None = None


Tokens: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    """Body of `/v1/completions`. `prompt`: a text, tokens, or a list of texts or of lists of tokens."""

    prompt: (
        str
        | Tokens
        | Annotated[list[str], Field(min_length=1, max_length=64)]
        | Annotated[list[Tokens], Field(min_length=1, max_length=64)]
    )
    echo: bool | None = None
    suffix: str | None = None
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    best_of: int | None = None
    n_predict: Count | None = None


class TokenizeRequest(Strict):
    """Body of `/tokenize`, as llama-server takes it."""

    content: str
    add_special: bool = False
    parse_special: bool = True
    with_pieces: bool = False


class DetokenizeRequest(Strict):
    """Body of `/detokenize`."""

    tokens: list[Annotated[int, Field(ge=0, le=2**31 - 1)]]
