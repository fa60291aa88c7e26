"""Many prompts through an engine, answers in the order of the prompts: for evaluations."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import fields
from itertools import chain

from sparing.config import UserError
from sparing.infer.engine import Engine
from sparing.infer.request import Request, Sampling

AHEAD = 64
"""Requests under way: enough for every step to be full, few enough for any queue."""


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
