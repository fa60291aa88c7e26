"""Divides a model's layers among the ranks of a pipeline, and trains it by the schedules of `torch.distributed.pipelining`.

`stages` ranks are a pipeline. Each holds one chunk of consecutive layers, or two (`schedules.chunks_of`); the last chunk has the output
head and the MTP modules as well. Where there are more ranks, there are more pipelines, which divide the rows of a batch. Ranks that hold
the same layers are neighbours, so that experts can be divided among them: rank = position in the pipeline x pipelines + pipeline.

Between chunks only hidden states travel, and their gradients back. Each rank makes its batch by itself. What the balance of experts adds to
the loss is added where the experts are. An embedding that the last chunk needs too is held at both ends, and learns as one.
"""

from __future__ import annotations

import logging
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparing.base.layers import EMBED
from sparing.data.loader import Batch
from sparing.kernels import native
from sparing.kernels.vocabulary import token_nll
from sparing.model.experts import MoE, RouterElsewhere, routers
from sparing.model.transformer import Block, States, Transformer
from sparing.parallel.ranks import RankLost, answering
from sparing.parallel.schedules import bubble as bubble
from sparing.parallel.schedules import chunks_of, made, places_of


@dataclass(frozen=True)
class Layers:
    """What this rank has of a model's layers, and who has the rest."""

    schedule: str
    spans: tuple[range, ...]
    """The layers of each chunk, by number."""
    ranks: tuple[int, ...]
    """This pipeline's, in their order."""
    line: Any
    """Their process group."""
    peers: tuple[int, ...]
    """Ranks that hold the same layers, this one too: one of each pipeline."""
    group: Any
    """Their process group."""
    ends: tuple[int, ...]
    """The first and last ranks of all pipelines, where both hold the embedding; else nobody."""
    end_group: Any
    """Their process group, where this rank is one of them."""
    whole: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    """Type and shape of every tensor that checkpoints have of the whole model, in their order."""
    holders: dict[str, int]
    """The lowest rank that holds each of them."""
    device: torch.device

    @property
    def position(self) -> int:
        """This rank's place in its pipeline."""
        return self.ranks.index(dist.get_rank())

    @property
    def pipeline(self) -> int:
        return self.peers.index(dist.get_rank())

    def holds(self, name: str) -> bool:
        """Whether this rank holds one of `whole`."""
        return self.holders[name] == self.peers[0] or (name == EMBED and dist.get_rank() in self.ends)

    def rank_of(self, chunk: int) -> int:
        """The rank of this pipeline that has a chunk."""
        return next(rank for place, rank in enumerate(self.ranks) if chunk in chunks_of(self.schedule, len(self.ranks), place))

    def brought(self, name: str, tensor: Tensor | None) -> Tensor | None:
        """A tensor of the model on rank 0, from the lowest rank that holds it, which gives it; None on all others."""
        source, here = self.holders[name], dist.get_rank()
        if here == source == 0:
            return tensor
        with answering():
            if here == source:
                dist.send(tensor.contiguous(), 0)
            elif here == 0:
                dtype, shape = self.whole[name]
                tensor = torch.empty(shape, dtype=dtype, device=self.device)
                dist.recv(tensor, source)
                return tensor
        return None


class Elsewhere(nn.Module):
    """Stands for a layer that another rank holds."""

    def __init__(self, block: Block):
        super().__init__()
        self.gate = RouterElsewhere(block.mlp.c) if isinstance(block.mlp, MoE) else None


def divide_layers(
    model: Transformer, saved: Mapping[str, Tensor], spans: Sequence[range], schedule: str, stages: int, rank: int, ranks: int,
    device: torch.device,
) -> Layers:  # fmt: skip
    """Keep this rank's layers of a model, in place. saved: what checkpoints have of it. spans: the layers of each chunk, `stages` x
    CHUNKS[schedule] of them. device: where the model is, or will be."""
    c, pipelines = model.config, ranks // stages
    whole = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in saved.items()}
    layer_places, end = places_of(schedule, stages, spans, len(model.model.layers))
    both = c.tie_word_embeddings or c.mtp_depth > 0

    def place(name: str) -> int:
        """The first place that holds a tensor."""
        if name == EMBED:
            return 0
        return layer_places[int(name.split(".")[2])] if name.startswith("model.layers.") else end

    mine, pipeline = divmod(rank, pipelines)
    lines = [tuple(range(number, ranks, pipelines)) for number in range(pipelines)]
    peers = [tuple(range(start, start + pipelines)) for start in range(0, ranks, pipelines)]
    ends = (*peers[0], *peers[end]) if both and end else ()
    line = [dist.new_group(members) for members in lines][pipeline]  # all ranks make all groups
    group = [dist.new_group(members) for members in peers][mine]
    end_group = dist.new_group(ends) if ends else None
    for number, block in enumerate(model.model.layers):
        if layer_places[number] != mine:
            model.model.layers[number] = Elsewhere(block)
    if mine and not (mine == end and both):
        model.model.embed_tokens = None
    if mine != end:
        model.model.norm = model.lm_head = None
    routers(model, anew=True)
    holders = {name: peers[place(name)][0] for name in whole}
    return Layers(schedule, tuple(spans), lines[pipeline], line, peers[mine], group, ends, end_group, whole, holders, device)


class Chunk(nn.Module):
    """Consecutive layers of a model on this rank; the first chunk begins with the embedding, the last one ends with the loss."""

    def __init__(self, pipeline: Pipeline, number: int):
        super().__init__()
        model, spans = pipeline.model, pipeline.layers.spans
        self.span, self.first, self.last = spans[number], number == 0, number == len(spans) - 1
        held = [model.model.embed_tokens] if self.first or self.last else []
        held += [model.model.layers[layer] for layer in self.span]
        if self.last:
            held += [*model.model.layers[model.config.num_layers :], model.model.norm, model.lm_head]
        self.held = nn.ModuleList([module for module in held if module is not None])
        self.step = pipeline.step_of

    def forward(self, *x_BTD: Tensor, number: Tensor) -> Tensor:
        """-> hidden states for the next chunk, or the loss. x_BTD: hidden states of the chunk before, in the first one tokens. number: of
        the micro-batch, (1,)."""
        return self.step(self, *x_BTD, int(number))


class Pipeline:
    """This rank's part of the forward and backward passes: what `train.replicas.Replicas` is to a rank that holds all layers."""

    def __init__(self, model: Transformer, objective: Any, layers: Layers, kernels: native.Path = "plain"):
        """model: after `divide_layers`. objective: a `train.objective.Objective`. kernels: which compute."""
        self.model, self.objective, self.layers, self.kernels = model, objective, layers, kernels
        self.chunks = {number: Chunk(self, number) for number in chunks_of(layers.schedule, len(layers.ranks), layers.position)}
        self.balance = getattr(objective, "sequence_balance", 0.0)
        self._made: tuple[tuple[int, ...], Any] | None = None
        logging.getLogger("torch.distributed.pipelining").setLevel(logging.CRITICAL)  # it prints the whole schedule when a rank is gone

    # training

    def gradients(
        self, batch: Batch, micro: int | None = None, denominator: float | None = None, share: float = 1.0, count: int | None = None
    ) -> Tensor:
        """Gradients of `batch` into the parameters that are here; -> (P,) this rank's part of the objective's parts.

        The arguments are those of `Replicas.gradients`; the batch is cut into `count` micro-batches."""
        rows = len(batch) // count
        self._batch, self._rows, self._given = batch, rows, (denominator, share / count)
        self._parts = torch.zeros(len(self.objective.parts), device=self.model.device)
        schedule, numbers = self._schedule(count, rows, batch.tokens.shape[1]), torch.arange(count)
        with native.path(self.kernels), _answering():
            schedule.step(*([batch.tokens] if 0 in self.chunks else []), number=numbers, target=numbers, return_outputs=False)
        self._batch = None
        return self._parts

    def step_of(self, chunk: Chunk, x: Tensor, number: int) -> Tensor:
        """A chunk's forward pass over one micro-batch."""
        batch = self._batch[number * self._rows : (number + 1) * self._rows]
        denominator, share = self._given
        if chunk.last:
            loss = self.objective(_Last(self.model, chunk, x), batch, denominator, share)
            self._parts += loss.parts
            return loss.total
        states = self._through(chunk, x, batch.documents, self.balance > 0)
        if not states.balances:
            return _Leaving.apply(states.hidden, None)
        balance = torch.stack(states.balances).sum() * share
        self._parts[self.objective.parts.index("balance_loss")] += balance.detach()
        return _Leaving.apply(states.hidden, self.balance * balance)

    def _through(self, chunk: Chunk, x: Tensor, documents: Tensor | None = None, want_balance: bool = False) -> States:
        return self.model.through(chunk.span, self.model.embed(x) if chunk.first else x, documents, want_balance=want_balance)

    def _schedule(self, count: int, rows: int, length: int) -> Any:
        """Torch's schedule for micro-batches of this shape; rows and lengths of a run change once at most."""
        if self._made is None or self._made[0] != (count, rows, length):
            stage_of, device, last = _stage_class(), self.model.device, len(self.layers.spans) - 1
            shape, dtype = (rows, length, self.model.config.hidden_size), self.model.compute_dtype
            hidden = torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)
            tokens = torch.empty(rows, length, dtype=torch.int64, device="meta")
            loss = torch.empty((), device="meta", requires_grad=True)
            stages = []
            for number, chunk in self.chunks.items():
                # Shapes are given: torch would find them out by running each chunk, whose routers would count those tokens.
                shapes = tokens if chunk.first else hidden, loss if chunk.last else hidden
                split = None if self._splits(chunk) else _nothing_left
                stages.append(stage_of(chunk, number, last + 1, device, *shapes, group=self.layers.line, dw_builder=split))
            self._made = (count, rows, length), made(self.layers.schedule, stages, count, lambda output, _: output)
        return self._made[1]

    def _splits(self, chunk: Chunk) -> bool:
        """Whether a chunk's gradients of weights are made later than those of its input. Torch cannot where a weight is used at several
        depths: on the way from one to the next it frees what other weights still need (2.13, `stage_backward_weight`). And a layer that is
        computed again for its backward pass would be so twice."""
        c, again = self.model.config, any(getattr(layer, "recompute", False) for layer in self.model.model.layers)
        return not again and (not chunk.last or c.mtp_depth + c.tie_word_embeddings <= 1)

    # evaluation

    def train(self, mode: bool) -> None:
        """Routers count tokens while training."""
        self.model.train(mode)

    @torch.no_grad()
    def nll(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """`Transformer.nll` of (B, T), on all ranks of the pipeline, which call it together; moved to the model's device, (B, T) nats."""
        model, layers = self.model, self.layers
        tokens, targets = tokens.to(model.device), targets.to(model.device)
        parts = max(1, -(-len(tokens) // len(layers.ranks)))  # rows at a time: while one rank has some of them, the next has others
        out, passed, sent = torch.zeros(targets.shape, device=model.device), defaultdict(list), []
        for number, chunk in self.chunks.items():
            before, after = (layers.rank_of(number + step) if 0 <= number + step < len(layers.spans) else None for step in (-1, 1))
            for start in range(0, len(tokens), parts):
                rows = slice(start, start + parts)
                x = tokens[rows]
                if not chunk.first and before == dist.get_rank():
                    x = passed[number].pop(0)
                elif not chunk.first:
                    x = torch.empty(*x.shape, model.config.hidden_size, dtype=model.compute_dtype, device=model.device)
                    with answering():
                        dist.recv(x, before, group=layers.line)
                with native.path(self.kernels):
                    x = self._through(chunk, x).hidden
                    if chunk.last:
                        nll = token_nll(model.model.norm(x).flatten(0, 1), model.head_weight, targets[rows].flatten())
                        out[rows] = nll.view_as(targets[rows])
                        continue
                if after == dist.get_rank():
                    passed[number + 1].append(x)
                else:
                    x = x.contiguous()
                    with answering():
                        sent.append((dist.isend(x, after, group=layers.line), x))
        with answering():
            for work, _ in sent:
                work.wait()
            dist.broadcast(out, layers.rank_of(len(layers.spans) - 1), group=layers.line)
        return out


@cache
def _stage_class() -> type:
    """Torch's `PipelineStage`, whose buffers for what other ranks send are there only while they are needed. Torch's own are made for all
    micro-batches of a step together, and stay."""
    from torch.distributed.pipelining import PipelineStage

    class Stage(PipelineStage):
        def _setup_forward_recv_info(self, *given) -> None:
            self._on_meta(super()._setup_forward_recv_info, *given)

        def _setup_backward_recv_info(self, *given) -> None:
            self._on_meta(super()._setup_backward_recv_info, *given)

        def _on_meta(self, setup: Callable[..., None], *given) -> None:
            self.device, device = torch.device("meta"), self.device
            setup(*given)
            self.device = device

        def get_fwd_recv_ops(self, number: int) -> list:
            self._buffers(self.args_recv_info[number], self.device)
            return super().get_fwd_recv_ops(number)

        def get_bwd_recv_ops(self, number: int) -> list:
            self._buffers(self.grad_recv_info[number], self.device)
            return super().get_bwd_recv_ops(number)

        def backward_one_chunk(self, number: int, *given, **more) -> None:
            super().backward_one_chunk(number, *given, **more)
            self._buffers((*self.args_recv_info[number], *self.grad_recv_info[number]), torch.device("meta"))

        def _buffers(self, received: Iterable[Any], device: torch.device) -> None:
            for one in received:
                if one.buffer is not None:
                    one.buffer = torch.empty_like(one.buffer, device=device, requires_grad=False)

    return Stage


def _nothing_left() -> Callable[[], None]:
    """A `dw_builder` of torch's for chunks that make all gradients in one pass."""
    return lambda: None


class _Last:
    """The model as an objective sees it in the last chunk: its layers begin where hidden states have come in."""

    def __init__(self, model: Transformer, chunk: Chunk, x_BTD: Tensor):
        self.model, self.config, self.next_depth, self._whole = model.model, model.config, model.next_depth, model
        self._chunk, self._x = chunk, x_BTD

    @property
    def head_weight(self) -> Any:
        return self._whole.head_weight

    def states(
        self, tokens_BT: Tensor, documents_BT: Tensor | None = None, positions: Tensor | None = None, want_balance: bool = False
    ) -> States:
        """As `Transformer.states`, of the micro-batch that the hidden states are of."""
        states = self._whole.through(self._chunk.span, self._x, documents_BT, positions, want_balance)
        return states._replace(hidden=self._whole.model.norm(states.hidden))

    def hidden(self, tokens_BT: Tensor, documents_BT: Tensor | None = None, positions: Tensor | None = None) -> Tensor:
        return self.states(tokens_BT, documents_BT, positions).hidden


class _Leaving(torch.autograd.Function):
    """Hidden states on their way to the next chunk, and a part of the loss that is known here already: its gradient is 1. A copy, because
    torch detaches in place what it has sent, which views do not allow."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor | None) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, torch.ones((), device=grad.device) if ctx.needs_input_grad[1] else None


@contextmanager
def _answering() -> Iterator[None]:
    """Around a schedule: raises RankLost where another rank is gone. What a chunk raises, torch wraps into an error with a cause; what
    sending and receiving raise has none and comes from its own code."""
    try:
        yield
    except RuntimeError as error:
        cause = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, RankLost):
            raise cause from None
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        with answering() if Path(dist.__file__).parent in raised_in.parents else nullcontext():
            raise
