"""The Triton kernels through its interpreter, in a process of its own (the variable must be set before they are defined), and on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
CHECKS = ("tiles", "faults", "blocks", "swiglu", "grouped", "products")


def check_tiles(device):
    """Bit by bit the plain form's, in both layouts, edges included."""
    from sparing.kernels import float8
    from sparing.precision.formats import E4M3
    from sparing.precision.quantise import quantise

    generator = torch.Generator().manual_seed(0)
    for shape in [(1, 128), (33, 256), (5, 130)]:
        x = (torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp()).bfloat16()
        x[0, :3] = 0
        for view in (x, x.t()):
            values, scales = float8.tiles(view.to(device) if view is x else x.to(device).t())
            q = quantise(view, E4M3, (1, 128), powers=True)
            assert torch.equal(values.cpu().float(), q.values.float()) and torch.equal(scales.cpu().t(), q.scale), shape


def check_faults(device):
    from sparing.kernels import float8

    x = torch.ones(5, 128)
    x[1, 3], x[2, 0], x[3], x[4] = torch.inf, torch.nan, 1e-38, 0
    values, scales = float8.tiles(x.to(device))
    assert scales[0, 1:3].isnan().all() and scales[0, [0, 3, 4]].tolist() == [2.0**-8, 0.0, 1.0]
    assert not values[3:].float().any() and values.float().isfinite().all()
    found = torch.zeros(2, dtype=torch.int64, device=device)
    float8.count(found, scales)
    assert found.tolist() == [2, 1]


def check_blocks(device):
    from sparing.kernels import float8
    from sparing.precision.formats import E4M3
    from sparing.precision.quantise import quantise

    w = torch.randn(2, 256, 384, generator=torch.Generator().manual_seed(0))
    w[1] *= 1e-4
    for turned in (False, True):
        values, scales = float8.blocks(w.to(device), turned)
        for e in range(2):
            q = quantise(w[e].t() if turned else w[e], E4M3, (128, 128), powers=True)
            assert torch.equal(values[e].cpu().float(), q.values.float()) and torch.equal(scales[e].cpu(), q.scale)


def check_swiglu(device):
    from sparing.kernels import float8
    from sparing.kernels.experts import swiglu_reference
    from sparing.precision.formats import E4M3
    from sparing.precision.quantise import Quantised, dequantise, quantise

    generator = torch.Generator().manual_seed(0)
    h, gates = torch.randn(19, 256, generator=generator).bfloat16(), torch.rand(19, generator=generator)
    values, scales = float8.swiglu_tiles(h.to(device), gates.to(device))
    mine = dequantise(Quantised(values.cpu(), scales.cpu().t().contiguous(), (1, 128)))
    exact = swiglu_reference(h.float()) * gates[:, None]  # which the kernel does not round to 16 bits
    want = dequantise(quantise(exact, E4M3, (1, 128), powers=True))
    w, ends = torch.randn(2, 128, 128, generator=generator), torch.tensor([5, 19])
    y = float8.swiglu_grouped_nt(h.to(device), gates.to(device), w.to(device), ends, None)
    assert relative(y[5:], mine[5:] @ plain(w[1], (128, 128)).t()) < 6e-3
    assert (mine - want).abs().max() <= exact.abs().max() / 16 and float((mine != want).float().mean()) < 0.02  # exp's last bit


def relative(a, b) -> float:
    """6e-3 below is bfloat16: the interpreter cuts off where a GPU rounds."""
    return float((a.cpu().double() - b.double()).norm() / b.double().norm())


def check_grouped(device):
    """Groups of any size, none among them: the sums of exactly those numbers."""
    from sparing.kernels import float8

    generator = torch.Generator().manual_seed(0)
    ends = torch.tensor([3, 3, 70, 75])
    a, g = torch.randn(75, 256, generator=generator).bfloat16(), torch.randn(75, 128, generator=generator).bfloat16()
    w = torch.randn(4, 128, 256, generator=generator)
    y = float8.grouped_nt(a.to(device), w.to(device), ends, None)
    back = float8.grouped_nn(g.to(device), w.to(device), ends, None)
    grad = float8.grouped_tn(g.to(device), a.to(device), ends, None)
    for e, rows in [(0, slice(0, 3)), (2, slice(3, 70)), (3, slice(70, 75))]:
        a_, g_, w_, turned = plain(a[rows]), plain(g[rows]), plain(w[e], (128, 128)), plain(w[e].t(), (128, 128))
        assert relative(y[rows], a_ @ w_.t()) < 6e-3 and relative(back[rows], g_ @ turned.t()) < 6e-3
        assert relative(grad[e], plain(g[rows].t()) @ plain(a[rows].t()).t()) < 1e-5
    assert not grad[1].any()


def plain(x, block=(1, 128)):
    from sparing.precision.formats import E4M3
    from sparing.precision.quantise import dequantise, quantise

    return dequantise(quantise(x, E4M3, block, powers=True))


def check_products(device):
    from sparing.kernels import float8

    generator = torch.Generator().manual_seed(0)
    a, g = torch.randn(48, 256, generator=generator).bfloat16(), torch.randn(48, 128, generator=generator).bfloat16()
    w, base = torch.randn(128, 256, generator=generator), torch.randn(48, 128, generator=generator).bfloat16()
    y = float8.nt(a.to(device), w.to(device), None, base=base.to(device))
    assert relative(y, plain(a) @ plain(w, (128, 128)).t() + base.float()) < 6e-3
    assert relative(float8.nn(g.to(device), w.to(device), None), plain(g) @ plain(w, (128, 128))) < 6e-3
    assert relative(float8.tn(g.to(device), a.to(device), None), plain(g.t()) @ plain(a.t()).t()) < 1e-5


@pytest.mark.parametrize("name", CHECKS)
def test_through_the_interpreter(name):
    here = Path(__file__)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(here.parent), *filter(None, sys.path)])}
    code = f"import {here.stem}; {here.stem}.check_{name}('cpu')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_on_a_gpu(name):
    globals()[f"check_{name}"]("cuda")
