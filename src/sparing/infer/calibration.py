"""Calibrates the approximate tier on a user's text: for each layer, the share of a token's gate weight that its experts must carry.

A token's heaviest experts are computed until they carry the share, the others skipped (top-p over the gate, as Huang et al., "Harder Tasks
Need More Experts", arXiv 2403.07652, route in training). Layer after layer the share is lowered as far as the loss allows; the result is
then tested on text that was not used for that.
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
from sparing.infer.network import CompiledNetwork, Rows
from sparing.infer.packed_weights import derived_paths
from sparing.kernels.sizes import CACHE_BLOCK as BLOCK

TOKENS, FEWEST, WINDOW, PIECE = 32_768, 4_096, 512, 256
"""Most and fewest tokens to calibrate on, tokens of a window, rows of a step."""
STEPS = 6
"""Bisections of a layer's share."""
LIMIT_S = 120.0
"""Longest calibration: fewer tokens are scored if all would take longer."""
EXACT = 0.98
"""Shares from here on count as 1."""


@dataclass(frozen=True)
class Calibration:
    """Shares that keep the loss within the limit, and what they cost. Losses are nats per token of the test text."""

    source: str
    """Version and fingerprint of the packed weights (`PackedWeights.source`)."""
    text: str
    """Hash of the tokens."""
    limit: float
    """Relative rise of the loss that is allowed."""
    floor: int
    """Experts that every token uses in each layer."""
    shares: tuple[float, ...]
    """One for every layer, dense ones and MTP's included."""
    loss: float
    increase: float
    error: float
    """Standard error of `increase`."""
    experts: float
    """Mean experts per token and mixture layer."""
    tokens: int
    date: str
    back_offs: int = 0
    """How often the guard has moved the shares halfway back to 1 since."""

    @property
    def current_shares(self) -> np.ndarray | None:
        """Shares after the back-offs; None: all experts are used."""
        shares = np.array(self.shares, np.float32)
        for _ in range(self.back_offs):
            shares = None if shares is None else milder(shares, 1 / 2)
        return None if shares is None or (shares >= 1).all() else shares


def milder(shares: np.ndarray, part: float) -> np.ndarray | None:
    """Shares moved by `part` of their distance to 1; None once all experts are used."""
    milder_shares = shares + part * (1 - shares)
    return None if (milder_shares >= EXACT).all() else milder_shares


def saved(run: RunFolder, source: str, format: str) -> Calibration | None:
    """The newest saved calibration of these weights in this format, or None."""
    found = []
    for path in derived_paths(run, source, f"{format}-experts.json"):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            calibration = Calibration(**{**fields, "shares": tuple(fields["shares"])})
        except (OSError, ValueError, TypeError, KeyError):
            continue
        if calibration.source == source:
            found.append(calibration)
    return max(found, key=lambda calibration: (calibration.date, calibration.back_offs), default=None)


def save(run: RunFolder, format: str, calibration: Calibration) -> Path | None:
    """Write it beside the packed weights; None if neither place can be written."""
    for path in derived_paths(run, calibration.source, f"{format}-experts.json"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, json.dumps(asdict(calibration), indent=1) + "\n")
            return path
        except OSError:
            continue
    return None


def decoder_mixtures(c: ModelConfig) -> list[int]:
    """Indices of mixture layers without the MTP modules', which always use all their experts."""
    return [layer.index for layer in mixtures(c) if not layer.mtp]


def max_tokens(network: CompiledNetwork) -> int:
    """Tokens of the longest sequence."""
    return min(network.c.max_position_embeddings, len(network.cache) * BLOCK)


def windows(network: CompiledNetwork, tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Texts cut into windows of WINDOW tokens, at most TOKENS of them. Raises UserError for too little text."""
    context = min(max_tokens(network), WINDOW)
    cut: list[list[int]] = []
    for text in texts:
        ids = [tokenizer.first_id, *tokenizer.encode(text)]
        cut += (ids[start : start + context + 1] for start in range(0, len(ids) - 1, context))
    cut = cut[: TOKENS // context]
    count = sum(map(len, cut)) - len(cut)
    if count < FEWEST or len(cut) < 2:
        raise UserError(f"the text to calibrate on has {count} tokens: {FEWEST} are needed, {TOKENS} are better")
    return cut


def digest(windows: list[list[int]]) -> str:
    return hashlib.blake2b(repr(windows).encode(), digest_size=16).hexdigest()


def token_losses(network: CompiledNetwork, texts: Sequence[Sequence[int]], shares: np.ndarray | None) -> tuple[np.ndarray, float]:
    """-> (loss in nats of every token but each text's first, mean experts per token and mixture layer). Overwrites the cache's first
    blocks."""
    losses, used = [], 0
    table = list(range(-(-max(map(len, texts)) // BLOCK)))[: len(network.cache)]
    for ids in texts:
        for start in range(0, len(ids) - 1, PIECE):
            rows, piece = Rows(), list(ids[start : min(start + PIECE, len(ids) - 1)])
            rows.add(table, piece, start, len(piece), shares)
            logits = torch.from_numpy(network.forward(rows))
            used += 0 if network.used is None else int(network.used.sum())
            losses.append(F.cross_entropy(logits, torch.tensor(ids[start + 1 : start + 1 + len(piece)]), reduction="none"))
    nats = torch.cat(losses).double().numpy()
    return nats, network.c.num_experts_per_tok if shares is None else used / len(nats) / len(decoder_mixtures(network.c))


def _affordable(network: CompiledNetwork, all_windows: list[list[int]]) -> list[list[int]]:
    """As many windows as `calibrate` can score in about LIMIT_S, judging by the second one; at least FEWEST tokens."""
    took = 0.0
    for ids in all_windows[:2]:
        before = time.perf_counter()
        token_losses(network, [ids], None)
        took = time.perf_counter() - before
    passes = (STEPS * len(decoder_mixtures(network.c)) + 4) / 2  # each scores every other window
    least = -(-FEWEST // max(1, len(all_windows[0]) - 1)) + 1
    count = max(least, int(LIMIT_S / (passes * took)))
    if count >= len(all_windows):
        return all_windows
    whole = f"all of them would take {passes * took * len(all_windows):,.0f} s"
    print(f"calibrating on {count} of {len(all_windows)} pieces of text: {whole}", file=sys.stderr)
    return all_windows[:count]


def calibrate(network: CompiledNetwork, tokenizer: Tokenizer, texts: Sequence[str], limit: float, floor: int) -> Calibration:
    """Find the lowest shares with which the loss rises by at most half of `limit`, relatively, on every other window of the texts.

    They are then raised until the same holds on the other windows, whose results are reported, and the rise plus two standard errors is
    within the limit there. Raises UserError for too little text.
    """
    chosen = _affordable(network, windows(network, tokenizer, texts))
    fitting, test = chosen[::2], chosen[1::2]
    network.min_experts = floor
    all_layers = network.cache.shape[1]
    shares: np.ndarray | None = np.ones(all_layers, np.float32)
    full = token_losses(network, fitting, None)[0].mean()
    layers = decoder_mixtures(network.c)
    for number, layer in enumerate(layers, 1):  # a layer's unused allowance goes to those after it
        low, high = 1 / network.c.num_experts_per_tok, 1.0
        for _ in range(STEPS):
            shares[layer] = (low + high) / 2
            rise = token_losses(network, fitting, shares)[0].mean() - full
            low, high = (low, shares[layer]) if rise <= limit / 2 * full * number / len(layers) else (shares[layer], high)
        shares[layer] = high
    exact, _ = token_losses(network, test, None)
    while shares is not None:
        nats, experts = token_losses(network, test, shares)
        rise, error = (nats - exact).mean(), (nats - exact).std() / len(nats) ** 0.5
        if rise <= limit / 2 * exact.mean() and rise + 2 * error <= limit * exact.mean():
            break
        shares = milder(shares, 1 / 8)
    else:
        rise, error, experts = 0.0, 0.0, network.c.num_experts_per_tok
    return Calibration(
        source=network.packed_weights.source, text=digest(chosen), limit=limit, floor=floor,
        shares=tuple(np.ones(all_layers).tolist() if shares is None else shares.tolist()),
        loss=float(exact.mean()), increase=float(rise), error=float(error), experts=float(experts), tokens=len(exact),
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )  # fmt: skip
