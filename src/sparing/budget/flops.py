"""Parameters and floating-point operations of a model, from its configuration alone.

A multiply-add counts as two operations. Attention is counted causally: position t attends to t + 1 keys. Norms, softmax, rotary
embedding, gates' activations and the embedding look-up are not counted, as in the papers' figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from sparing.base.config import ModelConfig
from sparing.base.layers import Attention, layers


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


def forward_flops(c: ModelConfig, seq_len: int, mtp: bool = True) -> dict[str, float]:
    """Operations of a forward pass per token, by part: attention (projections), scores, feed_forward, head, mtp."""
    main, modules = layers(c)[: c.num_layers], layers(c)[c.num_layers :] if mtp else ()
    head = 2.0 * c.vocab_size * c.hidden_size
    return {
        "attention": 2.0 * sum(layer.attention.weights for layer in main),
        "scores": sum(attention_flops(layer.attention, seq_len) for layer in main),
        "feed_forward": 2.0 * sum(layer.feed_forward.common + layer.feed_forward.routed_active for layer in main),
        "head": head,
        "mtp": sum((2.0 * (m.common + m.feed_forward.routed_active) + head + attention_flops(m.attention, seq_len) for m in modules), 0.0),
    }


class ForwardProducts(NamedTuple):
    """Operations of a token's forward pass, MTP modules included, by what is multiplied. The sum is that of `forward_flops`."""

    common: float
    """Matrices that every token uses."""
    routed: float
    """Routed experts."""
    scores: float
    """Attention's scores and values."""
    heads: float
    """The output head, once for the decoder and once for each MTP module."""


def forward_products(c: ModelConfig, seq_len: int) -> ForwardProducts:
    """Count the operations of `forward_flops` by the kernels that do them."""
    every = layers(c)
    return ForwardProducts(
        2.0 * sum(layer.common for layer in every),
        2.0 * sum(layer.feed_forward.routed_active for layer in every),
        sum(attention_flops(layer.attention, seq_len) for layer in every),
        2.0 * (1 + c.mtp_depth) * c.vocab_size * c.hidden_size,
    )


def train_flops(c: ModelConfig, seq_len: int, recompute: bool = False) -> float:
    """Operations per trained token: forward, and twice that for the backward pass; layers once more under recomputation.

    The recomputed pass is work, but not counted in MFU: pass recompute=False for that.
    """
    parts = forward_flops(c, seq_len)
    forward = sum(parts.values())
    return 3.0 * forward + (forward - parts["head"] if recompute else 0.0)


def kv_cache_bytes(c: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes that a decoder keeps per token."""
    return sum(layer.attention.cache_width for layer in layers(c)[: c.num_layers]) * bytes_per_number
