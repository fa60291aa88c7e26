"""Answers over HTTP: the choices of one request, from the engine's thread to asyncio, sent whole or as server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator, Coroutine

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sparing.base.config import UserError
from sparing.infer.engine import Engine
from sparing.infer.request import Busy, Piece, Sampling
from sparing.infer.request import Request as EngineRequest
from sparing.serve.completions import Completion
from sparing.serve.errors import ApiError, bad, failed
from sparing.serve.service import Service


async def respond(service: Service, request: Request, completion: Completion) -> Response:
    """Answer a request. Raises ApiError before the first byte; a stream sends later errors as an event."""
    answer = Answer(service, request, completion)
    if completion.body.get("stream"):
        return EventStream(answer)
    return await _until_gone(answer, answer.whole(), request.receive) or Response(status_code=499)  # nobody reads it


async def _until_gone(answer: Answer, sending: Coroutine, receive: Receive):
    """Run `sending` until its end or until the client hangs up, then end the answer; -> its result, None if the client hung up."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(sending), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
        answer.end()


class Choices:
    """The engine requests of one HTTP request. Iterate it for (index, piece); a piece of None ends that choice."""

    def __init__(self, engine: Engine, prompts: list[tuple[list[int], Sampling]]):
        """Submit all prompts or none. Raises ApiError: 429 if the engine's queue is full, 400 for what the engine refuses."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        self.requests: list[EngineRequest] = []
        try:
            for index, (prompt, sampling) in enumerate(prompts):
                self.requests.append(engine.submit(prompt, sampling, lambda piece, index=index: self._arrived(index, piece)))
        except Busy as error:
            self.cancel()
            waiting = engine.metrics().get("requests_waiting", 0)
            raise ApiError(429, f"The server is busy: {error}.", code="queue_full", retry_after=1 + math.ceil(waiting / 16)) from None
        except UserError as error:
            self.cancel()
            raise bad(str(error)) from None

    def _arrived(self, index: int, piece: Piece | None) -> None:
        """Called on the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the event loop has ended before the engine
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        left = len(self.requests)
        while left:
            index, piece = await self._queue.get()
            left -= piece is None
            yield index, piece

    def cancel(self) -> None:
        """Cancel what still runs; safe at any time."""
        for request in self.requests:
            request.cancel()

    def usage(self) -> dict[str, int]:
        """Tokens of all choices; a prompt with several choices counts once, as OpenAI counts."""
        total = dict.fromkeys(("completion_tokens", "drafted", "accepted", "approximate_experts", "approximate_layers"), 0)
        prompts: dict[tuple[int, ...], tuple[int, int]] = {}
        for request in self.requests:
            for name in total:
                total[name] += request.usage[name]
            prompts.setdefault(tuple(request.prompt), (request.usage["prompt_tokens"], request.usage["cached_tokens"]))
        total["prompt_tokens"] = sum(tokens for tokens, _ in prompts.values())
        total["cached_tokens"] = sum(cached for _, cached in prompts.values())
        return total


class Answer:
    """A running answer: its choices, its usage, and its line in the audit log."""

    def __init__(self, service: Service, request: Request, completion: Completion):
        self.service, self.completion, self.scope = service, completion, request.scope
        self.id, self.created, self._clock = completion.prefix + uuid.uuid4().hex[:24], int(time.time()), time.monotonic()
        self.model = service.model_of(completion.body)
        self.choices = Choices(service.engine, completion.prompts)
        completion.requests = self.choices.requests
        self._energy_mark: float | None = service.energy.begin()
        self._joules: float | None = None
        self.problem: str | None = None

    async def _pieces(self) -> AsyncIterator[tuple[int, list[dict]]]:
        """-> (index, `choices` of the chunks to send). Raises ApiError if the engine fails or takes too long."""
        try:
            async with asyncio.timeout(self.service.settings.answer_s - (time.monotonic() - self._clock)):
                async for index, piece in self.choices:
                    if time.monotonic() - self._clock > self.service.settings.answer_s:
                        raise TimeoutError  # pieces that never have to wait give the timer no turn
                    finish = None if piece else self.choices.requests[index].finish_reason
                    if finish == "grammar":
                        reason = self.choices.requests[index].error
                        raise bad(f"The answer was cut: its schema cannot be followed to the end ({reason}).", code="grammar_failed")
                    if finish in ("error", "cancelled"):
                        raise ApiError(503 if finish == "cancelled" else 500, "The server stopped this answer.", code=finish)
                    yield index, self.completion.push(index, piece, finish)
        except TimeoutError:
            raise ApiError(504, f"The answer took longer than {self.service.settings.answer_s:g} s.", code="timeout") from None

    async def whole(self) -> JSONResponse:
        try:
            async for _ in self._pieces():
                pass
        except Exception as error:
            self.problem = error.code if isinstance(error, ApiError) else failed().code
            raise
        requests = self.choices.requests
        choices = [self.completion.choice(i, request.finish_reason) for i, request in enumerate(requests)]
        self._collect()
        headers = {"openai-processing-ms": str(round(1000 * (time.monotonic() - self._clock)))}
        return JSONResponse(self._frame(self.completion.whole_object) | {"choices": choices, "usage": self._usage()}, headers=headers)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events (html.spec.whatwg.org/multipage/server-sent-events.html), ended by [DONE]."""
        with_usage = (self.completion.body.get("stream_options") or {}).get("include_usage", False)
        frame = self._frame(self.completion.chunk_object) | ({"usage": None} if with_usage else {})
        try:
            async for _, chunks in self._pieces():
                for choice in chunks:
                    yield _event(frame | {"choices": [choice]})
            self._collect()
            if with_usage:
                yield _event(frame | {"choices": [], "usage": self._usage()})
        except ApiError as error:
            self.problem = error.code
            yield _event(error.body())
        except Exception:  # the status has been sent: only an event can tell
            traceback.print_exc(file=sys.stderr)
            self.problem = failed().code
            yield _event(failed().body())
        yield b"data: [DONE]\n\n"

    def _collect(self) -> None:
        """Hold a chat's answer for whoever may judge it: from here on its client can."""
        collection, body = self.service.collection, self.completion.body
        if collection is not None and "messages" in body:
            choices = [self.completion.choice(i, request.finish_reason) for i, request in enumerate(self.choices.requests)]
            collection.remember(self.id, self.scope.get("state", {}).get("key"), self.model, body, choices)

    def _frame(self, kind: str) -> dict:
        service = self.service
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"sparing-{service.engine.weights}",
        }

    def _usage(self) -> dict:
        return self.service.usage(self.choices.usage(), self._energy(), self.choices.requests[-1].approximate)

    def _energy(self) -> float | None:
        if self._energy_mark is not None:
            self._joules, self._energy_mark = self.service.energy.end(self._energy_mark), None
        return self._joules

    def end(self) -> None:
        """Cancel what still runs and write the audit line. Called once, however the answer ended."""
        unfinished = [request for request in self.choices.requests if request.finish_reason is None]
        self.choices.cancel()
        usage, state = self.choices.usage(), self.scope.get("state", {})
        self.service.audit.write(
            {
                "request": state.get("request_id"),
                "key": state.get("key"),
                "client": (self.scope.get("client") or ("", 0))[0],
                "path": self.completion.path,
                "model": self.model,
                "choices": len(self.choices.requests),
                "prompt_tokens": usage["prompt_tokens"],
                "completion_tokens": usage["completion_tokens"],
                "ended": self.problem or ("disconnected" if unfinished else self.choices.requests[-1].finish_reason),
                "seconds": round(time.monotonic() - self._clock, 3),
                "joules": self._energy(),
                "energy": self.service.energy.how,
            },
            {"prompt": self.completion.prompt_text, "answers": self.completion.texts},
        )


def _event(value: dict) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(Response):
    """Sends an answer's events until they end, the client hangs up, or it reads nothing for `send_s`."""

    def __init__(self, answer: Answer):
        self.answer = answer
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [pair for pair in self.raw_headers if pair[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await _until_gone(self.answer, self._send(send), receive)

    async def _send(self, send: Send) -> None:
        async def within(message: dict) -> None:
            await asyncio.wait_for(send(message), self.answer.service.settings.send_s)

        try:
            await within({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.answer.events():
                await within({"type": "http.response.body", "body": event, "more_body": True})
            await within({"type": "http.response.body", "body": b""})
        except TimeoutError:
            self.answer.problem = "slow reader"
            raise SlowReader from None


class SlowReader(Exception):
    """The client reads nothing: its connection is dropped."""
