"""What a request may say, as JSON Schema: `check` holds bodies to it, and the OpenAPI document shows the same words.

Names and ranges are OpenAI's (platform.openai.com/docs/api-reference/chat/create, .../completions/create); top_k, min_p,
repetition_penalty and ignore_eos are the extensions that open servers share.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from sparing.serve.errors import ApiError, bad

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 4
Schema = dict[str, Any]


def maybe(schema: Schema) -> Schema:
    """The schema or null, which means the same as absence."""
    return {"anyOf": [schema, {"type": "null"}]}


def number(low: float, high: float, **more) -> Schema:
    return maybe({"type": "number", "minimum": low, "maximum": high, **more})


def integer(low: int, high: int) -> Schema:
    return maybe({"type": "integer", "minimum": low, "maximum": high})


TEXT = {"type": "string"}
TOKEN = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}
TOKENS = {"type": "array", "items": TOKEN, "minItems": 1}
FLAG = maybe({"type": "boolean"})
ANYTHING = {"description": "accepted and ignored"}
NAME = {"type": "string", "pattern": "^[a-zA-Z0-9_-]{1,64}$"}

SAMPLING = {
    "model": {"type": "string", "minLength": 1},
    "temperature": number(0, 2),
    "top_p": maybe({"type": "number", "exclusiveMinimum": 0, "maximum": 1}),
    "top_k": integer(-1, 2**31 - 1),
    "min_p": number(0, 1),
    "presence_penalty": number(-2, 2),
    "frequency_penalty": number(-2, 2),
    "repetition_penalty": number(0.01, 10),
    "seed": integer(-(2**63), 2**63 - 1),
    "stop": maybe(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": MAX_STOPS},
            ]
        }
    ),
    "n": integer(1, MAX_CHOICES),
    "logit_bias": maybe(
        {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,9}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
        }
    ),
    "ignore_eos": FLAG,
    "stream": FLAG,
    "stream_options": maybe({"type": "object", "properties": {"include_usage": FLAG}}),
    "max_tokens": integer(0, 2**31 - 1),
    "user": ANYTHING,
    "metadata": ANYTHING,
    "store": ANYTHING,
    "service_tier": ANYTHING,
    "safety_identifier": ANYTHING,
    "prompt_cache_key": ANYTHING,
}
PART = {"type": "object", "properties": {"type": {"enum": ["text"]}, "text": TEXT}, "required": ["type", "text"]}
CALL = {
    "type": "object",
    "properties": {
        "id": TEXT,
        "type": {"enum": ["function"]},
        "function": {"type": "object", "properties": {"name": TEXT, "arguments": TEXT}, "required": ["name", "arguments"]},
    },
    "required": ["function"],
}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant", "tool"]},
        "content": maybe({"anyOf": [TEXT, {"type": "array", "items": PART}]}),
        "name": maybe(TEXT),
        "tool_call_id": maybe(TEXT),
        "tool_calls": maybe({"type": "array", "items": CALL}),
    },
    "required": ["role"],
}
TOOL = {
    "type": "object",
    "properties": {
        "type": {"enum": ["function"]},
        "function": {
            "type": "object",
            "properties": {"name": NAME, "description": maybe(TEXT), "parameters": maybe({"type": "object"})},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
FORMAT = {
    "anyOf": [
        {"type": "object", "properties": {"type": {"enum": ["text", "json_object"]}}, "required": ["type"]},
        {
            "type": "object",
            "properties": {
                "type": {"enum": ["json_schema"]},
                "json_schema": {
                    "type": "object",
                    "properties": {"name": TEXT, "schema": {"type": "object"}, "strict": FLAG},
                    "required": ["schema"],
                },
            },
            "required": ["type", "json_schema"],
        },
        {"type": "object", "properties": {"type": {"enum": ["grammar"]}, "grammar": TEXT}, "required": ["type", "grammar"]},
    ]
}
CHAT = {
    "type": "object",
    "properties": SAMPLING
    | {
        "messages": {"type": "array", "items": MESSAGE, "minItems": 1},
        "max_completion_tokens": integer(1, 2**31 - 1),
        "logprobs": FLAG,
        "top_logprobs": integer(0, 20),
        "response_format": maybe(FORMAT),
        "tools": maybe({"type": "array", "items": TOOL, "maxItems": 128}),
        "tool_choice": maybe(
            {
                "anyOf": [
                    {"enum": ["none", "auto", "required"]},
                    {
                        "type": "object",
                        "properties": {
                            "type": {"enum": ["function"]},
                            "function": {"type": "object", "properties": {"name": NAME}, "required": ["name"]},
                        },
                        "required": ["function"],
                    },
                ]
            }
        ),
        "parallel_tool_calls": FLAG,
        "reasoning_effort": ANYTHING,
        "verbosity": ANYTHING,
    },
    "required": ["model", "messages"],
    "additionalProperties": False,
}
COMPLETION = {
    "type": "object",
    "properties": SAMPLING
    | {
        "prompt": {
            "anyOf": [
                TEXT,
                TOKENS,
                {"type": "array", "items": {"anyOf": [TEXT, TOKENS]}, "minItems": 1, "maxItems": MAX_PROMPTS},
            ]
        },
        "echo": FLAG,
        "logprobs": integer(0, 20),
        "response_format": maybe(FORMAT),
    },
    "required": ["model", "prompt"],
    "additionalProperties": False,
}
TOKENIZE = {
    "type": "object",
    "properties": {"model": maybe(TEXT), "prompt": TEXT, "add_special_tokens": FLAG},
    "required": ["prompt"],
    "additionalProperties": False,
}
DETOKENIZE = {
    "type": "object",
    "properties": {"model": maybe(TEXT), "tokens": {"type": "array", "items": TOKEN}},
    "required": ["tokens"],
    "additionalProperties": False,
}

KINDS = {
    "object": (dict, "an object"),
    "array": (list, "an array"),
    "string": (str, "a string"),
    "number": ((int, float), "a number"),
    "integer": (int, "an integer"),
    "boolean": (bool, "true or false"),
    "null": (type(None), "null"),
}


class WrongType(ApiError):
    """Not a value out of its range, but another kind of value."""


def wrong_type(message: str, param: str | None) -> WrongType:
    return WrongType(400, message, param)


def parse(body: bytes, schema: Schema) -> dict:
    """A request's body as the schema has it: fields that are null are left out. Raises ApiError 400 naming the field."""
    try:
        value = json.loads(body.decode(), parse_constant=_no_constant)
    except RecursionError:
        raise bad("The body is nested too deeply.") from None
    except ValueError as error:  # invalid UTF-8 and numbers of thousands of digits too
        raise bad(f"The body is not JSON: {str(error)[:200]}") from None
    return check(value, schema)


def _no_constant(name: str):
    raise ValueError(f"{name} is no JSON")


def check(value: Any, schema: Schema, where: str = "") -> Any:
    """`value` held to `schema`: a copy without the optional fields that are null, whole floats as integers. Raises ApiError 400."""
    if "anyOf" in schema:
        return _any_of(value, schema["anyOf"], where)
    if "enum" in schema and (not isinstance(value, str) or value not in schema["enum"]):
        complain = bad if isinstance(value, str) else wrong_type
        raise complain(f"{_the(where)} must be one of {', '.join(schema['enum'])}, not {_short(value)}.", where or None)
    kind = schema.get("type")
    if kind is None:
        return value
    if kind == "integer" and isinstance(value, float) and value.is_integer():
        value = int(value)
    python, name = KINDS[kind]
    if not isinstance(value, python) or (isinstance(value, bool) and kind != "boolean"):
        raise wrong_type(f"{_the(where)} must be {name}, not {_short(value)}.", where or None)
    if kind == "string":
        _check_text(value, schema, where)
    elif kind in ("number", "integer"):
        _check_number(value, schema, where)
    elif kind == "array":
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            raise bad(f"{_the(where)} must have {_span(schema)} entries, not {len(value)}.", where or None)
        return [check(item, schema["items"], f"{where}[{i}]") for i, item in enumerate(value)]
    elif kind == "object":
        return _check_object(value, schema, where)
    return value


def _any_of(value: Any, choices: list[Schema], where: str) -> Any:
    """The first that fits; else the complaint of the one that came furthest: rather about a value than about its type, rather inside."""
    best = None
    for choice in choices:
        try:
            return check(value, choice, where)
        except ApiError as error:
            far = (not isinstance(error, WrongType), len(error.param or ""))
            if best is None or far > best[0]:
                best = (far, error)
    raise best[1]


def _check_text(value: str, schema: Schema, where: str) -> None:
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise bad(f"{_the(where)} has a lone surrogate, which is no Unicode text.", where or None)
    if len(value) < schema.get("minLength", 0):
        raise bad(f"{_the(where)} must not be empty.", where or None)
    if "pattern" in schema and not re.search(schema["pattern"], value):
        raise bad(f"{_the(where)} must match {schema['pattern']}.", where or None)


def _check_number(value: float, schema: Schema, where: str) -> None:
    low, above, high = schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf), schema.get("maximum", math.inf)
    if not (math.isfinite(value) and low <= value <= high and value > above):
        floor = f"above {above:g}" if above > -math.inf else f"at least {low}"
        raise bad(f"{_the(where)} must be {floor} and at most {high}, not {_short(value)}.", where or None)


def _check_object(value: dict, schema: Schema, where: str) -> dict:
    fields, required, out = schema.get("properties", {}), schema.get("required", ()), {}
    for name, item in value.items():
        path = _join(where, name)
        if any("\ud800" <= char <= "\udfff" for char in name):
            raise bad(f"{_the(where)} has a name that is no Unicode text.", where or None)
        rest = schema.get("additionalProperties", {})
        if name not in fields and rest is False:
            raise bad(f"Unrecognized request argument supplied: {_short(name)}", path[:80], "unknown_parameter")
        if "propertyNames" in schema and not re.search(schema["propertyNames"]["pattern"], name):
            raise bad(f"{_the(where)}: {_short(name)} must match {schema['propertyNames']['pattern']}.", where)
        item = check(item, fields.get(name, rest), path)
        if item is not None or name in required:
            out[name] = item
    for name in required:
        if name not in value:
            raise bad(f"Missing required parameter: '{_join(where, name)}'.", _join(where, name), "missing_required_parameter")
    return out


def _join(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _the(where: str) -> str:
    return f"'{where}'" if where else "The body"


def _span(schema: Schema) -> str:
    low, high = schema.get("minItems", 0), schema.get("maxItems")
    return f"at least {low}" if high is None else f"{low} to {high}"


def _short(value: Any) -> str:
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    text = repr(value) if not isinstance(value, str) else value.encode("unicode_escape").decode()
    return text if len(text) <= 60 else text[:57] + "..."
