"""Sampling: from logits to tokens, and draft tokens from the model's own MTP module.

A token is sampled by adding Gumbel noise to the logits and taking the largest (the Gumbel-max trick). The noise depends on (seed,
position, token) alone. So a text does not depend on the other requests, and a draft sampled with the same noise agrees with the model's
own choice as often as two distributions can that share only a seed (drafter-invariant speculation, arXiv 2408.07978).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from sparing.infer.network import CompiledNetwork, Rows, TorchNetwork
from sparing.infer.request import Sampling, TokenLogprob
from sparing.infer.scheduler import Span
from sparing.kernels.decode import address, library

LIKELY = 256
"""As many of the likeliest tokens are looked at first for top-p; eight times as many next."""


def noise_key(seed: int, position: int) -> tuple[int, int]:
    """Two 32-bit keys: splitmix64 (Steele et al., OOPSLA 2014) of seed and position."""
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
    """(size,) float64 Gumbel noise of one position, from 23 random bits a number. The reference for `draw` in kernels/decode.c."""
    low, high = noise_key(seed, position)
    bits = _mix(_mix(np.arange(size, dtype=np.uint32) ^ np.uint32(low)) + np.uint32(high)) >> np.uint32(9)
    return -np.log(-np.log((bits + 0.5) / 2**23))


def draw(z_V: np.ndarray, scale: float, seed: int, position: int) -> int:
    """argmax of z * scale + noise, by kernels/decode.c where there is a C compiler."""
    compiled = library()
    if compiled is None:
        return int((z_V * scale + noise(seed, position, len(z_V))).argmax())
    z = z_V
    if z.dtype != np.float32 or not z.flags.c_contiguous:
        with np.errstate(over="ignore"):  # far enough below the largest to be -inf
            z = np.ascontiguousarray(z, np.float32)
    return compiled.draw(address(z), len(z), scale, *noise_key(seed, position))


def edited(logits_V: np.ndarray, s: Sampling, prompt: Sequence[int], generated: Sequence[int]) -> np.ndarray | None:
    """Logits after penalties, bias and grammar; None if the grammar allows no token, because it is complete. Raises GrammarFailed."""
    z = logits_V.astype(np.float64)
    if s.repetition_penalty != 1.0:
        seen = np.unique(np.fromiter((*prompt, *generated), np.int64))
        z[seen] = np.where(z[seen] > 0, z[seen] / s.repetition_penalty, z[seen] * s.repetition_penalty)
    if (s.presence_penalty or s.frequency_penalty) and len(generated):
        counts = Counter(generated)
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


def largest(z_V: np.ndarray, count: int) -> np.ndarray:
    """Places of the `count` largest numbers, the largest first, equal ones by place; a vocabulary is not sorted for it."""
    if count == 1:
        return np.array([z_V.argmax()])
    if not 0 < count < len(z_V):
        return np.argsort(-z_V, kind="stable")[:count]
    least = np.partition(z_V, len(z_V) - count)[len(z_V) - count]
    candidates = np.flatnonzero(z_V >= least)
    return candidates[np.argsort(-z_V[candidates], kind="stable")[:count]]


def _only(z_V: np.ndarray, places: np.ndarray) -> np.ndarray:
    """(V,) `z_V` at `places`, and -inf everywhere else."""
    kept = np.full_like(z_V, -np.inf)
    kept[places] = z_V[places]
    return kept


def _leading(p_V: np.ndarray, share: float) -> np.ndarray:
    """Places of the likeliest that come before `share` is reached and of the one that crosses it; at least one."""
    count = LIKELY
    while True:
        order = largest(p_V, count)
        before = np.cumsum(p_V[order]) - p_V[order]
        if before[-1] >= share or len(order) == len(p_V):
            break
        count *= 8
    kept = before < share
    kept[0] = True
    return order[kept]


def truncated(z_V: np.ndarray, s: Sampling) -> np.ndarray:
    """Logits divided by the temperature; -inf outside top-k, top-p (arXiv 1904.09751) and min-p (2407.01082). Ties go to lower ids."""
    z = (z_V.astype(np.float64) - float(z_V.max())) / s.temperature
    if s.top_k and s.top_k < len(z):
        z = _only(z, largest(z, s.top_k))
    if s.top_p < 1 or s.min_p > 0:
        p = np.exp(z)
        p /= p.sum()
        if s.top_p < 1:
            z = _only(z, _leading(p, s.top_p))
        z[p < s.min_p * p.max()] = -np.inf
    return z


def choose(
    logits_V: np.ndarray,
    s: Sampling,
    seed: int,
    position: int,
    prompt: Sequence[int] = (),
    generated: Sequence[int] = (),
    edit: bool = True,
) -> int | None:
    """Sample the token at `position` (counted from the prompt's start) from (V,) float32 logits; None if the grammar allows none.

    edit: apply penalties, bias and grammar; drafts skip them."""
    z: np.ndarray | None = logits_V
    if edit and s.edits_logits:
        z = edited(logits_V, s, prompt, generated)
        if z is None:
            return None
    if s.temperature == 0:
        return int(z.argmax())
    if s.top_k or s.top_p < 1 or s.min_p > 0 or s.temperature < 1e-3:  # float32 would overflow
        return draw(truncated(z, s), 1.0, seed, position)
    return draw(z, 1 / s.temperature, seed, position)


def logprob(logits_V: np.ndarray, token: int, alternatives: int) -> TokenLogprob:
    """Log-probability of `token` and of the likeliest `alternatives` under the model's distribution."""
    z = logits_V.astype(np.float64)
    z -= z.max()
    z -= np.log(np.exp(z).sum())
    best = largest(z, alternatives) if alternatives else ()
    return TokenLogprob(token, float(z[token]), tuple((int(i), float(z[i])) for i in best))


def propose(network: CompiledNetwork | TorchNetwork, spans: list[Span], length: int) -> None:
    """Draft up to `length` tokens for every sequence of the step just computed; the next step verifies them.

    The MTP module (DeepSeek-V3 §2.2) reads the hidden state of a position and the next token, and predicts the token after that; for
    longer drafts it reads its own output. It caches one more layer in the same blocks. If it skipped the first tokens of a sequence, its
    attention starts at the first one it saw. `network.hidden` has the step's hidden states.
    """
    rows, hidden, drafting = Rows(), [], []
    for span in spans:
        seq = span.seq
        seq.draft = []
        if length == 0 or not seq.blocks:
            continue
        if seq.request.sampling.routes:
            continue
        start, end = span.start, seq.computed
        if seq.mtp_end != start:
            seq.mtp_start = start
        seq.mtp_end = end
        complete = end == len(seq.tokens) - 1
        rows.add(seq.blocks, seq.tokens[start + 1 : end + 1], start, int(complete))
        rows.first += [seq.mtp_start] * (end - start)
        hidden.append(network.hidden[span.row : span.row + end - start])
        if complete:
            drafting.append(seq)
    if not rows.tokens:
        return
    logits = network.draft(rows, hidden[0] if len(hidden) == 1 else np.concatenate(hidden))
    for ahead in range(length):
        following, longer = Rows(), []
        for i, (seq, logits_V) in enumerate(zip(drafting, logits, strict=True)):
            room = seq.max_tokens - (len(seq.tokens) - len(seq.request.prompt)) - 1
            if ahead >= room:
                continue
            token = choose(logits_V, seq.request.sampling, seq.request.seed, len(seq.tokens) + ahead, edit=False)
            seq.draft.append(token)
            if ahead + 1 < length:
                following.add(seq.blocks, [token], seq.computed + ahead, 1)
                following.first.append(seq.mtp_start)
                longer.append((i, seq))
        if not longer:
            return
        drafting = [seq for _, seq in longer]
        before = network.hidden[rows.wanted][[i for i, _ in longer]]
        logits, rows = network.draft(following, before), following
