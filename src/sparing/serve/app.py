"""The routes."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from importlib.resources import files

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from sparing.serve import requests
from sparing.serve.answer import answer
from sparing.serve.body import parse
from sparing.serve.chat import Chat
from sparing.serve.completions import Completion
from sparing.serve.errors import ApiError, bad
from sparing.serve.gate import Gate
from sparing.serve.metrics import prometheus
from sparing.serve.openapi import document
from sparing.serve.page import page_and_policy
from sparing.serve.service import Service

Endpoint = Callable[[Service, Request], Awaitable[Response]]


async def read(service: Service, request: Request, model: type[requests.Body]) -> dict:
    """The body, held to its model. Raises ApiError 408, 413, 415, 400, 404."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # also keeps forms of other web pages out, which browsers send without asking
        raise ApiError(415, f"The body must be JSON with `Content-Type: application/json`, not {kind[:50] or 'none'}.")
    limit, parts, size = service.settings.max_body, [], 0
    length = request.headers.get("content-length", "")
    too_long = ApiError(413, f"The body is longer than {limit} bytes.", code="body_too_large")
    if length.isdigit() and len(length) < 20 and int(length) > limit:
        raise too_long
    try:
        async with asyncio.timeout(service.settings.body_s):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_long
                parts.append(part)
    except TimeoutError:
        raise ApiError(408, f"The body did not arrive within {service.settings.body_s:g} s.") from None
    body = await asyncio.to_thread(parse, b"".join(parts), model)
    if body.get("model"):  # an empty name is none, as to vLLM: clients whose form has no model send it
        service.known(body["model"])
    return body


async def chat(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Chat)
    return await answer(service, request, await asyncio.to_thread(Chat, service, body))


async def completions(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Completion)
    return await answer(service, request, await asyncio.to_thread(Completion, service, body))


async def models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(service)]})


async def model(service: Service, request: Request) -> Response:
    service.known(request.path_params["name"])
    return JSONResponse(_model(service))


def _model(service: Service) -> dict:
    engine = service.engine
    return {
        "id": service.name,
        "object": "model",
        "created": service.started,
        "owned_by": "sparing",
        "kind": service.kind,  # base: no chat template of its own
        "context_length": engine.context,
        "weights": engine.weights,
        "tiers": ["exact", "approximate"] if engine.approximate else ["exact"],
    }


async def tokenize(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Tokenize)
    tokenizer = service.engine.tokenizer
    ids = await asyncio.to_thread(tokenizer.encode, body["prompt"])
    ids = [tokenizer.eot_id, *ids] if body.get("add_special_tokens", True) else ids
    return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.engine.context})


async def detokenize(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Detokenize)
    wrong = next((token for token in body["tokens"] if token >= service.vocab_size), None)
    if wrong is not None:
        raise bad(f"'tokens': {wrong} is no token; they end at {service.vocab_size - 1}.", "tokens")
    return JSONResponse({"prompt": await asyncio.to_thread(service.engine.tokenizer.decode, body["tokens"])})


async def health(service: Service, request: Request) -> Response:
    return JSONResponse({"status": "draining" if service.draining else "ok"}, 503 if service.draining else 200)


async def metrics(service: Service, request: Request) -> Response:
    return PlainTextResponse(prometheus(service), media_type="text/plain; version=0.0.4")


async def openapi(service: Service, request: Request) -> Response:
    return JSONResponse(document())


async def page(service: Service, request: Request) -> Response:
    text, policy = page_and_policy()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


async def icon(service: Service, request: Request) -> Response:
    return Response(files("sparing.serve").joinpath("icon.svg").read_bytes(), media_type="image/svg+xml")


ROUTES: list[tuple[str, str, Endpoint]] = [
    ("GET", "/", page),
    ("GET", "/favicon.ico", icon),
    ("GET", "/health", health),
    ("GET", "/metrics", metrics),
    ("GET", "/openapi.json", openapi),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{name:path}", model),
    ("POST", "/v1/chat/completions", chat),
    ("POST", "/v1/completions", completions),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
]


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = {404: f"There is no {what}.", 405: f"{what}: another method is needed."}.get(error.status_code, error.detail)
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


def application(service: Service) -> Gate:
    """The whole server as an ASGI application."""

    def bound(endpoint: Endpoint):
        @functools.wraps(endpoint)
        async def call(request: Request) -> Response:
            return await endpoint(service, request)

        return call

    routes = [Route(path, bound(endpoint), methods=[method]) for method, path, endpoint in ROUTES]
    middleware = []
    if service.settings.origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=list(service.settings.origins), allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )  # fmt: skip
    app = Starlette(routes=routes, middleware=middleware, exception_handlers={ApiError: _api_error, HTTPException: _http_error})
    app.router.redirect_slashes = False
    return Gate(app, service)
