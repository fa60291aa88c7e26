"""Small configurations, one per variant of the model."""

from dataclasses import replace

from sparing.base.config import Llama3RopeConfig, ModelConfig, YarnConfig

TINY = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=3, num_dense_layers=1, intermediate_size=64, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=16,
    max_position_embeddings=32,
)  # fmt: skip

SHAPES = {
    "mla": TINY,
    "no q compression": replace(TINY, q_lora_rank=None),
    "yarn": replace(TINY, yarn=YarnConfig(factor=4.0, original_max_position_embeddings=8)),
    "dense": replace(TINY, num_dense_layers=3),
    "gqa": replace(TINY, attention="gqa", num_heads=4, num_kv_heads=2, head_dim=16),
    "biases": replace(TINY, attention="gqa", num_heads=4, num_kv_heads=2, head_dim=16, num_dense_layers=3, attention_bias=True),
    "head norms": replace(
        TINY,
        attention="gqa",
        num_heads=4,
        num_kv_heads=2,
        head_dim=12,
        head_norm=True,
        selection_bias=False,
        scoring_func="softmax",
        llama3=Llama3RopeConfig(4.0, 1.0, 4.0, 16),
    ),
    "biases and head norms, half rotated": replace(
        TINY, attention="gqa", num_kv_heads=1, head_dim=16, attention_bias=True, head_norm=True, partial_rotary_factor=0.5
    ),
    "tied": replace(TINY, tie_word_embeddings=True),
    "no shared experts": replace(TINY, n_shared_experts=0),
    "softmax": replace(TINY, scoring_func="softmax"),
    "no selection bias": replace(TINY, scoring_func="softmax", selection_bias=False, n_group=4, topk_group=2, linear_rope_factor=2.0),
}
