"""How many experts a user's text can spare: per layer, the share of a token's gate weight that its experts have to carry.

The heaviest experts of a token that together reach the share are computed, the others left out (top-p over the gate; Huang et al., "Harder
Tasks Need More Experts", arXiv 2403.07652, route so in training). The shares are lowered layer by layer as far as the loss allows,
then tried on text that had no part in that.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sparing.base.config import ModelConfig, UserError
from sparing.base.files import write_atomic
from sparing.base.layers import mixtures
from sparing.base.run import RunFolder
from sparing.data.tokenizer import Tokenizer
from sparing.infer.cache import BLOCK
from sparing.infer.compiled import CompiledNetwork
from sparing.infer.network import Rows
from sparing.infer.pack import places

TOKENS, FEWEST, WINDOW, PIECE = 32_768, 4_096, 512, 256
"""Most and fewest tokens that are read, the texts' length, rows of a step."""
STEPS = 6
"""Bisections of a layer's share."""
LIMIT_S = 120.0
"""For all of it: where scoring so many tokens so often would take longer, fewer are read."""
EXACT = 0.98
"""Shares above are taken for 1."""


@dataclass(frozen=True)
class Calibration:
    """Losses are nats a token of the text it was made on."""

    source: str
    """Of the packed weights."""
    text: str
    """Digest of the tokens."""
    limit: float
    """Of the loss: how much it may rise."""
    floor: int
    """Experts of a layer that every token keeps."""
    shares: tuple[float, ...]
    """Of every layer, dense ones and MTP's included."""
    loss: float
    increase: float
    error: float
    """Standard error of `increase`."""
    experts: float
    """Mean experts of a token and layer."""
    tokens: int
    date: str


def milder(shares: np.ndarray, part: float) -> np.ndarray | None:
    """That part of the way back to 1; None: there."""
    found = shares + part * (1 - shares)
    return None if (found >= EXACT).all() else found


def saved(run: RunFolder, source: str, format: str) -> Calibration | None:
    """The calibration of these weights in this format, where one was made."""
    for path in places(run, source, f"{format}-experts.json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            found = Calibration(**{**found, "shares": tuple(found["shares"])})
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if found.source == source:
            return found
    return None


def save(run: RunFolder, format: str, calibration: Calibration) -> Path | None:
    """Beside the packed weights; None: nothing can be written there."""
    for path in places(run, calibration.source, f"{format}-experts.json"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(asdict(calibration), indent=1) + "\n")
            return path
        except OSError:
            continue
    return None


def decoder_mixtures(c: ModelConfig) -> list[int]:
    """Numbers of the decoder's layers that have experts; drafts of MTP modules use all of theirs."""
    return [layer.index for layer in mixtures(c) if not layer.mtp]


def room(network: CompiledNetwork) -> int:
    """Tokens of the longest text."""
    return min(network.c.max_position_embeddings, len(network.cache) * BLOCK)


def windows(network: CompiledNetwork, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Texts cut to what is scored at once. Raises UserError for too little of it."""
    context = min(room(network), WINDOW)
    found: list[list[int]] = []
    for text in texts:
        ids = [tokenizer.eot_id, *tokenizer.encode(text)]
        found += (ids[start : start + context + 1] for start in range(0, len(ids) - 1, context))
    found = found[: TOKENS // context]
    count = sum(map(len, found)) - len(found)
    if count < FEWEST or len(found) < 2:
        raise UserError(f"the text to calibrate on has {count} tokens: {FEWEST} are needed, {TOKENS} are better")
    return found


def digest(windows: list[list[int]]) -> str:
    return hashlib.blake2b(repr(windows).encode(), digest_size=16).hexdigest()


def score(network: CompiledNetwork, texts: Sequence[Sequence[int]], shares: np.ndarray | None) -> tuple[np.ndarray, float]:
    """Nats of every token but each text's first; mean experts of a token and layer. Overwrites the cache's first blocks."""
    found, used = [], 0
    table = list(range(-(-max(map(len, texts)) // BLOCK)))[: len(network.cache)]
    for ids in texts:
        for start in range(0, len(ids) - 1, PIECE):
            rows, piece = Rows(), list(ids[start : min(start + PIECE, len(ids) - 1)])
            rows.add(table, piece, start, len(piece), shares)
            logits = torch.from_numpy(network.forward(rows))
            used += 0 if network.used is None else int(network.used.sum())
            found.append(F.cross_entropy(logits, torch.tensor(ids[start + 1 : start + 1 + len(piece)]), reduction="none"))
    nats = torch.cat(found).double().numpy()
    return nats, network.c.num_experts_per_tok if shares is None else used / len(nats) / len(decoder_mixtures(network.c))


def _affordable(network: CompiledNetwork, found: list[list[int]]) -> list[list[int]]:
    """As many windows as `calibrate` can score in about LIMIT_S, by the time that the second one takes; at least FEWEST tokens."""
    took = 0.0
    for ids in found[:2]:
        before = time.perf_counter()
        score(network, [ids], None)
        took = time.perf_counter() - before
    passes = (STEPS * len(decoder_mixtures(network.c)) + 4) / 2  # each scores every other window
    least = -(-FEWEST // max(1, len(found[0]) - 1)) + 1
    count = max(least, int(LIMIT_S / (passes * took)))
    if count >= len(found):
        return found
    whole = f"all of them would take {passes * took * len(found):,.0f} s"
    print(f"calibrating on {count} of {len(found)} pieces of text: {whole}", file=sys.stderr)
    return found[:count]


def calibrate(network: CompiledNetwork, tokenizer: Tokenizer, texts: Sequence[str], limit: float, floor: int) -> Calibration:
    """Shares with which the loss rises by half of `limit` of it at most, on every other window of the texts and, which is what is
    reported, on the others: there by two standard errors less than the limit, too. Raises UserError for too little text."""
    found = _affordable(network, windows(network, tokenizer, texts))
    fitted, tried = found[::2], found[1::2]
    network.model.least = floor
    shares: np.ndarray | None = np.ones(network.model.all_layers, np.float32)
    full = score(network, fitted, None)[0].mean()
    layers = decoder_mixtures(network.c)
    for number, layer in enumerate(layers, 1):  # what a layer leaves of its allowance goes to those after it
        low, high = 1 / network.c.num_experts_per_tok, 1.0
        for _ in range(STEPS):
            shares[layer] = (low + high) / 2
            rise = score(network, fitted, shares)[0].mean() - full
            low, high = (low, shares[layer]) if rise <= limit / 2 * full * number / len(layers) else (shares[layer], high)
        shares[layer] = high
    exact, _ = score(network, tried, None)
    while shares is not None:
        nats, experts = score(network, tried, shares)
        rise, error = (nats - exact).mean(), (nats - exact).std() / len(nats) ** 0.5
        if rise <= limit / 2 * exact.mean() and rise + 2 * error <= limit * exact.mean():
            break
        shares = milder(shares, 1 / 8)
    else:
        rise, error, experts = 0.0, 0.0, network.c.num_experts_per_tok
    return Calibration(
        source=network.pack.source, text=digest(found), limit=limit, floor=floor,
        shares=tuple(np.ones(network.model.all_layers).tolist() if shares is None else shares.tolist()),
        loss=float(exact.mean()), increase=float(rise), error=float(error), experts=float(experts), tokens=len(exact),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
