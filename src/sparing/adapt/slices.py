"""Slicing: a run with one domain alone, or with what that domain uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
from torch import Tensor

from sparing.account.receipt import read_state
from sparing.adapt import esft
from sparing.adapt.grown import PARTS, WAKES, Grown, make, without
from sparing.base.config import ModelConfig, UserError
from sparing.base.layers import mixtures, shapes
from sparing.base.messages import say
from sparing.data.accounts import Accounts, in_words
from sparing.data.sources import Tally, documents
from sparing.data.tokenizer import Tokenizer
from sparing.infer.network import load_transformer

LEAST = 1e-3
"""With text of the domain: an expert that fewer of its tokens wake goes, where nothing else is said."""
TOKENS = 16_384
"""Of that text, which are read: with LEAST, an expert is known by 16 tokens."""


class Fewer(Mapping[str, Tensor]):
    """Weights with some of each mixture's experts alone."""

    def __init__(self, whole: Mapping[str, Tensor], model: ModelConfig, kept: Mapping[int, list[int]]):
        """model: the shape with fewer experts. kept: by layer, the numbers of those that stay."""
        self.whole, self.shapes = whole, shapes(model)
        self.kept = {f"model.layers.{layer}.mlp.{part}": numbers for layer, numbers in kept.items() for part in PARTS}

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, name: str) -> Tensor:
        return self.whole[name][self.kept[name]] if name in self.kept else self.whole[name]


def slice(run: str, domain: str, out: str, least: float | None = None, data: Sequence[str] = (), started: float | None = None) -> dict:
    """Make a run with one domain alone, or with all that text of it wakes.

    least: experts go that fewer than this share of the domain's tokens wake, from 0 to 1. Without `data` these are a mixture's own, by what
    `grow` counted, beside the other domains'. data: text of the domain, of which TOKENS are read: by what they wake, other domains' experts
    may stay; least is LEAST unless said. All layers keep as many, those that wake most. What is left has no domains any more, and no
    modules that draft.
    -> as `retire`, and "experts": of each mixture; with `data`, "documents": `data.accounts`'. Raises UserError."""
    if least is not None and not 0 <= least <= 1:
        raise UserError(f"--least {least}: a share of the domain's tokens, from 0 to 1")
    grown = Grown.open(run)
    own = grown.having(domain)
    more: dict = {}
    if data:
        shares, more["documents"] = _counted(grown, data)
        packs = list(grown.packs)
    elif least is not None:
        shares, packs = _noted(grown, domain), [own]
    else:
        packs = [own]
    model, _, tensors = grown.with_packs(packs)
    if not data and least is None:
        return without("slice", grown, packs, out, started) | {"experts": model.n_routed_experts}
    always = {model.n_routed_experts - len(packs) + packs.index(own)} | ({0} if grown.growth.dense else set())
    kept = used(shares, always, LEAST if least is None else least, grown.model.num_experts_per_tok if mixtures(grown.model) else 0)
    stay = len(next(iter(kept.values())))
    if stay == model.n_routed_experts:
        say(f"in some layer {domain} wakes all experts so often: none is left out")
        if not data:
            return without("slice", grown, packs, out, started) | {"experts": stay}
    else:
        say(f"{model.n_routed_experts - stay} of {model.n_routed_experts} experts of each mixture are left out")
    if model.mtp_depth:
        say("its modules that draft are left out too: what they wake is not known")
    smaller = replace(model, n_routed_experts=stay, mtp_depth=0)
    digest = make("slice", grown, out, started, smaller, None, Fewer(tensors, smaller, kept))
    return {"out": out, "domains": [], "weights_sha256": digest, "base": grown.growth.root_sha256, "experts": stay} | more


def used(shares: Mapping[int, Sequence[float]], always: set[int], least: float, fewest: int) -> dict[int, list[int]]:
    """Layer -> the numbers of the experts that stay, ascending: those of `always`, and in each layer as many others, the ones that wake
    most, as have `least` or more where most have; at least `fewest`."""
    others = [number for number in range(max(map(len, shares.values()))) if number not in always]
    count = max(fewest, *(sum(by_number[number] >= least for number in others) for by_number in shares.values()))
    return {
        layer: sorted([*always, *sorted(others, key=lambda number: (-by_number[number], number))[:count]])
        for layer, by_number in shares.items()
    }


def _noted(grown: Grown, domain: str) -> dict[int, list[float]]:
    """Layer -> the share of the domain's tokens that wake each expert of the root, by what `grow` counted, and the domain's, 1. Raises
    UserError."""
    if grown.growth.dense:
        raise UserError(
            f"--least: {grown.run} was grown from a dense model: what {domain} wakes of other domains' experts, text says (--data)"
        )
    wakes = (read_state(grown.run, WAKES, dict) or {}).get(domain)
    layers, own = [layer.index for layer in mixtures(grown.model) if not layer.mtp], range(grown.model.n_routed_experts)
    try:
        return {layer: [*(float(wakes[str(layer)][str(number)]) for number in own), 1.0] for layer in layers}
    except (TypeError, KeyError, ValueError):
        raise UserError(f"--least: what {domain} wakes is not known here: {grown.run}/state/{WAKES}.json does not say") from None


def _counted(grown: Grown, data: Sequence[str]) -> tuple[dict[int, list[float]], dict[str, int]]:
    """Layer -> the share of the text's tokens that wake each expert, all domains being there; and the text's accounts. Raises UserError."""
    config = grown.config
    tokenizer = Tokenizer.load(grown.run.tokenizer_file, config.tokens)
    accounts = Accounts(tally := Tally())
    network = load_transformer(grown.run, config.model)

    def sequences() -> Iterator[np.ndarray]:
        left = TOKENS
        read = documents(data, config.data.text_key, accounts, extract=config.data.extract)
        for document in accounts.reading(read):
            accounts.use(document)
            ids = np.array([tokenizer.first_id, *tokenizer.encode(document.text)][:left])
            left -= len(ids)
            yield from (ids[start : start + config.train.seq_len] for start in range(0, len(ids), config.train.seq_len))
            if left <= 0:
                return

    first = next(found := sequences(), None)
    if first is None:
        raise UserError(f"{', '.join(data)}: no usable text" + (f": {tally}" if tally.total else ""))
    counts = esft.shares(network, chain([first], found))
    if tally.total:
        say(f"{tally.total:,} documents cannot be used: {tally}")
    say(in_words(accounts.balance()))
    choices = config.model.num_experts_per_tok
    return {layer: (share.token * choices).tolist() for layer, share in counts.items()}, accounts.balance()
