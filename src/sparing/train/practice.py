"""Training steps on random tokens, for the planner's timings and for benchmarks. Nothing is written."""

from __future__ import annotations

import torch

from sparing.base.config import Config
from sparing.data.loader import Batch
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.objective import NextToken
from sparing.train.trainer import Trainer

MOMENTUM, LR_SCALE = 0.95, 1e-3


class RandomWords:
    """One batch of random tokens, whatever the step; two documents a row, as in real data, because the mask is part of the work."""

    def __init__(self, config: Config, seed: int = 0):
        t, c = config.train, config.model
        generator = torch.Generator().manual_seed(seed)
        text = torch.randint(0, c.vocab_size, (t.batch_size, t.seq_len + 1 + c.mtp_depth), generator=generator)
        targets = torch.stack([text[:, 1 + k : 1 + k + t.seq_len] for k in range(1 + c.mtp_depth)], -1)
        documents = (torch.arange(t.seq_len) >= t.seq_len // 2).int().expand(t.batch_size, -1)
        self._batch = Batch(text[:, : t.seq_len], targets, documents)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        return self._batch


def trainer_of(config: Config) -> Trainer:
    """A trainer of the configuration's model from its initial weights, on its device."""
    model = Transformer(config.model)
    init_weights(model, config.train.seed)
    model.to(config.train.device or "cpu")
    return Trainer(model, RandomWords(config), NextToken.of(config), config=config)


def practise(trainer: Trainer, step: int = 1) -> dict[str, float]:
    """One whole optimizer step; -> the losses. step: as in `Trainer.gradients`."""
    losses = trainer.gradients(trainer.feed.batch(step), step)
    trainer.update(losses["grad_norm"], LR_SCALE, MOMENTUM)
    return losses
