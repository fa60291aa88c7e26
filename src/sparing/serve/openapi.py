"""The OpenAPI 3.1 document of this server, made of the schemas that bodies are held to."""

from __future__ import annotations

from sparing import __version__
from sparing.serve.requests import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from sparing.serve.schema import Schema

ERROR: Schema = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}
INTEGERS = {"type": "array", "items": {"type": "integer"}}


def answers(kind: str) -> Schema:
    """A whole answer; clients' own types say the rest."""
    choice = {"type": "object", "required": ["index", "finish_reason"]}
    fields: Schema = {"id": {"type": "string"}, "object": {"const": kind}, "model": {"type": "string"}, "usage": {"type": "object"}}
    fields["choices"] = {"type": "array", "items": choice}
    return {"type": "object", "properties": fields, "required": list(fields)}


EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
MODEL = {"type": "object", "properties": {"id": {"type": "string"}, "object": {"const": "model"}}, "required": ["id", "object"]}
MODELS = {"type": "object", "properties": {"data": {"type": "array", "items": MODEL}}, "required": ["data"]}
TOKENS = {"type": "object", "properties": {"tokens": INTEGERS, "count": {"type": "integer"}}, "required": ["tokens", "count"]}
PROMPT = {"type": "object", "properties": {"prompt": {"type": "string"}}, "required": ["prompt"]}
HEALTH = {"type": "object", "properties": {"status": {"type": "string"}}, "required": ["status"]}
POSTS = {
    "/v1/chat/completions": ("Answer a chat", CHAT, answers("chat.completion")),
    "/v1/completions": ("Continue a text", COMPLETION, answers("text_completion")),
    "/tokenize": ("A text as token ids", TOKENIZE, TOKENS),
    "/detokenize": ("Token ids as text", DETOKENIZE, PROMPT),
}
GETS = {"/v1/models": ("The model", MODELS), "/health": ("Is it up?", HEALTH)}


def _content(schema: Schema) -> dict:
    return {"application/json": {"schema": schema}}


def _responses(ok: Schema, stream: bool) -> dict:
    content = _content(ok) | ({"text/event-stream": {"schema": EVENT}} if stream else {})
    errors = {"content": _content({"$ref": "#/components/schemas/Error"})}
    return {"200": {"description": "done", "content": content}, "default": {"description": "an error", **errors}}


def document() -> dict:
    paths: dict = {}
    for path, (summary, body, ok) in POSTS.items():
        operation = {"summary": summary, "requestBody": {"required": True, "content": _content(body)}}
        paths[path] = {"post": operation | {"responses": _responses(ok, path.startswith("/v1"))}}
    for path, (summary, ok) in GETS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses(ok, False)}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"] = {"get": {"summary": "One model", "parameters": [name], "responses": _responses(MODEL, False)}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sparing", "version": __version__, "description": "OpenAI's interface to one model."},
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }
