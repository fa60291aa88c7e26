"""Counts parameters and floating-point operations of a model from its configuration.

A multiply-add counts as two operations. Attention is counted causally: position t attends to t + 1 keys. Norms, softmax, rotary
embedding, gates' activations and the embedding look-up are not counted, as in the papers' figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sparing.base.config import AdapterConfig, ModelConfig
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


def train_flops(c: ModelConfig, seq_len: int, recompute: bool = False, adapter: AdapterConfig | None = None) -> float:
    """Operations per trained token: forward, and twice that for the backward pass; layers once more under recomputation. With an adapter,
    frozen weights have no gradients: their backward pass is as much as forward, and MTP modules do not run.

    The recomputed pass is work, but not counted in MFU: pass recompute=False for that.
    """
    forward = forward_flops(c, seq_len, mtp=adapter is None)
    if adapter is not None:
        factors = 2.0 * factor_weights(c, adapter.rank)[1]
        scores = forward_products(c, seq_len, mtp=False).scores
        again = forward + factors - 2.0 * c.vocab_size * c.hidden_size if recompute else 0.0
        return 2.0 * forward + scores + 3.0 * factors + again
    return 3.0 * forward + (forward - 2.0 * c.vocab_size * c.hidden_size if recompute else 0.0)


def kv_cache_bytes(c: ModelConfig) -> int:
    """Bytes that a decoder keeps of each token, in 16 bits."""
    return 2 * sum(layer.attention.cache_width for layer in layers(c)[: c.num_layers])
