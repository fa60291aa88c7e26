"""Divides weights among ranks (ZeRO stage 3: arXiv 1910.02054 §5.3) by torch's FSDP2: each rank has a piece of every tensor that learns,
and a layer's pieces are put together when the layer is about to compute.

The optimizer is divided by whole tensors all the same (`owners.Owners`), because Muon needs whole matrices: an owner has a whole copy of
what it owns, the master, which gets the gradient's pieces, is updated, and is cut into pieces again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparing.model.init import give_memory
from sparing.model.transformer import MTPBlock, Transformer
from sparing.parallel.expert import Pieces
from sparing.parallel.owners import Owners
from sparing.parallel.ranks import answering


class Sharded(Owners):
    """Owners of a model whose weights are cut into pieces. What stays as it is (frozen weights, buffers) is whole everywhere; experts that
    are divided among ranks already are not cut again."""

    def __init__(
        self, model: Transformer, parameters: dict[str, nn.Parameter], world: Any, pieces: Pieces | None = None,
        device: torch.device | None = None,
    ):  # fmt: skip
        """Cuts the model's weights, in place. device: where the pieces of a model that is on the meta device get memory, without values."""
        super().__init__(parameters, world, pieces)
        self.shapes = {name: parameter.shape for part in self.parts.values() for name, parameter in part.items()}
        device = device or model.device
        masters = {
            name: nn.Parameter(torch.empty_like(whole, device=device) if whole.is_meta else whole.detach().clone())
            for name, whole in self.parts[world.rank].items()
        }
        shard(model, {parameter for name, parameter in parameters.items() if name not in self.shapes}, device)
        if model.device.type != device.type:
            give_memory(model, device)
        learning = dict(model.named_parameters())
        self.parameters = {name: learning[name] for name in parameters}
        self.parts, self.own_parts = (
            {rank: {name: learning[name] for name in part} for rank, part in parts.items()} for parts in (self.parts, self.own_parts)
        )
        self.mine = masters | self.own_parts.get(world.rank, {})

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        common, self.parts = self.parts, {}
        super().reduce_gradients()  # the experts' parts
        self.parts = common
        for owner, part in common.items():
            for name, parameter in part.items():
                piece = None if parameter.grad is None else parameter.grad.to_local()
                parameter.grad = None
                whole = self._whole(name, torch.zeros_like(parameter.to_local()) if piece is None else piece, owner)
                if whole is not None:
                    self.mine[name].grad = whole

    def broadcast_weights(self) -> None:
        common, self.parts = self.parts, {}
        super().broadcast_weights()
        self.parts = common
        for owner, part in common.items():
            for name in part:
                self.place(name, self.mine[name].detach() if owner == self.world.rank else None, owner)

    @torch.no_grad()
    def place(self, name: str, whole: Tensor | None, owner: int) -> None:
        """Cut what `owner` has of a tensor into the pieces of all ranks. whole: there, what that is."""
        piece = self.parameters[name].to_local()
        padded = piece.new_zeros(self._largest(name))
        pieces = None
        if owner == self.world.rank:
            pieces = [self._padded(name, whole[rows]) for rows in self._rows(name)]
        with answering():
            dist.scatter(padded, pieces, owner)
        piece.copy_(padded[: len(piece)])

    def wholes(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().wholes(state):
            if name in self.shapes:
                whole = self._whole(name, self.parameters[name].to_local(), 0)
                tensor = tensor if whole is None else whole
            yield name, tensor

    @torch.no_grad()
    def fill(self, state: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
        def pieces() -> Iterator[tuple[str, Tensor]]:
            for name, whole in tensors:
                if name in self.shapes and whole.shape == self.shapes[name]:
                    if name in self.mine:
                        self.mine[name].copy_(whole)
                    whole = whole[self._rows(name)[self.world.rank]]
                yield name, whole

        super().fill({name: self.parameters[name].to_local() if name in self.shapes else to for name, to in state.items()}, pieces(), where)

    def _whole(self, name: str, piece: Tensor, rank: int) -> Tensor | None:
        """A tensor from the pieces of all ranks, on one of them."""
        padded = self._padded(name, piece)
        whole = padded.new_empty(self.world.size * len(padded), *padded.shape[1:]) if self.world.rank == rank else None
        with answering():
            dist.gather(padded, None if whole is None else list(whole.chunk(self.world.size)), rank)
        return None if whole is None else whole[: self.shapes[name][0]]

    def _rows(self, name: str) -> list[slice]:
        """Of a tensor's first dimension, those of each rank, as `torch.chunk` cuts."""
        rows, height = self.shapes[name][0], self._largest(name)[0]
        return [slice(min(rows, rank * height), min(rows, (rank + 1) * height)) for rank in range(self.world.size)]

    def _largest(self, name: str) -> tuple[int, ...]:
        """The shape of the largest piece of a tensor."""
        rows, *rest = self.shapes[name]
        return -(-rows // self.world.size), *rest

    def _padded(self, name: str, piece: Tensor) -> Tensor:
        """A piece, filled up to the size of the largest."""
        height = self._largest(name)[0]
        return piece.contiguous() if len(piece) == height else torch.cat([piece, piece.new_zeros(height - len(piece), *piece.shape[1:])])


def shard(model: Transformer, whole: set[nn.Parameter], device: torch.device) -> None:
    """Cut the weights of `model` among all ranks, layer by layer, in place. whole: what stays as it is, besides what does not learn.
    device: where the model is, or will be."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    whole = whole | {parameter for parameter in model.parameters() if not parameter.requires_grad}
    for block in model.model.layers:
        # A module that drafts is entered three times: what was put together at the first stays until its backward pass.
        fully_shard(block, mesh=mesh, reshard_after_forward=not isinstance(block, MTPBlock), ignored_params=whole)
        if isinstance(block, MTPBlock):
            register_fsdp_forward_method(block, "join")
    fully_shard(model, mesh=mesh, reshard_after_forward=False, ignored_params=whole)
    for name in ("states", "nll"):
        register_fsdp_forward_method(model, name)
    for module in (*model.model.layers, model):
        module.set_gradient_divide_factor(1.0)  # sums, as of all other layouts; gloo has no others
        module.set_force_sum_reduction_for_comms(True)
