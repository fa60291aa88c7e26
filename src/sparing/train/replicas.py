"""A micro-batch's rows divided among threads, each with its own copy of the module over the same weights.

Operations of a small model are too short to be worth dividing among cores: two threads that each take half of the rows measured 10 to 18 %
faster than two threads inside each operation (LAB.md, 2026-11-21). Gradients are added in a fixed order, so results are reproducible.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import torch
from torch import Tensor, nn

from sparing.data.loader import Batch
from sparing.kernels import native
from sparing.model.experts import routers
from sparing.model.transformer import Transformer
from sparing.train.objective import Loss, Objective, weight_of


def sharing(model: Transformer) -> Transformer:
    """A twin over the model's own memory: no parameter and no buffer is copied but the expert counts. Its gradients are its own."""
    counts = {id(router.tokens_per_expert) for router in routers(model)}
    made: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in counts}
    made |= {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, made)  # what is in `made` counts as copied already


class Replicas:
    """`count` threads of one operation thread each; with count 1 the caller's thread, and nothing is copied."""

    def __init__(
        self, model: Transformer, objective: Objective | None, count: int = 1, compiled: bool = False, kernels: native.Path = "plain"
    ):
        """objective: None where only `nll` is asked for. compiled: it goes through torch.compile, where nothing is divided. kernels: which
        compute, in all of the threads."""
        self.kernels = kernels
        self.models = [model, *(sharing(model) for _ in range(count - 1))]
        self.objective = objective if count > 1 or not compiled else _compiled(objective)
        # The setting is each thread's own: the optimizer, in the caller's thread, keeps all cores.
        self.pool = ThreadPoolExecutor(count, "sparing-replica", self._prepare) if count > 1 else None

    def _prepare(self) -> None:
        torch.set_num_threads(1)
        native.choose(self.kernels)

    def gradients(
        self, batch: Batch, micro: int | None = None, denominator: float | None = None, share: float = 1.0, count: int | None = None
    ) -> Tensor:
        """Gradients of `batch` into the first model's parameters, `micro` rows at a time (default: all); -> (P,) the objective's parts.

        denominator: what the loss is divided by (default: `weight_of` the batch). share: of the step's sequences, how many are here.
        count: into exactly so many micro-batches instead."""
        total, denominator = len(batch), weight_of(batch) if denominator is None else denominator
        starts = range(0, total, micro or total) if count is None else [total * i // count for i in range(count)]
        parts = []
        for start, end in zip(starts, [*starts[1:], total], strict=True):
            rows = batch[start:end]
            parts.append(self._divided(rows, share * len(rows) / total, denominator))
        return torch.stack(parts).sum(0)

    def _divided(self, batch: Batch, share: float, denominator: float) -> Tensor:
        """A micro-batch's rows among the threads."""
        if self.pool is None:
            with native.path(self.kernels):
                return self._backward(self.models[0], batch, denominator, share)
        count, rows = len(self.models), len(batch)
        pieces = [batch[rows * i // count : rows * (i + 1) // count] for i in range(count)]
        pieces = [piece for piece in pieces if len(piece)]
        with _summing(self.models[: len(pieces)]):
            futures = [
                self.pool.submit(self._backward, model, piece, denominator, share * len(piece) / rows)
                for model, piece in zip(self.models, pieces, strict=False)
            ]
            parts = [future.result() for future in futures]
        self._gather()
        return torch.stack(parts).sum(0)

    def _backward(self, model: Transformer, batch: Batch, denominator: float, share: float) -> Tensor:
        loss = self.objective(model, batch, denominator, share)
        loss.total.backward()
        return loss.parts

    def train(self, mode: bool) -> None:
        """Routers count tokens while training."""
        for model in self.models:
            model.train(mode)

    def nll(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """`Transformer.nll` of (B, T), rows divided; moved to the model's device, (B, T) nats."""
        return self.apply(Transformer.nll, tokens, targets)

    def apply(self, function: Callable[..., Tensor], *rows: Tensor) -> Tensor:
        """`function(model, *rows)` without gradients, its rows divided among the threads; moved to the model's device."""
        rows = tuple(part.to(self.models[0].device) for part in rows)
        if self.pool is None:
            with native.path(self.kernels), torch.no_grad():
                return function(self.models[0], *rows)
        size = -(-len(rows[0]) // len(self.models))
        return torch.cat(list(self.pool.map(torch.no_grad()(function), self.models, *(part.split(size) for part in rows))))

    @torch.no_grad()
    def _gather(self) -> None:
        """The twins' counts into the first model's, and gradients of what did not get one in every piece."""
        for same in zip(*(model.parameters() for model in self.models), strict=True):
            _add(same)
        first, *twins = self.models
        for twin in twins:
            for mine, theirs in zip(routers(first), routers(twin), strict=True):
                mine.tokens_per_expert += theirs.tokens_per_expert
                theirs.tokens_per_expert.zero_()


@torch.no_grad()
def _add(same: Sequence[nn.Parameter]) -> None:
    """Gradients of one parameter's twins into the first one's, in their order."""
    mine, *twins = same
    for theirs in twins:
        if theirs.grad is not None:
            mine.grad = theirs.grad if mine.grad is None else mine.grad.add_(theirs.grad)
            theirs.grad = None


@contextmanager
def _summing(models: list[Transformer]) -> Iterator[None]:
    """Inside, each parameter's gradients are added up as soon as the backward pass of the last of the models has made its
    own: of the twins' there are then never more than a few at once."""
    lock, handles = Lock(), []

    def summing(same: tuple[nn.Parameter, ...]) -> None:
        left = len(same)

        def arrived(_: Tensor) -> None:
            nonlocal left
            with lock:
                left -= 1
                last = not left
            if last:
                _add(same)

        handles.extend(parameter.register_post_accumulate_grad_hook(arrived) for parameter in same)

    if len(models) > 1:
        for same in zip(*(model.parameters() for model in models), strict=True):
            if same[0].requires_grad:
                summing(same)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _compiled(objective: Objective) -> Callable[..., Loss]:
    def run(model, tokens, targets, documents, weights, denominator, share) -> Loss:
        return objective(model, Batch(tokens, targets, documents, weights), denominator, share)

    compiled = torch.compile(run, dynamic=False)
    return lambda model, batch, *rest: compiled(model, batch.tokens, batch.targets, batch.documents, batch.weights, *rest)
