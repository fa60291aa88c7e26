"""Learning rate and momentum as pure functions of (step, total steps, OptimConfig): nothing to save, nothing to drift.

Warm-up, stable, decay (WSD): MiniCPM, arXiv 2404.06395 §4; a long linear decay, to (nearly) zero: arXiv 2502.15938.
A step is the 0-based number of the update about to be made; the last one, total - 1, is made at exactly `final_lr` of the peak.
"""

from __future__ import annotations

from sparing.base.config import OptimConfig

MOMENTUM_START = 0.85
MOMENTUM_WARMUP = 0.15
"""Share of the run over which Muon's momentum rises: a young run's gradients turn quickly, an old average of them misleads."""


def decay_start(total: int, optim: OptimConfig) -> int:
    """The first step of the decay; the checkpoint kept for extending a run is the one with this many steps done."""
    return total - round(optim.decay * total)


def lr_scale(step: int, total: int, optim: OptimConfig) -> float:
    """Share of the peak learning rate for update `step` (0-based) of `total`."""
    warmup, start = round(optim.warmup * total), decay_start(total, optim)
    scale = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if step >= start:
        done = min(1.0, (step + 1 - start) / (total - start))
        scale = min(scale, 1.0 + (optim.final_lr - 1.0) * done)
    return scale


def momentum(step: int, total: int, optim: OptimConfig) -> float:
    """Muon's momentum for update `step`: linear from 0.85 (or less, where the configured value is) to `optim.momentum`."""
    start, warmup = min(MOMENTUM_START, optim.momentum), round(MOMENTUM_WARMUP * total)
    done = min(1.0, step / warmup) if warmup else 1.0
    return start + (optim.momentum - start) * done
