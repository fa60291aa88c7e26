"""Policy gradients: what a model has sampled becomes likelier or less likely by what it was worth.

On-policy, all kinds are REINFORCE with the group's mean as baseline, and differ in how they weigh tokens, sequences and groups. With
several updates for each rollout they differ in how they limit the step away from what sampled. All kinds can learn for pass@k instead of
pass@1 (`decides`). Kinds:

- `dr_grpo` (Liu and others, arXiv 2503.20783): reward less mean; a sum over tokens by a constant length, so long wrong answers do not pay
- `grpo` (Shao and others, arXiv 2402.03300): by the group's standard deviation too; a mean over each sequence
- `dapo` (Yu and others, arXiv 2503.14476): a mean over all tokens; a wider limit above; answers that were cut off do not count
- `gspo` (Zheng and others, arXiv 2507.18071): one ratio for each sequence
- `cispo` (MiniMax, arXiv 2506.13585): the ratio is a weight, limited and not differentiated
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparing.adapt.logprobs import loss_of_logprobs
from sparing.base.config import GrpoConfig
from sparing.data.loader import IGNORED, Batch
from sparing.model.experts import Router
from sparing.model.transformer import MTPBlock, Transformer
from sparing.train.objective import Loss

LIMITS = {"dr_grpo": (0.2, 0.2), "grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (0.0, 5.0)}
"""How far a ratio may fall below 1 and rise above it, by kind: the papers'; for `cispo` the largest weight (ScaleRL, arXiv 2510.13786)."""
BY_DEVIATION = ("grpo", "dapo", "gspo", "cispo")
"""Kinds whose advantages are divided by the group's standard deviation."""
LEAST_DEVIATION = 1e-4


def advantages(rewards_PG: np.ndarray, kind: str, pass_at: int = 1) -> np.ndarray:
    """(P, G) float64: how much better each answer was than its group, times `decides`; 0 where all of a group were alike."""
    differ = np.ptp(rewards_PG, axis=1, keepdims=True) > 0
    centred = (rewards_PG - rewards_PG.mean(1, keepdims=True)) * differ * decides(rewards_PG, pass_at)
    if kind not in BY_DEVIATION:
        return centred
    return centred / (rewards_PG.std(1, ddof=1, keepdims=True) + LEAST_DEVIATION)


def decides(rewards_PG: np.ndarray, pass_at: int) -> np.ndarray:
    """(P, G) float64, 0 to 1: how far each answer decides whether one among `pass_at` answers to its problem is right. It is the chance
    that pass_at - 1 of the group's other answers, drawn without replacement, are all wrong. The gradient of pass@k is k times (1 - p)^(k-1)
    times that of p, a right answer's probability; the chance is the unbiased estimate of the middle factor, as Walder and Karkhanis take it
    (arXiv 2505.15201). Rewards between 0 and 1 count as shares of right answers."""
    right = rewards_PG.clip(0, 1)
    others = rewards_PG.shape[1] - 1
    wrong = others - (right.sum(1, keepdims=True) - right)
    chance = np.ones_like(wrong)
    for drawn in range(pass_at - 1):
        chance *= (wrong - drawn).clip(0) / (others - drawn)
    return chance


def token_weights(lengths: np.ndarray, kind: str, longest: int) -> tuple[np.ndarray, float]:
    """(what a token of each answer counts, what the sum over all is divided by), of answers with `lengths` trained tokens."""
    match kind:
        case "grpo" | "gspo":
            return 1 / np.maximum(lengths, 1), float(len(lengths))
        case "dapo" | "cispo":
            return np.ones(len(lengths)), float(lengths.sum())
    return np.ones(len(lengths)), float(len(lengths) * longest)


@dataclass(frozen=True)
class PolicyBatch(Batch):
    """Answers behind their questions, several in a row, each a document of its own. `weights` and `divisor` are `token_weights`'."""

    advantages: Tensor | None = None
    """(B, T) float32, of the target at each position."""
    sampled: Tensor | None = None
    """(B, T) float32: log-probability with which the target was sampled."""
    known: Tensor | None = None
    """(B, F) float32: what the rollout says of itself (`FACTS`), in the first row, so that rows add up."""
    total: Tensor | None = None
    """(B,) float32: trained tokens of all rows, of all ranks."""
    routes: Tensor | None = None
    """(B, T, L, K) int16: the experts that each layer of the decoder chose when this token was sampled; None: a dense model."""


FACTS = ("reward", "pass_at_1", "pass_at_k", "length", "no_signal", "cut", "repeats")
"""Of a rollout: mean reward, share of answers that are right, of groups with a right one; mean tokens of an answer; share of groups in
which no answer is to become likelier or less likely; of answers that were cut off; of right answers that repeat themselves."""


def token_losses(
    logprobs_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, counted_BT: Tensor, sequences_BT: Tensor, kind: str,
    limits: tuple[float, float],
) -> Tensor:  # fmt: skip
    """(B, T) losses of tokens before they are weighted. old: log-probabilities of the policy that sampled, no gradient. counted: 1 for
    tokens that are trained. sequences: the number of each token's answer."""
    low, high = limits
    log_ratio = (logprobs_BT - old_BT) * counted_BT
    if kind == "gspo":
        numbers, count = sequences_BT.flatten(), int(sequences_BT.max()) + 1
        sums = log_ratio.new_zeros(count).index_add(0, numbers, log_ratio.flatten())
        lengths = log_ratio.new_zeros(count).index_add(0, numbers, counted_BT.flatten())
        log_ratio = (sums / lengths.clamp(min=1.0))[sequences_BT]
    ratio = log_ratio.exp()
    if kind == "cispo":
        return -ratio.clamp(max=high).detach() * advantages_BT * logprobs_BT
    return -torch.minimum(ratio * advantages_BT, ratio.clamp(1 - low, 1 + high) * advantages_BT)


class Policy:
    """The loss of a `PolicyBatch`. parts: the loss; `mismatch`, the mean distance of the trainer's log-probabilities from those that
    sampled; `corrected`, the share of tokens whose correction was truncated (or, with several updates, whose ratio left the limits);
    `entropy`, which is estimated by what was sampled; `trained`, the tokens of answers with a signal; what the rollout says of itself."""

    parts = ("loss", "mismatch", "corrected", "entropy", "trained", *FACTS)

    def __init__(self, settings: GrpoConfig):
        self.settings = settings
        low, high = LIMITS[settings.kind]
        self.limits = (settings.epsilon_low or low, settings.epsilon_high or high)

    def __call__(self, model: Transformer, batch: PolicyBatch, denominator: float | None = None, share: float = 1.0) -> Loss:
        denominator = float(batch.divisor.sum()) if denominator is None else denominator
        counted = (batch.targets[..., 0] != IGNORED).float()
        most = int(batch.documents.max()) + 1
        sequences = batch.documents.long() + most * torch.arange(len(batch), device=batch.tokens.device)[:, None]
        s = self.settings

        def loss(logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
            own = logprobs_BT.detach()
            difference = (own - batch.sampled) * counted
            old = batch.sampled if s.updates > 1 else own  # what sampled is the old policy; on-policy that is the model itself
            each = token_losses(logprobs_BT, old, batch.advantages, counted, sequences, s.kind, self.limits)
            if s.updates > 1:
                low, high = self.limits
                outside = (difference.exp() < 1 - low) | (difference.exp() > (high if s.kind == "cispo" else 1 + high))
            else:
                each = each * difference.exp().clamp(max=s.truncate)
                outside = difference.exp() > s.truncate
            total = (each * batch.weights * counted).sum() / denominator
            sums = torch.stack([difference.abs().sum(), (outside * counted).sum(), -(own * counted).sum()])
            seen = [total.reshape(1), sums / batch.total[0].clamp(min=1.0), counted.sum().reshape(1), batch.known.sum(0)]
            return total, torch.cat(seen)

        with replaying(model, batch.routes):
            return loss_of_logprobs(model, batch, loss)


@contextmanager
def replaying(model: Transformer, routes_BTLK: Tensor | None) -> Iterator[None]:
    """Inside, the decoder's routers choose these experts, and weigh them by their own scores (routing replay, as in arXiv 2510.11370)."""
    routers: list[Router] = []
    if routes_BTLK is not None:
        for number, block in enumerate(model.model.layers):
            if not isinstance(block, MTPBlock) and isinstance(gate := getattr(block.mlp, "gate", None), Router):
                gate.replayed_NK = routes_BTLK[:, :, number].flatten(0, 1).long()
                routers.append(gate)
    try:
        yield
    finally:
        for router in routers:
            router.replayed_NK = None
