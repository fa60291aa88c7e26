"""Between the engine's thread and asyncio: the choices of one HTTP request, and their pieces as they come."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Sequence

from sparing.base.config import UserError
from sparing.infer.engine import Engine
from sparing.infer.request import Busy, Piece, Request, Sampling
from sparing.serve.errors import ApiError, bad

Ask = tuple[list[int], Sampling]


class Choices:
    """Submits every ask, all or none. Iterate it for (index, piece); a piece of None ends that choice. `cancel` is safe at any time."""

    def __init__(self, engine: Engine, asks: Sequence[Ask]):
        """Raises ApiError: 429 where the engine's queue is full, 400 for what the engine refuses."""
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Piece | None]] = asyncio.Queue()
        self.requests: list[Request] = []
        try:
            for index, (prompt, sampling) in enumerate(asks):
                self.requests.append(engine.submit(prompt, sampling, lambda piece, index=index: self._arrived(index, piece)))
        except Busy as error:
            self.cancel()
            waiting = engine.metrics().get("requests_waiting", 0)
            raise ApiError(429, f"The server is busy: {error}.", code="queue_full", retry_after=1 + math.ceil(waiting / 16)) from None
        except UserError as error:
            self.cancel()
            raise bad(str(error)) from None

    def _arrived(self, index: int, piece: Piece | None) -> None:
        """On the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended before the engine has
            self._loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

    async def __aiter__(self) -> AsyncIterator[tuple[int, Piece | None]]:
        left = len(self.requests)
        while left:
            index, piece = await self._queue.get()
            left -= piece is None
            yield index, piece

    def cancel(self) -> None:
        for request in self.requests:
            request.cancel()

    def usage(self) -> dict[str, int]:
        """Tokens of all choices together; a prompt with several choices counts once (OpenAI's way of counting)."""
        total = dict.fromkeys(("completion_tokens", "drafted", "accepted", "approximate_experts", "approximate_layers"), 0)
        prompts: dict[tuple[int, ...], tuple[int, int]] = {}
        for request in self.requests:
            for name in total:
                total[name] += request.usage[name]
            prompts.setdefault(tuple(request.prompt), (request.usage["prompt_tokens"], request.usage["cached_tokens"]))
        total["prompt_tokens"] = sum(tokens for tokens, _ in prompts.values())
        total["cached_tokens"] = sum(cached for _, cached in prompts.values())
        return total
