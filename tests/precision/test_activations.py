"""Activations kept in int8: what is packed, what is not, bytes, and how far gradients move."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.losses import loss_of
from tests.model.shapes import SHAPES, TINY

from sparing.kernels import native
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.precision.activations import LEAST, pack, unpack


@pytest.fixture(autouse=True, params=["compiled", "plain"])
def path(request):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with native.path(request.param):
        yield request.param
    torch.set_num_threads(threads)


@given(st.integers(1, 40), st.integers(1, 300), st.integers(0, 2**31), st.floats(-20, 20))
@settings(deadline=None, max_examples=30)
def test_half_a_code_of_each_row(rows, columns, seed, magnitude):
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**magnitude).to(torch.bfloat16)
    x = x.repeat(-(-LEAST // x.numel()), 1)
    code, scale = pack(x)
    back = unpack((code, scale))
    assert code.dtype == torch.int8 and back.dtype == torch.bfloat16 and int(code.abs().max()) <= 127
    most = x.float().abs().amax(1, keepdim=True)
    assert bool(((back.float() - x.float()).abs() <= most * (0.5 / 127 + 2.0**-8)).all())


def test_zeros_and_layouts():
    x = torch.zeros(2, 8, 512, dtype=torch.bfloat16)
    assert float(unpack(pack(x)).abs().sum()) == 0
    strided = torch.randn(64, 256).to(torch.bfloat16)[:, :128].transpose(0, 1)
    assert torch.allclose(unpack(pack(strided)).float(), strided.float(), atol=0.03)


def test_what_is_left_alone():
    weight = torch.nn.Parameter(torch.randn(128, 128))
    kept = (
        torch.randn(128, 128),
        torch.randn(8, 8).to(torch.bfloat16),
        weight.to(torch.bfloat16),
        torch.cat((weight, weight)).to(torch.bfloat16),
        torch.nn.Parameter(torch.randn(128, 128).to(torch.bfloat16)),
    )
    assert all(pack(tensor) is tensor for tensor in kept)
    assert isinstance(pack((torch.randn(128, 128, requires_grad=True) * 2).to(torch.bfloat16)), tuple)


def gradients(name: str, int8: bool):
    model = Transformer(SHAPES[name])
    init_weights(model, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.3 * (p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3))
    model.compute_dtype = torch.bfloat16
    model.set_int8_activations(int8)
    model.train()
    tokens = torch.randint(TINY.vocab_size, (4, 128), generator=generator)
    out = loss_of(model, tokens, tokens.roll(-1, 1)[..., None])
    out.total.backward()
    return float(out.loss), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["mla", "dense", "gqa", "no q compression"])
def test_the_loss_is_exact_and_gradients_nearly(name):
    full, int8 = gradients(name, False), gradients(name, True)
    assert full[0] == int8[0]
    moved = []
    for key, grad in full[1].items():
        moved.append(float((int8[1][key] - grad).norm() / grad.norm().clamp(min=1e-9)))
    assert max(moved) < 0.08 and sum(moved) / len(moved) < 0.03
    assert max(moved) > 0  # it is not simply off
