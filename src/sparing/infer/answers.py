"""What others than a server ask of an engine: one text as long as is wished, many in their order, scores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import chain, count

from sparing.base.config import UserError
from sparing.infer.engine import Engine
from sparing.infer.request import Piece, Request, Sampling
from sparing.infer.text import TextStream

AHEAD = 64
"""Requests under way: enough for every step to be full, few enough for any queue."""


def continued(engine: Engine, prompt: str, sampling: Sampling, stream: Callable[[str], None] | None = None) -> tuple[str, int]:
    """-> (the text that follows a prompt, its tokens). `stream` gets it piece by piece, whole characters only. Where the context is full,
    its last half is read anew, so that `max_tokens` has no limit. Raises UserError for a prompt or settings that cannot be."""
    tokenizer, shown, parts, made = engine.tokenizer, TextStream(engine.tokenizer), [], 0
    ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]

    def show(piece: Piece | None) -> None:
        if piece and piece.text:
            parts.append(piece.text)
            if stream:
                stream(piece.text)

    for window in count():
        ids = ids[-(engine.context // 2) :] if len(ids) >= engine.context else ids
        seed = None if sampling.seed is None else sampling.seed + window  # noise is a position's: with one seed it would come again
        request = engine.submit(ids, replace(sampling, max_tokens=sampling.max_tokens - made, seed=seed))
        for piece in request:
            ids = ids + piece.tokens
            for token in piece.tokens:
                show(shown.push(token)[0])
        made += request.usage["completion_tokens"]
        if request.finish_reason in ("error", "cancelled"):
            raise RuntimeError(f"the engine stopped: {request.error or request.finish_reason}")
        if request.finish_reason == "stop" or made == sampling.max_tokens:
            show(shown.finish())
            return "".join(parts), made
    raise AssertionError


def answers(engine: Engine, asks: Iterable[tuple[list[int], Sampling]]) -> Iterator[tuple[Request, str]]:
    """Each (prompt, settings) as its finished request and what was written. Raises RuntimeError when the engine fails at one."""
    under_way: deque[Request] = deque()
    for ask in chain(asks, [None] * AHEAD):
        if under_way and (ask is None or len(under_way) == AHEAD):
            request = under_way.popleft()
            text = request.text()
            if request.finish_reason in ("error", "cancelled"):
                raise RuntimeError(f"the engine stopped: {request.error or request.finish_reason}")
            yield request, text
        if ask is not None:
            under_way.append(engine.submit(*ask))


def score(engine: Engine, texts: Iterable[list[int]]) -> Iterator[list[tuple[float, bool]]]:
    """Of every token of each text but the first: its log-probability in nats given those before, and whether it was the likeliest."""
    scored = Sampling(max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=True)
    for request, _ in answers(engine, ((ids, scored) for ids in texts)):
        yield [(row.logprob, row.logprob == row.top[0][1]) for row in request.prompt_logprobs]


def write(engine: Engine, asks: Iterable[tuple[list[int], dict]]) -> Iterator[str]:
    """What follows each prompt; settings are `Sampling`'s. Raises UserError for one that it does not have."""
    return (text for _, text in answers(engine, ((ids, _sampling(settings)) for ids, settings in asks)))


def _sampling(settings: dict) -> Sampling:
    known = {field.name for field in fields(Sampling)}
    if unknown := set(settings) - known:
        raise UserError(f"a task's generation setting {min(unknown)!r} is none of {', '.join(sorted(known))}")
    return Sampling(**settings)
