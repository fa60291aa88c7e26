"""Matrix products, and weights that know theirs.

The products take master weights as they are: float32 (or bfloat16) in, rounded to the activations' type on the way, sums in float32. Our
own ones serve one thread: bfloat16 on a processor with AVX512_BF16, in vectors or in the tiles of a matrix unit (AMX) (products.c), and
float32 on any (floats.c). `fastest` measures whether they are faster than torch.mm, which does the rest.

An `Operand` holds one matrix W (out, in) or a layer's experts W (E, out, in). It has a linear's three products: `nt` multiplies rows by Wᵀ,
`nn` multiplies the output's gradient by W, and `tn` makes the gradients of what learns. `grouped_nt`, `grouped_nn` and `grouped_tn` do the
same for experts: each expert's rows are one group, and groups end at `ends` (E,) int64. An autograd.Function takes an operand and, for
autograd to see, the operand's `tensors`. It keeps the operand on its context and returns `tn`'s gradients in the order of `tensors`.
Weights are not among its saved tensors, because hooks on those (`precision.activations`) are meant for activations.
"""

from __future__ import annotations

import math
import time
from functools import cache
from math import prod
from threading import Lock
from types import SimpleNamespace
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.base.config import ModelConfig
from sparing.base.held import GROUP, PANEL
from sparing.base.int4_groups import from_int4
from sparing.base.layers import layers
from sparing.kernels import native
from sparing.kernels.native import new
from sparing.kernels.sizes import NEWTON_SCHULZ

TO_BF16, TO_F32, ADD_F32 = 0, 1, 2


def usable(x: Tensor) -> bool:
    """Whether products with rows of `x` should be the compiled ones, which take the numbers of a row in pairs."""
    return x.shape[-1] % 2 == 0 and x.stride(0) % 2 == 0 and native.usable(x) and native.own_products(x.dtype)


def even(*widths: int | None) -> bool:
    """The compiled products take the numbers of a row in pairs: a sub-layer with an odd width is left to the plain path."""
    return all(not (width or 0) % 2 for width in widths)


MEASURED = ((2048, 128, 128), (320, 128, 64), (1024, 512, 256))
"""(rows, outputs, inputs) of the products that `fastest` times: a small model's layer, one expert's share, a larger layer."""
WIDEST, MEASURED_FLOPS = 2048, 4e9
"""Of the products of a model that are timed: no side is longer, no three of them take more FLOPs."""
MUCH = 1.3
"""How much faster PyTorch's products must be: ours also save the time between products (whole sub-layers, attention and the head are one
function each way, weights are not copied). In float32, steps were 1.20 times as fast with products 0.94 times as fast; in bfloat16 1.28
times, where products measured 0.87 to 1.28 times as fast; both in 0.65 to 0.72 of the memory (LAB.md)."""


def shapes_of(c: ModelConfig) -> tuple[tuple[int, int, int], ...]:
    """As MEASURED, of a model: its widths, an expert's share of the rows, and fewer rows where the products are large."""

    def shape(share: float, outputs: int) -> tuple[int, int, int]:
        outputs, inputs = (max(2, min(size, WIDEST) // 2 * 2) for size in (outputs, c.hidden_size))
        return int(min(MEASURED[0][0] * share, max(1.0, MEASURED_FLOPS / (6 * outputs * inputs)))) or 1, outputs, inputs

    kinds = {layer.feed_forward for layer in layers(c)}
    feed_forwards = {shape(kind.chosen / kind.experts if kind.mixture else 1.0, kind.width) for kind in kinds}
    return shape(1.0, c.hidden_size), *sorted(feed_forwards)


def rates(dtype: torch.dtype = torch.bfloat16, shapes: tuple[tuple[int, int, int], ...] = MEASURED) -> dict[native.Path, float]:
    """FLOP/s of the three products of a linear, by kernels that can run here, in the geometric mean over shapes. About 0.2 s."""
    found: dict[native.Path, float] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for kernels in [path for path in ("tiles", "vectors", "compiled") if native.can(path, dtype)]:
            with native.path(kernels):
                found[kernels] = prod(_rate(*shape, dtype) for shape in shapes) ** (1 / len(shapes))
    finally:
        torch.set_num_threads(threads)
    return found


def _rate(rows: int, outputs: int, inputs: int, dtype: torch.dtype) -> float:
    x, grad, weight = torch.randn(rows, inputs).to(dtype), torch.randn(rows, outputs).to(dtype), torch.randn(outputs, inputs)
    best = math.inf
    for _ in range(4):  # the first one makes PyTorch's kernels
        before = time.perf_counter()
        nt(x, weight)
        nn(grad, weight)
        tn(grad, x)
        best = min(best, time.perf_counter() - before)
    return 6.0 * rows * outputs * inputs / best


@cache
def fastest(dtype: torch.dtype = torch.bfloat16, shapes: tuple[tuple[int, int, int], ...] = MEASURED) -> tuple[native.Path, str]:
    """The kernels for training in `dtype` with one thread an operation, and why; measured once in a process."""
    if not native.can("vectors", dtype):
        return "compiled", "each operation has one thread: what our compiled kernels are for"
    found = rates(dtype, shapes)
    ours = max((path for path in found if path != "compiled"), key=found.get)
    told = ", ".join(f"{path} {rate / 1e9:,.0f}" for path, rate in found.items())
    return ours if MUCH * found[ours] > found["compiled"] else "compiled", f"measured, GFLOP/s of products on one core: {told}"


def fitting(replicas: int, threads: int | None, device: str, dtype: str, model: ModelConfig | None = None) -> tuple[native.Path, str]:
    """The kernels for training with so many replicas, or threads in each operation, and why: the compiled passes have one thread each.
    model: whose products are measured; default: a small one's."""
    if device != "cpu" or not (replicas > 1 or threads == 1) or native.passes() is None:
        return "plain", "operations have several threads, or there is no C compiler"
    return fastest(getattr(torch, dtype), MEASURED if model is None else shapes_of(model))


def kind_of(dtype: torch.dtype) -> int:
    return TO_BF16 if dtype == torch.bfloat16 else TO_F32


def _out(a: Tensor, columns: int, out: Tensor | None) -> Tensor:
    return new(a, len(a), columns) if out is None else out


def call(name: str, like: Tensor, *arguments) -> None:
    """A function of products.inc, in the library for activations of the type of `like`."""
    native.call(name, None, *arguments, of=native.OWN[like.dtype])


HELD = {torch.bfloat16: 0, torch.float32: 1, torch.int8: 2, torch.uint8: 3}
"""What weights are held in, as held.inc has it, by the type of their numbers or codes; uint8 is int4's blocks."""


def _product(name: str, a: Tensor, b: Tensor | Frozen, out: Tensor, base: Tensor | None, inner: int) -> Tensor:
    base_stride = 0 if base is None else base.stride(0)
    sizes = (kind_of(a.dtype), base, base_stride, len(a), out.shape[1], inner)
    call(name, a, a, a.stride(0), *held(b), out, out.stride(0), *sizes)
    return out


def held(b: Tensor | Frozen) -> tuple[Tensor, int, int, Tensor | None]:
    """A matrix as products.inc takes it: numbers, what they are held in, from a row to the next, scales of the rows."""
    if isinstance(b, Frozen):
        stride = b.shape[1] if b.values.dtype == torch.uint8 else b.values.stride(0)
        return b.values, HELD[b.values.dtype], stride, b.scale
    return b, HELD[b.dtype], b.stride(0), None


def _grouped(name: str, a: Tensor, b: Tensor | Frozen, columns: int, inner: int, ends: Tensor) -> Tensor:
    """A product of groups with the experts' b (E, ., .)."""
    values, scale = (b.values, b.scale) if isinstance(b, Frozen) else (b, None)
    apart = values.stride(0) * values.element_size()
    out = new(a, len(a), columns)
    call(name, a, a, values, HELD[values.dtype], scale, apart, out, ends, len(values), columns, inner)
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


def _summed(a: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type in which a product of `a` makes a gradient that is wanted in `dtype`."""
    return dtype if a.dtype == torch.bfloat16 else torch.float32


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


def tn(a: Tensor, b: Tensor, dtype: torch.dtype = torch.float32, sums: Tensor | None = None) -> Tensor:
    """a (K, M)ᵀ b (K, N): a weight's gradient, in the weight's type (in b's by torch.mm). sums: that of earlier rows, added to."""
    if sums is not None and usable(a) and sums.dtype == torch.float32:
        call("tn", a, a, a.stride(0), b, b.stride(0), sums, sums.stride(0), ADD_F32, *sums.shape, len(a))
        return sums
    if sums is not None:
        return sums.add_(tn(a, b, dtype))
    if not usable(a):
        return Plain.tn(a, b)
    out = new(a, a.shape[1], b.shape[1], dtype=_summed(a, dtype))
    call("tn", a, a, a.stride(0), b, b.stride(0), out, out.stride(0), kind_of(out.dtype), *out.shape, len(a))
    return out.to(dtype)


def grouped_nt(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """Rows of a (S, K) in groups that end at ends (E,) int64, each with its own b (E, N, K): (S, N)."""
    if not usable(a):
        return Plain.grouped_nt(a, b, ends)
    return _grouped("grouped_nt", a, b, b.shape[1], b.shape[2], ends)


def grouped_nn(a: Tensor, b: Tensor, ends: Tensor) -> Tensor:
    """The same with b (E, K, N)."""
    if not usable(a):
        return Plain.grouped_nn(a, b, ends)
    return _grouped("grouped_nn", a, b, b.shape[2], b.shape[1], ends)


def grouped_tn(a: Tensor, b: Tensor, ends: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """a (S, M), b (S, N) -> each group's aᵀ b, as `tn`: (E, M, N), zero for an empty group."""
    if not usable(a):
        return Plain.grouped_tn(a, b, ends)
    out = new(a, len(ends), a.shape[1], b.shape[1], dtype=_summed(a, dtype))
    call("grouped_tn", a, a, b, out, kind_of(out.dtype), ends, *out.shape)
    return out.to(dtype)


FLOATS = SimpleNamespace(nt=nt, nn=nn, tn=tn, grouped_nt=grouped_nt, grouped_nn=grouped_nn, grouped_tn=grouped_tn)
"""The six functions above, as a `Weight` takes them."""


def orthogonalise(x_NRC: Tensor, steps: int) -> Tensor:
    """U V^T (approximately) of each matrix U S V^T in the batch, in the batch's own dtype; a zero matrix stays zero. The quintic
    Newton-Schulz iteration of Muon (kellerjordan.github.io/posts/muon, 2024)."""
    a, b, c = NEWTON_SCHULZ
    tall = x_NRC.shape[-2] > x_NRC.shape[-1]
    x = x_NRC.mT if tall else x_NRC  # the Gram matrix is that of the shorter side
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=1e-7).to(x.dtype)  # Frobenius >= spectral norm: the iteration needs singular values <= 1
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x


# Weights with their products

PIECE = 1 << 20
"""Numbers of a frozen weight that are floats at a time, where the product is not our own. Smaller pieces were slower:
their products are (LAB.md)."""
_making = Lock()
_made: WeakValueDictionary[tuple[int, torch.dtype], Tensor] = WeakValueDictionary()
"""Frozen weights as floats, for as long as somebody uses them."""


class Operand:
    """What every kind of weight has."""

    shape: torch.Size
    """(out, in) or (E, out, in)."""
    tensors: tuple[Tensor, ...] = ()
    """What may learn; where one does not require a gradient, `tn` has None in its place."""
    joins = False
    """Whether autograd's own product serves: several such weights of one input are joined into one product."""

    @property
    def trainable(self) -> bool:
        """Whether any of its tensors learns."""
        return any(tensor.requires_grad for tensor in self.tensors)

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), differentiable."""
        return _Product.apply(x, self, *self.tensors)

    def nt(self, x: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        """x (M, in) Wᵀ (+ base (M, out)) -> (M, out) in x's type; rows of x, out and base may be strided."""
        raise NotImplementedError

    def nn(self, grad: Tensor, base: Tensor | None = None) -> Tensor:
        """grad (M, out) W (+ base (M, in)) -> (M, in) in grad's type."""
        raise NotImplementedError

    def tn(self, grad: Tensor, x: Tensor, sums: tuple[Tensor | None, ...] | None = None) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors`, from grad (M, out) and x (M, in). sums: those of earlier rows, added to."""
        raise NotImplementedError

    def grouped_nt(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (S, in) by each group's expert -> (S, out)."""
        raise NotImplementedError

    def grouped_nn(self, grad: Tensor, ends: Tensor) -> Tensor:
        """grad (S, out) by each group's expert -> (S, in)."""
        raise NotImplementedError

    def grouped_tn(self, grad: Tensor, x: Tensor, ends: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors`, from grad (S, out) and x (S, in)."""
        raise NotImplementedError

    def cast(self, dtype: torch.dtype) -> Operand:
        """For `grouped_nt` and `grouped_nn`: the same with its numbers in `dtype`, where that is one copy instead of one a product."""
        return self

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as one tensor of `self.shape` in `dtype`, differentiable: for what cannot multiply by pieces, and for merging."""
        raise NotImplementedError


class Weight(Operand):
    """Float numbers, multiplied by `products`: `FLOATS`, `Plain`, or what has the same six functions, as a linear's `EightBit`."""

    def __init__(self, weight: Tensor, products=FLOATS):
        self.weight, self.products = weight, products
        self.shape, self.tensors = weight.shape, (weight,)

    @property
    def joins(self) -> bool:
        return self.products in (FLOATS, Plain) and (self.weight.requires_grad or not torch.is_grad_enabled())

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) if self.joins else super().__call__(x)

    def nt(self, x: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        return self.products.nt(x, self.weight, out=out, base=base)

    def nn(self, grad: Tensor, base: Tensor | None = None) -> Tensor:
        return self.products.nn(grad, self.weight, base=base)

    def tn(self, grad: Tensor, x: Tensor, sums: tuple[Tensor | None, ...] | None = None) -> tuple[Tensor | None]:
        if not self.weight.requires_grad:
            return (None,)
        if sums is None:
            return (self.products.tn(grad, x, dtype=self.weight.dtype),)
        if self.products is FLOATS:
            return (tn(grad, x, self.weight.dtype, sums[0]),)
        return (sums[0].add_(self.products.tn(grad, x, dtype=self.weight.dtype)),)

    def grouped_nt(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.products.grouped_nt(x, self.weight, ends)

    def grouped_nn(self, grad: Tensor, ends: Tensor) -> Tensor:
        return self.products.grouped_nn(grad, self.weight, ends)

    def grouped_tn(self, grad: Tensor, x: Tensor, ends: Tensor) -> tuple[Tensor | None]:
        return (self.products.grouped_tn(grad, x, ends, dtype=self.weight.dtype) if self.weight.requires_grad else None,)

    def cast(self, dtype: torch.dtype) -> Weight:
        return Weight(self.weight.to(dtype), self.products)

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.weight.to(dtype)


class Frozen(Operand):
    """Numbers that do not learn: floats, int8 codes with a float32 scale for each row (out), or blocks of int4
    (`base.int4_groups`).

    Our own products read them as they are. Others are given floats, at most PIECE numbers at a time, so that no float
    copy of a large weight exists. The results are those of the same numbers in a float32 `Weight`.
    """

    def __init__(self, values: Tensor, scale: Tensor | None = None, shape: torch.Size | None = None):
        """values: (out, in) or (E, out, in), or blocks of such a weight with its shape; scale: (out) or (E, out)."""
        self.values, self.scale, self.shape = values, scale, values.shape if shape is None else shape

    def _expert(self, e: int) -> Frozen:
        return Frozen(self.values[e], None if self.scale is None else self.scale[e], self.shape[1:])

    def _pieces(self, dimension: int, dtype: torch.dtype):
        """(slice, its numbers in dtype) of one matrix, cut along a dimension."""
        step = max(GROUP, PIECE // self.shape[1 - dimension] // GROUP * GROUP)  # whole blocks of int4
        for start in range(0, self.shape[dimension], step):
            part = slice(start, min(start + step, self.shape[dimension]))
            rows, columns = (part, slice(0, self.shape[1])) if dimension == 0 else (slice(0, self.shape[0]), part)
            yield part, self._floats(rows, columns, dtype)

    def _floats(self, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """Some of a matrix's rows and columns; of int4 whole blocks, but for the last rows."""
        count, wide = rows.stop - rows.start, columns.stop - columns.start
        out = self.values.new_empty(count, wide, dtype=dtype)
        if native.usable(out):
            values, kind, stride, scale = held(self)
            native.call("unpack", dtype, values, kind, stride, scale, out, rows.start, count, columns.start, wide)
            return out
        if self.values.dtype == torch.uint8:
            panels, groups = (rows.start // PANEL, -(-rows.stop // PANEL)), (columns.start // GROUP, columns.stop // GROUP)
            return out.copy_(from_int4(self.values[slice(*panels), slice(*groups)], count))
        floats = self.values[rows, columns].float()
        return out.copy_(floats if self.scale is None else floats * self.scale[rows, None])

    def nt(self, x: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        if self.values.dtype == x.dtype:
            return nt(x, self.values, out=out, base=base)
        out = new(x, len(x), self.shape[0]) if out is None else out
        if usable(x):
            return _product("nt", x, self, out, base, self.shape[1])
        for part, weight in self._pieces(0, x.dtype):
            nt(x, weight, out=out[:, part], base=None if base is None else base[:, part])
        return out

    def nn(self, grad: Tensor, base: Tensor | None = None) -> Tensor:
        if self.values.dtype == grad.dtype:
            return nn(grad, self.values, base=base)
        out = new(grad, len(grad), self.shape[1])
        if usable(grad):
            return _product("nn", grad, self, out, base, self.shape[0])
        for part, weight in self._pieces(1, grad.dtype):  # along the sum, partial sums would be rounded
            out[:, part] = nn(grad, weight, base=None if base is None else base[:, part])
        return out

    def tn(self, grad: Tensor, x: Tensor, sums: tuple[Tensor | None, ...] | None = None) -> tuple[()]:
        return ()

    def grouped_nt(self, x: Tensor, ends: Tensor) -> Tensor:
        if self.values.dtype == x.dtype:
            return grouped_nt(x, self.values, ends)
        if usable(x):
            return _grouped("grouped_nt", x, self, *self.shape[1:], ends)
        out = new(x, len(x), self.shape[1])
        for e, rows in spans(ends):
            self._expert(e).nt(x[rows], out=out[rows])
        return out

    def grouped_nn(self, grad: Tensor, ends: Tensor) -> Tensor:
        if self.values.dtype == grad.dtype:
            return grouped_nn(grad, self.values, ends)
        if usable(grad):
            return _grouped("grouped_nn", grad, self, self.shape[2], self.shape[1], ends)
        out = new(grad, len(grad), self.shape[2])
        for e, rows in spans(ends):
            out[rows] = self._expert(e).nn(grad[rows])
        return out

    def grouped_tn(self, grad: Tensor, x: Tensor, ends: Tensor) -> tuple[()]:
        return ()

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        out = self.values.new_empty(self.shape, dtype=dtype)
        matrices = [self] if len(self.shape) == 2 else [self._expert(e) for e in range(self.shape[0])]
        for matrix, to in zip(matrices, out.view(-1, *self.shape[-2:]), strict=True):
            for part, weight in matrix._pieces(0, dtype):
                to[part] = weight
        return out

    def shared(self, dtype: torch.dtype) -> Tensor:
        """`whole`, made once for all who need it at the same time, as replicas do."""
        with _making:
            place = self.values.data_ptr(), dtype
            if (made := _made.get(place)) is None:
                made = _made[place] = self.whole(dtype)
            return made


class Chosen(Operand):
    """A layer's experts (E, out, in), of which some learn and the others do not.

    The gradient of each that learns is that of its own rows alone, so nothing is computed, and no memory taken, for the others.
    """

    def __init__(self, stack: Weight, learning: dict[int, Tensor]):
        """learning: (1, out, in) of each expert that learns, by its number: a view into `stack`."""
        self.stack, self.experts = stack, tuple(learning)
        self.shape, self.tensors = stack.shape, tuple(learning.values())

    def grouped_nt(self, x: Tensor, ends: Tensor) -> Tensor:
        return self.stack.grouped_nt(x, ends)

    def grouped_nn(self, grad: Tensor, ends: Tensor) -> Tensor:
        return self.stack.grouped_nn(grad, ends)

    def grouped_tn(self, grad: Tensor, x: Tensor, ends: Tensor) -> tuple[Tensor | None, ...]:
        limits, grads = [0, *ends.tolist()], []
        for e in self.experts:
            rows = slice(limits[e], limits[e + 1])
            count = torch.tensor([rows.stop - rows.start])
            grads.append(self.stack.products.grouped_tn(grad[rows], x[rows], count, dtype=self.stack.weight.dtype))
        return tuple(grads)

    def cast(self, dtype: torch.dtype) -> Weight:
        return self.stack.cast(dtype)


class LowRank(Operand):
    """base + scale · up · down, of which the two factors learn and `base` does not (LoRA, arXiv 2106.09685)."""

    def __init__(self, base: Operand, down: Tensor, up: Tensor, scale: float):
        """down: (rank, in) or (E, rank, in); up: (out, rank) or (E, out, rank)."""
        self.base, self.down, self.up, self.scale = base, Weight(down), Weight(up), scale
        self.shape, self.tensors = base.shape, (down, up)

    def nt(self, x: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        update = self.up.nt(self.down.nt(x).mul_(self.scale), base=base)
        return self.base.nt(x, out=out, base=update)

    def nn(self, grad: Tensor, base: Tensor | None = None) -> Tensor:
        return self.base.nn(grad, base=self.down.nn(self.up.nn(grad).mul_(self.scale), base=base))

    def tn(self, grad: Tensor, x: Tensor, sums: tuple[Tensor | None, ...] | None = None) -> tuple[Tensor | None, ...]:
        # Both rank-wide intermediates are made again: kept, they would be two more tensors of every linear.
        narrow_grad, narrow = self.up.nn(grad).mul_(self.scale), self.down.nt(x).mul_(self.scale)
        return (*self.down.tn(narrow_grad, x, sums and sums[:1]), *self.up.tn(grad, narrow, sums and sums[1:]))

    def grouped_nt(self, x: Tensor, ends: Tensor) -> Tensor:
        update = self.up.grouped_nt(self.down.grouped_nt(x, ends).mul_(self.scale), ends)
        return self.base.grouped_nt(x, ends).add_(update)

    def grouped_nn(self, grad: Tensor, ends: Tensor) -> Tensor:
        update = self.down.grouped_nn(self.up.grouped_nn(grad, ends).mul_(self.scale), ends)
        return self.base.grouped_nn(grad, ends).add_(update)

    def grouped_tn(self, grad: Tensor, x: Tensor, ends: Tensor) -> tuple[Tensor | None, ...]:
        narrow_grad, narrow = self.up.grouped_nn(grad, ends).mul_(self.scale), self.down.grouped_nt(x, ends).mul_(self.scale)
        return (*self.down.grouped_tn(narrow_grad, x, ends), *self.up.grouped_tn(grad, narrow, ends))

    def cast(self, dtype: torch.dtype) -> LowRank:
        return LowRank(self.base.cast(dtype), self.down.weight.to(dtype), self.up.weight.to(dtype), self.scale)

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.base.whole() + self.scale * (self.up.whole() @ self.down.whole())).to(dtype)


class _Product(torch.autograd.Function):
    """One linear by an operand's own products."""

    @staticmethod
    def forward(ctx, x: Tensor, operand: Operand, *tensors: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows if operand.trainable else None)
        ctx.operand, ctx.shape = operand, x.shape
        return operand.nt(rows).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (rows,), operand = ctx.saved_tensors, ctx.operand
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = operand.nn(grad).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, *(operand.tn(grad, rows) if operand.trainable else [None] * len(operand.tensors))


def in_one(x: Tensor, *operands: Operand | None) -> bool:
    """Whether one C function each way (floats.c) does all of a sub-layer, some rows at a time: of float32 alone. None has no say."""
    plain = all(o is None or (isinstance(o, Weight) and o.products is FLOATS and o.weight.is_contiguous()) for o in operands)
    return plain and x.dtype == torch.float32 and usable(x)


def tensors_of(*operands: Operand | None) -> list[Tensor]:
    """All tensors of several operands, for `apply`; None has none."""
    return [tensor for operand in operands if operand is not None for tensor in operand.tensors]
