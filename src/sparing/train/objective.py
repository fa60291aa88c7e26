"""Losses: an objective turns (model, batch) into a loss and its named parts.

`NextToken` is DeepSeek-V3's pre-training loss. Another way to learn is another class with the same two members: `parts` and the call.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparing.base.config import Config, ModelConfig
from sparing.base.layers import mixtures
from sparing.data.loader import Batch
from sparing.kernels.vocabulary import IGNORE, linear_cross_entropy
from sparing.model.transformer import Transformer


class Loss(NamedTuple):
    """Float32 scalars of one micro-batch. Those of all micro-batches of a step add up to the step's."""

    total: Tensor
    """What to differentiate."""
    parts: Tensor
    """(P,) detached: what is shown, in the order of the objective's `parts`; the first is what the guard watches."""


class Objective(Protocol):
    """A loss over micro-batches. `parts` names the numbers that go into the metrics."""

    parts: tuple[str, ...]

    def __call__(self, model: Transformer, batch: Batch, denominator: float | None = None, share: float = 1.0) -> Loss: ...


def weight_of(batch: Batch) -> float:
    """What a batch's loss is divided by, at least 1: by default the sum of the weights of its main targets."""
    if batch.divisor is not None:
        return max(1.0, float(batch.divisor.sum()))
    counted = batch.targets[..., 0] != IGNORE
    return max(1.0, float(counted.sum() if batch.weights is None else batch.weights.where(counted, 0.0).sum()))


def cross_entropy(model: Transformer, hidden_BTD: Tensor, batch: Batch, ahead: int, denominator: float) -> Tensor:
    """Of the targets `ahead` in `batch`, each times its weight, over `denominator`."""
    weights = None if batch.weights is None else batch.weights.flatten()
    targets = batch.targets[..., ahead].flatten()
    return linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, targets, denominator, weights)


class NextToken:
    """Cross-entropy of the next token, of the tokens after it by the MTP modules, and the sequence-wise balance of experts
    (DeepSeek-V3, arXiv 2412.19437 §2.1.2 and §2.2)."""

    def __init__(self, config: ModelConfig, mtp_weight: float = 0.3, sequence_balance: float = 0.0):
        """mtp_weight: of the mean over MTP depths; 0: it is not computed. sequence_balance: the same of the balance loss."""
        self.mtp_weight, self.sequence_balance = mtp_weight, sequence_balance
        parts = {"loss": True, "mtp_loss": config.mtp_depth > 0 and mtp_weight > 0, "balance_loss": bool(mixtures(config))}
        self.parts = tuple(name for name, there in parts.items() if there)

    @classmethod
    def of(cls, config: Config) -> NextToken:
        return cls(config.model, config.train.mtp_weight, config.train.sequence_balance)

    def next_token(self, model: Transformer, hidden_BTD: Tensor, batch: Batch, denominator: float) -> Tensor:
        """The loss of the main model's tokens."""
        return cross_entropy(model, hidden_BTD, batch, 0, denominator)

    def __call__(self, model: Transformer, batch: Batch, denominator: float | None = None, share: float = 1.0) -> Loss:
        """-> the loss of a micro-batch: nats a token; parts: main-token cross-entropy, unweighted mean over MTP depths (where there are
        any), unweighted balance (of mixtures).

        denominator: `weight_of` the whole step's batch (default: of this one), so that losses and gradients add up over micro-batches
        exactly. share: of the step's sequences, how many are here; the balance loss, a mean over sequences, counts by it.
        """
        denominator = weight_of(batch) if denominator is None else denominator
        states = model.states(batch.tokens, batch.documents, want_balance=self.sequence_balance > 0)
        loss = self.next_token(model, states.hidden, batch, denominator)
        total, zero = loss, loss.new_zeros(())
        mtp_loss, depth = zero, model.config.mtp_depth if self.mtp_weight else 0
        for k in range(depth):
            # Ignored positions embed word 0: their own loss is masked.
            states = model.next_depth(states, k, batch.targets[..., k].clamp(min=0))
            mtp_loss = mtp_loss + cross_entropy(model, states.hidden, batch, k + 1, denominator) / depth
        if depth:
            total = total + self.mtp_weight * mtp_loss
        balance = torch.stack(states.balances).sum() * share if states.balances else zero
        if states.balances:
            total = total + self.sequence_balance * balance
        values = {"loss": loss, "mtp_loss": mtp_loss, "balance_loss": balance}
        return Loss(total, torch.stack([values[name] for name in self.parts]).detach())
