"""Computes a linear's three products in 8 bits, or in 16 where the policy says so. `kernels.products.Weight` calls these for its own.

A scale belongs to a row or column of a matrix, or to a piece of one: it can be taken out of a sum in which it does not change. So
for y = x Wᵀ rows of x (tokens) and rows of W (channels) have scales; for the input's gradient g W rows of g and columns of W; for the
weight's gradient gᵀ x, whose inner dimension is the tokens, columns of both. DeepSeek-V3 (arXiv 2412.19437 §3.3) cuts the inner dimension
into 128s and gives weights square blocks, so that one quantised copy serves both directions.

int8: `kernels.int8` where the processor has it; otherwise exact float32 products of the integers on a CPU, and torch's own integer product
on a GPU. fp8: torch's block-wise scaled product where the GPU has one; elsewhere numbers are rounded to e4m3 and multiplied in 16 bits,
which hold e4m3 times a power of two exactly, with sums in float32: the same arithmetic, slower than 16 bits. fp8_row: e4m3 with one scale a
row, torch's row-wise scaled product on a GPU and float32 products on a CPU; its finer blocks are fp8's.

Embedding, head, router, norms, softmax and the MTP modules' joining projection are never in 8 bits (§3.3.1; the published FP8 checkpoints
leave out the same).
"""

from __future__ import annotations

import copy
import functools
import time
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Module

from sparing.kernels import formats, int8
from sparing.kernels import products as sixteen
from sparing.precision.compensation import rows_of, slices
from sparing.precision.formats import E4M3, E5M6, INT8, Format
from sparing.precision.quantise import TILE, Block, Quantised, dequantise, quantise

Kind = Literal["int8", "fp8", "fp8_row"]
EXACT = 1024
"""Products of two int8 numbers that float32 adds without rounding, in whatever order: 1024 * 128 * 128 = 2^24."""


class Blocks(NamedTuple):
    """Numbers of the inner dimension that share a scale; None: all."""

    inner: int | None
    square: bool
    """A weight's blocks are as wide outside as inside; every other matrix's are one row."""


SCHEMES: dict[Kind, tuple[Blocks, Blocks]] = {
    "int8": (Blocks(None, False), Blocks(TILE, False)),
    "fp8": (Blocks(TILE, True), Blocks(32, True)),
    "fp8_row": (Blocks(None, False), Blocks(TILE, True)),
}
"""A kind's blocks, and its finer ones."""
DIRECTIONS = ("forward", "dgrad", "wgrad")
Direction = Literal["forward", "dgrad", "wgrad"]
COARSE, FINE, SIXTEEN = range(3)
LEVELS = ("8 bit", "8 bit, finer blocks", "16 bit")


# The products


def count(q: Quantised, faults: Tensor) -> None:
    """Add the blocks of `q` that hold an infinity or NaN, and those too small to scale, to `faults`, int64 (2,)."""
    faults += torch.stack((q.scale.isnan().sum(), (q.scale == 0).sum()))


def rounded(x: Tensor, format: Format, block: Block, faults: Tensor) -> Tensor:
    """x (M, N) through a floating-point format with scales of powers of two and back, in bfloat16, where that is exact."""
    if int8.rounds(x):
        whole = tuple(b or n for b, n in zip(block, x.shape, strict=True))
        return int8.float_round(x, whole, format.mantissa, format.smallest * 2**format.mantissa, format.most, faults)
    q = quantise(x, format, block, powers=True)
    count(q, faults)
    return dequantise(q).to(torch.bfloat16)


def e4m3(x: Tensor, blocks: Blocks, faults: Tensor, *, inner_first: bool, weight: bool = False) -> Tensor:
    """x as an FP8 product sees it, in bfloat16. inner_first: the rows of x are the product's inner dimension."""
    outer = blocks.inner if weight and blocks.square else 1
    return rounded(x, E4M3, (blocks.inner, outer) if inner_first else (outer, blocks.inner), faults)


def _emulation_dtype(x: Tensor) -> torch.dtype:
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


def int8_product(a: Tensor, b: Tensor, block: int | None, faults: Tensor) -> Tensor:
    """The plain form of `kernels.int8`: a (M, K) b (N, K)ᵀ -> (M, N) float32."""
    length = min(block or int8.LONGEST, int8.LONGEST, max(1, a.shape[1]))  # a longer block would be filled up with zeros
    left, right = quantise(a, INT8, (1, length)), quantise(b, INT8, (1, length))
    count(left, faults)
    count(right, faults)
    out = a.new_zeros(len(a), len(b), dtype=torch.float32)
    for i in range(left.scale.shape[1]):
        part = slice(i * length, (i + 1) * length)
        out += _integers(left.values[:, part], right.values[:, part]).float() * (left.scale[:, i, None] * right.scale[:, i])
    return out


@functools.cache
def _has_block_products() -> bool:
    """Whether torch's scaled product takes DeepSeek-V3's blocks on this machine's GPU: compute capability 9.0, CUDA 12.9 or later."""
    cuda = tuple(int(part) for part in (torch.version.cuda or "0").split(".")[:2])
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0) and cuda >= (12, 9)


def _takes_blocks(blocks: Blocks, a: Tensor, b: Tensor) -> bool:
    """Whether `scaled_product` can make a (.., K) b (N, K)ᵀ in these blocks."""
    return blocks.inner == TILE and a.is_cuda and _has_block_products() and a.shape[1] % TILE == 0 == len(b) % TILE


def scaled_product(a: Tensor, b: Tensor, blocks: Blocks, faults: Tensor, weight: bool = False, dtype=torch.bfloat16) -> Tensor:
    """a (M, K) b (N, K)ᵀ in e4m3, (M, N): `torch.nn.functional.scaled_mm` in `dtype` on a GPU, a float32 product of the same numbers on a
    CPU. blocks: a scale a row, or 1x128 (a weight b: 128x128), which needs `_takes_blocks`."""
    by_row, outer = blocks.inner is None, blocks.inner if weight and blocks.square else 1
    left = quantise(a, E4M3, (1, blocks.inner), powers=not by_row)
    right = quantise(b, E4M3, (outer, blocks.inner), powers=not by_row)
    count(left, faults)
    count(right, faults)
    if not a.is_cuda:
        return dequantise(left) @ dequantise(right).t()
    return scaled_mm(left, right, dtype)[: len(a), : len(b)]


def scaled_mm(left: Quantised, right: Quantised, dtype: torch.dtype) -> Tensor:
    """torch's scaled product of e4m3 (M, K) and (N, K), both filled up to multiples of 16, with the scales laid out as it wants them."""
    x, y = (F.pad(q.values, (0, -q.values.shape[1] % 16, 0, -len(q.values) % 16)) for q in (left, right))
    s, t = (F.pad(q.scale, (0, 0, 0, -len(q.values) % 16)) if q.block[0] == 1 else q.scale for q in (left, right))
    by_tile, by_block = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
    if left.block[1] is None:
        return F.scaled_mm(x, y.t(), s, F.ScalingType.RowWise, t.t(), F.ScalingType.RowWise, output_dtype=dtype)
    s = s.t().contiguous().t()  # scales of one tile of all rows lie together
    if right.block[0] == 1:
        return F.scaled_mm(x, y.t(), s, by_tile, t.t().contiguous().t(), by_tile, output_dtype=dtype)
    t = F.pad(t, (0, -t.shape[1] % 4)).t()  # and a block's columns in fours
    return F.scaled_mm(x, y.t(), s, by_tile, t, by_block, output_dtype=dtype)


def _by_weight(kind: Kind, blocks: Blocks, faults: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
    """a (M, K) by a weight b (N, K)ᵀ; None where rounded numbers are multiplied in 16 bits instead."""
    if kind == "int8":
        return int8_product(a, b, blocks.inner, faults)
    if blocks.inner is None or _takes_blocks(blocks, a, b):
        return scaled_product(a, b, blocks, faults, weight=True)
    return None


def nt(kind: Kind, blocks: Blocks, faults: Tensor, a: Tensor, b: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
    """`kernels.products.nt` in 8 bits: a activations, b a weight."""
    if kind == "int8" and int8.usable(a):
        return int8.nt(a, b, blocks.inner, faults, out, base)
    if (y := _by_weight(kind, blocks, faults, a, b)) is not None:
        return _finish(y, a.dtype, out, base)
    left = e4m3(a, blocks, faults, inner_first=False).to(_emulation_dtype(a))
    right = e4m3(b, blocks, faults, inner_first=False, weight=True)
    if left.dtype == a.dtype:
        return sixteen.nt(left, right, out, base)
    return _finish(sixteen.nt(left, right), a.dtype, out, base)


def nn(kind: Kind, blocks: Blocks, faults: Tensor, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
    """`kernels.products.nn` in 8 bits: a a gradient, b a weight."""
    if kind == "int8" and int8.usable(a):
        return int8.nn(a, b, blocks.inner, faults, base)
    if (y := _by_weight(kind, blocks, faults, a, b.t())) is not None:
        return _finish(y, a.dtype, None, base)
    left = e4m3(a, blocks, faults, inner_first=False).to(_emulation_dtype(a))
    right = e4m3(b, blocks, faults, inner_first=True, weight=True)
    if left.dtype == a.dtype:
        return sixteen.nn(left, right, base)
    return _finish(sixteen.nn(left, right), a.dtype, None, base)


def tn(
    kind: Kind, blocks: Blocks, faults: Tensor, a: Tensor, b: Tensor, kept_e5m6: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`kernels.products.tn` in 8 bits: a a gradient, b activations. The plain forms' result is float32. kept_e5m6: b was kept for the
    backward pass in E5M6, in tiles along its rows."""
    if kind == "int8":
        if int8.usable(a):
            return int8.tn(a, b, blocks.inner, faults, dtype)
        return int8_product(a.t(), b.t(), blocks.inner, faults)
    if blocks.inner is None:
        return scaled_product(a.t(), b.t(), blocks, faults).float()
    dtypes = _emulation_dtype(a), _emulation_dtype(b)
    b = rounded(b, E5M6, (1, TILE), faults) if kept_e5m6 else b
    fill = (0, 0, 0, -len(a) % TILE)  # tokens, up to whole tiles
    if a.is_cuda and _takes_blocks(blocks, left := F.pad(a, fill).t(), right := F.pad(b, fill).t()):
        return scaled_product(left, right, blocks, faults, dtype=torch.float32)
    left, right = (e4m3(x, blocks, faults, inner_first=True).to(own) for x, own in zip((a, b), dtypes, strict=True))
    return sixteen.tn(left, right, dtype)


def _finish(y: Tensor, dtype: torch.dtype, out: Tensor | None, base: Tensor | None) -> Tensor:
    y = (y if base is None else y + base).to(dtype)
    return y if out is None else out.copy_(y)


PRODUCTS = {"nt": nt, "nn": nn, "tn": tn}


# A weight's products, as the policy has them


class EightBit:
    """`kernels.products`' functions for one weight, or for one layer's experts.

    levels: one of LEVELS a direction, changed between steps only. A copy (another thread's replica) shares them, has counters of its own,
    and does not measure.
    """

    def __init__(self, name: str, kind: Kind, size: float = 1.0, device: torch.device | str = "cpu"):
        """size: multiplications a token, for shares. device: where faults are counted."""
        self.name, self.kind, self.size = name, kind, size
        self.after_attention = name.endswith("o_proj")
        self.levels: dict[str, int] = dict.fromkeys(DIRECTIONS, COARSE)
        self.faults = {direction: torch.zeros(2, dtype=torch.int64, device=device) for direction in DIRECTIONS}
        self.copies = [self]
        self.errors: dict[tuple[str, int], list[float]] | None = None
        """While measuring: (direction, level) -> squared error and squared norm of the 16-bit product, summed."""

    def __deepcopy__(self, memo) -> EightBit:
        twin = copy.copy(self)
        twin.faults = {direction: torch.zeros_like(counts) for direction, counts in self.faults.items()}
        twin.errors = None
        self.copies.append(twin)
        return twin

    def take_faults(self, direction: str) -> tuple[int, int]:
        """(blocks with infinity or NaN, blocks all lost) since the last call, of all copies."""
        total = torch.stack([twin.faults[direction] for twin in self.copies]).sum(0)
        for twin in self.copies:
            twin.faults[direction].zero_()
        return tuple(total.tolist())

    def _run(self, direction: Direction, name: str, *arguments, **options):
        level = self.levels[direction]
        if self.errors is not None:
            self._measure(direction, name, level, arguments, options.get("dtype"))
        if level == SIXTEEN:
            return getattr(sixteen, name)(*arguments, **options)
        return self._eight(name, level, self.faults[direction], arguments, options)

    def _eight(self, name: str, level: int, faults: Tensor, arguments: tuple, options: dict) -> Tensor:
        blocks, own = SCHEMES[self.kind][level], {}
        if name.endswith("tn") and self.kind == "fp8":
            own = {"kept_e5m6": self.after_attention}
        one = PRODUCTS[name.removeprefix("grouped_")]
        if not name.startswith("grouped"):
            return one(self.kind, blocks, faults, *arguments, **options, **own)
        a, b, ends = arguments
        if self.kind == "int8" and int8.usable(a):
            return getattr(int8, name)(a, b, ends, blocks.inner, faults, **options)
        if name == "grouped_tn":
            out = a.new_zeros(len(ends), a.shape[1], b.shape[1], dtype=options.get("dtype", torch.float32))
            for e, rows in sixteen.spans(ends):
                out[e] = one(self.kind, blocks, faults, a[rows], b[rows])
            return out
        out = a.new_empty(len(a), b.shape[1 if name == "grouped_nt" else 2])
        for e, rows in sixteen.spans(ends):
            out[rows] = one(self.kind, blocks, faults, a[rows], b[e])
        return out

    def _measure(self, direction: Direction, name: str, level: int, arguments: tuple, dtype: torch.dtype | None) -> None:
        """The error of the level in use and of the one below, against 16 bits. Faults of a trial count for nobody. dtype: of a gradient."""
        options = {"dtype": dtype} if dtype else {}
        exact = rows_of(getattr(sixteen, name)(*arguments, **options))
        for trial in {level, max(level - 1, COARSE)} - {SIXTEEN}:
            mine = rows_of(self._eight(name, trial, torch.zeros_like(self.faults[direction]), arguments, options))
            sums = self.errors.setdefault((direction, trial), [0.0, 0.0])
            # A few rows at a time: whole differences would be the peak of a run's memory.
            squares = [torch.stack((_square(mine[rows].float() - exact[rows]), _square(exact[rows]))) for rows in slices(*exact.shape)]
            for i, total in enumerate(torch.stack(squares).sum(0).tolist()):
                sums[i] += total

    def nt(self, a: Tensor, b: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        return self._run("forward", "nt", a, b, out=out, base=base)

    def nn(self, a: Tensor, b: Tensor, base: Tensor | None = None) -> Tensor:
        return self._run("dgrad", "nn", a, b, base=base)

    def tn(self, a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._run("wgrad", "tn", a, b, dtype=dtype)

    def grouped_nt(self, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return self._run("forward", "grouped_nt", a, b, ends)

    def grouped_nn(self, a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
        return self._run("dgrad", "grouped_nn", a, b, ends)

    def grouped_tn(self, a: Tensor, b: Tensor, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return self._run("wgrad", "grouped_tn", a, b, ends, dtype=dtype)


def _square(x: Tensor) -> Tensor:
    return x.float().square().sum(dtype=torch.float64)


def install(model: Module, kind: Kind | None, device: torch.device | None = None) -> list[EightBit]:
    """Give the decoder's linears and experts their `EightBit` (None: take it away); -> them, in the model's order. Weights frozen in few
    bits have none, nor have low-rank factors. device: where the weights will be, None: where they are."""
    installed = []
    for name, module in model.named_modules():
        if not hasattr(module, "eight_bit") or name.endswith(("lm_head", "eh_proj")):
            continue
        parts = {
            f"{name}.{part}".removesuffix(".weight"): weight
            for part, weight in module.named_parameters(recurse=False)
            if part in module.weights
        }
        mine: list = [None]
        if kind and parts:
            mine = [EightBit(part, kind, module.active * w.numel(), device or w.device) for part, w in parts.items()]
        module.eight_bit = tuple(mine) if len(mine) > 1 else mine[0]
        installed += mine
    return [one for one in installed if one]


def fastest_kind(device: str) -> Kind | None:
    """The 8-bit format that this machine multiplies faster than 16 bits, if any. On a GPU: FP8, in blocks or with a scale a row as torch
    has it there, from compute capability 8.9 on, and int8 from 8.0 on. On a CPU: int8 with AVX512_VNNI."""
    if device == "cpu":
        return "int8" if int8.built() else None
    capability = torch.cuda.get_device_capability()
    by_row = "fp8_row" if capability >= (8, 9) else "int8" if capability >= (8, 0) else None
    return "fp8" if _has_block_products() else by_row


def speed_note(kind: Kind, device: str) -> str:
    """What to expect of 8-bit products here, in words."""
    if kind == fastest_kind(device):
        return f"{kind} products run on this machine's own 8-bit arithmetic"
    times = f", {slowness(kind):.1f} times slower than {formats.training_dtype()} (measured)" if device == "cpu" else ""
    return f"{kind} products run in their plain form here: the same numbers{times}"


def slowness(kind: Kind) -> float:
    """How many times longer than in training's own format a small product takes in `kind` on this processor: milliseconds of measuring."""
    a, b = torch.randn(2, 256, 256).to(getattr(torch, formats.training_dtype()))
    faults = torch.zeros(2, dtype=torch.int64)

    def least(product) -> float:
        took = []
        for _ in range(4):
            before = time.perf_counter()
            product()
            took.append(time.perf_counter() - before)
        return min(took)

    return least(lambda: nt(kind, SCHEMES[kind][0], faults, a, b)) / least(lambda: sixteen.nt(a, b))
