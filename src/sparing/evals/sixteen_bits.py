"""Scores text in 16 bits where that changes bits per byte too little to matter, as measured on the first pieces of the text itself."""

from __future__ import annotations

import torch

from sparing.evals.bpb import NllFn

PIECE_TOKENS = 2048
"""Scored both ways."""
MOST = 0.0005
"""The largest change of a piece's loss, as a share of it: half of what is allowed, 0.1 %, because the rest of the text differs from it."""


class CheaperNll:
    """An `NllFn` that compares both functions on the beginnings of the first rows, and then scores with the chosen one."""

    def __init__(self, exact: NllFn, cheaper: NllFn):
        self._exact, self._cheaper = exact, cheaper
        self._sums, self._tokens = [0.0, 0.0], 0
        self.chosen: NllFn | None = None
        """One of the two; None as long as too little text was read to choose: it was scored with the exact one."""

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.chosen is None:
            width = -(-PIECE_TOKENS // len(tokens))  # what follows in a row changes nothing before it
            self._compare(tokens[:, :width], targets[:, :width])
        return (self.chosen or self._exact)(tokens, targets)

    def _compare(self, tokens: torch.Tensor, targets: torch.Tensor) -> None:
        scored = targets != -100
        for i, nll in enumerate((self._exact, self._cheaper)):
            self._sums[i] += float(nll(tokens, targets).cpu().double()[scored].sum())
        self._tokens += int(scored.sum())
        if self._tokens >= PIECE_TOKENS:
            exact, cheaper = self._sums
            self.chosen = self._cheaper if abs(cheaper - exact) <= MOST * exact else self._exact  # not for a NaN either
