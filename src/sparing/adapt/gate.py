"""Decides whether what was learnt from use is kept: numbers before and after, paired, with bounds by bootstrap (Efron, Ann. Stat. 1979).

Three questions, in this order. Do trusted answers become likelier? Do they still belong to their questions as much as before: an answer
is likelier behind its own question than behind another one's, and training on answers that were mixed up takes that away, although it
makes all of them likelier. Is old text still as likely?
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

RESAMPLED = 4000
RISK = 0.05
"""That a bound of one question is wrong by chance."""


class Bounded(NamedTuple):
    """A mean, and the bounds that it is within, each with the risk that was asked for."""

    value: float
    low: float
    high: float


class Measured(NamedTuple):
    """What one set of weights gives on the texts of a decision, in nats."""

    right: np.ndarray
    """(P,) trusted answers behind their questions."""
    crossed: np.ndarray
    """(P,) the same answers behind another one's question."""
    old: np.ndarray
    """(D,) old documents."""
    own: np.ndarray
    """(A,) answers that the base wrote."""


class Sizes(NamedTuple):
    """Tokens of what `Measured` is of."""

    right: np.ndarray
    old: np.ndarray
    own: np.ndarray


def mean_of(values: np.ndarray, sizes: np.ndarray, risk: float = RISK) -> Bounded:
    """Sum of values per sum of sizes, with bounds over resampled entries, the same ones at every call. values, sizes: (N,)."""
    counts = _resampled(len(values))
    means = (counts @ values) / (counts @ sizes)
    return Bounded(float(values.sum() / sizes.sum()), *(float(np.quantile(means, at)) for at in (risk, 1 - risk)))


@functools.lru_cache(8)
def _resampled(count: int) -> np.ndarray:
    """(RESAMPLED, count) float64: how often each entry is drawn."""
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), RESAMPLED).astype(np.float64)


def new_change(before: Measured, after: Measured, sizes: Sizes) -> Bounded:
    """By how many nats per token trusted answers have become less likely."""
    return mean_of(after.right - before.right, sizes.right)


def belonging(measured: Measured, sizes: Sizes) -> Bounded:
    """By how many nats per token an answer is likelier behind its own question."""
    return mean_of(measured.crossed - measured.right, sizes.right)


def belonging_change(before: Measured, after: Measured, sizes: Sizes) -> Bounded:
    return mean_of((after.crossed - after.right) - (before.crossed - before.right), sizes.right)


def old_change(before: Measured, after: Measured, risk: float = RISK) -> Bounded:
    """By which share the loss of old text has risen."""
    return mean_of(after.old - before.old, before.old, risk)


def moved(before: Measured, after: Measured, sizes: Sizes) -> Bounded:
    """KL(base || tuned) per token of what the base would answer, estimated on its own samples (arXiv 2509.04259)."""
    return mean_of(after.own - before.own, sizes.own)
