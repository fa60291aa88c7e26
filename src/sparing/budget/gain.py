"""Predicts what continued pre-training gains: the share of a model's bits per byte that reading D bytes of new text takes away.

The form is g = c * (D / 1 MB)^p, fitted on logarithms to finished runs, the user's own and those that come with the package; one law per
kind of corpus (`laws/gain-KIND`). Runs that began with a model of the same size count most: what a model still has to learn differs more
between models than between budgets. A run that goes on from a model that Sparing trained from noise needs no law of its own: the loss law
(`budget/scaling.py`) says what more text is worth.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import numpy as np

from sparing.budget.estimate import Estimate
from sparing.budget.scaling import SIGMAS, keep_points, own_points, shipped_points

D0 = 1e6
PRIOR = np.array([math.log(0.03), 0.4])
"""Logarithm of the gain at D0 bytes, and the exponent."""
PRIOR_SPREAD = np.array([0.8, 0.15])
NOISE = 0.15
"""Relative scatter of a run's gain about the law of its own model."""
OTHER_MODEL = 0.5
"""How far the level of one model's law lies from another's, as a factor's logarithm."""
OTHER_KIND = 0.7
"""The same of another kind of text."""
MOST = 0.6
"""No gain is predicted above this share."""


@dataclass(frozen=True)
class GainPoint:
    """A finished run that went on from a model."""

    total: float
    """Parameters of the model: what it is recognised by."""
    text_bytes: float
    """Of new text read, as the law counts it (`scaling.effective_bytes`)."""
    before: float
    """Bits per byte of held-out text before the first step, and after the last."""
    after: float
    what: str = ""

    @property
    def gain(self) -> float:
        return 1 - self.after / self.before


@dataclass(frozen=True)
class GainLaw:
    """Coefficients (as PRIOR) with their covariance, for one model and one kind of text."""

    theta: np.ndarray
    covariance: np.ndarray
    scatter: float
    source: str

    def gain(self, text_bytes: float, read: float = 0.0) -> Estimate:
        """Share of the bits per byte that reading `text_bytes` takes away, after `read` bytes that were read before; the interval holds
        four runs out of five."""
        x = np.array([1.0, math.log(max(1.0, read + text_bytes) / D0)])
        half = SIGMAS * math.hypot(math.sqrt(float(x @ self.covariance @ x)), self.scatter)
        before = math.exp(float(np.array([1.0, math.log(read / D0)]) @ self.theta)) if read > 1 else 0.0
        new = (math.exp(float(x @ self.theta)) - before) / (1 - min(MOST, before))
        value, low, high = (min(MOST, new * math.exp(shift)) for shift in (0.0, -half, half))
        return Estimate(value, low, high, self.source)


def fit_gain(points: list[GainPoint], total: float, scatter: float = 0.0, what: str = "") -> GainLaw:
    """The most probable law for a model of `total` parameters: one exponent, and a level for each model about one that all share.
    scatter: more of it, where the text is of another kind."""
    points = [point for point in points if point.gain > 0]
    models = [total]
    for point in points:
        if not any(_same(point.total, model) for model in models):
            models.append(point.total)
    x = np.array([_row(point.text_bytes, point.total, models) for point in points]).reshape(-1, 2 + len(models))
    y = np.array([math.log(point.gain) for point in points])
    prior = np.append(PRIOR, np.zeros(len(models)))
    precision = np.diag(np.append(PRIOR_SPREAD, np.full(len(models), OTHER_MODEL)) ** -2.0)
    normal = x.T @ x / NOISE**2 + precision
    all_theta, all_covariance = np.linalg.solve(normal, x.T @ y / NOISE**2 + precision @ prior), np.linalg.inv(normal)
    mine = np.zeros((2, len(prior)))  # this model's level is the shared one and its own offset
    mine[0, [0, 2]] = mine[1, 1] = 1.0
    near = sum(_same(point.total, total) for point in points)
    source = f"law of gains{what}: {near} runs from a model of this size, {len(points) - near} from others"
    return GainLaw(mine @ all_theta, mine @ all_covariance @ mine.T, math.hypot(NOISE, scatter), source)


def _same(total: float, other: float) -> bool:
    return abs(total / other - 1) < 0.01


def _row(text_bytes: float, total: float, models: list[float]) -> list[float]:
    return [1.0, math.log(text_bytes / D0), *(float(_same(total, model)) for model in models)]


def gain_law(kind: str, total: float) -> GainLaw:
    """The law of a kind of corpus for a model of `total` parameters, fitted to its points now."""
    points = [*own_points(_name(kind), GainPoint), *shipped_points(_name(kind), GainPoint)]
    if points or kind == "text":
        return fit_gain(points, total)
    text = [*own_points(_name("text"), GainPoint), *shipped_points(_name("text"), GainPoint)]
    return fit_gain(text, total, OTHER_KIND, f" on text (none on {kind} yet)")


def add_gain(kind: str, point: GainPoint) -> bool:
    """Remember a finished run. False where nothing can be written, or where it gained nothing: only a better forecast is lost."""
    if not 0 < point.after < point.before < math.inf or point.text_bytes <= 0:
        return False
    return keep_points(_name(kind), [asdict(p) for p in (*own_points(_name(kind), GainPoint), point)])


def _name(kind: str) -> str:
    return f"gain-{kind}"
