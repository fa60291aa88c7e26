"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}, with the HTTP status that its clients map to exceptions."""

from __future__ import annotations

from starlette.responses import JSONResponse

TYPES = {401: "authentication_error", 403: "permission_error", 408: "timeout", 429: "rate_limit_error", 504: "timeout"}


class ApiError(Exception):
    """An error response. retry_after: seconds after which the client should try again."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def body(self) -> dict:
        kind = TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def failed() -> ApiError:
    """A 500: our mistake, whose details are the log's."""
    return ApiError(500, "The server failed; its log says how.", code="server_failed")


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the client's mistake."""
    return ApiError(400, message, param, code)
