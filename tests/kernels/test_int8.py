"""Compiled 8-bit products and rounding against their plain forms: exactly, up to the order of float32 sums."""

import pytest
import torch

from sparing.base.hardware import cpu_flags
from sparing.kernels import int8, native
from sparing.precision import eight_bit as plain
from sparing.precision.formats import E4M3, E5M6
from sparing.precision.quantise import dequantise, quantise

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.skipif(not int8.built(), reason="no AVX512_VNNI or no compiler here")]


def random(generator, *shape) -> torch.Tensor:
    x = torch.randn(*shape, generator=generator) * torch.randn(shape[0], *([1] * (len(shape) - 1)), generator=generator).exp()
    return x.bfloat16()


def relative(a, b) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


SHAPES = [(1, 1, 1), (7, 5, 6), (8, 32, 64), (33, 70, 258), (9, 33, 131), (64, 64, 256), (257, 130, 66), (20, 100, 1000)]


@pytest.mark.parametrize("block", [None, 128, 32])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("M, N, K", SHAPES)
def test_products(M, N, K, block, wide):
    generator = torch.Generator().manual_seed(M + N + K)
    found = torch.zeros(2, dtype=torch.int64)
    weight = random(generator, N, K).to(torch.float32 if wide else torch.bfloat16)
    a, g = random(generator, M, K), random(generator, M, N)
    want = plain.int8_product(a, weight, block, torch.zeros(2, dtype=torch.int64))
    got = int8.nt(a, weight, block, found)
    assert torch.equal(got, want.bfloat16()) or relative(got, want) < 3e-3
    base = random(generator, M, N)
    out = torch.zeros(M, N + 3, dtype=torch.bfloat16)
    int8.nt(a, weight, block, found, out=out[:, 1 : N + 1], base=base)
    assert relative(out[:, 1 : N + 1], want + base) < 3e-3 and not out[:, 0].any() and not out[:, N + 1 :].any()
    assert relative(int8.nn(g, weight, block, found), plain.int8_product(g, weight.t(), block, torch.zeros(2, dtype=torch.int64))) < 3e-3
    grad, want = int8.tn(g, a, block, found), plain.int8_product(g.t(), a.t(), block, torch.zeros(2, dtype=torch.int64))
    assert torch.equal(grad, want) or (block and relative(grad, want) < 1e-6)  # float32 out: nothing hides but the blocks' order
    assert torch.equal(int8.tn(g, a, block, found, torch.bfloat16), grad.bfloat16())
    assert found.tolist() == [0, 0]


@pytest.mark.parametrize("block", [None, 32])
def test_groups(block):
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(2, dtype=torch.int64)
    ends = torch.tensor([5, 5, 40, 41])
    a, g, weight = random(generator, 41, 34), random(generator, 41, 50), torch.randn(4, 50, 34, generator=generator)
    y, back, grad = (
        int8.grouped_nt(a, weight, ends, block, found), int8.grouped_nn(g, weight, ends, block, found),
        int8.grouped_tn(g, a, ends, block, found),
    )  # fmt: skip
    assert not grad[1].any()
    assert torch.equal(int8.grouped_tn(g, a, ends, block, found, torch.bfloat16), grad.bfloat16())
    for e, rows in [(0, slice(0, 5)), (2, slice(5, 40)), (3, slice(40, 41))]:
        assert relative(y[rows], plain.int8_product(a[rows], weight[e], block, torch.zeros(2, dtype=torch.int64))) < 3e-3
        assert relative(back[rows], plain.int8_product(g[rows], weight[e].t(), block, torch.zeros(2, dtype=torch.int64))) < 3e-3
        assert relative(grad[e], plain.int8_product(g[rows].t(), a[rows].t(), block, torch.zeros(2, dtype=torch.int64))) < 1e-6


@pytest.fixture
def switch(one_thread):
    """Switches the matrix unit on and off for this thread's products."""
    library = native.library("int8")
    if "amx_int8" not in cpu_flags() or not library.use_tiles(1):
        pytest.skip("no matrix unit here")
    with native.path("tiles"):
        yield library.use_tiles
    library.choose_tiles()


def both(switch, product) -> torch.Tensor:
    """What `product` gives with the matrix unit, which must be what it gives without."""
    found = []
    for on in (1, 0):
        assert switch(on) == on
        found.append(product())
    assert torch.equal(found[0].nan_to_num(7), found[1].nan_to_num(7))
    return found[0]


@pytest.mark.parametrize("block", [None, 128, 64, 32])
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("M, N, K", [*SHAPES, (16, 16, 64), (31, 17, 63), (100, 48, 4096), (700, 40, 192)])
def test_the_matrix_unit_gives_the_same_bits(switch, M, N, K, block, wide):
    generator = torch.Generator().manual_seed(M + N + K)
    found = torch.zeros(2, dtype=torch.int64)
    weight = random(generator, N, K).to(torch.float32 if wide else torch.bfloat16)
    a, g, base = random(generator, M, K), random(generator, M, N), random(generator, M, N)
    y = both(switch, lambda: int8.nt(a, weight, block, found))
    assert relative(y, plain.int8_product(a, weight, block, torch.zeros(2, dtype=torch.int64))) < 3e-3
    out = torch.zeros(M, N + 3, dtype=torch.bfloat16)
    both(switch, lambda: int8.nt(a, weight, block, found, out=out[:, 1 : N + 1], base=base).clone())
    assert not out[:, 0].any() and not out[:, N + 1 :].any()
    both(switch, lambda: int8.nn(g, weight, block, found))
    for dtype in (torch.float32, torch.bfloat16):
        both(switch, lambda: int8.tn(g, a, block, found, dtype))  # noqa: B023
    a[M // 2, K // 2], weight[N // 2, 0] = torch.inf, torch.nan
    y = both(switch, lambda: int8.nt(a, weight, block, found))
    assert y[M // 2].isnan().any() and y[:, N // 2].isnan().any()
    both(switch, lambda: int8.nn(g, weight, block, found))
    both(switch, lambda: int8.tn(g, a, block, found))


@pytest.mark.parametrize("block", [None, 128])
def test_the_matrix_unit_gives_the_same_bits_to_groups(switch, block):
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(2, dtype=torch.int64)
    ends = torch.tensor([5, 5, 40, 41, 230])
    a, g, weight = random(generator, 230, 34), random(generator, 230, 150), torch.randn(5, 150, 34, generator=generator)
    both(switch, lambda: int8.grouped_nt(a, weight, ends, block, found))
    both(switch, lambda: int8.grouped_nn(g, weight, ends, block, found))
    grad = both(switch, lambda: int8.grouped_tn(g, a, ends, block, found))
    assert not grad[1].any() and grad[0].any()


def test_long_sums_do_not_overflow():
    a, b = torch.full((40_000, 3), 1.0).bfloat16(), torch.full((40_000, 5), 1.0).bfloat16()
    found = torch.zeros(2, dtype=torch.int64)
    assert torch.allclose(int8.tn(a, b, None, found), torch.full((3, 5), 40_000.0), rtol=1e-5)


def test_faults_are_counted_and_shown():
    found = torch.zeros(2, dtype=torch.int64)
    a, weight = torch.ones(6, 8).bfloat16(), torch.ones(4, 8)
    a[1, 3], a[2, 0], a[3], a[4] = torch.inf, torch.nan, 1e-38, 0
    y = int8.nt(a, weight, None, found)
    assert found.tolist() == [2, 1]
    assert y[1].isnan().all() and y[2].isnan().all() and y[[0, 5]].isfinite().all() and not y[[3, 4]].any()
    weight[2, 2] = torch.nan
    found.zero_()
    y = int8.nn(torch.ones(2, 4).bfloat16(), weight, None, found)
    assert found.tolist() == [1, 0] and y[:, 2].isnan().all() and y[:, :2].isfinite().all()


@pytest.mark.parametrize("format", [E4M3, E5M6], ids=lambda f: f.name)
@pytest.mark.parametrize("block", [(1, 128), (128, 1), (128, 128), (32, 32), (1, 32), (1, 1000)])
@pytest.mark.parametrize("wide", [True, False])
def test_rounding_to_small_floats(format, block, wide):
    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 1), (3, 5), (130, 260), (129, 33)]:
        x = random(generator, *shape).to(torch.float32 if wide else torch.bfloat16)
        x.view(-1)[0] = 0
        found = torch.zeros(2, dtype=torch.int64)
        got = int8.float_round(x, block, format.mantissa, format.smallest * 2**format.mantissa, format.most, found)
        assert torch.equal(got.float(), dequantise(quantise(x, format, block, powers=True)))
        x.view(-1)[-1] = torch.nan
        got = int8.float_round(x, block, format.mantissa, format.smallest * 2**format.mantissa, format.most, found)
        want = dequantise(quantise(x, format, block, powers=True))
        assert found.tolist() == [1, 0] and torch.equal(got.float().nan_to_num(7), want.nan_to_num(7))
