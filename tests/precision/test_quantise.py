"""Formats and scaled blocks against a slow, obvious reference, bit by bit; and what must hold for any numbers."""

import math
from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.precision.eight_bit import SCHEMES, count, scaled_product
from sparing.precision.formats import E4M3, E5M6, INT8, Format
from sparing.precision.quantise import dequantise, quantise, spread

BLOCKS = [(1, 128), (128, 128), (128, 1), (1, None), (None, 1), (None, None), (32, 32)]


def faults(q) -> tuple[int, int]:
    """(blocks with an infinity or NaN, blocks too small to scale)."""
    found = torch.zeros(2, dtype=torch.int64)
    count(q, found)
    return tuple(found.tolist())


def numbers_of(format: Format) -> list[Fraction]:
    """All non-negative numbers, in order, from the definition."""
    if format is INT8:
        return [Fraction(i) for i in range(128)]
    out, step = [Fraction(i) * Fraction(format.smallest) for i in range(2**format.mantissa)], Fraction(format.smallest)
    while out[-1] < format.most:
        out += [Fraction(i) * step for i in range(2**format.mantissa, 2 ** (format.mantissa + 1))]
        step *= 2
    return [x for x in out if x <= format.most]


ALL = {format.name: numbers_of(format) for format in (E4M3, E5M6, INT8)}


def nearest(x: float, format: Format) -> float:
    """The nearest number, of two equally near the one with the even code; magnitudes to half a step beyond the largest stay."""
    numbers, size = ALL[format.name], Fraction(abs(x))
    i = min(bisect_left(numbers, size), len(numbers) - 1)
    if i and numbers[i] != size and (size - numbers[i - 1], (i - 1) % 2) < (abs(numbers[i] - size), i % 2):
        i -= 1
    return math.copysign(float(numbers[i]), x)


def single(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float32))


def slow(x: list[list[float]], format: Format, rows: int, columns: int, powers: bool) -> list[list[float]]:
    """Number by number: the block's largest, its scale in single precision, the nearest number."""
    M, N = len(x), len(x[0])
    out = [[0.0] * N for _ in range(M)]
    for m in range(0, M, rows):
        for n in range(0, N, columns):
            places = [(i, j) for i in range(m, min(M, m + rows)) for j in range(n, min(N, n + columns))]
            amax = max(abs(x[i][j]) for i, j in places)
            if amax == 0:
                continue
            scale = single(amax / format.most)
            inverse = single(format.most / amax)
            if powers:
                scale = 2.0 ** math.ceil(math.log2(scale))
                inverse = 1 / scale
            for i, j in places:
                out[i][j] = single(nearest(single(x[i][j] * inverse), format) * scale)
    return out


def test_the_formats_are_what_they_are_called():
    assert len(ALL["e4m3"]) == 127 and ALL["e4m3"][-1] == 448  # of 128 codes one is NaN
    assert len(ALL["e5m6"]) == 31 * 64 and ALL["e5m6"][-1] == 65024
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert [float(x) for x in ALL["e4m3"]] == codes.tolist()


@pytest.mark.parametrize("format", [E4M3, E5M6, INT8], ids=lambda f: f.name)
def test_rounding_is_to_nearest_even(format):
    """All numbers, all halfway points, and their neighbours in single precision."""
    numbers = [float(x) for x in ALL[format.name]]
    points = torch.tensor(numbers + [(a + b) / 2 for a, b in pairwise(numbers)], dtype=torch.float32)
    points = torch.cat([points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(-torch.inf))])
    points = torch.cat([points, -points])
    assert format.round(points).float().tolist() == [nearest(float(x), format) for x in points]


def test_what_does_not_fit_shows():
    huge = torch.tensor([1e6, -1e6, torch.inf, torch.nan])
    assert E4M3.round(huge).float().isnan().all()
    assert E5M6.round(huge)[:3].tolist() == [torch.inf, -torch.inf, torch.inf] and E5M6.round(huge)[3].isnan()


@pytest.mark.parametrize("format", [E4M3, E5M6, INT8], ids=lambda f: f.name)
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("powers", [False, True])
def test_equal_to_the_slow_reference_bit_by_bit(format, block, powers):
    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 1), (3, 130), (129, 5), (33, 140)]:
        x = torch.randn(shape, generator=generator) * 10.0 ** torch.randint(-6, 6, (shape[0], 1), generator=generator)
        x[0, 0] = 0.0
        rows, columns = block[0] or shape[0], block[1] or shape[1]
        assert dequantise(quantise(x, format, block, powers)).tolist() == slow(x.tolist(), format, rows, columns, powers)


def test_equal_to_torchs_own_cast():
    """A block that is scaled by 1 is torch's cast; and values are stored in torch's type."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)) * 50
    x[:, 0] = 448.0
    x = x.clamp(-448, 448)
    q = quantise(x, E4M3, (1, 128), powers=True)
    assert (q.scale == 1).all() and q.values.dtype == torch.float8_e4m3fn
    assert torch.equal(q.values.float(), x.to(torch.float8_e4m3fn).float())


numbers = st.floats(-(2.0**120), 2.0**120, width=32)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 140)).flatmap(
    lambda s: st.lists(numbers, min_size=s[0] * s[1], max_size=s[0] * s[1]).map(lambda v: torch.tensor(v).view(s))
)


@settings(max_examples=60, deadline=None)
@given(matrices, st.sampled_from([E4M3, E5M6, INT8]), st.sampled_from(BLOCKS), st.booleans())
def test_round_trip_is_within_half_a_step(x, format, block, powers):
    q = quantise(x, format, block, powers)
    scale = spread(q)
    back, dead = dequantise(q), scale == 0
    assert faults(q)[0] == 0 and (faults(q)[1] > 0) == bool(dead.any())
    assert (back[x == 0] == 0).all() and (back.sign() * x.sign() >= 0).all()
    assert (x[dead].abs() <= format.most * 2.0**-126).all()  # only what float32 itself can hardly hold is given up, and said to be
    half = torch.maximum(x.abs() * 2.0 ** -(format.mantissa + 1) if format.mantissa else x.new_zeros(x.shape), scale * format.smallest / 2)
    assert ((back - x).abs() <= half * (1 + 1e-5) + x.abs() * 1e-6)[~dead].all()


@settings(max_examples=30, deadline=None)
@given(matrices, st.sampled_from([E4M3, E5M6, INT8]), st.sampled_from([torch.nan, torch.inf, -torch.inf]), st.data())
def test_an_infinity_or_nan_is_reported_and_stays(x, format, bad, data):
    m, n = data.draw(st.integers(0, x.shape[0] - 1)), data.draw(st.integers(0, x.shape[1] - 1))
    x[m, n] = bad
    q = quantise(x, format, (1, 128))
    assert faults(q)[0] == 1
    back = dequantise(q)
    assert back[m, n // 128 * 128 : n // 128 * 128 + 128].isnan().all()
    others = torch.ones_like(x, dtype=torch.bool)
    others[m, n // 128 * 128 : n // 128 * 128 + 128] = False
    assert back[others].isfinite().all()


def test_zeros_denormals_and_nothing_at_all():
    assert torch.equal(dequantise(quantise(torch.zeros(3, 200), E4M3, (1, 128))), torch.zeros(3, 200))
    tiny = torch.full((1, 4), 1e-40)
    assert faults(quantise(tiny, INT8, (1, None))) == (0, 1) and not dequantise(quantise(tiny, INT8, (1, None))).any()
    small = torch.full((1, 4), 1e-35)
    assert faults(quantise(small, INT8, (1, None))) == (0, 0)
    assert torch.allclose(dequantise(quantise(small, INT8, (1, None))), small, atol=0)
    assert quantise(torch.zeros(0, 4), INT8, (1, None)).values.shape == (0, 4)


def test_a_block_beyond_the_matrix_is_the_whole_and_costs_no_more():
    """Filled up to such a block, these six numbers would need terabytes."""
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    beyond, whole = quantise(x, INT8, (1 << 20, 1 << 20)), quantise(x, INT8, (None, None))
    assert torch.equal(beyond.values, whole.values) and torch.equal(beyond.scale, whole.scale)
    assert torch.equal(dequantise(beyond), dequantise(whole))


def test_powers_of_two_are_exact_and_never_too_small():
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).exp()
    q = quantise(x, E4M3, (1, 128), powers=True)
    mantissa, _ = torch.frexp(q.scale)
    assert (mantissa == 0.5).all()
    assert torch.equal(dequantise(q), dequantise(q).bfloat16().float())  # bfloat16 holds e4m3 times a power of two
    assert q.values.float().abs().max() <= 448


@pytest.mark.parametrize("shape", [(48, 32, 64), (5, 3, 7), (1, 17, 130)])
def test_row_wise_products_are_those_of_the_rounded_numbers(shape):
    M, N, K = shape
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator) * torch.logspace(-3, 3, rows)[:, None] for rows in (M, N))
    found = torch.zeros(2, dtype=torch.int64)
    left, right = (dequantise(quantise(x, E4M3, (1, None))).double() for x in (a, b))
    y = scaled_product(a, b, SCHEMES["fp8_row"][0], found)
    torch.testing.assert_close(y.double(), left @ right.t(), rtol=1e-5, atol=1e-5 * float((left @ right.t()).abs().max()))
    assert found.tolist() == [0, 0]
    a[0, 0] = torch.inf
    assert scaled_product(a, b, SCHEMES["fp8_row"][0], found)[0].isnan().all() and found.tolist() == [1, 0]
