"""Expert-specialised fine-tuning of mixtures (ESFT; Wang and others 2024, arXiv 2407.01906): the experts that conversations use most learn.

Each layer's routed experts are scored on a sample of the training conversations: by their share of the gate weights (ESFT-Gate) or of the
tokens' choices (ESFT-Token). The fewest that together have the share `esft.share` learn. All else is frozen, and has neither gradients nor
moments. What was chosen is in config.toml, so a resumed run trains the same experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from sparing.base.config import Config, EsftConfig
from sparing.base.config_file import Wishes
from sparing.base.config_limits import checked, chosen_experts
from sparing.base.messages import say
from sparing.budget.flops import parameters
from sparing.data.answers import Pieces
from sparing.data.packed import Packed
from sparing.data.rows import permutation
from sparing.job.begin import Job
from sparing.job.corpus import TrainingData
from sparing.model.experts import Experts, MoE, Routing
from sparing.model.linear import Embedding, Linear, RMSNorm
from sparing.model.transformer import MTPBlock, Transformer
from sparing.planning.start import reasons_of

SHARES = {"gate": 0.1, "token": 0.2}
"""The paper's, by score (§4.1)."""
SCORED, TOKENS = 0.033, (2000, 131_072)
"""Share of the tokens that the budget trains on which the scores read, at least and at most so many. The paper reads 32 rows of 4,096."""


class Shares(NamedTuple):
    """What each routed expert of one layer has of it, (E,) float64; both sum to 1."""

    gate: np.ndarray
    token: np.ndarray


def derived(wishes: Wishes, tokens: float) -> tuple[dict, dict[str, str]]:
    """(settings, the reason for each by dotted name). tokens: that the budget trains on."""
    score = wishes.value("esft.score", EsftConfig.score)
    settings = {
        "esft": {"share": SHARES[score], "tokens": int(min(max(SCORED * tokens, TOKENS[0]), TOKENS[1]))},
        "train": {"bias_update_rate": 0.0, "sequence_balance": 0.0, "mtp_weight": 0.0},
    }
    reasons = {
        "esft.share": f"the paper's for the score {score}",
        "esft.tokens": f"{SCORED:.1%} of the training, {TOKENS[0]:,} to {TOKENS[1]:,} tokens",
    }
    return settings, reasons | {f"train.{name}": "routers and MTP modules stay as they are" for name in settings["train"]}


def limit(job: Job, config: Config, model: Transformer, data: TrainingData) -> Config:
    """Let the chosen experts alone learn. Where none are named yet, choose them, and write them into the run's configuration."""
    if not config.esft.experts:
        config = _chosen(job, config, model, data.feed)
    learn_only(model, config.esft, chosen_experts(config))
    return config


def _chosen(job: Job, config: Config, model: Transformer, feed: Packed) -> Config:
    esft, experts = config.esft, config.model.n_routed_experts
    model.compute_dtype = getattr(torch, config.train.dtype)
    found = shares(model, _sample(feed, config, job))
    chosen = {layer: choose(getattr(share, esft.score), esft.share) for layer, share in found.items()}
    texts = tuple(f"{layer}: {' '.join(map(str, numbers))}" for layer, numbers in chosen.items())
    config = checked(replace(config, esft=replace(esft, experts=texts)))
    of = "gate weight" if esft.score == "gate" else "tokens' choices"
    parts = ", ".join(f"{getattr(found[layer], esft.score)[list(numbers)].sum():.3f}" for layer, numbers in chosen.items())
    reason = f"the fewest of {experts} with {esft.share:g} of the {of} on {esft.tokens:,} tokens; they have {parts}"
    total = sum(map(len, chosen.values()))
    say(f"{total:,} of {experts * len(chosen):,} experts learn, {reason}")
    say(f"  esft.experts = {', '.join(texts)}")
    job.write(config, reasons_of(job.run) | {"esft.experts": reason})
    return config


def _sample(feed: Packed, config: Config, job: Job) -> Iterable[np.ndarray]:
    """Inputs of pieces in the order of the first epoch, `esft.tokens` of them."""
    pieces: Pieces = feed.pieces
    left = config.esft.tokens
    for number in permutation(len(pieces), config.train.seed, 0, 1):
        if left <= 0:
            return
        job.signals.check()
        ids = pieces[number][0][:-1][:left]
        left -= len(ids)
        yield ids


@torch.no_grad()
def shares(model: Transformer, sample: Iterable[np.ndarray]) -> dict[int, Shares]:
    """Layer -> its experts' shares on these sequences of token ids, of the decoder's layers that have experts."""
    layers = {number: block.mlp for number, block in enumerate(model.model.layers) if isinstance(block.mlp, MoE) and not _drafts(block)}
    count, device = model.config.n_routed_experts, model.head_weight.device
    gates = {number: torch.zeros(count, dtype=torch.float64, device=device) for number in layers}
    hits = {number: torch.zeros(count, dtype=torch.float64, device=device) for number in layers}

    def watch(number: int):
        def look(_module, _inputs, routing: Routing) -> None:
            experts = routing.experts_NK.flatten()
            gates[number].index_add_(0, experts, routing.weights_NK.flatten().double())
            hits[number].index_add_(0, experts, torch.ones_like(experts, dtype=torch.float64))

        return look

    hooks = [layer.gate.register_forward_hook(watch(number)) for number, layer in layers.items()]
    training = model.training
    model.eval()
    try:
        for ids in sample:
            model.hidden(torch.from_numpy(ids.astype(np.int64))[None].to(device))
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return {number: Shares(*((part[number] / part[number].sum()).cpu().numpy() for part in (gates, hits))) for number in layers}


def choose(share_E: np.ndarray, wanted: float) -> tuple[int, ...]:
    """The fewest experts that together have at least the share `wanted`, in ascending order. Equal ones: the first."""
    order = np.argsort(-share_E, kind="stable")
    reached = np.cumsum(share_E[order])
    count = min(len(order), int((reached < wanted - 1e-12).sum()) + 1)
    return tuple(sorted(order[:count].tolist()))


def learn_only(model: Transformer, esft: EsftConfig, chosen: dict[int, tuple[int, ...]]) -> None:
    """Freeze everything but the chosen experts, and what else `esft` says."""
    model.requires_grad_(False)
    if esft.rest:
        for module in model.modules():
            if isinstance(module, Linear | RMSNorm | Embedding):
                module.requires_grad_(True)
    for number, block in enumerate(model.model.layers):
        if _drafts(block):
            block.requires_grad_(False)
        elif isinstance(block.mlp, MoE):
            if block.mlp.shared_experts is not None:
                block.mlp.shared_experts.requires_grad_(esft.shared)
            experts: Experts = block.mlp.experts
            experts.learn_only(chosen.get(number, ()))
    learn = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    say(f"{learn:,} of {parameters(model.config).total:,} parameters learn")


def _drafts(block) -> bool:
    return isinstance(block, MTPBlock)
