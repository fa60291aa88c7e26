"""Matrix products with master weights as they are: float32 (or bfloat16) in, rounded to the activations' type on the way, sums in float32.

The compiled ones (products.c) serve bfloat16 on one thread of a processor with AVX512_BF16 and no matrix unit; measured against oneDNN on
such a one they are level for large shapes and up to a third faster for an expert's (LAB.md, 2026-11-21). Everywhere else it is torch.mm.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from sparing.kernels import native
from sparing.kernels.pool import new

TO_BF16, TO_F32 = 0, 1


@cache
def _compiled() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        flags = ""
    library = native.passes()
    if library is None or not hasattr(library, "grouped_nt"):
        return False
    import os
    return "amx_bf16" not in flags or (os.environ.get("TRY_TILES") == "1" and library.use_tiles(1) == 1)


def usable(x: Tensor) -> bool:
    """Whether products with rows of `x` should be the compiled ones, which take the numbers of a row in pairs."""
    return x.dtype == torch.bfloat16 and x.shape[-1] % 2 == 0 and x.stride(0) % 2 == 0 and native.usable(x) and _compiled()


def even(*widths: int | None) -> bool:
    """The compiled products take the numbers of a row in pairs: a sub-layer with an odd width is left to the plain path."""
    return all(not (width or 0) % 2 for width in widths)


def available() -> bool:
    """Whether the compiled products are there and chosen: for callers that bring tensors of other kinds."""
    return native.compiled() and _compiled()


def kind_of(dtype: torch.dtype) -> int:
    return TO_BF16 if dtype == torch.bfloat16 else TO_F32


def _out(a: Tensor, columns: int, out: Tensor | None) -> Tensor:
    return new(a, len(a), columns) if out is None else out


def _product(name: str, a: Tensor, b: Tensor, out: Tensor, base: Tensor | None, inner: int) -> Tensor:
    base_stride = 0 if base is None else base.stride(0)
    wide = int(b.dtype == torch.float32)
    sizes = (TO_BF16, base, base_stride, len(a), out.shape[1], inner)
    native.call(name, None, a, a.stride(0), b, wide, b.stride(0), out, out.stride(0), *sizes)
    return out


def spans(ends: Tensor) -> list[tuple[int, slice]]:
    """(group, its rows) of groups that have any."""
    stops = ends.tolist()
    return [(e, slice(start, stop)) for e, (start, stop) in enumerate(zip([0, *stops], stops)) if stop > start]


class Plain:
    """The same functions by torch.mm; weights' gradients in the operands' type."""

    @staticmethod
    def nt(a: Tensor, b: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        y = torch.mm(a, b.to(a.dtype).t()) if base is None else torch.addmm(base, a, b.to(a.dtype).t())
        return y if out is None else out.copy_(y)

    @staticmethod
    def nn(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        return torch.mm(a, b.to(a.dtype)) if base is None else torch.addmm(base, a, b.to(a.dtype))

    @staticmethod
    def tn(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return torch.mm(a.t(), b)

    @staticmethod
    def grouped_nt(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        out = a.new_empty(len(a), b.shape[1])
        for e, rows in spans(ends):
            torch.mm(a[rows], b[e].to(a.dtype).t(), out=out[rows])
        return out

    @staticmethod
    def grouped_nn(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        out = a.new_empty(len(a), b.shape[2])
        for e, rows in spans(ends):
            torch.mm(a[rows], b[e].to(a.dtype), out=out[rows])
        return out

    @staticmethod
    def grouped_tn(a: Tensor, b: Tensor, ends: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        out = a.new_zeros(len(ends), a.shape[1], b.shape[1])
        for e, rows in spans(ends):
            torch.mm(a[rows].t(), b[rows], out=out[e])
        return out


def nt(a: Tensor, b: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """a (M, K) b (N, K)ᵀ (+ base (M, N)) in a's type; rows of a, base and out may be strided."""
    if usable(a):
        return _product("nt", a, b, _out(a, len(b), out), base, b.shape[1])
    return Plain.nt(a, b, out, base)


def nn(a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """a (M, K) b (K, N) (+ base (M, N)) in a's type."""
    if usable(a):
        return _product("nn", a, b, _out(a, b.shape[1], None), base, len(b))
    return Plain.nn(a, b, base)


def tn(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """a (K, M)ᵀ b (K, N): a weight's gradient, in the weight's type (in b's by torch.mm)."""
    if not usable(a):
        return Plain.tn(a, b)
    out = new(a, a.shape[1], b.shape[1], dtype=dtype)
    native.call("tn", None, a, a.stride(0), b, b.stride(0), out, out.stride(0), kind_of(dtype), *out.shape, len(a))
    return out


def grouped_nt(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows of a (S, K) in groups that end at ends (E,) int64, each with its own b (E, N, K): (S, N)."""
    if not usable(a):
        return Plain.grouped_nt(a, b, ends)
    out = new(a, len(a), b.shape[1])
    native.call("grouped_nt", None, a, b, int(b.dtype == torch.float32), out, ends, *b.shape)
    return out


def grouped_nn(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The same with b (E, K, N)."""
    if not usable(a):
        return Plain.grouped_nn(a, b, ends)
    out = new(a, len(a), b.shape[2])
    native.call("grouped_nn", None, a, b, int(b.dtype == torch.float32), out, ends, len(b), b.shape[2], b.shape[1])
    return out


def grouped_tn(a: Tensor, b: Tensor, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """a (S, M), b (S, N) -> each group's aᵀ b, as `tn`: (E, M, N), zero for an empty group."""
    if not usable(a):
        return Plain.grouped_tn(a, b, ends)
    out = new(a, len(ends), a.shape[1], b.shape[1], dtype=dtype)
    native.call("grouped_tn", None, a, b, out, kind_of(dtype), ends, *out.shape)
    return out
