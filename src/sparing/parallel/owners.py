"""Divides an optimizer among ranks by whole tensors (ZeRO stage 1: Rajbhandari and others, arXiv 1910.02054 §5.1).

Each tensor that learns has an owner: the rank to which its gradients are added up, which alone keeps its averages and updates it, and which
then tells the others. No matrix is cut, so Muon's step is the same as on one rank, and a checkpoint has the same tensors for any number of
ranks. What it takes is what adding up gradients everywhere takes: each number goes to its owner once, and back once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sparing.base.layers import EMBED
from sparing.base.run import fill
from sparing.parallel.expert import Pieces
from sparing.parallel.pipeline import Layers
from sparing.parallel.ranks import answering


def owners_of(sizes: Mapping[str, int], ranks: int) -> dict[str, int]:
    """Which rank owns each tensor: the largest first, each to the rank that has least; the same for the same names and sizes."""
    owners, loads = {}, [0] * ranks
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += sizes[name]
    return owners


class Replicated:
    """No owners: every rank has all gradients, and makes every update itself. All ranks call the same methods in the same order."""

    mine: dict[str, nn.Parameter] | None = None
    """What this rank updates, by name; None: everything."""

    def __init__(self, parameters: Mapping[str, Tensor], world: Any):
        """world: a `train.world.World`."""
        self.parameters, self.world = parameters, world

    def reduce_gradients(self) -> None:
        """Add up the gradients of all ranks."""
        self.world.sum([parameter.grad for parameter in self._learning(self.parameters)])

    def norm(self, mine: Tensor) -> Tensor:
        """The L2 norm of all gradients, (1,), from that of those that are here."""
        return mine.reshape(1)

    def broadcast_weights(self) -> None:
        """Give every rank the weights that others have updated."""

    def fill(self, state: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
        """Copy whole tensors, which every rank reads, into a state dict of the model (`base.run.fill`)."""
        fill(state, tensors, where)

    def wholes(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """A state dict of the model with whole tensors, one at a time. All ranks go through it; what rank 0 gets counts."""
        yield from state.items()

    def layout(self, state: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and shape of what `wholes` gives."""
        return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()}

    def labelled(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of the optimizer's state, with names that say which part of a tensor it is where it is one."""
        return dict(moments)

    def moments(self, labelled: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """What `labelled` gave on all ranks, however many they were -> the optimizer's state by name, as it is on this one."""
        found: dict[str, dict[int, Tensor]] = defaultdict(dict)
        for label, tensor in labelled:
            match = LABEL.fullmatch(label)
            if match is None:
                yield label, tensor
                continue
            name, part, parts = match[1], int(match[2]), int(match[3])
            found[name][part] = tensor
            if len(found[name]) == parts:
                pieces = found.pop(name)
                yield name, torch.cat([pieces[part] for part in range(parts)]) if tensor.ndim else tensor

    def _learning(self, parameters: Mapping[str, Tensor], group: Any = None) -> list[Tensor]:
        """Those that have a gradient on some rank of a group. Where it has none on this one, it is zero: no row here needed it."""
        parameters = list(parameters.values())
        if self.world.size > 1 and parameters:
            reached = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
            self.world.sum([reached], group)
            for parameter, count in zip(parameters, reached.tolist(), strict=True):
                if count and parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return [parameter for parameter in parameters if parameter.grad is not None]


class Owners(Replicated):
    """Each parameter that learns has an owner among the ranks that hold it; of experts that are divided among ranks, each part."""

    def __init__(self, parameters: Mapping[str, Tensor], world: Any, pieces: Pieces | None = None, layers: Layers | None = None):
        """layers: of this rank, where it is one of a pipeline."""
        super().__init__(parameters, world)
        cut = pieces.names if pieces else frozenset()
        ends = {EMBED} if layers and world.rank in layers.ends else frozenset()
        self.pieces, self.layers = pieces, layers
        self.group = layers.group if layers else None
        """Of the ranks that hold the same layers."""
        common = {name: p for name, p in parameters.items() if name not in cut and name not in ends}
        self.parts = _by_owner(common, layers.peers if layers else range(world.size))
        """By rank: what it owns of what all of them have."""
        self.own_parts = _by_owner({name: p for name, p in parameters.items() if name in cut}, pieces.peers if pieces else [])
        """By rank: what it owns of what the ranks that hold the same experts have."""
        self.end_parts = _by_owner({name: p for name, p in parameters.items() if name in ends}, layers.ends if layers else [])
        """By rank: what it owns of what the ranks at both ends of the pipelines have."""
        self.mine = {name: p for parts, _ in self._parts() for name, p in parts[world.rank].items()}

    @torch.no_grad()
    def reduce_gradients(self) -> None:
        """Add up the gradients of all ranks, each at its owner; those of others are freed."""
        at_ends = {name: parameter for part in self.end_parts.values() for name, parameter in part.items()}
        self._learning({name: parameter for name, parameter in self.parameters.items() if name not in at_ends}, self.group)
        if at_ends:
            self._learning(at_ends, self.layers.end_group)
        for parts, group in self._shared():
            for rank, part in parts.items():
                learning = [parameter for parameter in part.values() if parameter.grad is not None]
                self.world.reduce([parameter.grad for parameter in learning], rank, group)
                if rank != self.world.rank:
                    for parameter in learning:
                        parameter.grad = None

    def norm(self, mine: Tensor) -> Tensor:
        square = mine.double().square().reshape(1)
        self.world.sum([square])
        return square.sqrt().to(mine.dtype)

    @torch.no_grad()
    def broadcast_weights(self) -> None:
        for parts, group in self._shared():
            for rank, part in parts.items():
                self.world.broadcast([parameter.data for parameter in part.values()], rank, group)

    def _parts(self) -> list[tuple[dict[int, dict[str, Tensor]], Any]]:
        """(what each rank owns, the process group that has it)."""
        own = [(self.own_parts, self.pieces.group)] if self.pieces else []
        ends = [(self.end_parts, self.layers.end_group)] if any(self.end_parts.values()) else []
        return [(self.parts, self.group), *own, *ends]

    def _shared(self) -> list[tuple[dict[int, dict[str, Tensor]], Any]]:
        """The same without what one rank alone holds."""
        return [(parts, group) for parts, group in self._parts() if len(parts) > 1]

    # whole tensors, in and out

    def fill(self, state: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]], where: str | Path) -> None:
        here = ((name, whole) for name, whole in tensors if not self._is_elsewhere(name))
        fill(state, ((name, self._piece(name, whole)) for name, whole in here), where)

    def wholes(self, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        for name in self.layers.whole if self.layers else state:
            tensor = state.get(name)
            if self._is_cut(name):
                tensor = self._joined(tensor)
            yield name, self.layers.brought(name, tensor) if self.layers else tensor

    def layout(self, state: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        if self.layers:
            return self.layers.whole
        layout = super().layout(state)
        for name in filter(self._is_cut, layout):
            dtype, (rows, *rest) = layout[name]
            layout[name] = dtype, (rows * self.pieces.parts, *rest)
        return layout

    def labelled(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        label = f"[{self.pieces.part}/{self.pieces.parts}]" if self.pieces else ""
        return {name + label if self._is_cut(_parameter(name)) else name: tensor for name, tensor in moments.items()}

    def moments(self, labelled: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        for name, whole in super().moments(labelled):
            if not self._is_elsewhere(_parameter(name)):
                yield name, self._piece(_parameter(name), whole)

    def _is_elsewhere(self, name: str) -> bool:
        """Whether other ranks alone hold a tensor of the model."""
        return self.layers is not None and name in self.layers.whole and not self.layers.holds(name)

    def _is_cut(self, name: str) -> bool:
        return self.pieces is not None and name in self.pieces.names

    def _piece(self, name: str, whole: Tensor) -> Tensor:
        """This rank's part of a tensor that goes with a parameter, or all of it where that is not cut."""
        if not self._is_cut(name) or not whole.ndim:
            return whole
        return whole.unflatten(0, (self.pieces.parts, -1))[self.pieces.part]

    def _joined(self, piece: Tensor) -> Tensor:
        """A tensor of which every rank that holds its layer has a part, whole on the lowest of them; elsewhere the part."""
        first = self.layers.peers[0] if self.layers else 0
        if self.world.rank >= first + self.pieces.parts:  # it asks the ranks of its own line
            return piece
        parts = self.pieces.parts
        whole = piece.new_empty(parts * len(piece), *piece.shape[1:]) if self.world.rank == first else None
        with answering():
            dist.gather(piece.contiguous(), None if whole is None else list(whole.chunk(parts)), first, group=self.pieces.line)
        return piece if whole is None else whole


LABEL = re.compile(r"(.+)\[(\d+)/(\d+)\]")
"""Of a tensor of which a file has a part: its name, which part, of how many; parts follow each other in the first dimension."""


def _parameter(name: str) -> str:
    """The parameter that a tensor of the optimizer's state (optimizer/KIND/NAME) belongs to."""
    return name.split("/", 2)[-1]


def _by_owner(parameters: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[int, dict[str, Tensor]]:
    owners = owners_of({name: parameter.numel() for name, parameter in parameters.items()}, len(ranks)) if parameters else {}
    return {rank: {name: parameters[name] for name, place in owners.items() if place == number} for number, rank in enumerate(ranks)}
