"""Our own products of bfloat16, by vectors and by the tiles of a matrix unit, in shapes that fill neither: against float32 products of the
same numbers."""

import itertools

import pytest
import torch

from sparing.kernels import native, products

ROWS, COLUMNS, INNER = (1, 3, 16, 31, 37, 64, 100), (1, 16, 17, 32, 50, 96), (2, 32, 34, 96, 130)
GUARD = 7.0


@pytest.fixture(params=["vectors", "tiles"])
def kernels(request, one_thread):
    if not native.can(request.param):
        pytest.skip("this machine cannot run these kernels")
    with native.path(request.param):
        yield request.param


def close(mine: torch.Tensor, reference: torch.Tensor) -> bool:
    tolerance = 1e-5 if mine.dtype == torch.float32 else 1e-2
    return float((mine.float() - reference).norm() / reference.norm()) < tolerance


def inside(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a bfloat16 matrix inside a larger one, the larger one): what is around it must stay as it is."""
    whole = torch.full((rows + 1, columns + 4), GUARD).bfloat16()
    return whole[:rows, :columns], whole


def test_products_in_every_shape(kernels):
    torch.manual_seed(0)
    for M, N, K in itertools.product(ROWS, COLUMNS, INNER):
        a, b, base = torch.randn(M, K).bfloat16(), torch.randn(N, K), torch.randn(M, N).bfloat16()
        assert products.usable(a)
        out, whole = inside(M, N)
        products.nt(a, b, out=out, base=base)
        assert close(out, a.float() @ b.bfloat16().float().T + base.float()), (M, N, K)
        assert torch.equal(whole[M], torch.full_like(whole[M], GUARD)) and bool((whole[:, N:] == GUARD).all())
        c = torch.randn(K, N)
        assert close(products.nn(a, c), a.float() @ c.bfloat16().float()), (M, N, K)
        x, y = torch.randn(K + 1, 2 * M).bfloat16(), torch.randn(K + 1, 2 * N).bfloat16()  # an odd number of rows
        for dtype in (torch.float32, torch.bfloat16):
            assert close(products.tn(x, y, dtype=dtype), x.float().T @ y.float()), (M, N, K)


def test_rows_of_a_larger_matrix(kernels):
    torch.manual_seed(0)
    whole, b = torch.randn(40, 200).bfloat16(), torch.randn(48, 64)
    a = whole[:, 10:74]
    assert close(products.nt(a, b), a.float() @ b.bfloat16().float().T)


def test_groups_of_any_size(kernels):
    """Experts' rows: none, one, a tile and a bit."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 1, 18, 18, 60])
    a, b = torch.randn(60, 34).bfloat16(), torch.randn(5, 48, 34)
    out, back = products.grouped_nt(a, b, ends), products.grouped_nn(torch.randn(60, 48).bfloat16(), b, ends)
    assert back.shape == (60, 34)
    gradient = products.grouped_tn(out, a, ends)
    for e, rows in products.spans(ends):
        assert close(out[rows], a[rows].float() @ b[e].bfloat16().float().T)
        assert close(gradient[e], out[rows].float().T @ a[rows].float())
    assert not gradient[0].any() and not gradient[3].any()


def test_what_is_measured_is_what_is_chosen(one_thread):
    products.fastest.cache_clear()
    kernels, why = products.fastest()
    assert native.can(kernels)
    if native.can("vectors"):
        found = products.rates()
        assert set(found) == {path for path in ("tiles", "vectors", "compiled") if native.can(path)} and min(found.values()) > 0
        assert all(path in why for path in found)
