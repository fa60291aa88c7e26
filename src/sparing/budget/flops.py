"""Counts parameters and floating-point operations of a model from its configuration.

A multiply-add counts as two operations. Attention is counted causally: position t attends to t + 1 keys. Norms, softmax, rotary
embedding, gates' activations and the embedding look-up are not counted, as in the papers' figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sparing.base.config import AdapterConfig, DraftsConfig, EsftConfig, ModelConfig
from sparing.base.layers import Attention, is_matrix, layers


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights, selection biases and MTP modules not counted in `total` and `active`."""

    total: int
    active: int
    """Used by one token: the head counted, the input embedding not (the convention behind V3's 37 B)."""
    embedding: int
    mtp: int
    """Weights of the MTP modules without the shared embedding and head."""


def parameters(c: ModelConfig) -> Parameters:
    """Count the weights of a model."""
    main, modules = layers(c)[: c.num_layers], layers(c)[c.num_layers :]
    embedding = c.vocab_size * c.hidden_size
    total = sum(layer.parameters for layer in main) + c.hidden_size + embedding * (1 if c.tie_word_embeddings else 2)
    active = sum(layer.active_parameters for layer in main) + c.hidden_size + embedding
    return Parameters(total, active, embedding, sum(layer.parameters for layer in modules))


def attention_flops(a: Attention, seq_len: int) -> float:
    """Score and value products of one layer for one token, averaged over the causal positions of a sequence."""
    keys = (seq_len + 1) / 2
    return 2 * keys * a.heads * (a.key + a.value)


def layer_flops(c: ModelConfig, seq_len: int) -> list[float]:
    """Operations of a token's forward pass in each layer, MTP modules last."""
    return [2.0 * (layer.common + layer.feed_forward.routed_active) + attention_flops(layer.attention, seq_len) for layer in layers(c)]


class ForwardProducts(NamedTuple):
    """Operations of a token's forward pass, by what is multiplied."""

    common: float
    """Matrices that every token uses."""
    routed: float
    """Routed experts."""
    scores: float
    """Attention's scores and values."""
    heads: float
    """The output head, once for the decoder and once for each MTP module."""


def forward_products(c: ModelConfig, seq_len: int, mtp: bool = True) -> ForwardProducts:
    """Operations of a forward pass per token, with or without the MTP modules."""
    every = layers(c) if mtp else layers(c)[: c.num_layers]
    return ForwardProducts(
        2.0 * sum(layer.common for layer in every),
        2.0 * sum(layer.feed_forward.routed_active for layer in every),
        sum(attention_flops(layer.attention, seq_len) for layer in every),
        2.0 * (1 + (c.mtp_depth if mtp else 0)) * c.vocab_size * c.hidden_size,
    )


def forward_flops(c: ModelConfig, seq_len: int, mtp: bool = True) -> float:
    """The sum of `forward_products`."""
    return sum(forward_products(c, seq_len, mtp))


def factor_weights(c: ModelConfig, rank: int) -> tuple[int, int]:
    """Numbers in the low-rank updates of the decoder's linears (`model/low_rank.py`): (all, those that one token uses)."""
    every = used = 0
    for layer in layers(c)[: c.num_layers]:
        f = layer.feed_forward
        for name, shape in layer.shapes.items():
            if is_matrix(name, len(shape)):
                count = rank * sum(shape[-2:])
                every += count * (shape[0] if len(shape) == 3 else 1)
                used += count * (f.chosen if len(shape) == 3 else 1)
    return every, used


def expert_products(c: ModelConfig, seq_len: int, esft: EsftConfig) -> ForwardProducts:
    """The part of a forward pass whose weights learn in expert-specialised fine-tuning; scores have none. The chosen experts are taken to
    do the share of their layers' work by which they are chosen."""
    main, every = layers(c)[: c.num_layers], forward_products(c, seq_len, mtp=False)
    shared = 2.0 * sum(3 * f.hidden * f.common_width for f in (layer.feed_forward for layer in main) if f.mixture)
    routers = 2.0 * sum(layer.feed_forward.router for layer in main if layer.mixture)
    rest = every.common - shared - routers if esft.rest else 0.0
    return ForwardProducts(rest + (shared if esft.shared else 0.0), every.routed * esft.share, 0.0, every.heads if esft.rest else 0.0)


def expert_weights(c: ModelConfig, esft: EsftConfig, experts: int | None = None) -> int:
    """Numbers that learn in expert-specialised fine-tuning. experts: how many are chosen; None: the most that `esft.share` can choose."""
    mixing = [layer.feed_forward for layer in layers(c)[: c.num_layers] if layer.mixture]
    if experts is None:  # the largest shares of E experts are 1/E on average at least
        experts = len(mixing) * min(c.n_routed_experts, int(esft.share * c.n_routed_experts) + 1)
    shared = sum(3 * f.hidden * f.common_width for f in mixing)
    routers, routed = sum(f.router for f in mixing), sum(f.routed for f in mixing)
    rest = parameters(c).total - routed - routers - shared if esft.rest else 0
    return experts * mixing[0].expert + (shared if esft.shared else 0) + rest


def train_flops(
    c: ModelConfig,
    seq_len: int,
    recompute: bool = False,
    adapter: AdapterConfig | None = None,
    esft: EsftConfig | None = None,
    drafts: DraftsConfig | None = None,
) -> float:
    """Operations per trained token: forward, and twice that for the backward pass; layers once more under recomputation. With an adapter
    or with chosen experts, frozen weights have no gradients: their backward pass is as much as forward, and MTP modules do not run. Where
    a module learns to draft, all else is forward alone, and both read `drafts.words` rows of the head.

    The recomputed pass is work, but not counted in MFU: pass recompute=False for that.
    """
    if drafts is not None:
        main, every = (sum(forward_products(c, seq_len, mtp)[:3]) for mtp in (False, True))
        return main + (4.0 if recompute else 3.0) * (every - main) + 4 * 2.0 * drafts.words * c.hidden_size
    forward = forward_flops(c, seq_len, mtp=adapter is None and esft is None)
    if esft is not None:
        again = forward - 2.0 * c.vocab_size * c.hidden_size if recompute else 0.0
        return 2.0 * forward + forward_products(c, seq_len, mtp=False).scores + sum(expert_products(c, seq_len, esft)) + again
    if adapter is not None:
        factors = 2.0 * factor_weights(c, adapter.rank)[1]
        scores = forward_products(c, seq_len, mtp=False).scores
        again = forward + factors - 2.0 * c.vocab_size * c.hidden_size if recompute else 0.0
        return 2.0 * forward + scores + 3.0 * factors + again
    return 3.0 * forward + (forward - 2.0 * c.vocab_size * c.hidden_size if recompute else 0.0)


def kv_cache_bytes(c: ModelConfig) -> int:
    """Bytes that a decoder keeps of each token, in 16 bits."""
    return 2 * sum(layer.attention.cache_width for layer in layers(c)[: c.num_layers])
