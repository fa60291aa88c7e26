"""Batches of conversations: pieces laid whole into rows of T inputs, several to a row, none of which sees another.

What a row holds is a pure function of (pieces, seed, row). In every epoch the pieces come in another order; a window of them is packed by
best fit, the longest first, and the rows are shuffled.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import torch

from sparing.data.answers import Pieces
from sparing.data.loader import IGNORED, Batch
from sparing.data.rows import permutation

WINDOW = 2048
"""Pieces that are packed together."""


@dataclass(frozen=True)
class _Epoch:
    """What each row of an epoch holds: `pieces[ends[r - 1] : ends[r]]`."""

    pieces: np.ndarray
    ends: np.ndarray
    trained: np.ndarray
    """Trained tokens of each row."""

    def row(self, number: int) -> np.ndarray:
        return self.pieces[self.ends[number - 1] if number else 0 : self.ends[number]]


class Packed:
    """A feed of `batch_size` rows a step, over all ranks. Attention needs no new positions where a piece begins: rotary embeddings know
    distances alone, and no piece sees another."""

    def __init__(self, pieces: Pieces, seq_len: int, batch_size: int, mtp_depth: int = 0, seed: int = 0, pad_id: int = 0):
        self.pieces, self.seq_len, self.batch_size, self.mtp_depth = pieces, seq_len, batch_size, mtp_depth
        self.seed, self.pad_id = seed, pad_id
        self._inputs = np.diff(pieces.starts) - 1
        assert len(pieces) and self._inputs.max() <= seq_len
        self._trained = np.add.reduceat(pieces.trained, pieces.starts[:-1], dtype=np.int64)
        self._begins = [0]
        """The first row of each epoch so far."""
        self._epochs: dict[int, _Epoch] = {}

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """This rank's part of step `step` (from 0): rows rank, rank + world, ... of its `batch_size`. Steps in any order."""
        return self.rows(range(step * self.batch_size + rank, (step + 1) * self.batch_size, world))

    def rows(self, numbers: range) -> Batch:
        """The batch of these rows of the run."""
        T, depths = self.seq_len, 1 + self.mtp_depth
        tokens = np.full((len(numbers), T), self.pad_id, np.int64)
        targets = np.full((len(numbers), T, depths), IGNORED, np.int64)
        documents = np.zeros((len(numbers), T), np.int32)
        trained = np.zeros((len(numbers), T), bool)
        for index, number in enumerate(numbers):
            epoch, row = self._place(number)
            at = place = 0
            for place, piece in enumerate(self._epoch(epoch).row(row), 1):
                ids, marks = self.pieces[piece]
                inputs = slice(at, at + len(ids) - 1)
                tokens[index, inputs], documents[index, inputs], trained[index, inputs] = ids[:-1], place - 1, marks[1:]
                for ahead in range(depths):
                    targets[index, at : at + len(ids) - 1 - ahead, ahead] = ids[1 + ahead :]
                at += len(ids) - 1
            documents[index, at:] = place
        weights = None
        if self.mtp_depth:  # whose modules read the targets of prompts: these stay, and count for nothing
            weights = torch.from_numpy(trained.astype(np.float32))
        else:
            targets[~trained] = IGNORED
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(documents), weights)

    def epoch(self, step: int) -> float:
        """Epochs done before this step."""
        epoch, row = self._place(step * self.batch_size)
        return epoch + row / len(self._epoch(epoch).ends)

    def trained_tokens(self, steps: int) -> int:
        """Trained tokens of the first `steps` batches."""
        last, row = self._place(steps * self.batch_size)
        return last * self.pieces.trained_tokens + int(self._epoch(last).trained[:row].sum())

    def _place(self, row: int) -> tuple[int, int]:
        """(epoch, row of the epoch)."""
        while self._begins[-1] <= row:
            self._begins.append(self._begins[-1] + len(self._epoch(len(self._begins) - 1).ends))
        epoch = bisect_left(self._begins, row + 1) - 1
        return epoch, row - self._begins[epoch]

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            while len(self._epochs) >= 2:  # a batch may reach from one epoch into the next
                del self._epochs[next(iter(self._epochs))]
            order, rows = permutation(len(self.pieces), self.seed, number, 1), []
            for start in range(0, len(order), WINDOW):
                rows += self._best_fit(order[start : start + WINDOW])
            rows = [rows[place] for place in permutation(len(rows), self.seed, number, 2)]
            pieces = np.concatenate(rows)
            trained = np.array([self._trained[row].sum() for row in rows])
            self._epochs[number] = _Epoch(pieces, np.cumsum([len(row) for row in rows]), trained)
        return self._epochs[number]

    def _best_fit(self, order: np.ndarray) -> list[np.ndarray]:
        """Rows of these pieces: each goes where the least room is left behind it, the longest first."""
        rows: list[list[int]] = []
        room: list[tuple[int, int]] = []
        """(inputs that are free, row), ascending."""
        for piece in order[np.argsort(-self._inputs[order], kind="stable")]:
            size = int(self._inputs[piece])
            found = bisect_left(room, (size, -1))
            if found < len(room):
                free, row = room.pop(found)
            else:
                free, row = self.seq_len, len(rows)
                rows.append([])
            rows[row].append(piece)
            if free > size:
                insort(room, (free - size, row))
        return [np.array(row) for row in rows]
