"""Scores text in 16 bits where that changes bits per byte too little to matter, as measured on the first pieces of the text itself."""

from __future__ import annotations

import torch

from sparing.evals.bpb import NllFn

PIECE_TOKENS = 2048
"""Scored both ways."""
MOST = 0.0005
"""The largest change of a piece's loss, as a share of it: half of what is allowed, 0.1 %, because the rest of the text differs from it."""


class CheaperNll:
    """An `NllFn` that scores the first pieces with both functions (their scores are the exact ones), and the rest with the chosen one."""

    def __init__(self, exact: NllFn, cheaper: NllFn):
        self._exact, self._cheaper = exact, cheaper
        self._sums, self._tokens = [0.0, 0.0], 0
        self.chosen: NllFn | None = None
        """One of the two; None as long as too little text was read to choose."""

    def __call__(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if self.chosen is not None:
            return self.chosen(tokens, targets)
        scored = targets != -100
        both = [nll(tokens, targets) for nll in (self._exact, self._cheaper)]
        for i, nll in enumerate(both):
            self._sums[i] += float(nll.cpu().double()[scored].sum())
        self._tokens += int(scored.sum())
        if self._tokens >= PIECE_TOKENS:
            exact, cheaper = self._sums
            self.chosen = self._cheaper if abs(cheaper - exact) <= MOST * exact else self._exact  # not for a NaN either
        return both[0]
