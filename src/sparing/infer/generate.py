"""A trained model for callers other than the server: load it, complete a prompt, answer many prompts in order, score texts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from itertools import chain, count
from pathlib import Path

import torch
from torch import Tensor

from sparing.base.config import Config, UserError
from sparing.base.config_file import read_config
from sparing.base.run import RunFolder
from sparing.data.tokenizer import Tokenizer
from sparing.infer.engine import Engine
from sparing.infer.network import load_transformer
from sparing.infer.request import Piece, Request, Sampling, TextStream
from sparing.model.transformer import Transformer

MAX_REQUESTS = 64
"""Requests at a time: enough to fill every step, few enough for any queue."""


class Model:
    """A run's model in memory, in plain PyTorch."""

    def __init__(self, run: RunFolder, config: Config, network: Transformer, tokenizer: Tokenizer | None):
        self.run, self.config, self.network, self._tokenizer = run, config, network, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError if the run has none (an import without one)."""
        if self._tokenizer is None:
            raise UserError(f"{self.run} has no tokenizer.json: it computes logits, but cannot read or write text")
        return self._tokenizer

    @torch.no_grad()
    def logits(self, tokens) -> Tensor:
        """(B, T) integers -> (B, T, vocab) float32. Raises UserError for other shapes and types."""
        ids = torch.as_tensor(tokens)
        if ids.dim() != 2 or ids.dtype.is_floating_point:
            raise UserError(f"logits takes (B, T) integers, not {tuple(ids.shape)} {ids.dtype}")
        return self.network(ids.long())

    def generate(
        self,
        prompt: str | list[int],
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The text that follows `prompt`. stream: called with each new piece of it. Raises UserError as `complete` does."""
        with Engine(self.run.path, max_batch=1, network=self.network) as engine:
            return complete(engine, prompt, Sampling(max_tokens, temperature, top_p, top_k, seed=seed), stream)[0]


def load(run: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Model:
    """Load a run's newest weights, kept and computed in `dtype`; routers and norms stay float32. Raises UserError if there are none."""
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    network = load_transformer(folder, config.model, device, dtype)
    tokenizer = Tokenizer.load(folder.tokenizer_file, config.tokens) if folder.tokenizer_file.exists() else None
    return Model(folder, config, network, tokenizer)


def complete(engine: Engine, prompt: str | list[int], sampling: Sampling, stream: Callable[[str], None] | None = None) -> tuple[str, int]:
    """-> (the text that follows `prompt`, a text or its tokens; its number of tokens). stream: called with each new piece of text, whole
    characters only.

    `max_tokens` may exceed the context: when the context is full, its last half becomes the new prompt. Raises UserError for prompts and
    settings that the engine refuses, RuntimeError if the engine fails.
    """
    tokenizer, text, parts, generated = engine.tokenizer, TextStream(engine.tokenizer), [], 0
    ids = tokenizer.encode_prompt(prompt) if isinstance(prompt, str) else prompt

    def show(piece: Piece | None) -> None:
        if piece and piece.text:
            parts.append(piece.text)
            if stream:
                stream(piece.text)

    for window in count():
        ids = ids[-(engine.context // 2) :] if len(ids) >= engine.context else ids
        seed = None if sampling.seed is None else sampling.seed + window  # noise depends on seed and position, and positions come again
        request = engine.submit(ids, replace(sampling, max_tokens=sampling.max_tokens - generated, seed=seed))
        for piece in request:
            ids = ids + piece.tokens
            for token in piece.tokens:
                show(text.push(token)[0])
        generated += request.usage["completion_tokens"]
        _check_finished(request)
        if request.finish_reason == "stop" or generated == sampling.max_tokens:
            break
    show(text.finish())
    return "".join(parts), generated


def finished_requests(engine: Engine, prompts: Iterable[tuple[list[int], Sampling]]) -> Iterator[tuple[Request, str]]:
    """-> (finished request, its text) for each (prompt, settings), in order. Raises RuntimeError if the engine fails."""
    running: deque[Request] = deque()
    for prompt in chain(prompts, [None] * MAX_REQUESTS):
        if running and (prompt is None or len(running) == MAX_REQUESTS):
            request = running.popleft()
            text = request.text()
            _check_finished(request)
            yield request, text
        if prompt is not None:
            running.append(engine.submit(*prompt))


def _check_finished(request: Request) -> None:
    if request.finish_reason in ("error", "grammar", "cancelled"):
        raise RuntimeError(f"the engine stopped: {request.error or request.finish_reason}")


def score_tokens(engine: Engine, texts: Iterable[list[int]]) -> Iterator[list[tuple[float, bool]]]:
    """For each text, for each token but the first: (log-probability in nats given those before, whether it was the likeliest)."""
    sampling = Sampling(max_tokens=1, temperature=0, logprobs=1, prompt_logprobs=True)
    for request, _ in finished_requests(engine, ((ids, sampling) for ids in texts)):
        yield [(row.logprob, row.logprob == row.top[0][1]) for row in request.prompt_logprobs]


def generate_texts(engine: Engine, prompts: Iterable[tuple[list[int], dict]]) -> Iterator[str]:
    """The text that follows each (prompt, fields of `Sampling`). Raises UserError for an unknown field."""
    return (text for _, text in finished_requests(engine, ((ids, _sampling(settings)) for ids, settings in prompts)))


def _sampling(settings: dict) -> Sampling:
    known = {field.name for field in fields(Sampling)}
    if unknown := set(settings) - known:
        raise UserError(f"a task's generation setting {min(unknown)!r} is none of {', '.join(sorted(known))}")
    return Sampling(**settings)
