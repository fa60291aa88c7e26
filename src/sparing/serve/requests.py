"""What a request may say, as pydantic models: bodies are held to them (`body.check`), and the OpenAPI document is made from them.

Names and ranges are OpenAI's (platform.openai.com/docs/api-reference/chat/create, .../completions/create); top_k, min_p,
repetition_penalty and ignore_eos are the extensions that open servers share; tier is ours.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
"""OpenAI takes 4; lm-eval's tasks end at up to six and the end of text."""
MOST = 2**31 - 1
"""Of counts and token ids: a signed 32-bit integer."""


class Object(BaseModel):
    """A JSON object; fields that it doesn't name are passed on. null means the same as absence."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="wrap")
    @classmethod
    def _as_sent(cls, value: Any, check) -> dict[str, Any]:
        """A plain dict without nulls, in the client's order: templates write messages and tools into the prompt as they came."""
        found = dict(check(value))
        return {name: found.get(name, sent) for name, sent in value.items() if sent is not None}


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def integer(low: int, high: int):
    """A type: low to high; 3.0 is the integer 3, as in JSON Schema."""
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(_whole)]


Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Token = integer(0, MOST)
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[str | Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
# JSON Schema lets keys that match no pattern pass, unless it is told otherwise.
Biases = Annotated[dict[TokenName, Bias], Field(json_schema_extra={"additionalProperties": False})]
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
Model = Annotated[str | None, Field(description="the name of the served model; left out, null or empty it means the same")]
Ignored = Annotated[Any, Field(description="accepted and ignored")]


class JsonSchema(Object):
    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class PlainFormat(Object):
    type: Literal["text", "json_object"]


class SchemaFormat(Object):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarFormat(Object):
    type: Literal["grammar"]
    grammar: str


Format = Annotated[PlainFormat | SchemaFormat | GrammarFormat, Field(discriminator="type")]


class StreamOptions(Object):
    include_usage: bool | None = None


class Body(Object):
    """A whole request: other fields than those of its kind are refused."""

    model_config = ConfigDict(extra="forbid")

    model: Model = None


class Sampled(Body):
    """What chats and completions share."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: integer(-1, MOST) | None = None
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    seed: integer(-(2**63), 2**63 - 1) | None = None
    stop: Stop | Stops | None = None
    n: integer(1, MAX_CHOICES) | None = None
    logit_bias: Biases | None = None
    ignore_eos: bool | None = None
    tier: Literal["exact", "approximate"] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: integer(0, MOST) | None = None
    response_format: Format | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None


class Part(Object):
    type: Literal["text"]
    text: str


class CalledFunction(Object):
    name: str
    arguments: str


class Call(Object):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Object):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[Part], Field(fail_fast=True)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: Annotated[list[Call], Field(fail_fast=True)] | None = None


class Function(Object):
    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Object):
    type: Literal["function"]
    function: Function


class ChosenFunction(Object):
    name: Name


class Choice(Object):
    type: Literal["function"] = "function"
    function: ChosenFunction


class Chat(Sampled):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: integer(1, MOST) | None = None
    logprobs: bool | None = None
    top_logprobs: integer(0, 20) | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None


class Completion(Sampled):
    prompt: str | Tokens | Prompts
    echo: bool | None = None
    logprobs: integer(0, 20) | None = None


class Tokenize(Body):
    prompt: str
    add_special_tokens: bool | None = None


class Detokenize(Body):
    tokens: Annotated[list[Token], Field(fail_fast=True)]
