"""Rows divided among threads: the gradients, losses and expert counts of the undivided pass."""

from dataclasses import replace

import pytest
import torch
from tests.model.shapes import TINY

from sparing.data.loader import Batch
from sparing.model.experts import routers, update_biases
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.objective import NextToken
from sparing.train.replicas import Replicas


def make():
    model = Transformer(replace(TINY, mtp_depth=1)).train()
    init_weights(model, 0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    return model


def run(model, count, rows=5):
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 64, (rows, 16), generator=generator)
    targets = torch.stack((tokens.roll(-1, 1), tokens.roll(-2, 1)), -1)
    replicas = Replicas(model, NextToken(model.config, sequence_balance=0.01), count)
    parts = [replicas.gradients(Batch(tokens, targets)) for _ in range(2)]
    return (
        parts[-1],
        {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
        [r.tokens_per_expert.clone() for r in routers(model)],
    )


@pytest.mark.parametrize("count", [2, 3, 8])
def test_divided_equals_undivided(count):
    whole, divided = run(make(), 1), run(make(), count)
    assert torch.allclose(whole[0], divided[0], rtol=1e-5)
    for name, grad in whole[1].items():
        assert torch.allclose(grad, divided[1][name], atol=2e-5, rtol=1e-3), name
    assert all(torch.equal(a, b) for a, b in zip(whole[2], divided[2], strict=True))


def test_gradients_are_added_up_while_others_are_made(monkeypatch):
    """By the backward passes themselves: nothing is left for the end but what did not get a gradient in each."""
    whole, left = run(make(), 1), []

    def gather(self):
        left.append(sum(p.grad is not None for twin in self.models[1:] for p in twin.parameters()))

    monkeypatch.setattr(Replicas, "_gather", gather)
    divided = run(make(), 3)
    assert left == [0, 0] and whole[1].keys() == divided[1].keys()
    for name, grad in whole[1].items():
        assert torch.allclose(grad, divided[1][name], atol=2e-5, rtol=1e-3), name


def test_divided_is_reproducible_bit_for_bit():
    first, second = run(make(), 2), run(make(), 2)
    assert torch.equal(first[0], second[0]) and all(torch.equal(first[1][n], second[1][n]) for n in first[1])


def test_copies_follow_the_weights_and_the_biases():
    model = make()
    replicas = Replicas(model, NextToken(model.config), 2)
    with torch.no_grad():
        model.lm_head.weight.fill_(3.0)
    for router in routers(model):
        router.tokens_per_expert[0] = 5
    update_biases(model, 0.5)
    twin = replicas.models[1]
    assert torch.equal(twin.lm_head.weight, model.lm_head.weight)
    for mine, theirs in zip(routers(twin), routers(model), strict=True):
        assert torch.equal(mine.e_score_correction_bias, theirs.e_score_correction_bias) and theirs.e_score_correction_bias.any()
        assert not mine.tokens_per_expert.any()


def test_nothing_is_copied_but_what_each_twin_counts():
    model = make()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.register_buffer("codes", torch.zeros(8, dtype=torch.int8))
    twin = Replicas(model, None, 2).models[1]
    theirs = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, mine in (dict(twin.named_parameters()) | dict(twin.named_buffers())).items():
        assert (mine.data_ptr() == theirs[name].data_ptr()) == ("tokens_per_expert" not in name) or not mine.numel(), name
        assert mine.requires_grad == theirs[name].requires_grad
    run(model, 2)
    assert model.model.embed_tokens.weight.grad is None and model.model.norm.weight.grad is not None
