"""A micro-batch's rows divided among threads, each with its own copy of the module over the same weights.

Operations of a small model are too short to be worth dividing among cores: two threads that each take half of the rows measured 10 to 18 %
faster than two threads inside each operation (LAB.md, 2026-11-21). Gradients are added in a fixed order, so results are reproducible.
"""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from sparing.model.router import routers
from sparing.model.transformer import Transformer


def _sharing(model: Transformer) -> Transformer:
    """A twin over the model's own memory: no parameter and no buffer is copied but the expert counts. Its gradients are its own."""
    counts = {id(router.tokens_per_expert) for router in routers(model)}
    made: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers() if id(buffer) not in counts}
    made |= {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, made)  # what is in `made` counts as copied already


class Replicas:
    """`count` threads of one operation thread each; with count 1 the caller's thread, and nothing is copied."""

    def __init__(self, model: Transformer, count: int):
        self.models = [model, *(_sharing(model) for _ in range(count - 1))]
        # The setting is each thread's own: the optimizer, in the caller's thread, keeps all cores.
        self.pool = ThreadPoolExecutor(count, "sparing-replica", torch.set_num_threads, (1,)) if count > 1 else None

    def backward(self, tokens: Tensor, targets: Tensor, documents: Tensor | None, share: float = 1.0, loss_fn=None, **options) -> Tensor:
        """Gradients of a micro-batch into the first model's parameters; -> (3,) loss, MTP loss, balance loss.

        tokens (B, T), targets (B, T, K), documents (B, T) or None; share and options: see `Transformer.loss`. loss_fn: a compiled form
        of it, used where nothing is divided.
        """
        if self.pool is None:
            return _one(loss_fn or self.models[0].loss, tokens, targets, documents, share, options)
        rows = [slice(len(tokens) * i // len(self.models), len(tokens) * (i + 1) // len(self.models)) for i in range(len(self.models))]
        rows = [part for part in rows if part.stop > part.start]
        futures = [
            self.pool.submit(
                _one, model.loss, tokens[part], targets[part], None if documents is None else documents[part],
                share * (part.stop - part.start) / len(tokens), options,
            )
            for model, part in zip(self.models, rows, strict=False)
        ]  # fmt: skip
        parts = [future.result() for future in futures]
        self._gather()
        return torch.stack(parts).sum(0)

    def train(self, mode: bool) -> None:
        """Routers count tokens while training."""
        for model in self.models:
            model.train(mode)

    def nll(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """`Transformer.nll` of (B, T), rows divided; moved to the model's device, (B, T) nats."""
        device = self.models[0].model.norm.weight.device
        tokens, targets = tokens.to(device), targets.to(device)
        if self.pool is None:
            return self.models[0].nll(tokens, targets)
        size = -(-len(tokens) // len(self.models))
        return torch.cat(list(self.pool.map(lambda model, *part: model.nll(*part), self.models, tokens.split(size), targets.split(size))))

    @torch.no_grad()
    def _gather(self) -> None:
        """The twins' gradients and counts into the first model's."""
        first, *twins = self.models
        for twin in twins:
            for mine, theirs in zip(first.parameters(), twin.parameters(), strict=True):
                if theirs.grad is not None:
                    mine.grad = theirs.grad if mine.grad is None else mine.grad.add_(theirs.grad)
                    theirs.grad = None
            for mine, theirs in zip(routers(first), routers(twin), strict=True):
                mine.tokens_per_expert += theirs.tokens_per_expert
                theirs.tokens_per_expert.zero_()


def _one(loss_fn, tokens, targets, documents, share: float, options: dict) -> Tensor:
    out = loss_fn(tokens, targets, documents, share=share, **options)
    out.total.backward()
    return torch.stack([out.loss, out.mtp_loss, out.balance]).detach()
