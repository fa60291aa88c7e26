"""What every request passes, whatever its route: an id, the host it asked for, a key, counting, and no stack trace on the way out."""

from __future__ import annotations

import re
import sys
import traceback
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparing.serve.answer import Hung
from sparing.serve.errors import ApiError
from sparing.serve.service import Service
from sparing.serve.settings import LOCAL

OPEN = ("/", "/health", "/favicon.ico", "/openapi.json")
"""Paths that need no key: they tell nothing that anybody wrote."""
PATHS = (*OPEN, "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize")
"""Paths that are counted by name; whatever else a client asks for is "other"."""
HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Gate:
    """ASGI middleware around the whole application."""

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
        except (ClientDisconnect, Hung):
            pass  # nobody reads on
        except Exception:
            traceback.print_exc(file=sys.stderr)
            if not status:
                await ApiError(500, "The server failed; its log says how.").response()(scope, receive, sending)
        finally:
            self.service.counts[scope["path"] if scope["path"] in PATHS else "other", status or 499] += 1

    def _admit(self, scope: Scope, state: dict) -> None:
        settings, headers = self.service.settings, Headers(scope=scope)
        if not settings.keys:
            # A page of the web that makes its own name mean 127.0.0.1 (DNS rebinding) gives itself away by that name.
            host = re.sub(r":\d*$", "", headers.get("host", "")).strip("[]")
            if settings.local and host not in LOCAL:
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
