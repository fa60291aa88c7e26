"""Weights that do not learn: no gradient is computed for them, and the others' gradients stay what they were."""

from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import TINY

from sparing.kernels import native, products
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = {
    "mixture": replace(TINY, mtp_depth=1),
    "queries not compressed": replace(TINY, q_lora_rank=None),
    "gqa": replace(TINY, attention="gqa", num_heads=4, num_kv_heads=2, head_dim=16),
    "biases and head norms": replace(TINY, attention="gqa", num_kv_heads=1, head_dim=16, attention_bias=True, head_norm=True),
}
LEARNING = {
    "experts": lambda name: "experts.gate_up" in name,
    "one norm": lambda name: name == "model.layers.1.post_attention_layernorm.weight",
    "norms, a norm of heads, a bias": lambda name: name.endswith(
        ("layernorm.weight", "1.self_attn.q_norm.weight", "2.self_attn.k_proj.bias")
    ),
    "one projection": lambda name: name == "model.layers.0.self_attn.o_proj.weight",
    "head": lambda name: name == "lm_head.weight",
    "all but embedding and head": lambda name: "embed" not in name and "lm_head" not in name,
}


def filled(config, seed: int = 0) -> Transformer:
    model = Transformer(config)
    init_weights(model, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for p in model.parameters():  # output projections start at 0, which would hide what is behind them
            p.add_(torch.randn(p.shape, generator=generator) * 0.3 * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    c, generator = model.config, torch.Generator().manual_seed(2)
    tokens = torch.randint(c.vocab_size, (2, 30), generator=generator)
    targets = torch.randint(c.vocab_size, (2, 30, 1 + c.mtp_depth), generator=generator)
    model.zero_grad(set_to_none=True)
    loss_of(model, tokens, targets).total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(params=["compiled", "plain", "vectors", "tiles"])
def path(request):
    if not any(native.can(request.param, dtype) for dtype in native.SUFFIXES):
        pytest.skip("this machine cannot run these kernels")
    with native.path(request.param):
        yield request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("learning", LEARNING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rest_has_the_same_gradients(shape, learning, dtype, path):
    model = filled(SHAPES[shape])
    model.compute_dtype = dtype
    everything = gradients(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(LEARNING[learning](name))
    found = gradients(model)
    assert found.keys() == {name for name in everything if LEARNING[learning](name)}
    # The plain path joins weights that learn into one product, and multiplies those that do not one by one.
    tolerance = 0.0 if path != "plain" else 1e-5 if dtype == torch.float32 else 3e-2
    for name, gradient in found.items():
        assert (gradient - everything[name]).norm() <= tolerance * everything[name].norm(), name


@pytest.mark.skipif(native.passes() is None, reason="no C compiler here: products are PyTorch's")
def test_no_gradient_is_computed_for_what_is_frozen(monkeypatch):
    model = filled(SHAPES["mixture"])
    made = []
    for name in ("tn", "grouped_tn"):
        function = getattr(products.FLOATS, name)
        monkeypatch.setattr(products.FLOATS, name, lambda *a, f=function, n=name, **o: made.append(n) or f(*a, **o))
    gradients(model)
    assert "tn" in made and "grouped_tn" in made
    made.clear()
    model.requires_grad_(False)
    model.model.layers[0].self_attn.kv_b_proj.weight.requires_grad_(True)
    gradients(model)
    assert made == ["tn"]
