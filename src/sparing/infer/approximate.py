"""The approximate tier: requests that ask for it use fewer experts, and a guard watches what that costs.

About 1 % of such texts are computed a second time with every expert when they have ended, as requests of the engine's own. What is compared
is the log-probability of a token that the approximate model draws at every place at temperature 1, beside the one that it wrote:
approximate minus exact, whose mean is the divergence of the two models, on trained models as large as the rise of the loss on real text.
The tokens written would not do: the likeliest ones differ less, and in texts that repeat themselves the other way round (LAB.md).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparing.base.config import UserError
from sparing.base.run import RunFolder
from sparing.data.tokenizer import Tokenizer
from sparing.infer.calibration import calibrate, decoder_mixtures, digest, milder, room, save, saved, windows
from sparing.infer.compiled import CompiledNetwork
from sparing.infer.network import TorchNetwork
from sparing.infer.request import Piece, Request, Sampling, TokenLogprob
from sparing.infer.sample import draw, logprob, noise_key
from sparing.infer.scheduler import Share, Text
from sparing.infer.text import TextStream

MEMORY = 1 - 1e-4
"""Weight of what was compared before, a token ago."""
SOME, MANY = 200, 5000
"""Tokens from which a rise of three standard errors over the limit is believed, and from which the mean itself is."""


@dataclass(frozen=True)
class Approximate:
    """What an engine's operator allows. texts: the user's, to calibrate on; none: as it was calibrated before. limit: of the loss, how
    much it may rise. floor: experts of a layer that every token keeps. checked: share of the texts that the guard computes again."""

    texts: Sequence[str] = ()
    limit: float = 0.001
    floor: int = 1
    checked: float = 0.01


class Approximation:
    """An engine's approximate tier; everything but `begin` and `metrics` is called on the engine's thread."""

    def __init__(self, allowed: Approximate, run: RunFolder, network: CompiledNetwork | TorchNetwork, tokenizer: Tokenizer):
        """Calibrates where texts are given and no earlier calibration was made on them. Raises UserError."""
        if isinstance(network, TorchNetwork):
            raise UserError(f"{run} runs in plain PyTorch here, where approximate answers would save nothing")
        c, format = network.c, network.format
        if not decoder_mixtures(c):
            raise UserError(f"{run} has no experts to leave out: it answers exactly only")
        if not 1 <= allowed.floor <= c.num_experts_per_tok:
            raise UserError(f"approximate floor {allowed.floor}: must be from 1 to {c.num_experts_per_tok}, the model's experts a token")
        if not 0 < allowed.limit < 1:
            raise UserError(f"approximate limit {100 * allowed.limit:g} %: must be above 0 and below 100")
        found = saved(run, network.pack.source, format)
        if allowed.texts:
            asked = (digest(windows(network, tokenizer, allowed.texts)), allowed.limit, allowed.floor)
            if found is None or (found.text, found.limit, found.floor) != asked:
                found = calibrate(network, tokenizer, allowed.texts, allowed.limit, allowed.floor)
                save(run, format, found)
        if found is None:
            raise UserError(f"{run} was not calibrated for approximate answers in {format}: give some of your text")
        self.calibration, self.checked, self._room, self._tokenizer = found, allowed.checked, room(network), tokenizer
        network.model.least = found.floor
        shares = np.array(found.shares, np.float32)
        self.shares = None if (shares >= 1).all() else shares
        """Of new requests; None: as exact as any."""
        self.back_offs = 0
        self._layers, self._counts = len(decoder_mixtures(c)), Counter()
        self._forget()

    def _forget(self) -> None:
        self._weight = self._sum = self._squares = 0.0

    @property
    def rise(self) -> tuple[float, float]:
        """What the guard sees, nats a token, and its standard error."""
        if not self._weight:
            return 0.0, 0.0
        mean = self._sum / self._weight
        return mean, (max(0.0, self._squares / self._weight - mean**2) / self._weight) ** 0.5

    def begin(self, text: Text) -> None:
        """A text that asked for it, before it waits."""
        found = self.calibration
        text.request.approximate = {
            "loss_increase": found.increase / found.loss,
            "limit": found.limit,
            "back_offs": self.back_offs,
        }
        text.shares = self.shares
        if self.shares is not None and noise_key(text.request.seed, len(text.tokens))[0] < self.checked * 2**32:
            text.noted = []

    def count(self, shares: Sequence[Share], used: np.ndarray) -> None:
        """After a step with approximate texts. used: (rows,) experts, of all layers."""
        rows = [share.row for share in shares]
        for share, end, experts in zip(shares, [*rows[1:], len(used)], np.add.reduceat(used, rows).tolist(), strict=True):
            if share.text.shares is not None:
                for counts, suffix in ((share.text.request.usage, ""), (self._counts, "_total")):
                    counts["approximate_experts" + suffix] += experts
                    counts["approximate_layers" + suffix] += (end - share.row) * self._layers

    def again(self, text: Text, reason: str) -> list[Text]:
        """A text has ended: those that compute it again exactly, one or none."""
        if not text.noted or reason not in ("stop", "length"):
            return []
        request: Request

        def hear(piece: Piece | None) -> None:
            if piece is None and request.finish_reason in ("stop", "length"):
                self._compare(text, request.prompt_logprobs[len(text.request.prompt) - 1 :])

        request = Request(text.tokens[: self._room - 1], Sampling(max_tokens=1, temperature=0, prompt_logprobs=True), hear)
        found = Text(request, TextStream(self._tokenizer), 1)
        found.targets = [*text.request.prompt, *(row.token for row in text.noted)]
        return [found]

    def _compare(self, text: Text, exact: list[TokenLogprob]) -> None:
        if text.shares is not self.shares:
            return  # what came before a back-off says nothing about what follows it
        for noted, row in zip(text.noted or (), exact, strict=False):
            difference = noted.logprob - row.logprob
            self._weight = MEMORY * self._weight + 1
            self._sum = MEMORY * self._sum + difference
            self._squares = MEMORY * self._squares + difference**2
        self._counts["approximate_checked_total"] += len(exact)
        limit, (mean, error) = self.calibration.limit * self.calibration.loss, self.rise
        if (self._weight >= SOME and mean - 3 * error > limit) or (self._weight >= MANY and mean > limit):
            self.shares = milder(self.shares, 1 / 2)
            self.back_offs += 1
            self._forget()
            what = "halfway back to all experts" if self.shares is not None else "all experts again"
            print(f"approximate answers lose {mean:.4f} nats a token, more than {limit:.4f}: {what}", file=sys.stderr, flush=True)

    def metrics(self) -> dict[str, float]:
        mean, error = self.rise
        experts, layers = self._counts["approximate_experts_total"], self._counts["approximate_layers_total"]
        return {
            **self._counts, "approximate_experts_per_token": experts / layers if layers else 0.0, "approximate_rise": mean,
            "approximate_rise_error": error, "approximate_back_offs_total": self.back_offs,
            "approximate_rise_limit": self.calibration.limit * self.calibration.loss,
        }  # fmt: skip


def begin(tier: Approximation | None, text: Text) -> None:
    """A text asks for the tier. Raises UserError where there is none."""
    if tier is None:
        raise UserError("this engine answers exactly only: its operator has not allowed `approximate`")
    tier.begin(text)


def note(text: Text, logits_V: np.ndarray) -> None:
    """The approximate model's logits for the text's last token: what the guard will compare."""
    token = draw(logits_V, 1.0, ~text.request.seed, len(text.tokens))
    text.noted.append(logprob(logits_V, token, 0))
