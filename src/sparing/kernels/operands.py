"""Weights that know how to multiply: linears, experts and the compiled sub-layers are handed these.

An operand holds one matrix W (out, in) or a layer's experts W (E, out, in). It has a linear's three products: `nt` multiplies rows by Wᵀ,
`nn` multiplies the output's gradient by W, and `tn` makes the gradients of what learns. `grouped_nt`, `grouped_nn` and `grouped_tn` do the
same for experts: each expert's rows are one group, and groups end at `ends` (E,) int64.

An autograd.Function takes an operand and, for autograd to see, the operand's `tensors`. It keeps the operand on its context and returns
`tn`'s gradients in the order of `tensors`. Weights are not among its saved tensors, because hooks on those (`precision.activations`) are
meant for activations.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels import products as sixteen
from sparing.kernels.pool import new

PIECE = 1 << 20
"""Numbers of a frozen weight that are floats at a time. Smaller pieces were slower: their products are (LAB.md)."""


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

    def tn(self, grad: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of `tensors`, from grad (M, out) and x (M, in)."""
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
    """Float numbers, multiplied by `products`: functions like those of `kernels.products`, or a linear's `EightBit`."""

    def __init__(self, weight: Tensor, products=sixteen):
        self.weight, self.products = weight, products
        self.shape, self.tensors = weight.shape, (weight,)

    @property
    def joins(self) -> bool:
        return self.products in (sixteen, sixteen.Plain) and (self.weight.requires_grad or not torch.is_grad_enabled())

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype)) if self.joins else super().__call__(x)

    def nt(self, x: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        return self.products.nt(x, self.weight, out=out, base=base)

    def nn(self, grad: Tensor, base: Tensor | None = None) -> Tensor:
        return self.products.nn(grad, self.weight, base=base)

    def tn(self, grad: Tensor, x: Tensor) -> tuple[Tensor | None]:
        return (self.products.tn(grad, x, dtype=self.weight.dtype) if self.weight.requires_grad else None,)

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
    """Numbers that do not learn: floats, or int8 codes with a float32 scale for each row (out).

    Unless they are of the rows' type they become floats at most PIECE numbers at a time, so that no float copy of a large weight exists.
    The results are those of the same numbers in a float32 `Weight`.
    """

    def __init__(self, values: Tensor, scale: Tensor | None = None):
        """values: (out, in) or (E, out, in); scale: (out) or (E, out)."""
        self.values, self.scale, self.shape = values, scale, values.shape

    def _expert(self, e: int) -> Frozen:
        return Frozen(self.values[e], None if self.scale is None else self.scale[e])

    def _pieces(self, dimension: int):
        """(slice, its numbers as floats) of one matrix, cut along a dimension."""
        step = max(1, PIECE // self.shape[1 - dimension])
        for start in range(0, self.shape[dimension], step):
            part = slice(start, start + step)
            cut = (part, slice(None)) if dimension == 0 else (slice(None), part)
            yield part, self.values[cut].float() if self.scale is None else self.values[cut] * self.scale[cut[0], None]

    def nt(self, x: Tensor, out: Tensor | None = None, base: Tensor | None = None) -> Tensor:
        if self.values.dtype == x.dtype:
            return sixteen.nt(x, self.values, out=out, base=base)
        out = new(x, len(x), self.shape[0]) if out is None else out
        for part, weight in self._pieces(0):
            sixteen.nt(x, weight, out=out[:, part], base=None if base is None else base[:, part])
        return out

    def nn(self, grad: Tensor, base: Tensor | None = None) -> Tensor:
        if self.values.dtype == grad.dtype:
            return sixteen.nn(grad, self.values, base=base)
        out = new(grad, len(grad), self.shape[1])
        for part, weight in self._pieces(1):  # along the sum, partial sums would be rounded
            out[:, part] = sixteen.nn(grad, weight, base=None if base is None else base[:, part])
        return out

    def tn(self, grad: Tensor, x: Tensor) -> tuple[()]:
        return ()

    def grouped_nt(self, x: Tensor, ends: Tensor) -> Tensor:
        if self.values.dtype == x.dtype:
            return sixteen.grouped_nt(x, self.values, ends)
        out = new(x, len(x), self.shape[1])
        for e, rows in sixteen.spans(ends):
            self._expert(e).nt(x[rows], out=out[rows])
        return out

    def grouped_nn(self, grad: Tensor, ends: Tensor) -> Tensor:
        if self.values.dtype == grad.dtype:
            return sixteen.grouped_nn(grad, self.values, ends)
        out = new(grad, len(grad), self.shape[2])
        for e, rows in sixteen.spans(ends):
            out[rows] = self._expert(e).nn(grad[rows])
        return out

    def grouped_tn(self, grad: Tensor, x: Tensor, ends: Tensor) -> tuple[()]:
        return ()

    def whole(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows = Frozen(self.values.flatten(0, -2), None if self.scale is None else self.scale.flatten())
        out = self.values.new_empty(rows.shape, dtype=dtype)
        for part, weight in rows._pieces(0):
            out[part] = weight
        return out.view(self.shape)


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

    def tn(self, grad: Tensor, x: Tensor) -> tuple[Tensor | None, ...]:
        # Both rank-wide intermediates are made again: kept, they would be two more tensors of every linear.
        return (*self.down.tn(self.up.nn(grad).mul_(self.scale), x), *self.up.tn(grad, self.down.nt(x).mul_(self.scale)))

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


def tensors_of(*operands: Operand | None) -> list[Tensor]:
    """All tensors of several operands, for `apply`; None has none."""
    return [tensor for operand in operands if operand is not None for tensor in operand.tensors]
