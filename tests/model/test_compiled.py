"""The compiled sub-layers against the plain path: loss and every gradient of whole models."""

from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import TINY

from sparing.base.config import YarnConfig
from sparing.kernels import attention, native
from sparing.model.experts import routers, update_biases
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = {
    "mixture": {},
    "dense": {"num_dense_layers": TINY.num_layers},
    "queries not compressed": {"q_lora_rank": None},
    "no shared expert": {"n_shared_experts": 0},
    "two predicted tokens": {"mtp_depth": 1},
    "yarn": {"yarn": YarnConfig(factor=4.0, original_max_position_embeddings=8)},
    "gqa": {"attention": "gqa", "num_dense_layers": TINY.num_layers, "num_kv_heads": 1, "head_dim": 16},
    "gqa, groups of one": {"attention": "gqa", "num_dense_layers": TINY.num_layers, "num_kv_heads": 2, "head_dim": 16},
    "gqa, groups of three": {"attention": "gqa", "num_dense_layers": TINY.num_layers, "num_heads": 6, "num_kv_heads": 2, "head_dim": 16},
    "gqa, mixture, two predicted tokens": {"attention": "gqa", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "mtp_depth": 1},
    "biases": {"attention": "gqa", "num_dense_layers": TINY.num_layers, "num_kv_heads": 1, "head_dim": 16, "attention_bias": True},
    "head norms": {"attention": "gqa", "num_dense_layers": TINY.num_layers, "num_heads": 4, "head_dim": 24, "head_norm": True},
    "biases, head norms, half rotated": {
        "attention": "gqa", "num_dense_layers": TINY.num_layers, "num_heads": 6, "num_kv_heads": 3, "head_dim": 20,
        "attention_bias": True, "head_norm": True, "partial_rotary_factor": 0.5,
    },
    "no selection bias": {"selection_bias": False, "scoring_func": "softmax", "n_group": 4, "topk_group": 2, "norm_topk_prob": False},
    "odd widths": {"num_dense_layers": TINY.num_layers, "kv_lora_rank": 15, "v_head_dim": 15, "intermediate_size": 63},
    "tied": {"tie_word_embeddings": True},
}  # fmt: skip


def results(model, batch, dtype) -> dict[str, torch.Tensor]:
    model.compute_dtype = dtype
    model.zero_grad(set_to_none=True)
    out = loss_of(model, *batch, sequence_balance=0.01)
    out.total.backward()
    counts = [r.tokens_per_expert.clone() for r in routers(model)]
    update_biases(model, 0.0)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"total": out.total.detach(), "counts": torch.stack(counts).flatten() if counts else torch.zeros(1), **grads}


# In bfloat16 rounding moves single tokens to other experts.
DENSE = (
    "dense", "gqa", "gqa, groups of one", "gqa, groups of three", "odd widths", "biases", "head norms", "biases, head norms, half rotated",
)  # fmt: skip


@pytest.mark.skipif(native.passes() is None, reason="no C compiler here")
@pytest.mark.parametrize(
    "case, dtype, tolerance, kernels",
    [(case, torch.float32, 2e-5, kernels) for case in CASES for kernels in ("compiled", "vectors")]
    + [(case, torch.bfloat16, 6e-2, kernels) for case in DENSE for kernels in ("compiled", "vectors", "tiles")],
)
@pytest.mark.parametrize("length", [7, 150])
def test_compiled_equals_plain(case, dtype, tolerance, kernels, length, monkeypatch):
    """Where a sub-layer goes through its sequences in parts, two of three and the third one."""
    if not native.can(kernels, dtype):
        pytest.skip("this machine cannot run these kernels")
    monkeypatch.setattr(attention, "PART_TOKENS", 2 * length)
    config = replace(TINY, **CASES[case])
    model = Transformer(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # output projections start at 0, which would hide what is behind them
            p.add_(torch.randn(p.shape, generator=generator) * 0.3 * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    model.train()
    shape = (3, length)
    tokens = torch.randint(config.vocab_size, shape, generator=generator)
    targets = torch.randint(config.vocab_size, (*shape, 1 + config.mtp_depth), generator=generator)
    targets[:, ::5] = -100
    documents = (torch.arange(length) // 40).to(torch.int32).expand(shape).contiguous()
    with native.path(kernels):
        ours = results(model, (tokens, targets, documents), dtype)
    with native.path("plain"):
        plain = results(model, (tokens, targets, documents), torch.float32)
    assert ours.keys() == plain.keys()
    for name, value in plain.items():
        difference = (ours[name].double() - value.double()).norm() / value.double().norm().clamp(min=1e-6)
        assert difference < tolerance, (name, float(difference))


@pytest.mark.skipif(native.passes() is None, reason="no C compiler here")
@pytest.mark.parametrize("case", ["dense", "gqa", "gqa, groups of three", "biases, head norms, half rotated"])
@pytest.mark.parametrize("kernels", ["compiled", "vectors"])
def test_positions_of_each_sequence(case, kernels, monkeypatch):
    """A rotary table (B, T, ...) instead of (T, ...)."""
    monkeypatch.setattr(attention, "PART_TOKENS", 9)
    model = Transformer(replace(TINY, **CASES[case]))
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(TINY.vocab_size, (2, 9), generator=generator)
    positions = torch.stack((torch.arange(9), torch.arange(9) * 2 + 3))
    found = []
    for plain in (False, True):
        with native.path("plain" if plain else kernels):
            model.zero_grad(set_to_none=True)
            x = model.hidden(tokens, positions=positions)
            (x * torch.randn(x.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
            found.append([x.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for ours, theirs in zip(*found, strict=True):
        assert torch.allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()) + 1e-7)
