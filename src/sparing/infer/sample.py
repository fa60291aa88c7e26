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
from sparing.kernels.decode import address, library


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys: splitmix64 (Steele et al., OOPSLA 2014) of both."""
    x = (seed + 0x9E3779B97F4A7C15 * (position + 1)) % 2**64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return x % 2**32, x >> 32


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
    x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
    return x ^ x >> np.uint32(16)


def noise(seed: int, position: int, size: int) -> np.ndarray:
    """(size,) float64 Gumbel noise of one position of one text, from 23 bits a number."""
    low, high = noise_key(seed, position)
    bits = _mix(_mix(np.arange(size, dtype=np.uint32) ^ np.uint32(low)) + np.uint32(high)) >> np.uint32(9)
    return -np.log(-np.log((bits + 0.5) / 2**23))


def draw(z_V: np.ndarray, scale: float, seed: int, position: int) -> int:
    """argmax of z * scale + noise: compiled (kernels/decode.c) where there is a compiler, else the reference."""
    compiled = library()
    if compiled is None:
        return int((z_V * scale + noise(seed, position, len(z_V))).argmax())
    z = z_V
    if z.dtype != np.float32 or not z.flags.c_contiguous:
        with np.errstate(over="ignore"):  # far enough below the largest to be -inf
            z = np.ascontiguousarray(z, np.float32)
    return compiled.draw(address(z), len(z), scale, *noise_key(seed, position))


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
    z = (z_V.astype(np.float64) - float(z_V.max())) / s.temperature
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
    if s.top_k or s.top_p < 1 or s.min_p > 0 or s.temperature < 1e-3:  # float32 would overflow
        return draw(truncated(z, s), 1.0, seed, position)
    return draw(z, 1 / s.temperature, seed, position)


def logprob(logits_V: np.ndarray, token: int, alternatives: int) -> TokenLogprob:
    """Of the model's own distribution."""
    z = logits_V.astype(np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    best = np.argsort(-z, kind="stable")[:alternatives] if alternatives else ()
    return TokenLogprob(token, float(z[token]), tuple((int(i), float(z[i])) for i in best))
