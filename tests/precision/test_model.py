"""8-bit products inside whole models: close to 16 bits, the same by both paths, nothing changed where they are off."""

from dataclasses import replace

import pytest
import torch
from tests.losses import loss_of
from tests.model.shapes import SHAPES, TINY

from sparing.kernels import int8, native
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.precision.eight_bit import DIRECTIONS, SIXTEEN, install

pytestmark = pytest.mark.usefixtures("one_thread")

VNNI = pytest.mark.skipif(not int8.built(), reason="no AVX512_VNNI or no compiler here")


def filled(config) -> Transformer:
    model = Transformer(config)
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():  # output projections start at 0, which would hide what is behind them
            p.add_(torch.randn(p.shape, generator=generator) * 0.3 * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    model.compute_dtype = torch.bfloat16
    return model.train()


def gradients(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    c = model.config
    tokens = torch.randint(c.vocab_size, (2, 31), generator=generator)
    targets = torch.randint(c.vocab_size, (2, 31, 1 + c.mtp_depth), generator=generator)
    model.zero_grad(set_to_none=True)
    out = loss_of(model, tokens, targets)
    out.total.backward()
    return {"loss": out.loss} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def distance(a: dict, b: dict) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {n: float((a[n].double() - b[n].double()).norm() / b[n].double().norm().clamp(min=1e-9)) for n in a}


DENSE = {name: replace(c, num_dense_layers=c.num_layers, mtp_depth=1) for name, c in SHAPES.items()}  # no token changes its expert


@pytest.mark.parametrize("kind, tolerance", [("int8", 0.1), ("fp8", 0.3), ("fp8_row", 0.3)])
@pytest.mark.parametrize("shape", ["mla", "no q compression", "gqa", "biases and head norms, half rotated"])
@pytest.mark.parametrize("path", ["compiled", "plain"])
def test_close_to_sixteen_bits_and_not_the_same(kind, tolerance, shape, path, monkeypatch):
    if path == "plain":
        monkeypatch.setattr(native, "compiled", lambda: False)
    elif native.passes() is None:
        pytest.skip("no C compiler here")
    model = filled(DENSE[shape])
    before = gradients(model)
    sites = install(model, kind)
    far = distance(gradients(model), before)
    assert max(far.values()) < tolerance, far
    assert far["model.layers.0.self_attn.o_proj.weight"] > 1e-3 and far["model.layers.0.mlp.gate_proj.weight"] > 1e-3
    for site in sites:
        assert all(not any(site.take_faults(direction)) for direction in DIRECTIONS)
        site.levels = dict.fromkeys(DIRECTIONS, SIXTEEN)
    assert max(distance(gradients(model), before).values()) < (1e-9 if path == "compiled" and DENSE[shape].attention == "mla" else 2e-2)
    install(model, None)
    assert max(distance(gradients(model), before).values()) == 0


@VNNI
@pytest.mark.parametrize("kind, tolerance", [("int8", 0.06), ("fp8", 0.15)])  # e4m3 turns a last bit of bfloat16 into its own last bit
def test_both_paths_compute_the_same(kind, tolerance, monkeypatch):
    model = filled(DENSE["mla"])
    install(model, kind)
    ours = gradients(model)
    monkeypatch.setattr(native, "compiled", lambda: False)
    far = distance(ours, gradients(model))
    assert max(far.values()) < tolerance, far


@pytest.mark.parametrize("kind", ["int8", "fp8", "fp8_row"])
@pytest.mark.parametrize("path", ["compiled", "plain"])
def test_experts_are_in_eight_bits_too(kind, path, monkeypatch):
    """Routing may differ between runs of different precision; so experts alone, with given tokens."""
    if path == "plain":
        monkeypatch.setattr(native, "compiled", lambda: False)
    model = filled(replace(TINY, num_dense_layers=0, num_experts_per_tok=8))  # every expert is chosen: nothing to flip
    before = gradients(model)
    install(model, kind)
    far = distance(gradients(model), before)
    assert 1e-3 < far["model.layers.0.mlp.experts.gate_up_proj"] < 0.3, far
    assert 1e-3 < far["model.layers.0.mlp.experts.down_proj"] < 0.3, far


@pytest.mark.parametrize("shape", ["mla", "biases and head norms, half rotated"])
def test_what_stays_in_sixteen_bits(shape):
    model = filled(replace(SHAPES[shape], mtp_depth=1))
    names = [site.name for site in install(model, "int8")]
    assert len(names) == len(set(names))
    assert not [n for n in names if any(part in n for part in ("lm_head", "embed", "eh_proj", "norm", "mlp.gate.", "bias"))]
    linears = {n.removesuffix(".weight") for n, p in model.named_parameters() if p.ndim > 1}
    left = linears - set(names)
    assert all(n.endswith(("lm_head", "embed_tokens", "eh_proj", "mlp.gate")) for n in left), left


def test_evaluation_shows_the_model_as_it_is_saved():
    model = filled(DENSE["mla"]).eval()
    tokens = torch.arange(20).view(1, 20)
    with torch.no_grad():
        before = model(tokens)
        install(model, "int8")
        assert torch.equal(model(tokens), before)
