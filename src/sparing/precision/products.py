"""Matrix products in 8 bits: which numbers share a scale, and how the products are made.

A scale belongs to a row or column of an operand, or to a piece of one: it can be taken out of a sum in which it does not change. So
for y = x Wᵀ rows of x (tokens) and rows of W (channels) have scales; for the input's gradient g W rows of g and columns of W; for the
weight's gradient gᵀ x, whose inner dimension is the tokens, columns of both. DeepSeek-V3 cuts the inner dimension into 128s and gives
weights square blocks, so that one quantised copy serves both directions.

int8: `kernels.int8` where the processor has it; otherwise exact float32 products of the integers on a CPU, and torch's own integer product
on a GPU. fp8: on a GPU `kernels.float8`; elsewhere numbers are rounded to e4m3 and multiplied in 16 bits, which hold e4m3 times a power of
two exactly, with sums in float32: the arithmetic of FP8 hardware that promotes its partial sums, and slower than 16 bits, not faster.
fp8_row: e4m3 with int8's scales, for GPUs whose scaled product takes one a row and not one a block (Ada); its finer blocks are fp8's.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels import float8, formats, int8, products
from sparing.precision.formats import E4M3, E5M6, INT8, Format
from sparing.precision.quantise import TILE, Block, dequantise, quantise

Kind = Literal["int8", "fp8", "fp8_row"]
LONGEST = int8.LONGEST
EXACT = 1024
"""Products of two int8 numbers that float32 adds without rounding, in whatever order: 1024 * 128 * 128 = 2^24."""


class Blocks(NamedTuple):
    """Numbers of the inner dimension that share a scale; None: all."""

    inner: int | None
    square: bool
    """A weight's blocks are as wide outside as inside; every other operand's are one row."""


SCHEMES: dict[Kind, tuple[Blocks, Blocks]] = {
    "int8": (Blocks(None, False), Blocks(TILE, False)),
    "fp8": (Blocks(TILE, True), Blocks(32, True)),
    "fp8_row": (Blocks(None, False), Blocks(TILE, True)),
}
"""A kind's blocks, and its finer ones."""


class Operand(NamedTuple):
    x: Tensor
    inner_first: bool
    """Its rows are the inner dimension."""
    weight: bool

    def block(self, blocks: Blocks) -> Block:
        outer = blocks.inner if self.weight and blocks.square else 1
        return (blocks.inner, outer) if self.inner_first else (outer, blocks.inner)


def count(q, found: Tensor | None) -> None:
    """Add a quantised operand's faults to `found`, int64 (2,)."""
    if found is not None:
        found += torch.stack((q.scale.isnan().sum(), (q.scale == 0).sum()))


def rounded(x: Tensor, format: Format, block: Block, found: Tensor | None) -> Tensor:
    """x (M, N) through a floating-point format with scales of powers of two and back, in bfloat16, where that is exact."""
    if int8.rounds(x) and found is not None:
        whole = tuple(b or n for b, n in zip(block, x.shape, strict=True))
        return int8.float_round(x, whole, format.mantissa, format.smallest * 2**format.mantissa, format.most, found)
    q = quantise(x, format, block, powers=True)
    count(q, found)
    return dequantise(q).to(torch.bfloat16)


def fp8_operand(operand: Operand, blocks: Blocks, found: Tensor | None, kept_e5m6: bool = False) -> Tensor:
    """The operand as the product sees it. kept_e5m6: it was kept for the backward pass in E5M6, in tiles along its rows."""
    x = rounded(operand.x, E5M6, (1, TILE), found) if kept_e5m6 else operand.x
    return rounded(x, E4M3, operand.block(blocks), found)


def _emulated_dtype(x: Tensor) -> torch.dtype:
    """The type in which x, rounded to e4m3, is multiplied: its own, or float32, which holds such numbers too, where that is slow."""
    return x.dtype if x.is_cuda or formats.fast(str(x.dtype).removeprefix("torch.")) else torch.float32


def _integers(a: Tensor, b: Tensor) -> Tensor:
    """int8 (M, K), (N, K) -> int32 (M, N).

    On a CPU the products are float32, exact for EXACT numbers at a time. torch._int_mm is slow there without AVX512_VNNI. With torch 2.13
    it is wrong for an inner dimension of 1, and where ONEDNN_MAX_CPU_ISA forbids VNNI: sums of two products saturate in 16 bits. On CUDA
    it wants more than 16 rows and multiples of 8."""
    if a.device.type == "cpu":
        pieces = zip(a.float().split(EXACT, 1), b.float().split(EXACT, 1), strict=True)
        return functools.reduce(Tensor.add_, (torch.mm(x, y.t()).int() for x, y in pieces))
    M, N = len(a), len(b)
    a = F.pad(a, (0, -a.shape[1] % 8, 0, max(0, 24 - M)))
    b = F.pad(b, (0, -b.shape[1] % 8, 0, -N % 8))
    return torch._int_mm(a, b.t())[:M, :N]


def int8_product(a: Tensor, b: Tensor, block: int | None, found: Tensor | None = None) -> Tensor:
    """The plain form of `kernels.int8`: a (M, K) b (N, K)ᵀ -> (M, N) float32."""
    length = min(block or LONGEST, LONGEST, max(1, a.shape[1]))  # a longer block would be filled up with zeros
    left, right = quantise(a, INT8, (1, length)), quantise(b, INT8, (1, length))
    count(left, found)
    count(right, found)
    out = a.new_zeros(len(a), len(b), dtype=torch.float32)
    for i in range(left.scale.shape[1]):
        part = slice(i * length, (i + 1) * length)
        out += _integers(left.values[:, part], right.values[:, part]).float() * (left.scale[:, i, None] * right.scale[:, i])
    return out


def row_product(a: Tensor, b: Tensor, found: Tensor | None = None) -> Tensor:
    """a (M, K) b (N, K)ᵀ in e4m3 with a scale a row of either: (M, N) float32. torch's product, on a CPU too; it wants multiples of 16, and
    on CUDA gives bfloat16, the one type that its row-wise kernels have had throughout."""
    left, right = quantise(a, E4M3, (1, None)), quantise(b, E4M3, (1, None))
    count(left, found)
    count(right, found)
    M, N, columns = len(a), len(b), -a.shape[1] % 16
    x, y = F.pad(left.values, (0, columns, 0, -M % 16)), F.pad(right.values, (0, columns, 0, -N % 16))
    s, t = F.pad(left.scale, (0, 0, 0, -M % 16)), F.pad(right.scale, (0, 0, 0, -N % 16))
    dtype = torch.bfloat16 if a.is_cuda else torch.float32
    return torch._scaled_mm(x, y.t(), scale_a=s, scale_b=t.t(), out_dtype=dtype)[:M, :N].float()


def nt(kind: Kind, blocks: Blocks, found: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """`kernels.products.nt` in 8 bits: a activations, b a weight."""
    if kind == "fp8_row" and blocks.inner is None:
        return _finish(row_product(a, b, found), a.dtype, out, base)
    if kind != "int8":
        if blocks.inner == TILE and float8.usable(a, b):
            return float8.nt(a, b, found, out, base)
        left, right = (fp8_operand(o, blocks, found) for o in (Operand(a, False, False), Operand(b, False, True)))
        dtype = _emulated_dtype(a)
        if dtype == a.dtype:
            return products.nt(left.to(dtype), right, out, base)
        return _finish(products.nt(left.to(dtype), right), a.dtype, out, base)
    if int8.usable(a):
        return int8.nt(a, b, blocks.inner, found, out, base)
    return _finish(int8_product(a, b, blocks.inner, found), a.dtype, out, base)


def nn(kind: Kind, blocks: Blocks, found: Tensor, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """`kernels.products.nn` in 8 bits: a a gradient, b a weight."""
    if kind == "fp8_row" and blocks.inner is None:
        return _finish(row_product(a, b.t(), found), a.dtype, None, base)
    if kind != "int8":
        if blocks.inner == TILE and float8.usable(a, b):
            return float8.nn(a, b, found, base)
        left, right = (fp8_operand(o, blocks, found) for o in (Operand(a, False, False), Operand(b, True, True)))
        dtype = _emulated_dtype(a)
        if dtype == a.dtype:
            return products.nn(left.to(dtype), right, base)
        return _finish(products.nn(left.to(dtype), right), a.dtype, None, base)
    if int8.usable(a):
        return int8.nn(a, b, blocks.inner, found, base)
    return _finish(int8_product(a, b.t(), blocks.inner, found), a.dtype, None, base)


def tn(
    kind: Kind, blocks: Blocks, found: Tensor, a: Tensor, b: Tensor, kept_e5m6: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`kernels.products.tn` in 8 bits: a a gradient, b activations. The plain forms' result is float32."""
    if kind == "fp8_row" and blocks.inner is None:
        return row_product(a.t(), b.t(), found)
    if kind != "int8":
        if blocks.inner == TILE and float8.usable(a, b):
            return float8.tn(a, rounded(b, E5M6, (1, TILE), found) if kept_e5m6 else b, found)
        left = fp8_operand(Operand(a, True, False), blocks, found)
        right = fp8_operand(Operand(b, True, False), blocks, found, kept_e5m6)
        return products.tn(left.to(_emulated_dtype(a)), right.to(_emulated_dtype(b)), dtype)
    if int8.usable(a):
        return int8.tn(a, b, blocks.inner, found, dtype)
    return int8_product(a.t(), b.t(), blocks.inner, found)


def _finish(y: Tensor, dtype: torch.dtype, out: Tensor | None, base: Tensor | None) -> Tensor:
    y = (y if base is None else y + base).to(dtype)
    return y if out is None else out.copy_(y)
