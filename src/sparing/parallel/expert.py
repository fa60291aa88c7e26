"""Divides the experts of each mixture among ranks, and brings tokens to them by all-to-all (DeepSeek-V3 §3.2.2).

`parts` consecutive ranks hold all experts of their layers, in order, each an equal part; where there are more ranks, the next ones hold
them again, or, in pipelines, those of other layers. So a part's gradients are those of all tokens of its line of ranks, and are added up
over the ranks that hold the same part. Node-limited routing (`n_group`, `topk_group`) needs nothing here: a group's experts are neighbours,
so they are on neighbouring ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparing.kernels.feed_forward import LOCAL, Dispatched
from sparing.model.experts import Experts
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import answering


@dataclass(frozen=True)
class Pieces:
    """What this rank has of the experts."""

    names: frozenset[str]
    """Parameters of which it has a part of the rows (experts)."""
    part: int
    parts: int
    peers: tuple[int, ...]
    """Ranks that hold the same part, this one too."""
    group: Any
    """Their process group."""
    line: Any
    """Process group of the ranks that hold all parts together, this one among them."""


def divide_experts(model: Transformer, parts: int, rank: int, ranks: int, alike: int | None = None) -> Pieces:
    """Keep of each mixture's experts this rank's part alone, in place, and let tokens come and go by all-to-all. alike: so many consecutive
    ranks hold the same layers; None: all."""
    alike = alike or ranks
    lines = [list(range(start, start + parts)) for start in range(0, ranks, parts)]
    peers = [list(range(first + part, first + alike, parts)) for first in range(0, ranks, alike) for part in range(parts)]
    line = [dist.new_group(members) for members in lines][rank // parts]  # all ranks make all groups
    mine = next(number for number, members in enumerate(peers) if rank in members)
    group = [dist.new_group(members) for members in peers][mine]
    names = set()
    for prefix, module in model.named_modules():
        if isinstance(module, Experts):
            for name in module.weights:
                whole = getattr(module, name)
                piece = nn.Parameter(whole.detach().chunk(parts)[rank % parts].clone(), requires_grad=whole.requires_grad)
                setattr(module, name, piece)
                names.add(f"{prefix}.{name}")
            module.dispatcher = AllToAll(line, parts)
    return Pieces(frozenset(names), rank % parts, parts, tuple(peers[mine]), group, line)


class AllToAll:
    """The dispatcher (`kernels.feed_forward.Dispatcher`) of ranks that hold a part of the experts each."""

    def __init__(self, line: Any, parts: int):
        self.line, self.parts = line, parts

    def dispatch(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, held: int) -> Dispatched:
        flat = experts_NK.flatten()
        to = flat // held
        order = to.argsort(stable=True)
        here = torch.bincount(to, minlength=self.parts)
        there = torch.empty_like(here)
        with answering():
            dist.all_to_all_single(there, here, group=self.line)
        sizes = here.tolist(), there.tolist()
        rows = _Exchange.apply(x_ND.index_select(0, order // experts_NK.shape[1]), self.line, *sizes)
        gates = _Exchange.apply(weights_NK.flatten().index_select(0, order), self.line, *sizes)
        numbers = _exchanged(flat.index_select(0, order) % held, self.line, *sizes)
        local = LOCAL.dispatch(rows, gates[:, None], numbers[:, None], held)
        return Dispatched(*local[:3], (local, sizes, order, experts_NK.shape))

    def combine(self, y_SD: Tensor, sent: Dispatched) -> Tensor:
        local, (here, there), order, shape = sent.back
        rows = _Exchange.apply(LOCAL.combine(y_SD, local), self.line, there, here)
        rows = rows.index_select(0, order.argsort()).view(*shape, -1)
        total = rows[:, 0]
        for k in range(1, shape[1]):  # in the order of choice, as one rank adds them up
            total = total + rows[:, k]
        return total


class _Exchange(torch.autograd.Function):
    """Rows to other ranks, `here` of them to each, `there` from each; gradients the other way."""

    @staticmethod
    def forward(ctx, rows: Tensor, line: Any, here: list[int], there: list[int]) -> Tensor:
        ctx.line, ctx.sizes = line, (there, here)
        return _exchanged(rows, line, here, there)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _exchanged(grad, ctx.line, *ctx.sizes), None, None, None


def _exchanged(rows: Tensor, line: Any, here: list[int], there: list[int]) -> Tensor:
    found = rows.new_empty(sum(there), *rows.shape[1:])
    with answering():
        dist.all_to_all_single(found, rows.contiguous(), there, here, group=line)
    return found
