"""From logits to a token: penalties, masks, temperature, truncation, and a draw that depends on the seed and the position alone.

The draw adds Gumbel noise to the logits and takes the largest (the Gumbel-max trick). The noise is a function of (seed, position,
token), so a text does not depend on who else is served; and a draft drawn with the same noise agrees with the model's own choice as
often as two distributions allow without exchanging more than the seed (drafter-invariant speculation, arXiv 2408.07978).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sparing.infer.request import Sampling, TokenLogprob


def noise(seed: int, position: int, size: int) -> np.ndarray:
    """(size,) float64 Gumbel noise of one position of one text."""
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, position])).gumbel(size=size)


def edited(logits_V: np.ndarray, s: Sampling, prompt: Sequence[int], made: Sequence[int]) -> np.ndarray | None:
    """Logits after penalties, bias and grammar; None when the grammar allows no further token."""
    z = logits_V.astype(np.float64)
    if s.repetition_penalty != 1.0:
        seen = np.unique(np.fromiter((*prompt, *made), np.int64))
        z[seen] = np.where(z[seen] > 0, z[seen] / s.repetition_penalty, z[seen] * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and len(made):
        counts = Counter(made)
        ids, times = np.fromiter(counts, np.int64), np.fromiter(counts.values(), np.float64)
        z[ids] -= s.presence_penalty + s.frequency_penalty * times
    for token, bias in s.logit_bias.items():
        z[token] += bias
    if s.grammar is not None:
        allowed = np.asarray(s.grammar.mask(), bool)
        if not allowed.any():
            return None
        z[~allowed] = -np.inf
    return z


def truncated(z_V: np.ndarray, s: Sampling) -> np.ndarray:
    """Logits over the temperature; those outside top-k, top-p (arXiv 1904.09751) or min-p (2407.01082) are -inf. Ties go to lower ids."""
    z = (z_V - z_V.max()) / s.temperature
    if s.top_k and s.top_k < len(z):
        z[np.argsort(-z, kind="stable")[s.top_k :]] = -np.inf
    if s.top_p < 1 or s.min_p > 0:
        p = np.exp(z)
        p /= p.sum()
        if s.top_p < 1:
            order = np.argsort(-p, kind="stable")
            before = np.cumsum(p[order]) - p[order]  # the token that crosses top_p is still in
            z[order[before >= s.top_p]] = -np.inf
        z[p < s.min_p * p.max()] = -np.inf
    return z


def choose(
    logits_V: np.ndarray, s: Sampling, seed: int, position: int, prompt: Sequence[int] = (), made: Sequence[int] = (), edit: bool = True
) -> int | None:
    """The token at `position` (of prompt and continuation together), from (V,) float32 logits; None: the grammar allows none.

    edit: apply penalties, bias and grammar (drafts leave them out)."""
    z: np.ndarray | None = logits_V
    if edit and s.edits_logits:
        z = edited(logits_V, s, prompt, made)
        if z is None:
            return None
    if s.temperature == 0:
        return int(z.argmax())
    z = truncated(z.astype(np.float64), s)
    return int((z + noise(seed, position, len(z))).argmax())


def logprob(logits_V: np.ndarray, token: int, alternatives: int) -> TokenLogprob:
    """Of the model's own distribution."""
    z = logits_V.astype(np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    best = np.argsort(-z, kind="stable")[:alternatives]
    return TokenLogprob(token, float(z[token]), tuple((int(i), float(z[i])) for i in best))
