"""The HTTP application: the checks that every request passes, and the routes."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import sys
import traceback
import uuid
from collections.abc import Awaitable, Callable
from functools import cache, partial
from importlib.resources import files

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparing.account.power import resident_memory
from sparing.serve import requests
from sparing.serve.answer import SlowReader, respond
from sparing.serve.completions import ChatCompletion, TextCompletion
from sparing.serve.errors import ApiError, failed
from sparing.serve.openapi import document
from sparing.serve.service import Service
from sparing.serve.settings import LOCAL

OPEN = ("/", "/health", "/favicon.ico", "/openapi.json")
"""Paths that need no key: they show nothing that a user wrote."""
PATHS = (*OPEN, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/v1/feedback")
"""Paths that are counted by name; all others count as "other"."""
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Gate:
    """ASGI middleware around the whole application: request ids, host and key checks, counts, errors without stack traces."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        state["request_id"] = f"req_{uuid.uuid4().hex[:24]}"
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = state["request_id"]
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            self._admit(scope, state)
            await self.app(scope, receive, sending)
        except ApiError as error:
            await error.response()(scope, receive, sending)
        except (ClientDisconnect, SlowReader):
            pass  # nobody reads the answer
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if not status:
                await failed().response()(scope, receive, sending)
        finally:
            self.service.counts[scope["path"] if scope["path"] in PATHS else "other", status or 499] += 1

    def _admit(self, scope: Scope, state: dict) -> None:
        settings, headers = self.service.settings, Headers(scope=scope)
        if not settings.keys:
            # A web page may make its own host name resolve to 127.0.0.1 (DNS rebinding); the host header shows that name.
            host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]").rstrip(".").lower()
            if settings.host in LOCAL and host not in LOCAL:
                raise ApiError(403, f"This server answers to localhost only; for the name {host[:100]!r} it needs --api-key-file.")
        elif scope["path"] not in OPEN and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not given:
                raise ApiError(401, "You didn't provide an API key: send it as `Authorization: Bearer KEY`.", code="missing_api_key")
            state["key"] = settings.key_of(given.strip())
            if state["key"] is None:
                raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key")
        if self.service.draining and scope["path"] != "/health":
            raise ApiError(503, "The server is shutting down.", code="shutting_down", retry_after=10)


async def read(service: Service, request: Request, model: type[requests.Body]) -> dict:
    """The request's body, checked. Raises ApiError 408, 413, 415, 400, 404."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # also stops forms of other web pages, which browsers send without CORS
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
    request.state.size = size
    body = await service.work(size, requests.parse, b"".join(parts), model)
    if body.get("model"):  # an empty name means none, as in vLLM: some clients send it
        service.check_model(body["model"])
    return body


async def chat(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Chat)
    return await respond(service, request, await service.work(request.state.size, ChatCompletion, service, body))


async def completions(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Completion)
    return await respond(service, request, await service.work(request.state.size, TextCompletion, service, body))


async def models(service: Service, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [_model(service, name) for name in service.templates]})


async def model(service: Service, request: Request) -> Response:
    service.check_model(request.path_params["name"])
    return JSONResponse(_model(service, request.path_params["name"]))


def _model(service: Service, name: str) -> dict:
    engine = service.engine
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "sparing",
        "kind": "base" if service.templates[name].plain else "chat",  # base: no chat template of its own
        **({} if name == service.name else {"parent": service.name}),
        "context_length": engine.context,
        "weights": engine.weights,
        "tiers": ["exact", "approximate"] if engine.approximate else ["exact"],
        "collects": service.collection is not None,
    }


async def tokenize(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Tokenize)
    tokenizer = service.engine.tokenizer

    def answer() -> Response:
        ids = tokenizer.encode(body["prompt"])
        ids = [*tokenizer.start, *ids] if body.get("add_special_tokens", True) else ids
        return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": service.engine.context})

    return await service.work(request.state.size, answer)


async def detokenize(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Detokenize)

    def answer() -> Response:
        service.check_tokens("tokens", body["tokens"], service.vocab_size)
        return JSONResponse({"prompt": service.engine.tokenizer.decode(body["tokens"])})

    return await service.work(request.state.size, answer)


async def feedback(service: Service, request: Request) -> Response:
    body = await read(service, request, requests.Feedback)
    judge, key = service.collecting().judge, getattr(request.state, "key", None)
    verdict = key, body["id"], body["verdict"], body.get("correction"), body.get("choice", 0)
    return JSONResponse(await service.work(request.state.size, judge, *verdict))


async def forget(service: Service, request: Request) -> Response:
    key, answer_id = getattr(request.state, "key", None), request.path_params["id"]
    return JSONResponse(await service.work(0, service.collecting().delete, key, answer_id[:100]))


async def health(service: Service, request: Request) -> Response:
    return JSONResponse({"status": "draining" if service.draining else "ok"}, 503 if service.draining else 200)


async def metrics(service: Service, request: Request) -> Response:
    """Prometheus' text format (prometheus.io/docs/instrumenting/exposition_formats)."""
    lines = []
    for name, value in sorted(service.engine.metrics().items()):
        lines += [f"# TYPE sparing_{name} {'counter' if name.endswith('_total') else 'gauge'}", f"sparing_{name} {value:.10g}"]
    lines.append("# TYPE sparing_http_requests_total counter")
    for (path, status), count in sorted(service.counts.items()):
        lines.append(f'sparing_http_requests_total{{path="{path}",status="{status}"}} {count}')
    lines += ["# TYPE sparing_audit_lost_total counter", f"sparing_audit_lost_total {service.audit.lost}"]
    lines += ["# TYPE sparing_energy_joules_total counter", f"sparing_energy_joules_total {service.energy.total():.6g}"]
    lines += ["# TYPE sparing_resident_bytes gauge", f"sparing_resident_bytes {resident_memory()}"]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4")


async def openapi(service: Service, request: Request) -> Response:
    return JSONResponse(document())


@cache
def page_and_policy() -> tuple[str, str]:
    """The chat page: (HTML, Content-Security-Policy). Only its own script and style run, by their hashes; it contacts no other host."""
    text = files("sparing.serve").joinpath("chat.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" for part in parts)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'self'; require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return text, policy


async def page(service: Service, request: Request) -> Response:
    text, policy = page_and_policy()
    return HTMLResponse(text, headers={"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


async def icon(service: Service, request: Request) -> Response:
    return Response(files("sparing.serve").joinpath("icon.svg").read_bytes(), media_type="image/svg+xml")


ROUTES: list[tuple[str, str, Callable[[Service, Request], Awaitable[Response]]]] = [
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
    ("POST", "/v1/feedback", feedback),
    ("DELETE", "/v1/feedback/{id}", forget),
]


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _failure(request: Request, error: Exception) -> Response:
    """Starlette raises the error again afterwards: `Gate` logs it."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    return failed().response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = f"{request.method} {request.url.path[:200]}"
    message = {404: f"There is no {what}.", 405: f"{what}: another method is needed."}.get(error.status_code, error.detail)
    response = ApiError(error.status_code, message).response()
    response.headers.update(error.headers or {})
    return response


def application(service: Service) -> Gate:
    """The whole server as an ASGI application."""

    routes = [Route(path, partial(endpoint, service), methods=[method]) for method, path, endpoint in ROUTES]
    middleware = []
    if service.settings.origins:
        middleware.append(
            Middleware(
                CORSMiddleware, allow_origins=list(service.settings.origins), allow_methods=["*"], allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )  # fmt: skip
    handlers = {ApiError: _api_error, HTTPException: _http_error, Exception: _failure}
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=handlers)
    app.router.redirect_slashes = False
    return Gate(app, service)
