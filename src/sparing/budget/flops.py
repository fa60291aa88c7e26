"""Parameters and floating-point operations of a model, from its configuration alone.

A multiply-add counts as two operations. Attention is counted causally: position t attends to t + 1 keys. Norms, softmax, rotary
embedding, gates' activations and the embedding look-up are not counted, as in the papers' figures.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparing.config import ModelConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of weights, selection biases and MTP modules not counted in `total` and `active`."""

    total: int
    active: int
    """Used by one token: the head counted, the input embedding not (the convention behind V3's 37 B)."""
    embedding: int
    mtp: int
    """Weights of the MTP modules without the shared embedding and head."""


def attention_parameters(c: ModelConfig) -> int:
    """Matrices of one attention layer."""
    if c.attention == "gqa":
        return c.hidden_size * c.head_dim * (2 * c.num_heads + 2 * c.num_kv_heads)
    query_width = c.num_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim)
    query = c.hidden_size * query_width if c.q_lora_rank is None else c.q_lora_rank * (c.hidden_size + query_width)
    key_value = c.hidden_size * (c.kv_lora_rank + c.qk_rope_head_dim) + c.kv_lora_rank * c.num_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return query + key_value + c.num_heads * c.v_head_dim * c.hidden_size


def _norms(c: ModelConfig) -> int:
    latent = 0 if c.attention == "gqa" else c.kv_lora_rank + (c.q_lora_rank or 0)
    return 2 * c.hidden_size + latent


def _is_dense(c: ModelConfig, layer: int) -> bool:
    return layer < c.num_dense_layers or c.num_dense_layers >= c.num_layers


def feed_forward_parameters(c: ModelConfig, layer: int, active: bool) -> int:
    """Matrices of the feed-forward of a layer, all of them or those that one token uses (router included)."""
    if _is_dense(c, layer):
        return 3 * c.hidden_size * c.intermediate_size
    experts = (c.num_experts_per_tok if active else c.n_routed_experts) + c.n_shared_experts
    return 3 * c.hidden_size * c.moe_intermediate_size * experts + c.n_routed_experts * c.hidden_size


def parameters(c: ModelConfig) -> Parameters:
    """Count the weights of a model."""

    def layer(i: int, active: bool) -> int:
        return attention_parameters(c) + _norms(c) + feed_forward_parameters(c, i, active)

    embedding = c.vocab_size * c.hidden_size
    head = 0 if c.tie_word_embeddings else embedding
    total = sum(layer(i, False) for i in range(c.num_layers)) + c.hidden_size + embedding + head
    active = sum(layer(i, True) for i in range(c.num_layers)) + c.hidden_size + embedding
    mtp = c.mtp_depth * (layer(c.num_layers, False) + 2 * c.hidden_size * c.hidden_size + 3 * c.hidden_size)
    return Parameters(total, active, embedding, mtp)


def attention_flops(c: ModelConfig, seq_len: int) -> float:
    """Score and value products of one layer for one token, averaged over the causal positions of a sequence."""
    keys = (seq_len + 1) / 2
    width = 2 * c.head_dim if c.attention == "gqa" else c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
    return 2 * keys * c.num_heads * width


def forward_flops(c: ModelConfig, seq_len: int, mtp: bool = True) -> dict[str, float]:
    """Operations of a forward pass per token, by part: attention (projections), scores, feed_forward, head, mtp."""
    parts = {
        "attention": 2.0 * c.num_layers * attention_parameters(c),
        "scores": c.num_layers * attention_flops(c, seq_len),
        "feed_forward": 2.0 * sum(feed_forward_parameters(c, i, True) for i in range(c.num_layers)),
        "head": 2.0 * c.vocab_size * c.hidden_size,
        "mtp": 0.0,
    }
    if mtp and c.mtp_depth:
        module = attention_parameters(c) + feed_forward_parameters(c, c.num_layers, True) + 2 * c.hidden_size * c.hidden_size
        parts["mtp"] = c.mtp_depth * (2.0 * (module + c.vocab_size * c.hidden_size) + attention_flops(c, seq_len))
    return parts


def train_flops(c: ModelConfig, seq_len: int, recompute: bool = False) -> float:
    """Operations per trained token: forward, and twice that for the backward pass; layers once more under recomputation.

    The recomputed pass is work, but not counted in MFU: pass recompute=False for that.
    """
    parts = forward_flops(c, seq_len)
    forward = sum(parts.values())
    return 3.0 * forward + (forward - parts["head"] if recompute else 0.0)


def kv_cache_bytes(c: ModelConfig, bytes_per_number: int = 2) -> int:
    """Bytes that a decoder keeps per token."""
    per_layer = 2 * c.num_kv_heads * c.head_dim if c.attention == "gqa" else c.kv_lora_rank + c.qk_rope_head_dim
    return c.num_layers * per_layer * bytes_per_number
