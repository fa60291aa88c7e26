"""A model small enough for seconds."""

from sparing.base.config import ModelConfig

TINY = ModelConfig(
    vocab_size=512,
    hidden_size=32,
    num_layers=2,
    num_dense_layers=1,
    intermediate_size=64,
    num_heads=2,
    q_lora_rank=32,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    max_position_embeddings=64,
)
