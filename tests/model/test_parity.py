"""Logits and gradients against transformers' `DeepseekV3ForCausalLM` from the same safetensors, and that the comparison can fail."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.losses import loss_of

from sparing.base.config import ModelConfig, YarnConfig
from sparing.interop.huggingface import export_hf, import_hf
from sparing.model.experts import Router, Routing, routers
from sparing.model.transformer import Transformer

transformers = pytest.importorskip("transformers")

CASES = range(14)
LENGTH = 80
"""Longer than the original context of every YaRN case (32), and than their extended one where the factor is 2."""


def random_config(case: int) -> ModelConfig:
    """A small configuration; the features cycle with different periods, so that they meet in different company."""
    rng = random.Random(case)
    groups = (1, 2, 4)[case % 3]
    layers = rng.choice((3, 4))
    yarn = YarnConfig(
        factor=rng.choice((2.0, 4.0, 40.0)),
        original_max_position_embeddings=32,
        beta_fast=rng.choice((4.0, 32.0)),
        mscale=rng.choice((1.0, 0.707)),
        mscale_all_dim=rng.choice((1.0, 0.5)),
    )
    return ModelConfig(
        vocab_size=128,
        hidden_size=rng.choice((32, 48, 64)),
        num_layers=layers,
        num_dense_layers=case % 4 if case % 4 < layers else layers - 1,
        intermediate_size=rng.choice((48, 96)),
        num_heads=rng.choice((2, 4)),
        q_lora_rank=None if case % 2 else rng.choice((16, 24)),
        kv_lora_rank=rng.choice((16, 24)),
        qk_nope_head_dim=rng.choice((8, 16)),
        qk_rope_head_dim=rng.choice((8, 16)),
        v_head_dim=rng.choice((8, 12, 16)),
        n_routed_experts=rng.choice((8, 16)),
        n_shared_experts=1 + (case // 3) % 2,
        num_experts_per_tok=rng.choice((2, 3)),
        moe_intermediate_size=rng.choice((16, 24)),
        n_group=groups,
        topk_group={1: 1, 2: 1, 4: rng.choice((2, 3))}[groups],
        norm_topk_prob=case % 5 != 4,
        routed_scaling_factor=rng.choice((2.5, 1.7, 0.8)),
        rope_theta=rng.choice((10000.0, 500.0)),
        yarn=yarn if (case // 2) % 2 else None,
        max_position_embeddings=64,
        tie_word_embeddings=case == 12,
    )


def random_model(config: ModelConfig, seed: int, bias_mean: float = 0.0) -> Transformer:
    """Weights of a scale at which every part matters: logits of std >= 1, selection biases of std 0.5, norms away from 1.

    Not much larger: at 2 / sqrt(fan-in) float32 itself is 1e-4 off, on both sides (each compared with transformers in float64).
    """
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                tensor.copy_(0.5 * noise + bias_mean)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
            elif "embed_tokens" in name:
                tensor.copy_(noise * (0.25 if config.tie_word_embeddings else 1.0))
            else:
                tensor.copy_(1.3 * noise * tensor.shape[-1] ** -0.5)
    return model


def both(config: ModelConfig, folder, seed: int, bias_mean: float = 0.0):
    """(our model, transformers' model), each loaded from the same exported folder."""
    export_hf(config, random_model(config, seed, bias_mean).state_dict(), None, folder)
    ours = Transformer(config)
    ours.load_state_dict(dict(import_hf(folder)[1]))
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return ours, transformers.DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32, **eager)


def random_tokens(config: ModelConfig, seed: int, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(seed))


def test_cases_cover_the_feature_list():
    configs = [random_config(case) for case in CASES]
    assert len(configs) >= 12
    assert {c.q_lora_rank is None for c in configs} == {True, False}
    assert {c.n_group for c in configs} == {1, 2, 4}
    assert {c.num_dense_layers for c in configs} == {0, 1, 2, 3}
    assert {c.n_shared_experts for c in configs} == {1, 2}
    assert {c.norm_topk_prob for c in configs} == {True, False}
    assert sum(c.yarn is not None for c in configs) >= 4
    assert any(c.yarn and c.yarn.mscale != c.yarn.mscale_all_dim for c in configs)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case, tmp_path):
    config = random_config(case)
    ours, theirs = both(config, tmp_path / "hf", seed=case)
    for router in routers(ours):
        assert router.e_score_correction_bias.std() > 0.25
    # One case is longer than a row block of the attention kernel.
    tokens = random_tokens(config, seed=case, length=150 if case == 1 else LENGTH)
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100

    logits = theirs(tokens).logits
    assert logits.std() >= 1
    assert (ours(tokens) - logits).abs().max() <= 1e-4

    reference = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
    reference.backward()
    loss = loss_of(ours, tokens, targets.unsqueeze(-1))
    assert abs(loss.loss - reference.detach()) <= 1e-5
    loss.total.backward()
    expected = dict(theirs.named_parameters())
    assert set(expected) == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        want = expected[name].grad
        assert want.norm() > 0, name
        assert (parameter.grad - want).norm() <= 1e-3 * want.norm(), name


def difference(ours: Transformer, theirs, tokens: torch.Tensor) -> float:
    with torch.no_grad():
        return float((ours(tokens) - theirs(tokens).logits).abs().max())


MUTANTS_ON = ModelConfig(
    vocab_size=128,
    hidden_size=48,
    num_layers=3,
    num_dense_layers=1,
    intermediate_size=64,
    num_heads=4,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=16,
    v_head_dim=12,
    n_routed_experts=16,
    num_experts_per_tok=3,
    moe_intermediate_size=24,
    n_group=4,
    topk_group=2,
    yarn=YarnConfig(factor=8.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.7),
    max_position_embeddings=256,
)


def gate_weights_from(scores_of):
    """A forward of Router whose gate weights come from `scores_of(router, scores)`."""

    def forward(self, x_ND):
        scores = self.scores(x_ND)
        experts = self.select(scores)
        weights = scores_of(self, scores).gather(-1, experts)
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return Routing(weights * self.c.routed_scaling_factor, experts, scores)

    return forward


def zero_group_mask(self, scores_NE):
    """Router.select as old versions of transformers had it: experts of closed groups score 0, which beats a negative score."""
    c = self.c
    grouped = (scores_NE.detach() + self.e_score_correction_bias).unflatten(-1, (c.n_group, -1))
    best = grouped.topk(2, -1).values.sum(-1).topk(c.topk_group, -1).indices
    closed = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(-1, best, False)
    return grouped.masked_fill(closed.unsqueeze(-1), 0.0).flatten(-2).topk(c.num_experts_per_tok, -1).indices


@pytest.fixture(scope="module")
def mutants_on(tmp_path_factory):
    """(our model, transformers' model, tokens), which agree."""
    ours, theirs = both(MUTANTS_ON, tmp_path_factory.mktemp("parity") / "hf", seed=100)
    tokens = random_tokens(MUTANTS_ON, seed=100)
    assert difference(ours, theirs, tokens) <= 1e-4
    return ours, theirs, tokens


@pytest.mark.parametrize(
    "change",
    [
        {"routed_scaling_factor": 1.0},
        {"topk_group": MUTANTS_ON.n_group},
        {"yarn": replace(MUTANTS_ON.yarn, mscale_all_dim=0.0)},
        {"yarn": replace(MUTANTS_ON.yarn, mscale=MUTANTS_ON.yarn.mscale_all_dim)},
        {"yarn": None},
        {"norm_topk_prob": False},
    ],
    ids=["scaling factor", "group mask", "mscale of the softmax", "mscale of cos and sin", "yarn", "normalised gates"],
)
def test_leaving_out_a_part_of_the_config_fails(change, mutants_on):
    ours, theirs, tokens = mutants_on
    mutant = Transformer(replace(MUTANTS_ON, **change))
    mutant.load_state_dict(ours.state_dict())
    assert difference(mutant, theirs, tokens) > 1e-2


def test_leaving_out_the_softmax_temperature_alone_fails(mutants_on):
    """The square of mscale_all_dim on the attention logits, with cos and sin as they should be."""
    ours, theirs, tokens = mutants_on
    mutant = Transformer(MUTANTS_ON)
    mutant.load_state_dict(ours.state_dict())
    for block in mutant.model.layers:
        block.self_attn.scale = (MUTANTS_ON.qk_nope_head_dim + MUTANTS_ON.qk_rope_head_dim) ** -0.5
    assert difference(mutant, theirs, tokens) > 1e-2


def test_the_bias_in_the_gate_weights_fails(mutants_on, monkeypatch):
    ours, theirs, tokens = mutants_on
    monkeypatch.setattr(Router, "forward", gate_weights_from(lambda router, scores: scores))
    assert difference(ours, theirs, tokens) <= 1e-4  # the stand-in itself is right
    monkeypatch.setattr(Router, "forward", gate_weights_from(lambda router, scores: scores + router.e_score_correction_bias))
    assert difference(ours, theirs, tokens) > 1e-2


def test_a_group_mask_of_zero_fails(tmp_path, monkeypatch):
    """It only shows where the biased scores of an open group are negative, hence the biases around -1."""
    ours, theirs = both(MUTANTS_ON, tmp_path / "hf", seed=101, bias_mean=-1.0)
    tokens = random_tokens(MUTANTS_ON, seed=101)
    assert difference(ours, theirs, tokens) <= 1e-4
    monkeypatch.setattr(Router, "select", zero_group_mask)
    assert difference(ours, theirs, tokens) > 1e-2


def test_mtp_module_equals_transformers(tmp_path):
    """The block behind the main model: order of the projection's input, hidden state after `model.norm`, shared head, its own norm."""
    layers = pytest.importorskip("transformers.modeling_layers")
    if not hasattr(layers, "MtpLayer"):
        pytest.skip("this version of transformers has no MTP layer")
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

    config = replace(MUTANTS_ON, mtp_depth=1)
    ours, theirs = both(config, tmp_path / "hf", seed=7)
    layer = layers.MtpLayer(theirs.config.get_mtp_config(), DeepseekV3DecoderLayer, DeepseekV3RMSNorm, 0)
    prefix = f"model.layers.{config.num_layers}."
    weights = {}
    for name, tensor in ours.state_dict().items():
        if name.startswith(prefix):
            inner = name.removeprefix(prefix).replace("shared_head.norm", "post_norm")
            weights[inner if inner.split(".")[0] in ("enorm", "hnorm", "eh_proj", "post_norm") else f"mtp_block.{inner}"] = tensor
    layer.load_state_dict(weights)
    layer.mtp_block.self_attn.config._attn_implementation = "eager"

    tokens = random_tokens(config, seed=7)
    targets = torch.stack([F.pad(tokens[:, 1:], (0, 1), value=-100), F.pad(tokens[:, 2:], (0, 2), value=-100)], -1)
    length = tokens.shape[1] - 1
    positions = torch.arange(length).unsqueeze(0)
    with torch.no_grad():
        hidden = theirs.model(tokens).last_hidden_state[:, :-1]
        embedded = theirs.model.embed_tokens(tokens[:, 1:])
        mask = torch.full((length, length), float("-inf")).triu_(1)[None, None]
        out = layer(embedded, hidden, theirs.model.rotary_emb(embedded, positions), mask, positions, None)
        logits = theirs.lm_head(out)
    assert logits.std() >= 1
    # `loss` divides every depth by the number of main targets, one more than this depth has.
    reference = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 2:].flatten(), reduction="sum") / (targets[..., 0] != -100).sum()
    loss = loss_of(ours, tokens, targets)
    assert abs(loss.mtp_loss - reference) <= 1e-4
