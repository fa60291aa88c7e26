"""The whole model: micro-batches, caches, document boundaries, MTP, baselines by configuration."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tests.losses import loss_of
from tests.model.shapes import SHAPES, TINY

from sparing.base.config import ModelConfig
from sparing.kernels.vocabulary import IGNORE
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer


def make(c: ModelConfig) -> Transformer:
    """Random weights everywhere: the default initialisation's zero projections would hide mistakes."""
    model = Transformer(c)
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2 if p.dim() > 1 else 0.5, generator=generator)
    return model.eval()


def batch(c: ModelConfig, B=3, T=20, seed=0):
    tokens = torch.randint(0, c.vocab_size, (B, T + 1 + c.mtp_depth), generator=torch.Generator().manual_seed(seed))
    targets = torch.stack([tokens[:, 1 + k : 1 + k + T] for k in range(1 + c.mtp_depth)], -1)
    return tokens[:, :T], targets


@pytest.mark.parametrize("name", SHAPES)
def test_loss_is_the_cross_entropy_of_the_logits(name):
    model = make(SHAPES[name])
    tokens, targets = batch(model.config)
    targets[0, 3:9] = IGNORE
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets[..., 0].flatten(), ignore_index=IGNORE)
    assert float(loss_of(model, tokens, targets).loss) == pytest.approx(expected.item(), rel=1e-5)
    nll = model.nll(tokens, targets[..., 0])
    assert float(nll.sum() / (targets != IGNORE).sum()) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mla", "gqa"])
def test_documents_do_not_see_each_other(name):
    """Two documents packed into a row: the second's logits are those it has alone (rotary positions are relative)."""
    model = make(SHAPES[name])
    tokens, _ = batch(model.config, B=1)
    documents = (torch.arange(20) >= 8).int().unsqueeze(0)
    packed = model(tokens, documents)
    assert torch.allclose(packed[:, 8:], model(tokens[:, 8:]), atol=2e-5)
    assert torch.allclose(packed[:, :8], model(tokens[:, :8]), atol=2e-5)
    assert not torch.allclose(packed[:, 8:], model(tokens)[:, 8:], atol=1e-2)


def test_micro_batches_add_up_to_the_whole_batch():
    """With ignored targets unevenly spread, sums over a common denominator are exact where means of means would not be."""
    model = make(replace(TINY, mtp_depth=2))
    tokens, targets = batch(model.config, B=4)
    targets[0, 2:] = IGNORE
    denominator = int((targets[..., 0] != IGNORE).sum())
    loss_of(model, tokens, targets).total.backward()
    whole = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    parts = [loss_of(model, tokens[i : i + 1], targets[i : i + 1], denominator=denominator, share=0.25) for i in range(4)]
    sum(p.total for p in parts).backward()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, whole[name], atol=1e-5, rtol=1e-4), name


def test_mtp_predicts_further_ahead_from_what_it_may_know():
    """Depth k at position i sees tokens up to i + k, nothing later; its loss is masked where its target is."""
    c = replace(TINY, mtp_depth=2)
    model = make(c)
    tokens, targets = batch(c, B=1)

    def mtp(targets):
        return float(loss_of(model, tokens, targets).mtp_loss)

    base = mtp(targets)
    only_last = targets.clone()
    only_last[:, :-1, 2] = IGNORE
    only_last[..., 1] = IGNORE
    changed = only_last.clone()
    changed[:, -1, 1] = (changed[:, -1, 1] + 1) % c.vocab_size  # not a masked target: the input of depth 2 at the last position
    assert mtp(only_last) != pytest.approx(mtp(changed))
    assert mtp(only_last) < base
    # What the main model predicts does not depend on MTP targets at all.
    assert float(loss_of(model, tokens, changed).loss) == float(loss_of(model, tokens, targets).loss)


def test_initialisation_is_a_function_of_the_seed():
    a, b, other = (Transformer(TINY) for _ in range(3))
    init_weights(a, 1), init_weights(b, 1), init_weights(other, 2)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))
    assert not torch.equal(a.model.embed_tokens.weight, other.model.embed_tokens.weight)
    published = Transformer(replace(TINY, init="deepseek"))
    init_weights(published, 0)
    std = torch.cat([p.flatten() for p in published.parameters() if p.dim() > 1]).std()
    assert std.item() == pytest.approx(0.006, rel=0.02)


def test_bfloat16_is_close_to_float32():
    model = make(TINY)
    tokens, targets = batch(TINY)
    exact = float(loss_of(model, tokens, targets).loss)
    model.compute_dtype = torch.bfloat16
    assert float(loss_of(model, tokens, targets).loss) == pytest.approx(exact, rel=2e-2)
