"""Our own products, of bfloat16 by vectors and by the tiles of a matrix unit, of float32 by vectors, in shapes that fill neither: against
PyTorch's products of the same numbers."""

import itertools
import os
import shutil

import pytest
import torch

from sparing.base.config import ModelConfig
from sparing.base.hardware import cpu_flags
from sparing.kernels import native, products

ROWS, COLUMNS, INNER = (1, 3, 16, 31, 37, 64, 100), (1, 16, 17, 32, 50, 96), (2, 32, 34, 96, 130)
GUARD = 7.0
KERNELS = {
    "vectors": ("vectors", torch.bfloat16),
    "tiles": ("tiles", torch.bfloat16),
    "float32": ("vectors", torch.float32),
}


@pytest.fixture(params=KERNELS)
def dtype(request, one_thread):
    """Of activations; the kernels are chosen."""
    kernels, dtype = KERNELS[request.param]
    if not native.can(kernels, dtype):
        pytest.skip("this machine cannot run these kernels")
    with native.path(kernels):
        yield dtype


def close(mine: torch.Tensor, reference: torch.Tensor) -> bool:
    tolerance = 1e-5 if mine.dtype == torch.float32 else 1e-2
    return float((mine.float() - reference).norm() / reference.norm()) < tolerance


def inside(rows: int, columns: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(a matrix inside a larger one, the larger one): what is around it must stay as it is."""
    whole = torch.full((rows + 1, columns + 4), GUARD, dtype=dtype)
    return whole[:rows, :columns], whole


def check_products(dtype: torch.dtype, M: int, N: int, K: int) -> None:
    a, b, base = torch.randn(M, K).to(dtype), torch.randn(N, K), torch.randn(M, N).to(dtype)
    assert products.usable(a)
    out, whole = inside(M, N, dtype)
    products.nt(a, b, out=out, base=base)
    assert close(out, a.float() @ b.to(dtype).float().T + base.float()), (M, N, K)
    assert torch.equal(whole[M], torch.full_like(whole[M], GUARD)) and bool((whole[:, N:] == GUARD).all())
    c = torch.randn(K, N)
    assert close(products.nn(a, c), a.float() @ c.to(dtype).float()), (M, N, K)
    x, y = torch.randn(K + 1, 2 * M).to(dtype), torch.randn(K + 1, 2 * N).to(dtype)  # an odd number of rows
    for kind in (torch.float32, torch.bfloat16):
        assert close(products.tn(x, y, dtype=kind), x.float().T @ y.float()), (M, N, K)


def test_products_in_every_shape(dtype):
    torch.manual_seed(0)
    for M, N, K in itertools.product(ROWS, COLUMNS, INNER):
        check_products(dtype, M, N, K)


def test_products_of_many_rows_and_a_long_inner_dimension(dtype):
    """More than one block in each direction."""
    torch.manual_seed(0)
    check_products(dtype, 450, 40, 600)


def test_rows_of_a_larger_matrix(dtype):
    torch.manual_seed(0)
    whole, b = torch.randn(40, 200).to(dtype), torch.randn(48, 64)
    a = whole[:, 10:74]
    assert close(products.nt(a, b), a.float() @ b.to(dtype).float().T)


def test_a_bfloat16_weight(dtype):
    torch.manual_seed(0)
    a, b = torch.randn(20, 64).to(dtype), torch.randn(48, 64).bfloat16()
    assert close(products.nt(a, b), a.float() @ b.float().T)
    assert close(products.nn(products.nt(a, b), b), a.float() @ b.float().T @ b.float())


def test_groups_of_any_size(dtype):
    """Experts' rows: none, one, a tile and a bit."""
    torch.manual_seed(0)
    ends = torch.tensor([0, 1, 18, 18, 60])
    a, b = torch.randn(60, 34).to(dtype), torch.randn(5, 48, 34)
    out, back = products.grouped_nt(a, b, ends), products.grouped_nn(torch.randn(60, 48).to(dtype), b, ends)
    assert back.shape == (60, 34)
    gradient = products.grouped_tn(out, a, ends)
    for e, rows in products.spans(ends):
        assert close(out[rows], a[rows].float() @ b[e].to(dtype).float().T)
        assert close(gradient[e], out[rows].float().T @ a[rows].float())
    assert not gradient[0].any() and not gradient[3].any()


@pytest.mark.skipif(not shutil.which("cc") or "SPARING_PROCESSOR" in os.environ, reason="no compiler, or held to another processor")
def test_kernels_of_this_processor_are_there():
    """Other tests skip kernels that cannot run: here a build that fails is a failure."""
    assert native.can("compiled") and native.can("compiled", torch.float32) and native.can("vectors", torch.float32)
    assert native.can("vectors") or "avx512_bf16" not in cpu_flags()


@pytest.mark.skipif(native.passes() is None, reason="no C compiler here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_measured_is_what_is_chosen(dtype, one_thread):
    products.fastest.cache_clear()
    kernels, why = products.fastest(dtype)
    assert native.can(kernels, dtype)
    if native.can("vectors", dtype):
        found = products.rates(dtype)
        assert set(found) == {path for path in ("tiles", "vectors", "compiled") if native.can(path, dtype)} and min(found.values()) > 0
        assert all(path in why for path in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("ours", "theirs", "chosen"), [(120e9, 138e9, "vectors"), (100e9, 140e9, "compiled")])
def test_products_of_others_must_be_much_faster(monkeypatch, dtype, ours, theirs, chosen):
    """On a Zen 4 ours measured 120 GFLOP/s and PyTorch's 138, and steps with these took 1.28 times as long."""
    monkeypatch.setattr(products.native, "can", lambda path, dtype: True)
    monkeypatch.setattr(products, "rates", lambda dtype, shapes: {"vectors": ours, "compiled": theirs})
    products.fastest.cache_clear()
    try:
        assert products.fastest(dtype)[0] == chosen
    finally:
        products.fastest.cache_clear()


def test_the_products_that_are_timed_are_those_of_the_model():
    dense = ModelConfig(hidden_size=576, intermediate_size=1536, num_layers=4, num_dense_layers=4)
    assert {(outputs, inputs) for _, outputs, inputs in products.shapes_of(dense)} == {(576, 576), (1536, 576)}
    widths = {"intermediate_size": 30001, "moe_intermediate_size": 64, "n_routed_experts": 64, "num_experts_per_tok": 2}
    mixture = ModelConfig(hidden_size=8192, num_layers=4, num_dense_layers=1, **widths)
    shapes = products.shapes_of(mixture)
    assert all(rows >= 1 and max(outputs, inputs) <= products.WIDEST and outputs % 2 == 0 for rows, outputs, inputs in shapes)
    assert all(6 * rows * outputs * inputs <= products.MEASURED_FLOPS for rows, outputs, inputs in shapes)
    assert (64, 64, products.WIDEST) in shapes


@pytest.mark.skipif(not native.can("tiles"), reason="no matrix unit here")
def test_tiles_of_more_columns_than_are_near(one_thread):
    """In two parts, the second smaller, also where sums are added to and where a base is."""
    torch.manual_seed(0)
    a, b = torch.randn(70, 4100).bfloat16(), torch.randn(270, 4100)
    wide = a.float() @ b.bfloat16().float().T
    with native.path("tiles"):
        assert close(products.nt(a, b), wide)
        assert close(products.nt(a, b, base=torch.ones(70, 270).bfloat16()), wide + 1)
        assert close(products.nn(a, b.T.contiguous()), wide)
        assert close(products.tn(a.T.contiguous(), b.T.contiguous().bfloat16()), wide)
