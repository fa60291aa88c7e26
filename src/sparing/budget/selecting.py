"""What choosing texts from a pool takes, and how much of it a run keeps: `train --for`.

A run keeps what it will train on: the planned tokens, EPOCHS times. So it sees the best documents about once, and no others. It pays for
choosing from its own budget, of which that may take SHARE: of a pool that is too large for it, a random part is looked at.
"""

from __future__ import annotations

from sparing.budget.estimate import Estimate, around

SHARE = 0.2
"""Of a budget in time, money or energy, for looking at documents, at most."""
LEARN_S = 4.0
"""Learning to tell the sample from the pool."""
LOOKED_BYTES_PER_S = 3e6
"""Of text that a process reads, scores and writes down; scoring alone does 6.5 MB a second (LAB.md)."""
EPOCHS = 1.0
"""How often what is kept is trained on, where the plan comes true."""

SCORED_BYTES = 32_000
"""Of the sample, on which the run is scored in every evaluation beside its held-out text."""


def looked_at(pool_bytes: float, budget_s: float | None, workers: int = 1) -> float:
    """Share of the pool's documents that are looked at, from 0 to 1. budget_s: None for tokens and operations, which choosing takes none
    of."""
    return 1.0 if budget_s is None else min(1.0, SHARE * budget_s * workers * LOOKED_BYTES_PER_S / max(1.0, pool_bytes))


def selecting_s(pool_bytes: float, budget_s: float | None, workers: int = 1) -> Estimate:
    """Seconds that choosing takes."""
    looked = looked_at(pool_bytes, budget_s, workers) * pool_bytes
    return around(LEARN_S + looked / (workers * LOOKED_BYTES_PER_S), 0.5, "rule of thumb")


def kept_bytes(tokens: float, bytes_per_token: float, holdout_fraction: float) -> float:
    """Bytes of the documents that are kept for a run of so many tokens, with what is held out of them."""
    return tokens / EPOCHS * bytes_per_token / (1 - holdout_fraction)
