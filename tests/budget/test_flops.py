"""Counts against the published models, against the real module, and against torch's own FLOP counter."""

from dataclasses import replace

import pytest
import torch
from tests.model.shapes import SHAPES
from torch.utils.flop_counter import FlopCounterMode

from sparing.base.config import ModelConfig
from sparing.base.layers import layers
from sparing.budget.flops import attention_flops, forward_flops, forward_products, kv_cache_bytes, parameters, train_flops
from sparing.kernels import native
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

V3 = ModelConfig(
    vocab_size=129280, hidden_size=7168, num_layers=61, num_dense_layers=3, intermediate_size=18432, num_heads=128, q_lora_rank=1536,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=256, num_experts_per_tok=8,
    moe_intermediate_size=2048, mtp_depth=1,
)  # fmt: skip
V2_LITE = ModelConfig(
    vocab_size=102400, hidden_size=2048, num_layers=27, num_dense_layers=1, intermediate_size=10944, num_heads=16, q_lora_rank=None,
    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, moe_intermediate_size=1408,
)  # fmt: skip


def test_published_models():
    """Totals of the papers: 671.03 B and 36.62 B, MTP 11.61 B; V2-Lite 15.71 B and 2.45 B; V3's cache 70,272 B a token."""
    assert parameters(V3).total == pytest.approx(671.03e9, rel=1e-3)
    assert parameters(V3).active == pytest.approx(36.62e9, rel=1e-3)
    assert parameters(V3).mtp == pytest.approx(11.61e9, rel=1e-3)
    assert kv_cache_bytes(V3) == 70_272
    assert parameters(V2_LITE).total == pytest.approx(15.71e9, rel=1e-3)
    assert parameters(V2_LITE).active == pytest.approx(2.45e9, rel=1e-3)
    assert train_flops(replace(V3, mtp_depth=0), 4096) == pytest.approx(250e9, rel=0.01)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("mtp", [0, 2])
def test_parameters_of_the_module(name, mtp):
    config = replace(SHAPES[name], mtp_depth=mtp)
    counts = parameters(config)
    assert counts.total + counts.mtp == sum(p.numel() for p in Transformer(config).parameters())


@pytest.mark.parametrize("name", ["mla", "dense", "gqa", "no q compression"])
def test_forward_flops_agree_with_torch(name, monkeypatch):
    """Torch counts whole score squares of a row block; we count causally: the difference is taken out by hand."""
    monkeypatch.setattr("sparing.kernels.feed_forward.ROWS", 1)  # no filler rows: they are work, but not the model's
    config = replace(SHAPES[name], num_experts_per_tok=2)
    model = Transformer(config)
    init_weights(model, 0)
    B, T = 2, 16
    with native.path("plain"), FlopCounterMode(display=False) as counter, torch.no_grad():  # it sees PyTorch's operations only
        model.eval()(torch.zeros(B, T, dtype=torch.int64))
    ours = forward_flops(config, T) * B * T
    causal = sum(attention_flops(layer.attention, T) for layer in layers(config))
    whole_squares = causal * (2 * T / (T + 1) - 1) * B * T
    assert ours + whole_squares == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_recomputation_adds_a_forward_pass_of_the_layers():
    plain, more = train_flops(V2_LITE, 1024), train_flops(V2_LITE, 1024, recompute=True)
    assert more - plain == pytest.approx(forward_flops(V2_LITE, 1024) - forward_products(V2_LITE, 1024).heads)
