"""Objectives: what a micro-batch contributes, and tokens that weigh more than others."""

from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import TINY

from sparing.data.loader import Batch
from sparing.kernels import native
from sparing.kernels.vocabulary import linear_cross_entropy, linear_cross_entropy_reference
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.objective import NextToken, weight_of


def example(rows=3, length=16):
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 64, (rows, length), generator=generator)
    targets = torch.stack((tokens.roll(-1, 1), tokens.roll(-2, 1)), -1)
    targets[:, -2:] = -100
    return tokens, targets, torch.rand(rows, length, generator=generator) * 2


def model_of(**changes):
    model = Transformer(replace(TINY, mtp_depth=1, **changes)).train()
    init_weights(model, 0)
    torch.nn.init.normal_(model.lm_head.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def gradients(model, tokens, targets, **options):
    model.zero_grad()
    out = loss_of(model, tokens, targets, **options)
    out.total.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_names_are_those_of_what_the_model_has():
    assert NextToken(TINY).parts == ("loss", "balance_loss")
    assert NextToken(replace(TINY, mtp_depth=1)).parts == ("loss", "mtp_loss", "balance_loss")
    assert NextToken(replace(TINY, num_dense_layers=TINY.num_layers)).parts == ("loss",)


def test_weights_of_zero_and_one_are_a_mask():
    tokens, targets, _ = example()
    weights = (torch.arange(16) % 3 > 0).float().expand(3, -1)
    masked = targets.clone()
    masked[weights == 0] = -100
    model = model_of()
    counted = weight_of(Batch(tokens, masked))
    assert weight_of(Batch(tokens, targets, weights=weights)) == counted == 3 * 9
    one, first = gradients(model, tokens, targets, weights=weights)
    two, second = gradients(model, tokens, targets=torch.where(weights[..., None] > 0, targets, -100))
    assert float(one.loss) == pytest.approx(float(two.loss), rel=1e-6)
    for name in first:
        if "layers.3" not in name:  # the MTP module embeds the targets, which the mask changes
            assert torch.allclose(first[name], second[name], atol=1e-6), name


def test_the_gradient_of_a_weighted_row_is_its_weight_times_as_large():
    tokens, targets, _ = example(rows=1)
    model = model_of()
    one, plain = gradients(model, tokens, targets, denominator=10.0)
    double, weighted = gradients(model, tokens, targets, denominator=10.0, weights=torch.full((1, 16), 2.0))
    assert float(double.loss) == pytest.approx(2 * float(one.loss), rel=1e-6)
    for name in plain:
        assert torch.allclose(weighted[name], 2 * plain[name], rtol=1e-4, atol=1e-6), name


def test_micro_batches_of_weighted_tokens_add_up():
    tokens, targets, weights = example(rows=4)
    model, objective = model_of(), NextToken(replace(TINY, mtp_depth=1))
    batch = Batch(tokens, targets, weights=weights)
    whole = objective(model, batch)
    parts = [objective(model, batch[i : i + 1], weight_of(batch), 0.25) for i in range(4)]
    assert torch.allclose(sum(part.parts for part in parts), whole.parts, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2])
def test_every_path_weighs_as_the_reference_does(dtype, threads, monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(40, 32, generator=generator).to(dtype)
        w = torch.randn(64, 32, generator=generator) / 6
        targets, weights = torch.randint(0, 64, (40,), generator=generator), torch.rand(40, generator=generator)
        targets[5] = -100
        found = {}
        for name, function in (("ours", linear_cross_entropy), ("reference", linear_cross_entropy_reference)):
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            with native.path("compiled" if threads == 1 else "plain"):
                loss = function(a, b, targets, 7.0, weights)
            loss.backward()
            found[name] = loss.detach(), a.grad.float(), b.grad
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        for mine, theirs in zip(found["ours"], found["reference"], strict=True):
            assert torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))
    finally:
        torch.set_num_threads(before)
