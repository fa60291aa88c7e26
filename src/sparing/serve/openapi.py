"""The server's OpenAPI 3.1 document, made from the models in `requests`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, create_model
from pydantic.json_schema import models_json_schema

from sparing import __version__
from sparing.serve import requests


def answers(name: str, kind: str) -> type[BaseModel]:
    """A whole answer, without the details that clients have types for."""
    return create_model(name, id=str, object=Literal[kind], model=str, usage=dict[str, Any], choices=list[AnswerChoice])


AnswerChoice = create_model("AnswerChoice", index=int, finish_reason=str)
Error = create_model("Error", error=create_model("ErrorBody", message=str, type=str, param=str | None, code=str | None))
Event = create_model("Event", data=str)
ServedModel = create_model("ServedModel", id=str, object=Literal["model"])
Models = create_model("Models", data=list[ServedModel])
TokenIds = create_model("TokenIds", tokens=list[int], count=int)
Prompt = create_model("Prompt", prompt=str)
Health = create_model("Health", status=str)
Verdict = create_model("Verdict", id=str, verdict=str, stored=bool)
Deleted = create_model("Deleted", id=str, deleted=bool)
POSTS = {
    "/v1/chat/completions": ("Answer a chat", requests.Chat, answers("ChatAnswer", "chat.completion")),
    "/v1/completions": ("Continue a text", requests.Completion, answers("CompletionAnswer", "text_completion")),
    "/tokenize": ("A text as token ids", requests.Tokenize, TokenIds),
    "/detokenize": ("Token ids as text", requests.Detokenize, Prompt),
    "/v1/feedback": ("Accept, correct or reject an answer, where the server collects that", requests.Feedback, Verdict),
}
GETS = {
    "/v1/models": ("The model", Models),
    "/v1/models/{name}": ("One model", ServedModel),
    "/health": ("Is it up?", Health),
}


def _content(model: type[BaseModel]) -> dict:
    return {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}


def _responses(ok: type[BaseModel], stream: bool) -> dict:
    content = {"application/json": _content(ok)} | ({"text/event-stream": _content(Event)} if stream else {})
    error = {"description": "an error", "content": {"application/json": _content(Error)}}
    return {"200": {"description": "done", "content": content}, "default": error}


def document() -> dict:
    paths: dict = {}
    for path, (summary, body, ok) in POSTS.items():
        request = {"required": True, "content": {"application/json": _content(body)}}
        paths[path] = {"post": {"summary": summary, "requestBody": request, "responses": _responses(ok, path.endswith("completions"))}}
    for path, (summary, ok) in GETS.items():
        paths[path] = {"get": {"summary": summary, "responses": _responses(ok, False)}}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    one = {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
    forget = {"summary": "Delete what was kept of an answer", "parameters": [one], "responses": _responses(Deleted, False)}
    paths["/v1/feedback/{id}"] = {"delete": forget}
    models = [model for row in (*POSTS.values(), *GETS.values()) for model in row[1:]] + [Error, Event, Deleted]
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template="#/components/schemas/{model}")
    return {
        "openapi": "3.1.0",
        "info": {"title": "Sparing", "version": __version__, "description": "OpenAI's interface to one model."},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }
