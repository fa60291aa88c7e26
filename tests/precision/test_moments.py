"""8-bit averages: bounds, zeros, bias, and an average that goes on moving."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.precision.moments import BLOCK, Average, dequantise, quantise

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 600))


def there_and_back(x, signed, bits):
    code, scale = quantise(x, signed, torch.full(x.shape, bits, dtype=torch.int32))
    return code, dequantise(code, scale)


@given(SHAPES, st.integers(0, 2**31), st.sampled_from([0, 1, 32768, 65535]), st.floats(-30, 30), st.booleans())
@settings(deadline=None, max_examples=60)
def test_within_one_code_of_the_number(shape, seed, bits, magnitude, signed):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    x = (x if signed else x.square()) * 10.0**magnitude
    code, back = there_and_back(x, signed, bits)
    most = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in x.split(BLOCK, 1)], 1)
    share = (x.abs() / most).double()
    step = (2 * share.sqrt() / 127 + 127**-2) if signed else ((share**0.25 + 1 / 255) ** 4 - share)
    assert bool(((back - x).abs().double() <= most * (step * 1.001 + 2e-6)).all())
    assert bool((back.sign() * x.sign() >= 0).all())
    assert code.dtype == (torch.int8 if signed else torch.uint8)


def test_zeros_stay_and_nothing_else_becomes_one():
    x = torch.zeros(2, 300)
    assert float(there_and_back(x, True, 65535)[1].abs().sum()) == float(there_and_back(x, False, 65535)[1].sum()) == 0
    x[0, 0], x[0, 1] = 1.0, 1e-12
    back = there_and_back(x, False, 0)[1]
    assert float(back[0, 0]) == 1.0 and 0 < float(back[0, 1]) < 1e-9 and float(back[0, 2:].sum()) == 0
    assert float(back[1].sum()) == 0


def test_one_large_number_spoils_its_block_only():
    x = torch.full((1, 2 * BLOCK), 1e-3)
    x[0, 0] = 1e6
    back = there_and_back(x, True, 65535)[1]
    assert torch.allclose(back[0, BLOCK:], x[0, BLOCK:]) and float(back[0, 1]) == 0 and float(back[0, 0]) == 1e6


@pytest.mark.parametrize("signed", [True, False])
def test_unbiased(signed):
    """The mean over many draws is the number, to a few standard errors."""
    x = torch.rand(1, 256, generator=torch.Generator().manual_seed(0)) + 1e-3
    average, draws = Average("exp_avg/w", torch.empty(1, 256), signed, True), 4000
    total = torch.zeros(1, 256, dtype=torch.float64)
    for step in range(draws):
        average.write(slice(0, 1), x, 0, step)
        total += average.read(slice(0, 1))
    error = (total / draws - x).abs()
    gap = 2 * x.sqrt() / 127 if signed else 4 * x**0.75 / 255
    assert bool((error < 5 * gap / 2 / draws**0.5 + 1e-6).all())


@pytest.mark.parametrize("signed", [True, False])
def test_a_slow_average_arrives(signed):
    """1 % a step of the way: less than half a code, so that an average rounded to nearest would never move."""
    start, aim = torch.linspace(0.5, 1, 256)[None], torch.linspace(0.1, 0.2, 256)[None]
    average, rows = Average("exp_avg_sq/w", start, signed, True), slice(0, 1)
    average.write(rows, start, 0, 0)
    for step in range(1, 600):
        average.write(rows, average.read(rows).lerp_(aim, 0.01), 0, step)
    assert torch.allclose(average.read(rows).mean(), aim.mean(), rtol=0.03)


def test_bytes_and_repetition():
    average = Average("momentum/w", torch.empty(3, 8, 512), True, True)
    assert {name: t.numel() * t.element_size() for name, t in average.state().items()} == {"momentum": 12288, "momentum_scale": 24 * 2 * 4}
    x = torch.randn(24, 512)
    average.write(slice(0, 24), x, 3, 4)
    whole = average.value.clone()
    for start in range(0, 24, 8):  # however it is cut into slices
        average.write(slice(start, start + 8), x[start : start + 8], 3, 4)
    assert torch.equal(whole, average.value)
    average.write(slice(0, 24), x, 3, 5)
    assert not torch.equal(whole, average.value)
