"""Routing against a slow reference, loss-free balancing, the sequence-wise loss."""

from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import TINY

from sparing.base.config import ModelConfig
from sparing.model.experts import Router, routers, sequence_balance_loss, update_biases
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer


def slow_routing(x, weight, bias, c: ModelConfig):
    """Token by token, group by group, with Python lists: DeepSeek-V3 §2.1.2 and the node-limited rule."""
    chosen, gates = [], []
    for row in (x @ weight.T).tolist():
        logits = torch.tensor(row)
        if c.scoring_func == "sigmoid":
            s = [1 / (1 + float(torch.exp(-v))) for v in logits]
        elif c.scoring_func == "softmax":
            s = logits.softmax(0).tolist()
        else:
            s = [float(torch.log1p(torch.exp(v))) ** 0.5 for v in logits]
        biased = [a + b for a, b in zip(s, bias.tolist(), strict=True)]
        size = c.n_routed_experts // c.n_group
        group_score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
        open_groups = sorted(range(c.n_group), key=lambda g: -group_score[g])[: c.topk_group]
        candidates = [e for e in range(c.n_routed_experts) if e // size in open_groups]
        top = sorted(candidates, key=lambda e: -biased[e])[: c.num_experts_per_tok]
        total = sum(s[e] for e in top) if c.norm_topk_prob else 1.0
        chosen.append(set(top))
        gates.append({e: s[e] / total * c.routed_scaling_factor for e in top})
    return chosen, gates


@pytest.mark.parametrize("scoring", ["sigmoid", "softmax", "sqrtsoftplus"])
@pytest.mark.parametrize("groups,open_groups", [(1, 1), (4, 2), (2, 1)])
@pytest.mark.parametrize("normalise", [True, False])
def test_routing_equals_the_slow_reference(scoring, groups, open_groups, normalise):
    torch.manual_seed(0)
    c = replace(TINY, scoring_func=scoring, n_group=groups, topk_group=open_groups, norm_topk_prob=normalise, routed_scaling_factor=1.7)
    router = Router(c).eval()
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.normal_(std=0.5)
    x = torch.randn(50, c.hidden_size)
    routing = router(x)
    chosen, gates = slow_routing(x, router.weight.detach(), router.e_score_correction_bias, c)
    for i in range(len(x)):
        experts = routing.experts_NK[i].tolist()
        assert set(experts) == chosen[i]
        for e, g in zip(experts, routing.weights_NK[i].tolist(), strict=True):
            assert g == pytest.approx(gates[i][e], rel=1e-4)


def test_the_bias_changes_the_choice_and_never_the_gates():
    torch.manual_seed(0)
    router = Router(TINY).eval()
    torch.nn.init.normal_(router.weight)
    x = torch.randn(30, TINY.hidden_size)
    before = router(x)
    router.e_score_correction_bias[5] = 10.0
    after = router(x)
    assert (after.experts_NK == 5).any(1).all() and not (before.experts_NK == 5).any(1).all()
    s = router.scores(x).gather(1, after.experts_NK)
    assert torch.allclose(after.weights_NK, s / s.sum(1, keepdim=True) * TINY.routed_scaling_factor)


def test_bias_update_is_signed_centred_and_clears_the_counts():
    router = Router(TINY)
    router.tokens_per_expert.copy_(torch.tensor([4.0, 4, 4, 4, 4, 4, 8, 0]))
    violations = update_biases(router, 0.001)
    assert violations == [pytest.approx(1.0)]  # 8 / 4 - 1
    expected = 0.001 * torch.tensor([0.0, 0, 0, 0, 0, 0, -1, 1])
    assert torch.allclose(router.e_score_correction_bias, expected - expected.mean())
    assert float(router.e_score_correction_bias.sum()) == pytest.approx(0, abs=1e-9)
    assert not router.tokens_per_expert.any()
    router.tokens_per_expert.copy_(torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 0]))  # one above, seven below the mean
    update_biases(router, 0.001)
    assert float(router.e_score_correction_bias.sum()) == pytest.approx(0, abs=1e-8)


def counts_after(model, tokens, targets, micro: int) -> list[torch.Tensor]:
    for router in routers(model):
        router.tokens_per_expert.zero_()
    for start in range(0, len(tokens), micro):
        rows = slice(start, start + micro)
        loss_of(model, tokens[rows], targets[rows], sequence_balance=0.01, denominator=tokens.numel()).total.backward()
    return [router.tokens_per_expert.clone() for router in routers(model)]


@pytest.mark.parametrize("recompute", [False, True])
def test_counts_under_accumulation_and_recomputation(recompute):
    """Micro-batches add up; a recomputed layer counts its tokens once; MTP layers are counted too; evaluation is not."""
    c = replace(TINY, mtp_depth=1)
    model = Transformer(c)
    init_weights(model, 0)
    model.set_recompute(recompute)
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    targets = torch.stack((tokens.roll(-1, 1), tokens.roll(-2, 1)), -1)
    whole, halves = counts_after(model, tokens, targets, 4), counts_after(model, tokens, targets, 2)
    assert len(whole) == 3  # two MoE layers and the MTP module's
    for a, b in zip(whole, halves, strict=True):
        assert torch.equal(a, b) and float(a.sum()) == 4 * 16 * c.num_experts_per_tok
    model.eval()
    model(tokens)
    assert all(float(router.tokens_per_expert.sum()) == 4 * 16 * c.num_experts_per_tok for router in routers(model))
    update_biases(model, 0.1)
    assert all(router.e_score_correction_bias.abs().max() > 0.05 for router in routers(model))


def test_recomputation_gives_the_same_gradients():
    model = Transformer(replace(TINY, mtp_depth=1))
    init_weights(model, 0)
    tokens = torch.randint(0, 64, (2, 16))
    targets = torch.stack((tokens.roll(-1, 1), tokens.roll(-2, 1)), -1)
    gradients = []
    for recompute in (False, True):
        model.set_recompute(recompute)
        model.zero_grad()
        loss_of(model, tokens, targets, sequence_balance=0.01).total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, grad in gradients[0].items():
        assert torch.allclose(grad, gradients[1][name], atol=1e-7), name


def test_sequence_balance_loss():
    """Equations 17-20 of DeepSeek-V3, summed by hand; 1 when everything is even, larger when it is not."""
    torch.manual_seed(0)
    B, T, E, K = 3, 10, TINY.n_routed_experts, TINY.num_experts_per_tok
    scores = torch.rand(B * T, E)
    expected = 0.0
    for b in range(B):
        rows = scores[b * T : (b + 1) * T]
        for i in range(E):
            f = sum(1 for row in rows if i in row.topk(K).indices) * E / (K * T)
            p = sum(float(row[i] / row.sum()) for row in rows) / T
            expected += f * p / B
    assert float(sequence_balance_loss(scores, TINY, B)) == pytest.approx(expected, rel=1e-5)
    skewed = torch.rand(B * T, E) * 0.01
    skewed[:, :K] += 1
    assert float(sequence_balance_loss(skewed, TINY, B)) > 3
