"""Every kind of operand against the same weight as one float64 matrix: the three products, their grouped forms, autograd."""

import pytest
import torch

from sparing.base.int4_groups import to_int4
from sparing.kernels import native, products
from sparing.kernels.products import Frozen, LowRank, Operand, Weight

pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def codes(weight: torch.Tensor) -> Frozen:
    scale = weight.abs().amax(-1) / 127
    return Frozen((weight / scale.unsqueeze(-1)).round().to(torch.int8), scale)


def low_rank(base: Operand, generator) -> LowRank:
    *experts, out, columns = base.shape
    down, up = (torch.randn(*experts, *size, generator=generator, requires_grad=True) for size in ((4, columns), (out, 4)))
    return LowRank(base, down, up, 0.5)


def make(kind: str, *shape: int) -> Operand:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator) * shape[-1] ** -0.5
    base = {
        "float32": lambda: Weight(weight.requires_grad_()),
        "bfloat16": lambda: Weight(weight.bfloat16().requires_grad_()),
        "not learning": lambda: Weight(weight),
        "frozen bfloat16": lambda: Frozen(weight.bfloat16()),
        "frozen int8": lambda: codes(weight),
        "frozen int4": lambda: Frozen(to_int4(weight), None, weight.shape),
    }[kind.removeprefix("low rank, ")]()
    return low_rank(base, generator) if kind.startswith("low rank") else base


KINDS = ["float32", "bfloat16", "not learning", "frozen bfloat16", "frozen int8", "frozen int4"]
KINDS += [f"low rank, {kind}" for kind in KINDS[2:]]


@pytest.fixture(params=["compiled", "plain", "vectors", "tiles"])
def path(request):
    if not any(native.can(request.param, dtype) for dtype in native.SUFFIXES):
        pytest.skip("this machine cannot run these kernels")
    with native.path(request.param):
        yield


def close(mine: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    mine, theirs, rounded = mine.detach().double(), theirs.detach().double(), theirs.dtype == torch.bfloat16
    return float((mine - theirs).norm() / theirs.norm()) < TOLERANCE[torch.bfloat16 if rounded else dtype]


def reference_gradients(operand: Operand, product) -> list[torch.Tensor | None]:
    """Gradients of the sum of `product(weight)` in float64."""
    tensors = [t for t in operand.tensors if t.requires_grad]
    if not tensors:
        return [None] * len(operand.tensors)
    return list(torch.autograd.grad(product(operand.whole(torch.float64)).sum(), tensors))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_of_a_matrix(kind, dtype, path, monkeypatch):
    monkeypatch.setattr(products, "PIECE", 1 << 16)
    operand = make(kind, 700, 928)  # in several pieces
    generator = torch.Generator().manual_seed(1)
    x, grad, base, base_x = (torch.randn(50, size, generator=generator).to(dtype) for size in (928, 700, 700, 928))
    with torch.no_grad():
        w = operand.whole(torch.float64)
        y, out = operand.nt(x), torch.zeros(50, 1400, dtype=dtype)
        assert y.dtype == dtype and close(y, x.double() @ w.T, dtype)
        assert operand.nt(x, out=out[:, 700:], base=base) is not None
        assert close(out[:, 700:], x.double() @ w.T + base.double(), dtype) and not out[:, :700].any()
        assert close(operand.nn(grad), grad.double() @ w, dtype)
        assert close(operand.nn(grad, base=base_x), grad.double() @ w + base_x.double(), dtype)
        found = operand.tn(grad, x)
    assert len(found) == len(operand.tensors)
    expected = reference_gradients(operand, lambda w: (x.double() @ w.T) * grad.double())
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is theirs is None or close(mine, theirs, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_products_of_experts(kind, dtype, path):
    operand = make(kind, 4, 24, 32)
    ends = torch.tensor([10, 10, 31, 40])  # the second has no rows
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(40, size, generator=generator).to(dtype) for size in (32, 24))

    def product(w: torch.Tensor, rows: torch.Tensor, transposed: bool = True) -> torch.Tensor:
        parts = rows.double().tensor_split(ends[:-1].tolist())
        return torch.cat([part @ (e.T if transposed else e) for part, e in zip(parts, w, strict=True)])

    with torch.no_grad():
        w, mine = operand.whole(torch.float64), operand.cast(dtype)
        assert close(operand.grouped_nt(x, ends), product(w, x), dtype) and close(mine.grouped_nt(x, ends), product(w, x), dtype)
        assert close(operand.grouped_nn(grad, ends), product(w, grad, False), dtype)
        found = operand.grouped_tn(grad, x, ends)
    expected = reference_gradients(operand, lambda w: product(w, x) * grad.double())
    assert len(found) == len(operand.tensors)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine is theirs is None or close(mine, theirs, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_autograd_sees_what_learns(kind, dtype, path):
    operand, generator = make(kind, 24, 32), torch.Generator().manual_seed(1)
    x, grad = torch.randn(3, 5, 32, generator=generator).to(dtype).requires_grad_(), torch.randn(3, 5, 24, generator=generator).to(dtype)
    y = operand(x)
    y.backward(grad)
    assert close(y, x.double() @ operand.whole(torch.float64).T, dtype) and close(
        x.grad, grad.double() @ operand.whole(torch.float64), dtype
    )
    expected = reference_gradients(operand, lambda w: (x.detach().double() @ w.T) * grad.double())
    for tensor, theirs in zip(operand.tensors, expected, strict=True):
        assert tensor.grad is theirs is None or (tensor.grad.dtype == tensor.dtype and close(tensor.grad, theirs, dtype))


@pytest.mark.parametrize("kind", ["frozen int8", "frozen int4"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_frozen_codes_multiply_as_the_floats_they_stand_for(kind, dtype, path):
    frozen, generator = make(kind, 80, 64), torch.Generator().manual_seed(1)
    x, grad = (torch.randn(20, size, generator=generator).to(dtype) for size in (64, 80))
    floats = Weight(frozen.whole())
    assert torch.equal(frozen.nt(x), floats.nt(x)) and torch.equal(frozen.nn(grad), floats.nn(grad))


def test_rows_are_not_kept_for_weights_that_do_not_learn():
    x, kept = torch.randn(6, 32, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        make("frozen int8", 24, 32)(x * 1.0)
    assert not [t for t in kept if t.shape == x.shape]
