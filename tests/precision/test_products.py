"""The plain forms of 8-bit products: int8's exactly, fp8's in whichever type multiplies them."""

import pytest
import torch

from sparing.precision import products
from sparing.precision.products import SCHEMES, Operand, fp8_operand

ROWS, COLUMNS = 17, 9


@pytest.mark.parametrize("inner", [1, 7, 1024, 1025, 5000])
def test_integers_are_those_of_integer_arithmetic(inner):
    """Random numbers, the largest that can occur, and numbers of one sign, whose sums float32 would have to round in longer pieces."""
    generator = torch.Generator().manual_seed(inner)
    for low, high in ((-127, 127), (127, 127), (-127, -127), (-128, -128), (101, 127)):
        a, b = (torch.randint(low, high + 1, (rows, inner), dtype=torch.int8, generator=generator) for rows in (ROWS, COLUMNS))
        b[::2] *= 1 if low == -128 else -1  # (-128 has no opposite)
        found = products._integers(a, b)
        assert found.dtype == torch.int32 and torch.equal(found.long(), a.long() @ b.long().t())


@pytest.mark.parametrize("kind", ["fp8", "fp8_row"])
def test_fp8_operands_may_be_multiplied_in_float32(kind, monkeypatch):
    """The sums of the same numbers, in the type that was asked for, whether bfloat16 multiplies or float32."""
    generator = torch.Generator().manual_seed(0)
    a, g, base, weight = (torch.randn(*shape, generator=generator) for shape in ((40, 160), (40, 70), (40, 70), (70, 160)))
    a, g, base = a.bfloat16(), g.bfloat16(), base.bfloat16()
    blocks, found = SCHEMES[kind][1], torch.zeros(2, dtype=torch.int64)  # (fp8_row's first has a product of its own)

    def exact(x: torch.Tensor, inner_first: bool, is_weight: bool = False) -> torch.Tensor:
        return fp8_operand(Operand(x, inner_first, is_weight), blocks, found).double()

    want = (
        exact(a, False) @ exact(weight, False, True).t() + base.double(), exact(g, False) @ exact(weight, True, True),
        exact(g, True).t() @ exact(a, True),
    )  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(products, "_emulated_dtype", lambda x, dtype=dtype: dtype)
        out = torch.zeros(40, 72, dtype=torch.bfloat16)
        y = products.nt(kind, blocks, found, a, weight, out[:, 1:71], base)
        assert y.data_ptr() == out[:, 1:].data_ptr() and not out[:, 0].any() and not out[:, 71].any()
        assert torch.equal(products.nt(kind, blocks, found, a, weight, base=base), y)
        back, grad = products.nn(kind, blocks, found, g, weight), products.tn(kind, blocks, found, g, a)
        assert y.dtype == back.dtype == torch.bfloat16
        for got, exactly in zip((y, back, grad), want, strict=True):
            step = 2.0**-8 if got.dtype == torch.bfloat16 else 2.0**-20
            torch.testing.assert_close(got.double(), exactly, rtol=step, atol=step * float(exactly.abs().mean()))
    assert grad.dtype == torch.float32 and not found.any()
