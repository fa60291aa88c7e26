"""8-bit integer products for processors with AVX512_VNNI: inputs in bfloat16 are quantised, sums are int32, results as in `products`.

In threads whose kernels are "tiles" (`kernels.native`) the matrix unit makes them (AMX-INT8), where a measurement shows that it is faster.
Its sums are the same integers, so no bit depends on that.

What they compute is `precision.eight_bit`'s plain form; int8.c has the layout. Measured against the bfloat16 products: LAB.md, 2026-11-22.
Every function adds (blocks with an infinity or NaN, blocks too small to scale) to `faults`, int64 (2,).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from sparing.base.hardware import cpu_flags
from sparing.kernels import native
from sparing.kernels.native import new, new_like
from sparing.kernels.products import TO_BF16, _out, kind_of

LONGEST = 32768
"""Of an inner block: 255 * 127 * 32768 fits an int32 sum."""


@cache
def _compiled() -> bool:
    library = native.library("int8")
    if not hasattr(library, "int8_nt"):
        return False
    if "amx_int8" in cpu_flags():
        library.choose_tiles()
    return True


def usable(x: Tensor) -> bool:
    """Whether 8-bit products of `x` should be the compiled ones."""
    return x.dtype == torch.bfloat16 and rounds(x)


def rounds(x: Tensor) -> bool:
    """Whether `float_round` serves `x`."""
    return native.usable(x, "int8") and _compiled() and x.stride(-1) == 1


def built() -> bool:
    """Whether there are compiled 8-bit products for this processor."""
    return _compiled()


def _inner(block: int | None, inner: int) -> tuple[int, int]:
    """(the length of inner blocks: a multiple of 4, at most `LONGEST`; whether the products should be the matrix unit's: where it is slower
    the library does not heed that)."""
    return min(block or LONGEST, (inner + 3) // 4 * 4 or 4, LONGEST), int(native.chosen() == "tiles")


def _wide(b: Tensor) -> int:
    return int(b.dtype == torch.float32)


def nt(a: Tensor, b: Tensor, block: int | None, faults: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """a (M, K) b (N, K)ᵀ (+ base (M, N)), bfloat16; block: numbers of the inner dimension that share a scale, None: all."""
    return _product("int8_nt", a, b, _out(a, len(b), out), base, b.shape[1], block, faults)


def nn(a: Tensor, b: Tensor, block: int | None, faults: Tensor, base: Tensor | None = None) -> Tensor:
    """a (M, K) b (K, N) (+ base (M, N))."""
    return _product("int8_nn", a, b, _out(a, b.shape[1], None), base, len(b), block, faults)


def _product(name: str, a: Tensor, b: Tensor, out: Tensor, base: Tensor | None, inner: int, block: int | None, faults: Tensor) -> Tensor:
    base_stride = 0 if base is None else base.stride(0)
    sizes = (TO_BF16, base, base_stride, len(a), out.shape[1], inner, *_inner(block, inner), faults)
    native.call(name, None, a, a.stride(0), b, _wide(b), b.stride(0), out, out.stride(0), *sizes, of="int8")
    return out


def tn(a: Tensor, b: Tensor, block: int | None, faults: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """a (K, M)ᵀ b (K, N), in float32 or bfloat16."""
    out = new(a, a.shape[1], b.shape[1], dtype=dtype)
    sizes = (kind_of(dtype), *out.shape, len(a), *_inner(block, len(a)), faults)
    native.call("int8_tn", None, a, a.stride(0), b, b.stride(0), out, out.stride(0), *sizes, of="int8")
    return out


def grouped_nt(a: Tensor, b: Tensor, ends: Tensor, block: int | None, faults: Tensor) -> Tensor:
    """Rows of a (S, K) in groups that end at ends (E,) int64, each with its own b (E, N, K): (S, N)."""
    out = new(a, len(a), b.shape[1])
    native.call("int8_grouped_nt", None, a, b, _wide(b), out, ends, *b.shape, *_inner(block, b.shape[2]), faults, of="int8")
    return out


def grouped_nn(a: Tensor, b: Tensor, ends: Tensor, block: int | None, faults: Tensor) -> Tensor:
    """The same with b (E, K, N)."""
    out = new(a, len(a), b.shape[2])
    native.call(
        "int8_grouped_nn", None, a, b, _wide(b), out, ends, len(b), b.shape[2], b.shape[1], *_inner(block, b.shape[1]), faults, of="int8"
    )
    return out


def grouped_tn(a: Tensor, b: Tensor, ends: Tensor, block: int | None, faults: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """a (S, M), b (S, N) -> each group's aᵀ b: (E, M, N), zero for an empty group."""
    out = new(a, len(ends), a.shape[1], b.shape[1], dtype=dtype)
    native.call("int8_grouped_tn", None, a, b, out, kind_of(dtype), ends, *out.shape, *_inner(block, LONGEST), faults, of="int8")
    return out


def float_round(x: Tensor, block: tuple[int, int], mantissa: int, normal: float, most: float, faults: Tensor) -> Tensor:
    """x (M, N) through a small floating-point format and back, bfloat16 (`quantise` with powers, then `dequantise`)."""
    out = new_like(x, torch.bfloat16)
    sizes = (*x.shape, *(max(1, min(b, n)) for b, n in zip(block, x.shape, strict=True)), mantissa, normal, most, faults)
    native.call("float8_round", None, x, _wide(x), x.stride(0), out, *sizes, of="int8")
    return out
