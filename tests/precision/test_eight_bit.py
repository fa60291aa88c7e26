"""8-bit products: int8's plain form exactly, fp8's in whichever type multiplies them, and what torch's scaled products are handed."""

import pytest
import torch

from sparing.precision import eight_bit
from sparing.precision.eight_bit import SCHEMES, e4m3, scaled_mm, scaled_product
from sparing.precision.formats import E4M3
from sparing.precision.quantise import dequantise, quantise

ROWS, COLUMNS = 17, 9


@pytest.mark.parametrize("inner", [1, 7, 1024, 1025, 5000])
def test_integers_are_those_of_integer_arithmetic(inner):
    """Random numbers, the largest that can occur, and numbers of one sign, whose sums float32 would have to round in longer pieces."""
    generator = torch.Generator().manual_seed(inner)
    for low, high in ((-127, 127), (127, 127), (-127, -127), (-128, -128), (101, 127)):
        a, b = (torch.randint(low, high + 1, (rows, inner), dtype=torch.int8, generator=generator) for rows in (ROWS, COLUMNS))
        b[::2] *= 1 if low == -128 else -1  # (-128 has no opposite)
        found = eight_bit._integers(a, b)
        assert found.dtype == torch.int32 and torch.equal(found.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("kind", ["fp8", "fp8_row"])
def test_fp8_operands_may_be_multiplied_in_float32(kind, monkeypatch):
    """The sums of the same numbers, in the type that was asked for, whether bfloat16 multiplies or float32."""
    generator = torch.Generator().manual_seed(0)
    a, g, base, weight = (torch.randn(*shape, generator=generator) for shape in ((40, 160), (40, 70), (40, 70), (70, 160)))
    a, g, base = a.bfloat16(), g.bfloat16(), base.bfloat16()
    blocks, found = SCHEMES[kind][1], torch.zeros(2, dtype=torch.int64)  # (fp8_row's first has a product of its own)

    def exact(x: torch.Tensor, inner_first: bool, is_weight: bool = False) -> torch.Tensor:
        return e4m3(x, blocks, found, inner_first=inner_first, weight=is_weight).double()

    want = (
        exact(a, False) @ exact(weight, False, True).t() + base.double(), exact(g, False) @ exact(weight, True, True),
        exact(g, True).t() @ exact(a, True),
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(eight_bit, "_emulation_dtype", lambda x, dtype=dtype: dtype)
        out = torch.zeros(40, 72, dtype=torch.bfloat16)
        y = eight_bit.nt(kind, blocks, found, a, weight, out[:, 1:71], base)
        assert y.data_ptr() == out[:, 1:].data_ptr() and not out[:, 0].any() and not out[:, 71].any()
        assert torch.equal(eight_bit.nt(kind, blocks, found, a, weight, base=base), y)
        back, grad = eight_bit.nn(kind, blocks, found, g, weight), eight_bit.tn(kind, blocks, found, g, a)
        assert y.dtype == back.dtype == torch.bfloat16
        for got, exactly in zip((y, back, grad), want, strict=True):
            step = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-20
            torch.testing.assert_close(got.double(), exactly, rtol=step, atol=step * float(exactly.abs().mean()))
    assert grad.dtype == torch.float32 and not found.any()


def test_torch_takes_row_wise_scales_as_they_are_handed_over():
    generator = torch.Generator().manual_seed(0)
    left, right = (quantise(torch.randn(rows, 40, generator=generator), E4M3, (1, None)) for rows in (5, 9))
    y = scaled_mm(left, right, torch.float32)[:5, :9]
    torch.testing.assert_close(y, dequantise(left) @ dequantise(right).t(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("inner", [128, 640])
def test_torch_takes_block_wise_scales_as_they_are_handed_over(inner, weight):
    """On the meta device, where torch checks shapes and strides as a GPU's product does."""
    left = quantise(torch.randn(5, inner), E4M3, (1, 128), powers=True)
    right = quantise(torch.randn(256, inner), E4M3, (128 if weight else 1, 128), powers=True)
    left, right = (q._replace(values=q.values.to("meta"), scale=q.scale.to("meta")) for q in (left, right))
    assert scaled_mm(left, right, torch.bfloat16).shape == (16, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["fp8", "fp8_row"])
def test_scaled_products_on_a_gpu_are_those_on_the_cpu(kind):
    blocks, faults = SCHEMES[kind][0], torch.zeros(2, dtype=torch.int64)
    if kind == "fp8" and not eight_bit._has_block_products():
        pytest.skip("torch's scaled product takes no blocks on this GPU")
    a, b = torch.randn(40, 256), torch.randn(128, 256)
    for weight in (True, False):
        y = scaled_product(a.cuda(), b.cuda(), blocks, faults.cuda(), weight).cpu().float()
        torch.testing.assert_close(y, scaled_product(a, b, blocks, faults, weight), rtol=2.0**-7, atol=0.05)
