"""In which proportions several sources make the best training data for a sample: `data select --by mixture`.

As RegMix does (Liu et al. 2024, arXiv 2407.01492): small proxy models learn from mixtures drawn at random, each is scored on the sample, a
regression says what proportions are worth, and the mixture that it likes best is taken. The regression here is a power law of the
proportions, log(bits per byte) = a - sum of c_k log(p_k + f) with c_k >= 0: two more numbers than sources, so that few proxies settle it;
and more of a source is worth less the more there is of it, so that its best mixture is not simply the best source. (RegMix has a linear
regression, whose best mixture is one source alone, and gradient-boosted trees, which need hundreds of proxies.)
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sparing.base.config import Config, OptimConfig, TrainConfig, UserError
from sparing.base.files import append_durably, read_lines
from sparing.base.hardware import cores
from sparing.base.messages import say
from sparing.curate.parts import Stop
from sparing.data.progress import check
from sparing.data.tokenizer import Tokenizer, train_tokenizer
from sparing.resolve import LADDER, LR_EXPONENT, LR_PEAK, LR_TOKENS, shaped

PROXY_TOKENS = 400_000
"""That a proxy is trained on: seconds. RegMix's proxies, of 1 M parameters too, had 1 G."""
PER_SOURCE, FEWEST = 4, 8
"""Proxies by default: as many for each source, and no fewer in all."""
VOCABULARY, SEQ_LEN, ROWS = 2048, 256, 16
DRAWN_BYTES = 4 * PROXY_TOKENS
"""Of a source, and at most SCORED_BYTES of the sample."""
SCORED_BYTES = 64 << 10
CONCENTRATIONS = (0.3, 1.0, 3.0)
"""Of the Dirichlet distributions that mixtures are drawn from: nearly one source, any, nearly even. RegMix's are 0.1 to 5."""
CANDIDATES = 128
"""Draws from each, of which those are tried that lie farthest apart."""
FLOORS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""A source that is left out is worth what such a share of it would be, because others have some of its words."""
WEAK = 0.5
"""Rank correlation below which the law's advice is said to be weak."""


@dataclass(frozen=True)
class Law:
    """log(bits per byte) = start - sum of worth_k log(p_k + floor)."""

    start: float
    worth: np.ndarray
    """float64 [sources], 0 or more."""
    floor: float

    def bpb(self, shares: np.ndarray) -> np.ndarray:
        """Bits per byte of mixtures, float64 [..., sources] -> [...]."""
        return np.exp(self.start - np.log(shares + self.floor) @ self.worth)

    @classmethod
    def of(cls, shares: np.ndarray, bpb: np.ndarray) -> Law:
        """By least squares: shares float64 [proxies, sources], bpb float64 [proxies]."""
        laws = [cls._with(floor, shares, bpb) for floor in FLOORS]
        return min(laws, key=lambda law: float(np.square(np.log(law.bpb(shares) / bpb)).sum()))

    @classmethod
    def _with(cls, floor: float, shares: np.ndarray, bpb: np.ndarray) -> Law:
        """A source whose worth comes out negative has none, and the others are fitted again."""
        logs, worth = -np.log(shares + floor), np.zeros(shares.shape[1])
        able = np.ones(shares.shape[1], bool)
        while True:
            found = np.linalg.lstsq(np.column_stack((np.ones(len(logs)), logs[:, able])), np.log(bpb), rcond=None)[0]
            if (found[1:] >= 0).all():
                worth[able] = found[1:]
                return cls(float(found[0]), worth, floor)
            able[np.flatnonzero(able)[np.argmin(found[1:])]] = False

    def best(self, most: np.ndarray) -> np.ndarray:
        """The mixture with the fewest bits per byte, float64 [sources]. most: of each source, as a share of the mixture. Less than 1 in
        all where the sources that are worth something have less."""
        most = np.minimum(most, 1.0)
        if not self.worth.any():
            raise UserError("no source lowers the loss on the sample: there is no best mixture; use --by quality")
        low, high = 0.0, (1.0 + self.floor) / self.worth[self.worth > 0].min()
        for _ in range(100):  # shares grow with the middle: p_k + floor is proportional to the worth, up to what there is
            middle = (low + high) / 2
            shares = np.clip(self.worth * middle - self.floor, 0.0, most)
            low, high = (low, middle) if shares.sum() > 1 else (middle, high)
        return np.clip(self.worth * low - self.floor, 0.0, most)


@dataclass(frozen=True)
class Mixture:
    """What proxies have found."""

    shares: np.ndarray
    """float64 [sources]: of the budget."""
    summary: dict
    """For `--json`: proxies, tokens of each, rank, expected and own (bits per byte by the law), tried."""


def find_mixture(
    sources: Sequence[list[str]], sample: list[str], own: np.ndarray, most: np.ndarray, proxies: int, work: Path, should_stop: Stop = None
) -> Mixture:
    """The best mixture of sources for a sample.

    sources: texts of each, drawn at random, about DRAWN_BYTES. own: each one's share of the pool. most: each one's size as a share of the
    budget. proxies: how many models are trained, sources + 3 or more. work: keeps their scores, so that the same call goes on. Raises
    UserError; Stopped.
    """
    tokenizer = _tokenizer([text for texts in zip_all(sources) for text in texts], should_stop)
    tokens = [np.concatenate([[tokenizer.eot_id], *(_ended(tokenizer, text) for text in texts)]) for texts in sources]
    for number, array in enumerate(tokens):
        if len(array) <= SEQ_LEN + 1:
            raise UserError(f"source {number + 1} has {len(array)} tokens: too few to learn from; leave it out")
    tried = draw_mixtures(own, proxies)
    setting = hashlib.blake2b(repr((tried.tolist(), PROXY_TOKENS, tokenizer.to_json(), sample)).encode(), digest_size=8)
    for array in tokens:
        setting.update(array.tobytes())
    scores = work / f"proxies-{setting.hexdigest()}.jsonl"
    found = [line["bpb"] for line in read_lines(scores)]
    say(f"{proxies} proxies of {PROXY_TOKENS / 1e6:.2g} M tokens each" + (f", {len(found)} of them done" if found else ""))
    for shares in tried[len(found) :]:
        began = time.monotonic()
        found.append(proxy_bpb(tokenizer, tokens, shares, sample, should_stop))
        append_durably(scores, json.dumps({"shares": shares.tolist(), "bpb": found[-1]}))
        left = (proxies - len(found)) * (time.monotonic() - began)
        mixed = ", ".join(f"{share:.0%}" for share in shares)
        say(f"  {len(found)} of {proxies}: {mixed}: {found[-1]:.4f} bits per byte of the sample; about {left:.0f} s left")
    bpb = np.array(found)
    law = Law.of(tried, bpb)
    left_out = [Law.of(np.delete(tried, n, 0), np.delete(bpb, n)).bpb(tried[n]) for n in range(proxies)]
    rank = _rank(np.array(left_out), bpb)
    if rank < WEAK:
        say(f"the law hardly knows which proxy is better (rank correlation {rank:.2f} on those that it was not fitted to): more --proxies")
    shares = law.best(most)
    summary = {
        "proxies": proxies, "tokens": PROXY_TOKENS, "rank": rank, "expected": float(law.bpb(shares)), "own": float(law.bpb(own)),
        "tried": [{"shares": row.tolist(), "bpb": value} for row, value in zip(tried, found, strict=True)],
    }  # fmt: skip
    return Mixture(shares, summary)


def draw_mixtures(own: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """float64 [count, sources]: the pool's own proportions, then draws from Dirichlet distributions, each as far as can be from all before
    it."""
    dice = np.random.default_rng(seed)
    drawn = np.concatenate([dice.dirichlet(np.full(len(own), value), CANDIDATES) for value in CONCENTRATIONS])
    tried = [own]
    for _ in range(count - 1):
        apart = np.min([np.abs(drawn - other).sum(1) for other in tried], 0)
        tried.append(drawn[int(np.argmax(apart))])
    return np.stack(tried)


def zip_all(sources: Sequence[list[str]]) -> list[tuple[str, ...]]:
    """The first text of each source, then the second of each, until the shortest list ends: all count the same for the tokenizer."""
    return list(zip(*sources, strict=False))


class MixedRows:
    """Rows of `ROWS` x `SEQ_LEN` tokens from anywhere in the sources, in given proportions: a pure function of the step."""

    def __init__(self, tokens: Sequence[np.ndarray], shares: np.ndarray):
        self._tokens, self._ends = tokens, np.cumsum(shares) / np.sum(shares)

    def batch(self, step: int, rank: int = 0, world: int = 1):
        import torch

        from sparing.data.loader import Batch

        dice = np.random.default_rng(step)  # the same for all proxies: what differs is the mixture
        places, offsets = (np.arange(ROWS) + dice.random()) / ROWS, dice.random(ROWS)
        owners = np.minimum(np.searchsorted(self._ends, places, side="right"), len(self._tokens) - 1)
        rows = []
        for owner, offset in zip(owners, offsets, strict=True):
            array = self._tokens[owner]
            start = int(offset * (len(array) - SEQ_LEN - 1))
            rows.append(array[start : start + SEQ_LEN + 1])
        text = torch.from_numpy(np.stack(rows).astype(np.int64))
        return Batch(text[:, :-1].contiguous(), text[:, 1:, None].contiguous())


def proxy_bpb(tokenizer: Tokenizer, tokens: Sequence[np.ndarray], shares: np.ndarray, sample: list[str], should_stop: Stop = None) -> float:
    """Bits per byte of the sample under a small model that has learnt from a mixture."""
    from sparing.evals.bpb import bpb  # here, because torch takes seconds to load
    from sparing.model.init import init_weights
    from sparing.model.transformer import Transformer
    from sparing.train.objective import NextToken
    from sparing.train.optim import lr_scale, momentum
    from sparing.train.trainer import Trainer

    steps = max(1, PROXY_TOKENS // (ROWS * SEQ_LEN))
    optim = OptimConfig(lr=round(min(0.05, LR_PEAK * (PROXY_TOKENS / LR_TOKENS) ** LR_EXPONENT), 4))
    settings = TrainConfig(seq_len=SEQ_LEN, batch_size=ROWS, dtype="float32", device="cpu", replicas=min(cores(), ROWS), compile=False)
    config = Config(model=shaped(LADDER[0], -(-tokenizer.vocab_size // 64) * 64, SEQ_LEN, moe=False), train=settings, optim=optim)
    model = Transformer(config.model)
    init_weights(model, settings.seed)
    trainer = Trainer(model, MixedRows(tokens, shares), NextToken.of(config), config=config)
    for step in range(steps):
        check(should_stop)
        losses = trainer.gradients(trainer.feed.batch(step), step)
        trainer.update(losses["grad_norm"], lr_scale(step, steps, optim), momentum(step, steps, optim))
    trainer.replicas.train(False)
    return bpb(trainer.replicas.nll, tokenizer, sample, SEQ_LEN, batch=2 * ROWS, should_stop=should_stop)["bpb"]


def _tokenizer(texts: list[str], should_stop: Stop) -> Tokenizer:
    return train_tokenizer(texts, VOCABULARY, should_stop)


def _ended(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.append(tokenizer.encode_array(text), tokenizer.eot_id)


def _rank(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation; 0 where one of them is constant."""
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(np.argsort(np.argsort(one)), np.argsort(np.argsort(other)))[0, 1])
