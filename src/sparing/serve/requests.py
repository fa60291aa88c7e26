"""What a request may say, as JSON Schema: bodies are held to it (`schema.check`), and the OpenAPI document shows the same words.

Names and ranges are OpenAI's (platform.openai.com/docs/api-reference/chat/create, .../completions/create); top_k, min_p,
repetition_penalty and ignore_eos are the extensions that open servers share; tier is ours.
"""

from __future__ import annotations

from sparing.serve.schema import Schema

MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_STOPS = 16
"""OpenAI takes 4; lm-eval's tasks end at up to six and the end of text."""


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
MODEL = maybe({"type": "string", "description": "the name of the served model; left out, null or empty it means the same"})

SAMPLING = {
    "model": MODEL,
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
    "tier": maybe({"enum": ["exact", "approximate"]}),
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
    "required": ["messages"],
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
    "required": ["prompt"],
    "additionalProperties": False,
}
TOKENIZE = {
    "type": "object",
    "properties": {"model": MODEL, "prompt": TEXT, "add_special_tokens": FLAG},
    "required": ["prompt"],
    "additionalProperties": False,
}
DETOKENIZE = {
    "type": "object",
    "properties": {"model": MODEL, "tokens": {"type": "array", "items": TOKEN}},
    "required": ["tokens"],
    "additionalProperties": False,
}
