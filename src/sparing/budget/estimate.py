"""Predicts the seconds of a training step: from steps timed on this machine, or, for another machine, from the hardware table.

A step's time is a sum over what it does (products, attention scores, head, memory traffic of activations and of weights, optimizer,
launches), each at a rate of its own.
The rates are fitted to timed steps of a few models (`train/profile.py`) as the most probable ones around defaults, so that two or three
timings already help. The interval comes from how far the fit misses timings that it was not given.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from sparing.base.config import Config, ModelConfig
from sparing.base.layers import layers, mixtures
from sparing.budget.flops import expert_products, expert_weights, factor_weights, forward_products, parameters, train_flops
from sparing.budget.memory import matrix_weights, path_of, saved_per_token

DESCRIPTION = 6
"""Raise it when the features or the kernels change: steps that were timed before tell nothing any more."""
FEATURES = ("products", "thin", "experts", "scores", "head", "traffic", "weights", "optimizer", "muon", "launches")
DEFAULTS = {
    "cpu": (0.5, 0.5, 1.27, 1.46, 1.5, 4.0e-10, 4.5e-10, 8.5e-10, 1.02, 1.9e-3),
    "cuda": (1.8, 0.2, 3.0, 4.0, 2.5, 1.5e-12, 1.0e-12, 1.0e-11, 4.0, 2.0e-5),
}
"""Seconds per unit of each feature; products, thin, experts, scores, head and muon in units of the peak's time (1: at the peak rate). CPU:
fitted to the steps of models of 0.2-135 M active parameters on the compiled kernels, which they meet to 11 % (LAB.md)."""
THIN_WIDTH = 128
"""A product of matrices of this width takes `products` + `thin` of the peak's time; of wider ones the second part is smaller."""
SPREAD = {"products": 0.3, "thin": 0.3}
"""How far each rate is believed to lie from the defaults, as a factor's logarithm: how much thin products lose differs between machines,"""
OTHER_SPREAD = 0.15
"""the others' ratios less,"""
SPEED_SPREAD = 0.5
"""after all of them are multiplied by one factor, the machine's, which may lie this far from 1."""
NOISE = 0.04
"""Relative scatter of a timed step on a machine that does something else now and then."""
DRIFT = 0.12
"""How much faster or slower, as a standard deviation, a shared machine is at another time than when it was timed (LAB.md)."""
UTILISATION = {"cpu": (0.2, 0.33, 0.5), "gpu": (0.15, 0.3, 0.45)}
"""Low, middle, high share of the dense peak that our models reach on a machine that was not measured (LAB.md; GPU: assumption)."""


@dataclass(frozen=True)
class Estimate:
    """A number, the interval that should hold it four times out of five, and where it is from."""

    value: float
    low: float
    high: float
    source: str

    def times(self, factor: float, source: str | None = None) -> Estimate:
        return Estimate(self.value * factor, self.low * factor, self.high * factor, source or self.source)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def exactly(value: float, source: str) -> Estimate:
    return Estimate(value, value, value, source)


def around(value: float, share: float, source: str) -> Estimate:
    """value, give or take a share of it."""
    return Estimate(value, value / (1 + share), value * (1 + share), source)


def features(config: Config, seq_len: int, peak_flops: float) -> np.ndarray:
    """What one optimizer step on rows of `seq_len` tokens does, in the units of DEFAULTS."""
    c, t = config.model, config.train
    tokens = t.batch_size * t.seq_len
    micro = -(-t.batch_size // min(t.micro_batch_size or t.batch_size, t.batch_size))
    size = 2 if t.dtype == "bfloat16" else 4
    counts = parameters(c)
    common, routed, scores, heads = forward_products(c, seq_len, mtp=config.adapter is None and config.esft is None)
    again = 4 / 3 if t.recompute else 1.0
    learned = counts.total + counts.mtp
    if config.adapter is not None:  # products with frozen weights: two of three
        learned, used = factor_weights(c, config.adapter.rank)
        common, routed, heads = common * 2 / 3 + 2.0 * used, routed * 2 / 3, heads * 2 / 3
    elif config.esft is not None:
        learned, part = expert_weights(c, config.esft), expert_products(c, seq_len, config.esft)
        common, routed, heads = (
            (2 * every + own) / 3 for every, own in ((common, part.common), (routed, part.routed), (heads, part.heads))
        )
    traffic = sum(saved_per_token(layer, seq_len, size, path_of(config)) for layer in layers(c)) * again
    experts = sum(layer.feed_forward.experts for layer in layers(c))
    return np.array(
        [
            3 * again * tokens * common / peak_flops,
            3 * again * tokens * common / peak_flops * THIN_WIDTH / c.hidden_size,
            3 * again * tokens * routed / peak_flops,
            3 * again * tokens * scores / peak_flops,
            3 * tokens * heads / peak_flops,
            tokens * traffic,
            micro * (t.replicas or 1) * 4.0 * learned,
            4.0 * learned,
            _muon_flops(c, config.optim.ns_steps) / peak_flops if config.optim.matrix == "muon" else 0.0,
            micro * (len(layers(c)) + 2 + experts / 8) * (t.replicas or 1),
        ]
    )


def _muon_flops(c: ModelConfig, steps: int) -> float:
    """Newton-Schulz on every matrix: about three products with its shorter side (hidden size, an expert's width) each step."""
    shorter = min([c.hidden_size, *(layer.feed_forward.width for layer in mixtures(c))])
    return 2.0 * steps * 3 * matrix_weights(c) * shorter


@dataclass(frozen=True)
class StepModel:
    """Rates of one machine."""

    rates: tuple[float, ...]
    peak_flops: float
    scatter: float
    """Relative half-width of the interval."""
    source: str

    def step_seconds(self, config: Config, seq_len: int | None = None) -> Estimate:
        """One optimizer step; without `seq_len` the mean over the run's short and whole rows."""
        t = config.train
        if seq_len is None and t.short_seq_len:
            short, whole = self.step_seconds(config, t.short_seq_len).value, self.step_seconds(config, t.seq_len).value
            return around(t.short_until * short + (1 - t.short_until) * whole, self.scatter, self.source)
        return around(float(features(config, seq_len or t.seq_len, self.peak_flops) @ np.array(self.rates)), self.scatter, self.source)

    def tokens_per_second(self, config: Config) -> Estimate:
        step, tokens = self.step_seconds(config), config.train.batch_size * config.train.seq_len
        return Estimate(tokens / step.value, tokens / step.high, tokens / step.low, self.source)


def fit(timings: list[dict[str, Any]], peak_flops: float, device: str = "cpu") -> StepModel:
    """Most probable rates, given timed steps [{"features": [...], "seconds": s}] and the defaults.

    The interval's width is how far off each timed step is when it is predicted from the others, and what the machine may do meanwhile.
    """
    if not timings:
        return StepModel(DEFAULTS[device], peak_flops, SPEED_SPREAD, f"default rates of a {device}, not measured here")
    x = np.array([row["features"] for row in timings])
    y = np.array([row["seconds"] for row in timings])
    rates = _rates(x, y, device)
    each = np.arange(len(y))
    alone = [math.log(float(x[i] @ _rates(x[each != i], y[each != i], device)) / y[i]) for i in each]
    scatter = 1.28 * math.hypot(DRIFT, NOISE, math.sqrt(float(np.mean(np.square(alone)))))
    return StepModel(tuple(rates.tolist()), peak_flops, scatter, f"fitted to {len(timings)} timed steps on this machine")


def _rates(x: np.ndarray, y: np.ndarray, device: str) -> np.ndarray:
    """Gauss-Newton on the rates' logarithms and on their common factor's: relative misses weigh by NOISE, distances from the defaults by
    SPREAD, OTHER_SPREAD and SPEED_SPREAD."""
    defaults = np.array(DEFAULTS[device])
    theta = np.zeros(len(defaults) + 1)
    precision = np.array([SPREAD.get(name, OTHER_SPREAD) for name in FEATURES] + [SPEED_SPREAD]) ** -2.0
    for _ in range(50):
        terms = x * defaults * np.exp(theta[:-1] + theta[-1])
        miss = np.log(terms.sum(1) / y) / NOISE
        jacobian = np.hstack([terms / terms.sum(1, keepdims=True), np.ones((len(y), 1))]) / NOISE
        step = np.linalg.solve(jacobian.T @ jacobian + np.diag(precision), jacobian.T @ miss + precision * theta)
        theta = theta - np.clip(step, -0.5, 0.5)
        if abs(step).max() < 1e-6:
            break
    return defaults * np.exp(theta[:-1] + theta[-1])


def profile_model(config: Config, peak_flops: float, kind: str, name: str) -> Estimate:
    """Tokens per second on a machine that is not here: its dense peak times the share that training reaches."""
    work = train_flops(config.model, config.train.seq_len, adapter=config.adapter, esft=config.esft)
    low, middle, high = (share * peak_flops / work for share in UTILISATION[kind])
    return Estimate(middle, low, high, f"hardware table: {name}, {UTILISATION[kind][1]:.0%} of the dense peak")
