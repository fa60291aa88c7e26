"""Losses of the log-probabilities of tokens: preferences and policy gradients are functions of these numbers alone.

The output head is passed twice. The first pass gives each token's log-probability; the loss is a small function of those, and so is its
gradient by each of them. The second pass is a cross-entropy in which each token's weight is minus that gradient: its gradient by hidden
states and head is the loss's, exactly, and no logits are kept. Both are in float32 whatever the model computes in: rounded logits are most
of what makes a trainer's probabilities differ from those that sampled (ScaleRL, arXiv 2510.13786, §3.2).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparing.data.loader import Batch
from sparing.kernels.vocabulary import linear_cross_entropy, token_nll
from sparing.model.transformer import Transformer
from sparing.train.objective import Loss


def token_logprobs(model: Transformer, hidden_BTD: Tensor, targets_BT: Tensor) -> Tensor:
    """(B, T) float32 log-probabilities of the targets behind these hidden states, 0 where a target does not count; no gradient."""
    return -token_nll(hidden_BTD.detach().flatten(0, 1).float(), model.head_weight, targets_BT.flatten()).view_as(targets_BT)


def loss_of_logprobs(model: Transformer, batch: Batch, loss: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Loss:
    """The loss of a batch's main targets. loss: (B, T) log-probabilities -> (scalar, (P,) parts)."""
    hidden, targets = model.states(batch.tokens, batch.documents).hidden, batch.targets[..., 0]
    logprobs = token_logprobs(model, hidden, targets).requires_grad_()
    with torch.enable_grad():
        total, parts = loss(logprobs)
        (slopes,) = torch.autograd.grad(total, logprobs)
    through = linear_cross_entropy(hidden.flatten(0, 1).float(), model.head_weight, targets.flatten(), 1.0, -slopes.flatten())
    return Loss(through, parts.detach())
