"""The processes (ranks) that train one model together, as the trainer sees them.

Each rank computes the gradients of its rows of a batch; their sum is what every rank learns from. Rank 0 alone writes: logs, plans,
messages, checkpoints. What a clock, a signal or a disk decides is agreed on before anyone acts on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class World(Protocol):
    """Every rank calls the same methods in the same order; a call returns when all ranks have made it."""

    rank: int
    """0 to size - 1."""
    size: int

    def agree(self, values: Sequence[float]) -> list[float]:
        """The largest of all ranks' numbers (at least 0), one by one. Where rank 0 decides, the others say 0."""

    def leaving(self, told: bool) -> None:
        """All ranks stop. told: this one was told to. Raises RankLost on the ranks of machines none of which was, where those may go on
        without the others."""

    def sum(self, tensors: Sequence[Tensor], group: Any = None) -> None:
        """Replace each tensor by the sum of all ranks' tensors in its place; the same bits on every rank. group: the ranks whose tensors
        are added up, this one among them."""

    def reduce(self, tensors: Sequence[Tensor], rank: int, group: Any = None) -> None:
        """The same on one rank alone; what the others' hold afterwards means nothing."""

    def broadcast(self, tensors: Sequence[Tensor], rank: int, group: Any = None) -> None:
        """Replace each tensor by that of one rank, on the ranks of `group`."""

    def gather(self, text: str) -> list[str]:
        """All ranks' texts, by rank, on rank 0; nothing on the others."""


class Alone:
    """One process."""

    rank, size = 0, 1

    def agree(self, values: Sequence[float]) -> list[float]:
        return list(values)

    def leaving(self, told: bool) -> None:
        pass

    def sum(self, tensors: Sequence[Tensor], group: Any = None) -> None:
        pass

    def reduce(self, tensors: Sequence[Tensor], rank: int, group: Any = None) -> None:
        pass

    def broadcast(self, tensors: Sequence[Tensor], rank: int, group: Any = None) -> None:
        pass

    def gather(self, text: str) -> list[str]:
        return [text]


ALONE = Alone()
