"""From a request's choices to an HTTP answer: whole, or as server-sent events while it is written."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sparing.serve.chat import Chat
from sparing.serve.completions import Completion
from sparing.serve.errors import ApiError
from sparing.serve.service import Service
from sparing.serve.streams import Choices


async def answer(service: Service, request: Request, form: Chat | Completion) -> Response:
    """Raises ApiError before the first byte; a stream tells later errors as an event."""
    job = Job(service, request, form)
    if form.body.get("stream"):
        return EventStream(job)
    work = asyncio.ensure_future(job.whole())
    gone = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=499)  # nobody reads it
    finally:
        for task in (work, gone):
            task.cancel()
        job.end()


async def _gone(receive: Receive) -> None:
    """Returns when the client has hung up."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Job:
    """The choices of a request under way, counted and written down when it ends."""

    def __init__(self, service: Service, request: Request, form: Chat | Completion):
        self.service, self.form, self.scope = service, form, request.scope
        self.id, self.created, self._clock = form.prefix + uuid.uuid4().hex[:24], int(time.time()), time.monotonic()
        self.choices = Choices(service.engine, form.asks)
        form.requests = self.choices.requests
        self._mark: float | None = service.energy.begin()
        self._joules: float | None = None
        self.problem: str | None = None

    async def _pieces(self) -> AsyncIterator[tuple[int, list[dict]]]:
        """(index, the chunks' choices). Raises ApiError when the engine fails or takes too long."""
        try:
            async with asyncio.timeout(self.service.settings.answer_s - (time.monotonic() - self._clock)):
                async for index, piece in self.choices:
                    if time.monotonic() - self._clock > self.service.settings.answer_s:
                        raise TimeoutError  # pieces that are always there already give a timer no turn
                    finish = None if piece else self.choices.requests[index].finish_reason
                    if finish in ("error", "cancelled"):
                        raise ApiError(503 if finish == "cancelled" else 500, "The server stopped this answer.", code=finish)
                    yield index, self.form.push(index, piece, finish)
        except TimeoutError:
            raise ApiError(504, f"The answer took longer than {self.service.settings.answer_s:g} s.", code="timeout") from None

    async def whole(self) -> JSONResponse:
        try:
            async for _ in self._pieces():
                pass
        except ApiError as error:
            self.problem = error.code
            raise
        requests = self.choices.requests
        found = [self.form.choice(i, request.finish_reason) for i, request in enumerate(requests)]
        return JSONResponse(self._frame(self.form.whole_object) | {"choices": found, "usage": self._usage()}, headers=self._headers())

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events (html.spec.whatwg.org/multipage/server-sent-events.html), ended by [DONE]."""
        counted = (self.form.body.get("stream_options") or {}).get("include_usage", False)
        frame = self._frame(self.form.chunk_object) | ({"usage": None} if counted else {})
        try:
            async for _, chunks in self._pieces():
                for choice in chunks:
                    yield _event(frame | {"choices": [choice]})
            if counted:
                yield _event(frame | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            self.problem = error.code
            yield _event(error.body())
        yield b"data: [DONE]\n\n"

    def _frame(self, kind: str) -> dict:
        service = self.service
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": service.name,
            "system_fingerprint": f"sparing-{service.engine.weights}",
        }

    def _headers(self) -> dict[str, str]:
        return {"openai-processing-ms": str(round(1000 * (time.monotonic() - self._clock)))}

    def _usage(self) -> dict:
        return self.service.usage(self.choices.usage(), self._energy(), self.choices.requests[-1].approximate)

    def _energy(self) -> float | None:
        if self._mark is not None:
            self._joules, self._mark = self.service.energy.end(self._mark), None
        return self._joules

    def end(self) -> None:
        """Cancels what still runs; once, whatever happened."""
        unfinished = [request for request in self.choices.requests if request.finish_reason is None]
        self.choices.cancel()
        usage, state = self.choices.usage(), self.scope.get("state", {})
        self.service.audit.write(
            {
                "request": state.get("request_id"),
                "key": state.get("key"),
                "client": (self.scope.get("client") or ("", 0))[0],
                "path": self.form.path,
                "model": self.service.name,
                "choices": len(self.choices.requests),
                "prompt_tokens": usage["prompt_tokens"],
                "completion_tokens": usage["completion_tokens"],
                "ended": self.problem or ("disconnected" if unfinished else self.choices.requests[-1].finish_reason),
                "seconds": round(time.monotonic() - self._clock, 3),
                "joules": self._energy(),
                "energy": self.service.energy.how,
            },
            {"prompt": self.form.prompt_text, "answers": self.form.text()},
        )


def _event(value: dict) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends a job's events; ends it when they end, when the client hangs up, or when it reads nothing for `send_s`."""

    def __init__(self, job: Job):
        self.job = job
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            self.job.end()

    async def _send(self, send: Send) -> None:
        async def within(message: dict) -> None:
            await asyncio.wait_for(send(message), self.job.service.settings.send_s)

        try:
            await within({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.job.events():
                await within({"type": "http.response.body", "body": event, "more_body": True})
            await within({"type": "http.response.body", "body": b""})
        except TimeoutError:
            self.job.problem = "slow reader"
            raise Hung from None


class Hung(Exception):
    """The client takes nothing: its connection is dropped."""
