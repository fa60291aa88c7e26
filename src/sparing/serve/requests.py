"""Request bodies: pydantic models of what they may contain, and their errors in OpenAI's words. The OpenAPI document uses the models too.

Names and ranges are OpenAI's (platform.openai.com/docs/api-reference/chat/create, .../completions/create); top_k, min_p,
repetition_penalty and ignore_eos are extensions that open servers share; tier is ours.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from sparing.serve.errors import ApiError, bad

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
"""OpenAI allows 4; tasks of lm-eval have up to seven."""
MAX_INT = 2**31 - 1
"""Largest count or token id: a signed 32-bit integer."""
MAX_ERRORS = 10_000
"""Most errors to describe: pydantic lists 200,000 a second, and the server waits. Only objects have many: arrays fail fast."""
MUST = {
    "dict_type": "be an object",
    "model_type": "be an object",
    "model_attributes_type": "be an object",
    "list_type": "be an array",
    "string_type": "be a string",
    "float_type": "be a number",
    "int_type": "be an integer",
    "bool_type": "be true or false",
    "greater_than_equal": "be at least {ge}",
    "greater_than": "be above {gt}",
    "less_than_equal": "be at most {le}",
    "literal_error": "be one of {expected}",
    "union_tag_invalid": "be one of {expected_tags}",
    "none_required": "be left out, empty or null: this server does not support it",
    "string_too_short": "not be empty",
    "string_pattern_mismatch": "match {pattern}",
    "too_short": "have at least {min_length} entries",
    "too_long": "have at most {max_length} entries",
}
"""What a value must do, by pydantic's name of the error (docs.pydantic.dev/latest/errors/validation_errors)."""


class Object(BaseModel):
    """A JSON object. Unknown fields are kept; null means the same as absence."""

    model_config = ConfigDict(strict=True, extra="allow")

    @model_validator(mode="wrap")
    @classmethod
    def _as_sent(cls, value: Any, check) -> dict[str, Any]:
        """A plain dict without nulls, in the client's order, because chat templates write messages and tools into the prompt."""
        checked = dict(check(value))
        found = {name: checked.get(name, sent) for name, sent in value.items() if sent is not None}
        return {name: value for name, value in found.items() if value is not None}  # what is empty may mean null


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


def integer(low: int, high: int):
    """The type of integers from low to high; 3.0 is one too, as in JSON Schema."""
    return Annotated[int, Field(ge=low, le=high), BeforeValidator(_whole)]


Stop = Annotated[str, Field(min_length=1)]
Stops = Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)]
Token = integer(0, MAX_INT)
Tokens = Annotated[list[Token], Field(min_length=1, fail_fast=True)]
Prompts = Annotated[list[str | Tokens], Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)]
TokenName = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
# By default JSON Schema allows keys that match no pattern.
Biases = Annotated[dict[TokenName, Bias], Field(json_schema_extra={"additionalProperties": False})]
Name = Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{1,64}$")]
ModelName = Annotated[str | None, Field(description="the name of the served model; left out, null or empty it means the same")]
Ignored = Annotated[Any, Field(description="accepted and ignored")]
Absent = Annotated[
    None, BeforeValidator(lambda value: None if value in ("", []) else value),
    WithJsonSchema({"enum": [None, "", []], "description": "not supported: empty or null only"}),
]  # fmt: skip


class Closed(Object):
    """A JSON object whose unknown fields are refused: ignored, they would change an answer."""

    model_config = ConfigDict(extra="forbid")


class JsonSchema(Closed):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class PlainFormat(Closed):
    type: Literal["text"]


class JsonFormat(Closed):
    type: Literal["json_object"]
    schema_: dict[str, Any] | None = Field(None, alias="schema", description="a JSON schema for the object; an extension of open servers")


class SchemaFormat(Closed):
    type: Literal["json_schema"]
    json_schema: JsonSchema


class GrammarFormat(Closed):
    type: Literal["grammar"]
    grammar: str


Format = Annotated[PlainFormat | JsonFormat | SchemaFormat | GrammarFormat, Field(discriminator="type")]


class StreamOptions(Object):
    include_usage: bool | None = None


class Body(Closed):
    """A whole request body."""

    model: ModelName = None


class Sampled(Body):
    """Fields that chats and completions share."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: integer(-1, MAX_INT) | None = None
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
    max_tokens: integer(0, MAX_INT) | None = None
    response_format: Format | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None


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
    max_completion_tokens: integer(1, MAX_INT) | None = None
    logprobs: bool | None = None
    top_logprobs: integer(0, 20) | None = None
    tools: Annotated[list[Tool], Field(max_length=128, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Ignored = None
    verbosity: Ignored = None
    prediction: Annotated[Any, Field(description="accepted and ignored: it would change the speed only")] = None
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = None
    functions: Absent = None
    function_call: Literal["none", "auto"] | None = None
    audio: Absent = None
    moderation: Absent = None
    web_search_options: Absent = None


class Completion(Sampled):
    prompt: Annotated[str | Tokens | Prompts | None, Field(description="null: a new document")]
    best_of: integer(1, MAX_CHOICES) | None = None
    suffix: Absent = None
    echo: bool | None = None
    logprobs: integer(0, 20) | None = None


class Tokenize(Body):
    prompt: str
    add_special_tokens: bool | None = None


class Detokenize(Body):
    tokens: Annotated[list[Token], Field(fail_fast=True)]


class Feedback(Body):
    id: Annotated[str, Field(pattern="^chatcmpl-[0-9a-f]{24}$")]
    verdict: Literal["accepted", "corrected", "rejected"]
    correction: Annotated[str | None, Field(description="with the verdict corrected: what the answer should have been")] = None
    choice: integer(0, MAX_CHOICES - 1) | None = None


def parse(body: bytes, model: type[BaseModel]) -> dict:
    """The JSON of a body, checked as by `check`. Raises ApiError 400."""
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_no_constant)
        if b"\\u" in body:  # may hide a lone surrogate, which neither answer nor log could encode
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise bad("The body is nested too deeply.") from None
    except UnicodeEncodeError:
        raise bad("The body has a lone surrogate, which is no Unicode text.") from None
    except ValueError as error:  # also invalid UTF-8, and integers of thousands of digits
        raise bad(f"The body is not JSON: {str(error)[:200]}") from None
    return check(value, model)


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def check(value: Any, model: type[BaseModel]) -> dict:
    """Validate `value`: a copy without null fields, whole floats as integers. Raises ApiError 400 that names the field."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        if error.error_count() > MAX_ERRORS:
            raise bad(f"The body has {error.error_count()} mistakes.") from None
        raise _api_error(error.errors(include_url=False), value) from None


def _api_error(errors: list[dict], body: Any) -> ApiError:
    """The most helpful of pydantic's errors, in OpenAI's words.

    Each member of a union makes an error. Errors about a value come before errors about a type, then deeper ones, then later ones in an
    array. Equally good errors at the same place are joined.
    """
    places = [_place(error, body) for error in errors]
    place = max(places, key=lambda place: place[0])
    same = [error for error, other in zip(errors, places) if other == place]
    error, path = same[0], place[1]
    where = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path).removeprefix(".")
    if error["type"] in ("missing", "union_tag_not_found"):
        return bad(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    if error["type"] == "extra_forbidden":
        return bad(f"Unrecognized request argument supplied: {_short(path[-1])[1:-1]}", where[:80], "unknown_parameter")
    context = error.get("ctx", {})
    sent = error["input"].get("type") if error["type"] == "union_tag_invalid" else error["input"]
    got = "" if sent == "" else _short(context.get("actual_length", sent))
    what = ("A key of " if error["loc"][-1:] == ("[key]",) else "") + (f"'{where}'" if where else "The body")
    must = " or ".join(dict.fromkeys(map(_must, same))).replace(" or be ", " or ")
    return bad(f"{what} must {must}{got and ', not '}{got}.", where or None)


def _place(error: dict, body: Any) -> tuple[tuple[bool, int, int], list[str | int]]:
    """-> (rank, larger is more helpful; path of fields and indices: pydantic's `loc` without names of union members and wrong keys)."""
    kind, loc, path = error["type"], error["loc"], []
    for step in loc[:-2] if loc[-1:] == ("[key]",) else loc:
        if step in body if isinstance(body, dict) else isinstance(body, list) and isinstance(step, int):
            path.append(step)
            body = body[step]
    path += [loc[-1]] if kind == "missing" else ["type"] if kind.startswith("union_tag") else []
    about_type = kind.endswith("_type") or kind == "missing" or (kind == "literal_error" and not isinstance(error["input"], str))
    return (not about_type, len(path), path[-1] if path and isinstance(path[-1], int) else -1), path


def _must(error: dict) -> str:
    context = {name: str(value).removesuffix(".0").replace("'", "").replace(" or ", ", ") for name, value in error.get("ctx", {}).items()}
    return MUST.get(error["type"], "be valid").format(**context)


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
