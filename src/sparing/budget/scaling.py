"""Predicts the loss of a run: L(N, D) = E + A/N^a + B/D^b in bits per byte, one law per kind of corpus, fitted to our own runs.

The form is Hoffmann et al.'s (arXiv 2203.15556 §3.3). N is active parameters times (total / active)^0.25, so that a mixture's idle experts
count for something; D is bytes of text read, repetitions worth less (Muennighoff et al., arXiv 2305.16264 §4: R* = 15). The coefficients
are the most probable ones around priors, because a few runs do not determine five numbers; points that lie far off weigh less. Points are
kept in $SPARING_HOME/laws/KIND.json, beside those that come with the package; each finished run adds one.
"""

from __future__ import annotations

import json
import math
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from sparing.base.files import write_atomic
from sparing.base.hardware import home
from sparing.budget.estimate import Estimate

P = TypeVar("P")
N0, D0 = 1e6, 1e7
"""Where the priors of the two terms are stated, so that exponents and sizes hardly depend on each other."""
PRIOR = np.array([math.log(0.7), math.log(0.45), math.log(0.6), math.log(0.35), math.log(0.37)])
"""Logarithms of E, A/N0^a, B/D0^b, a, b. Exponents, and E from 1.82 nats a token: Besiroglu et al., arXiv 2404.10102 table 1."""
PRIOR_SPREAD = np.array([0.25, 0.7, 0.5, 0.15, 0.15])
NOISE = 0.012
"""Relative scatter of a run's score: seeds, held-out text, settings (LAB.md)."""
FOREIGN = 3.0
"""Points that come with the package scatter this many times more about a user's own law."""
OTHER_KIND = 0.12
"""A corpus of a kind that has no runs yet may differ by this share from the law of prose."""
SIGMAS = 1.5
"""Standard deviations that hold four fifths of new runs, for fits to about ten (1.28 with the scatter known)."""
IDLE_EXPONENT = 0.25
REPEATS = 15.0
CODE = frozenset(
    "py pyi c h cc cpp hpp cu rs go java kt js ts jsx tsx rb php swift scala sh lua r jl hs ml sql css html xml json yaml yml toml".split()
)


@dataclass(frozen=True)
class Point:
    """A finished run."""

    active: float
    total: float
    text_bytes: float
    """Bytes of text read, as the law counts them."""
    bpb: float
    what: str = ""


@dataclass(frozen=True)
class Law:
    """Fitted coefficients (logarithms, as PRIOR) with their covariance."""

    theta: np.ndarray
    covariance: np.ndarray
    scatter: float
    """Relative scatter of the points about the law."""
    own: int
    shipped: int
    kind: str
    extra: float = 0.0

    def bpb(self, active: float, total: float, text_bytes: float) -> Estimate:
        """Bits per byte after training a model on `text_bytes` (see `effective_bytes`); the interval holds four runs out of five."""
        value, gradient = _predict(self.theta, np.array([[effective_parameters(active, total), text_bytes]]))
        sigma = math.sqrt(float(gradient[0] @ self.covariance @ gradient[0]) + self.scatter**2 + self.extra**2)  # relative
        half = SIGMAS * sigma
        source = f"law of {self.kind}: {self.own} own runs, {self.shipped} that came with the package"
        if self.extra:
            source = f"no runs on {self.kind} yet: the law of text, widened"
        return Estimate(float(value[0]), float(value[0]) * (1 - half), float(value[0]) * (1 + half), source)

    def coefficients(self) -> dict[str, float]:
        """E, A, B, a, b of the formula, N in parameters, D in bytes."""
        e, ca, cb, a, b = (float(x) for x in np.exp(self.theta))
        return {"E": e, "A": ca * N0**a, "B": cb * D0**b, "a": a, "b": b}


def effective_parameters(active: float, total: float) -> float:
    return active * (max(total, active) / active) ** IDLE_EXPONENT


def effective_bytes(read: float, unique: float) -> float:
    """Bytes of fresh text that `read` bytes are worth when the corpus has only `unique` of them."""
    if read <= unique:
        return read
    return unique * (1 + REPEATS * (1 - math.exp(-(read / unique - 1) / REPEATS)))


def kind_of(kinds: dict[str, int]) -> str:
    """`code` or `text`, by where most bytes are; kinds: bytes per file ending, without its dot."""
    code = sum(size for ending, size in kinds.items() if ending.lower().lstrip(".") in CODE)
    return "code" if 2 * code > sum(kinds.values()) else "text"


def _predict(theta: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(bpb, its relative derivatives by theta) at rows (N, D)."""
    e, ca, cb, a, b = np.exp(theta)
    log_n, log_d = np.log(x[:, 0] / N0), np.log(x[:, 1] / D0)
    first, second = ca * np.exp(-a * log_n), cb * np.exp(-b * log_d)
    value = e + first + second
    parts = np.stack([np.full(len(x), e), first, second, -a * log_n * first, -b * log_d * second], 1)
    return value, parts / value[:, None]


def fit(points: list[Point], weights: list[float] | None = None, kind: str = "text", own: int = 0) -> Law:
    """The most probable law. weights: scatter of each point in units of NOISE (default 1)."""
    x = np.array([[effective_parameters(p.active, p.total), p.text_bytes] for p in points]).reshape(-1, 2)
    y = np.log([p.bpb for p in points])
    sigma = NOISE * np.array(weights if weights is not None else [1.0] * len(points))
    theta, trust = PRIOR.copy(), np.ones(len(points))
    precision = np.diag(1 / PRIOR_SPREAD**2)
    for _ in range(200):
        value, jacobian = _predict(theta, x)
        miss = (np.log(value) - y) / sigma
        trust = 5.0 / (4.0 + miss**2)  # Student's t with four degrees of freedom
        scaled = jacobian / sigma[:, None]
        normal = scaled.T @ (trust[:, None] * scaled) + precision
        step = np.linalg.solve(normal, scaled.T @ (trust * miss) + precision @ (theta - PRIOR))
        theta = theta - np.clip(step, -0.3, 0.3)
        if abs(step).max() < 1e-8:
            break
    value, jacobian = _predict(theta, x)
    scaled = jacobian / sigma[:, None]
    covariance = np.linalg.inv(scaled.T @ (trust[:, None] * scaled) + precision)
    misses = np.log(value) - y
    scatter = math.sqrt((4 * NOISE**2 + float((trust * misses**2).sum())) / (4 + len(points)))
    return Law(theta, covariance, scatter, own, len(points) - own, kind)


def shipped_points(name: str, point: type[P]) -> list[P]:
    """The points that come with the package."""
    file = Path(__file__).parent / "laws" / f"{name}.toml"
    return [point(**row) for row in tomllib.loads(file.read_text(encoding="utf-8"))["point"]] if file.exists() else []


def own_points(name: str, point: type[P]) -> list[P]:
    """The user's own. What a damaged file still has to say is read; the rest is left."""
    try:
        rows = json.loads((home() / "laws" / f"{name}.json").read_text())["points"]
        points = [point(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [p for p in points if all(value > 0 for value in vars(p).values() if not isinstance(value, str))]


def keep_points(name: str, points: list[dict], **more: object) -> bool:
    """Write the user's own. False where nothing can be written."""
    file = home() / "laws" / f"{name}.json"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, json.dumps({"points": points, **more}, indent=1))
    except (OSError, ValueError):
        return False
    return True


def law_of(kind: str) -> Law:
    """The law of a kind of corpus, fitted to its points now."""
    own, shipped = own_points(kind, Point), shipped_points(kind, Point)
    if not own and not shipped:
        base = law_of("text")
        return Law(base.theta, base.covariance, base.scatter, 0, 0, kind, OTHER_KIND)
    trusted = FOREIGN if own else 1.0
    return fit([*own, *shipped], [1.0] * len(own) + [trusted] * len(shipped), kind, len(own))


def add_point(kind: str, point: Point) -> bool:
    """Remember a finished run and refit. False where nothing can be written: only a better forecast is lost."""
    if not (math.isfinite(point.bpb) and min(point.active, point.text_bytes, point.bpb) > 0):
        return False
    points = [*own_points(kind, Point), point]
    law = fit(points, kind=kind, own=len(points))
    return keep_points(kind, [asdict(p) for p in points], coefficients=law.coefficients())
