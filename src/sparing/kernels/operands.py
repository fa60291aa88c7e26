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
from sparing.kernels.experts import swiglu_reference


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

    def swiglu_grouped_nt(self, h: Tensor, gates: Tensor, ends: Tensor) -> Tensor:
        """swiglu(h (S, 2 in)) · gates (S, 1) by each group's expert -> (S, out)."""
        return self.grouped_nt(swiglu_reference(h).mul_(gates), ends)

    def cast(self, dtype: torch.dtype) -> Operand:
        """For `grouped_nt` and `grouped_nn`: the same with its numbers in `dtype`, where that is one copy instead of one a product."""
        return self


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

    def swiglu_grouped_nt(self, h: Tensor, gates: Tensor, ends: Tensor) -> Tensor:
        fused = getattr(self.products, "swiglu_grouped_nt", None)  # of 8-bit products, some of which do both at once
        return fused(h, gates, self.weight, ends) if fused else super().swiglu_grouped_nt(h, gates, ends)

    def cast(self, dtype: torch.dtype) -> Weight:
        return Weight(self.weight.to(dtype), self.products)


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
