"""Makes the batch of any step. It has no state, so any machine can make any batch at any time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Self

import numpy as np
import torch

from sparing.base.config import UserError
from sparing.data.rows import EpochOrder, Rows
from sparing.data.store import TokenStore

IGNORED = -100


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens, with K = 1 + MTP depth targets for each token."""

    tokens: torch.Tensor
    """(B, T) int64."""
    targets: torch.Tensor
    """(B, T, K) int64: [..., j] is the token 1 + j ahead in the same document; -100: does not count."""
    documents: torch.Tensor | None = None
    """(B, T) int32: pieces of different documents in a row have different numbers, from 0; padding is a piece of its own. None: every row
    is one document."""
    weights: torch.Tensor | None = None
    """(B, T) float32: how much each position's targets count; None: all alike."""
    divisor: torch.Tensor | None = None
    """(B,) float32: each row's part of what the loss is divided by; None: the weights of its targets."""
    drawn: torch.Tensor | None = None
    """(B, T, S) int64: words drawn from a teacher's distribution of the next token; -100: it was not asked. None: there is no teacher."""

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Self:
        values = (getattr(self, field.name) for field in fields(self))
        return type(self)(*(None if value is None else change(value) for value in values))

    def __len__(self) -> int:
        return len(self.tokens)

    def to(self, device: torch.device | str) -> Self:
        return self._each(lambda x: x.to(device, non_blocking=True))

    def cut(self, length: int) -> Self:
        """Rows cut into pieces of `length` tokens, which divides T: (B * T / length, length)."""
        return self._each(lambda x: x.unflatten(1, (-1, length)).flatten(0, 1))

    def __getitem__(self, rows: slice) -> Self:
        """A micro-batch."""
        return self._each(lambda x: x[rows])


class Loader:
    """Batches of rows of `store`, in an order given by `seed`.

    Row r of the run is row r mod `rows_per_epoch` of epoch r // `rows_per_epoch`.
    """

    def __init__(self, store: TokenStore, seq_len: int, batch_size: int, mtp_depth: int = 0, seed: int = 0, first_id: int | None = None):
        """`batch_size` counts rows over all ranks. first_id: the token that documents begin with; None: the store's end-of-text token."""
        for name, value, least in (("seq_len", seq_len, 1), ("batch_size", batch_size, 1), ("mtp_depth", mtp_depth, 0)):
            if value < least:
                raise UserError(f"{name} must be at least {least}, not {value}")
        self.store, self.seq_len, self.batch_size, self.mtp_depth, self.seed = store, seq_len, batch_size, mtp_depth, seed
        self.first_id = store.eot_id if first_id is None else first_id
        self._rows = Rows(store.starts, store.lengths, seq_len)
        self.rows_per_epoch = self._rows.count
        self._orders: dict[int, EpochOrder] = {}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's part of step `step` (from 0): rows rank, rank + world, ... of its `batch_size`. Steps in any order."""
        return self.rows(self.numbers(step, rank, world))

    def numbers(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """Which rows of the run `batch` gives, (B,) int64."""
        return np.arange(step * self.batch_size + rank, (step + 1) * self.batch_size, world, dtype=np.int64)

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`Rows.positions` of these rows of the run: each input's position in the store, and what goes with it."""
        epochs = rows // self.rows_per_epoch
        position, last = np.empty((2, len(rows), self.seq_len), np.int64)
        piece = np.empty((len(rows), self.seq_len), np.int32)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            position[mask], last[mask], piece[mask] = self._rows.positions(self._order(int(epoch)), rows[mask] % self.rows_per_epoch)
        return position, last, piece

    def rows(self, rows: np.ndarray) -> Batch:
        """The batch of these rows of the run, (B,) int64."""
        position, last, piece = self.places(rows)
        padding = position < 0
        tokens = self.store.take(np.maximum(position, 0))
        tokens[padding] = self.store.eot_id
        if self.first_id != self.store.eot_id:  # among inputs it stands at beginnings only: no text is encoded to it
            tokens[tokens == self.store.eot_id] = self.first_id
        targets = np.empty((*position.shape, 1 + self.mtp_depth), np.int64)
        for ahead in range(1 + self.mtp_depth):
            ahead_position = position + 1 + ahead
            valid = ~padding & (ahead_position <= last)
            targets[..., ahead] = np.where(valid, self.store.take(np.where(valid, ahead_position, 0)), IGNORED)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(piece))

    def epoch(self, step: int) -> float:
        """Epochs done before this step."""
        return step * self.batch_size / self.rows_per_epoch

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            while len(self._orders) >= 2:  # a batch may reach from one epoch into the next
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = self._rows.order(self.seed, epoch)
        return self._orders[epoch]
