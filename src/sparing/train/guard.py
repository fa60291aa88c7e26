"""Finds batches that a run must not learn from."""

from __future__ import annotations

import math
from collections import deque
from statistics import median

WINDOW = 64
"""Losses that the guard remembers."""
FLOOR_NATS = 1.0
"""A spike is at least this far above the median: below it, ordinary noise of tiny batches would be mistaken for one."""
DEVIATIONS = 10.0
"""... and at least this many robust standard deviations (1.4826 x median absolute deviation)."""
PATIENCE = 3
"""Bad batches in a row before the weights are blamed."""
MAX_ROLLBACKS = 3


class Guard:
    """Finds batches that must not be learnt from: loss or gradients not finite, or a loss far above what this run is used to.

    Both are known before the update is made: the batch is dropped, the weights stay as they are, and killed and resumed runs stay the
    same. Only when batch after batch is bad are the weights themselves to blame (a bad update slipped through): then the trainer goes back
    to a checkpoint and on with fresh batches, as PaLM's authors did by hand (arXiv 2204.02311 §5.1). The state is saved in checkpoints.
    """

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=WINDOW)
        self.bad_in_a_row = 0
        self.rollbacks = 0

    def state(self) -> dict:
        return {"losses": list(self.losses), "bad_in_a_row": self.bad_in_a_row, "rollbacks": self.rollbacks}

    def load(self, state: dict) -> None:
        self.losses = deque(state["losses"], maxlen=WINDOW)
        self.bad_in_a_row, self.rollbacks = state["bad_in_a_row"], state["rollbacks"]

    def verdict(self, loss: float, grad_norm: float, warm: bool) -> str | None:
        """Why this batch must not be learnt from, or None. warm: the learning-rate warm-up is over (before it, losses leap)."""
        if not math.isfinite(loss):
            return f"loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"gradient norm is {grad_norm}"
        if warm and len(self.losses) == WINDOW:
            usual = median(self.losses)
            spread = 1.4826 * median(abs(other - usual) for other in self.losses)
            if loss > usual + max(FLOOR_NATS, DEVIATIONS * spread):
                return f"loss {loss:.3f} where {usual:.3f} is usual"
        return None

    def accept(self, loss: float) -> None:
        self.losses.append(loss)
        self.bad_in_a_row = 0

    def reject(self) -> bool:
        """Count a bad batch. True: it is time to go back to a checkpoint."""
        self.bad_in_a_row += 1
        return self.bad_in_a_row >= PATIENCE
