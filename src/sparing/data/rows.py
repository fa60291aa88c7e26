"""Lays documents out in rows of T inputs. A row is a pure function of (seed, epoch, row), and each token is a target once an epoch.

A document has L inputs (end-of-text and its tokens) and L targets (its tokens and end-of-text). Its first L - L mod T inputs make full
rows; what remains, the tail, is laid end to end with the other tails, in an order of the epoch's own, and cut at T. The last of these
rows may be short: it is padded, with targets that do not count. All rows of an epoch are then shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparing.data.split import mix


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64, that depends on nothing but `n` and `key` (numpy's own generators may change with its version)."""
    state = 0
    for part in key:
        state = mix(state ^ part % (1 << 64))
    return np.argsort(mix(mix(np.arange(n, dtype=np.uint64) ^ state) + state), kind="stable")


@dataclass(frozen=True)
class EpochOrder:
    """The order of rows and tails in one epoch: 8 bytes a row, 16 a tail."""

    rows: np.ndarray
    """Row of the epoch -> row before shuffling."""
    tails: np.ndarray
    """The documents with tails, in this epoch's order."""
    ends: np.ndarray
    """Where each of these tails ends when they are laid end to end."""


class Rows:
    """Rows of T = `seq_len` inputs over documents of `lengths` (inputs each) that begin at `starts`; both (documents,) int64."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, seq_len: int):
        self.starts, self.lengths, self.seq_len = starts, lengths, seq_len
        full = lengths // seq_len
        self._full_ends = np.cumsum(full)  # full rows of the documents so far
        self.full_rows = int(self._full_ends[-1])
        self._with_tail = np.flatnonzero(lengths % seq_len)
        tail_inputs = int((lengths % seq_len).sum())
        self.count = self.full_rows + -(-tail_inputs // seq_len)
        """Rows in every epoch."""

    def order(self, seed: int, epoch: int) -> EpochOrder:
        tails = self._with_tail[permutation(len(self._with_tail), seed, epoch, 1)]
        return EpochOrder(permutation(self.count, seed, epoch, 2), tails, np.cumsum(self.lengths[tails] % self.seq_len))

    def positions(self, order: EpochOrder, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (B,) of an epoch -> three arrays (B, T): position of each input (-1: padding), position of the last target of its document
        (both int64), and the number of its document within the row (int32)."""
        T = self.seq_len
        unshuffled = order.rows[rows]
        position = np.empty((len(rows), T), np.int64)
        last = np.empty((len(rows), T), np.int64)
        piece = np.zeros((len(rows), T), np.int32)
        offsets = np.arange(T)
        is_full = unshuffled < self.full_rows
        full = unshuffled[is_full]
        document = np.searchsorted(self._full_ends, full, side="right")
        window = full - (self._full_ends[document] - self.lengths[document] // T)
        position[is_full] = (self.starts[document] + window * T)[:, None] + offsets
        last[is_full] = (self.starts[document] + self.lengths[document])[:, None]
        if not is_full.all():
            at = (unshuffled[~is_full] - self.full_rows)[:, None] * T + offsets  # place in the line of tails
            tail = np.searchsorted(order.ends, at.ravel(), side="right").reshape(at.shape)
            padding = tail == len(order.ends)
            document = order.tails[np.minimum(tail, len(order.ends) - 1)]
            end = self.starts[document] + self.lengths[document]  # the tail is the end of its document
            position[~is_full] = np.where(padding, -1, end - (order.ends[np.minimum(tail, len(order.ends) - 1)] - at))
            last[~is_full] = end
            piece[~is_full] = tail - tail[:, :1]
        return position, last, piece
