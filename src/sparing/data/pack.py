"""Documents -> rows of T inputs. Which tokens a row holds is a pure function of (seed, epoch, row); every token is a target once an epoch.

A document has L inputs (end-of-text and its tokens) and L targets (its tokens and end-of-text). Its first L - L mod T inputs make full
rows; what remains, the tail, is laid end to end with the other tails, in an order of the epoch's own, and cut at T. The last of these
rows may be short: it is padded, with targets that do not count. All rows of an epoch are then shuffled.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


def permutation(n: int, *key: int) -> np.ndarray:
    """A permutation of range(n), int64, that depends on nothing but `n` and `key` (numpy's own generators may change with its version)."""
    state = np.zeros(1, np.uint64)
    for part in key:
        state = _mix(state ^ np.uint64(part % (1 << 64)))
    return np.argsort(_mix(_mix(np.arange(n, dtype=np.uint64) ^ state) + state), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014), a bijection."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Epoch:
    """One epoch's order: 8 bytes a row, 16 a tail."""

    rows: np.ndarray
    """Row of the epoch -> row of the plan."""
    tails: np.ndarray
    """The documents with tails, in this epoch's order."""
    ends: np.ndarray
    """Where each of these tails ends when they are laid end to end."""


class Plan:
    """Rows over documents of `lengths` (inputs each) that begin at `starts`, int64; T = `seq_len`."""

    def __init__(self, starts: np.ndarray, lengths: np.ndarray, seq_len: int):
        self.starts, self.lengths, self.seq_len = starts, lengths, seq_len
        full = lengths // seq_len
        self._full_ends = np.cumsum(full)  # full rows of the documents so far
        self.full_rows = int(self._full_ends[-1])
        self._with_tail = np.flatnonzero(lengths % seq_len)
        tail_inputs = int((lengths % seq_len).sum())
        self.rows = self.full_rows + -(-tail_inputs // seq_len)
        """Rows in every epoch."""

    def epoch(self, seed: int, epoch: int) -> Epoch:
        tails = self._with_tail[permutation(len(self._with_tail), seed, epoch, 1)]
        return Epoch(permutation(self.rows, seed, epoch, 2), tails, np.cumsum(self.lengths[tails] % self.seq_len))

    def positions(self, epoch: Epoch, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """For rows (B,) of an epoch, each (B, T): position of the input, -1: padding; of its document's last target; number of the piece.

        int64, int64, int32.
        """
        T = self.seq_len
        planned = epoch.rows[rows]
        position = np.empty((len(rows), T), np.int64)
        last = np.empty((len(rows), T), np.int64)
        piece = np.zeros((len(rows), T), np.int32)
        offsets = np.arange(T)
        is_full = planned < self.full_rows
        full = planned[is_full]
        document = np.searchsorted(self._full_ends, full, side="right")
        window = full - (self._full_ends[document] - self.lengths[document] // T)
        position[is_full] = (self.starts[document] + window * T)[:, None] + offsets
        last[is_full] = (self.starts[document] + self.lengths[document])[:, None]
        if not is_full.all():
            at = (planned[~is_full] - self.full_rows)[:, None] * T + offsets  # place in the line of tails
            tail = np.searchsorted(epoch.ends, at.ravel(), side="right").reshape(at.shape)
            padding = tail == len(epoch.ends)
            document = epoch.tails[np.minimum(tail, len(epoch.ends) - 1)]
            end = self.starts[document] + self.lengths[document]  # the tail is the end of its document
            position[~is_full] = np.where(padding, -1, end - (epoch.ends[np.minimum(tail, len(epoch.ends) - 1)] - at))
            last[~is_full] = end
            piece[~is_full] = tail - tail[:, :1]
        return position, last, piece
