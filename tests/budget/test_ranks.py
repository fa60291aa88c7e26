"""What ranks send in a step: formulas, and what is counted at the collectives."""

from dataclasses import replace

import pytest

from benchmarks.collectives import step
from sparing.base.config import Config, ModelConfig, ParallelConfig, TrainConfig
from sparing.budget.ranks import sent

MODEL = ModelConfig(
    vocab_size=96, hidden_size=32, num_layers=3, num_dense_layers=1, intermediate_size=64, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, n_routed_experts=8, moe_intermediate_size=32, mtp_depth=1, n_group=4, topk_group=2,
)  # fmt: skip
TRAIN = TrainConfig(
    seq_len=16, batch_size=16, micro_batch_size=1, dtype="float32", kernels="plain", threads=1, replicas=1, compile=False, document_mask=False
)


@pytest.mark.parametrize(
    ("shard", "experts", "change"),
    [
        ("nothing", 1, {}),
        ("optimizer", 1, {}),
        ("optimizer", 4, {"dtype": "bfloat16", "recompute": True}),
        ("optimizer", 8, {}),
        ("weights", 1, {"recompute": True}),
        ("weights", 2, {"micro_batch_size": 2}),
    ],
)
def test_what_ranks_send(shard, experts, change):
    """Counted on a fake world of eight ranks, by the first and the last of them."""
    config = Config(model=MODEL, train=replace(TRAIN, **change), parallel=ParallelConfig(shard, experts))
    for rank in (0, 7):
        assert step(config, rank, 8).counter.by_name() == pytest.approx(sent(config, 8), abs=0.5)
