"""The processes (ranks) that train one model together, as the trainer sees them.

Each rank computes the gradients of its rows of a batch; their sum is what every rank learns from. Rank 0 alone writes: logs, plans,
messages, checkpoints. What a clock, a signal or a disk decides is agreed on before anyone acts on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class World(Protocol):
    """Every rank calls the same methods in the same order; a call returns when all ranks have made it."""

    rank: int
    """0 to size - 1."""
    size: int

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' numbers (at least 0), one by one. Where rank 0 decides, the others say 0."""

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum of all ranks' tensors in its place; the same bits on every rank."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def agree(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def sum(self, tensors: Sequence[Tensor]) -> None:
        pass


ALONE = Alone()
