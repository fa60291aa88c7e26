"""RMSNorm: `x / rms(x) * weight`, the statistics in float32 (arXiv 1910.07467; rounding order of `DeepseekV3RMSNorm`)."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import native
from sparing.kernels.native import new_like


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) float32 -> (..., D) in x's type. Plain autograd."""
    x_float = x.float()
    normed = x_float * torch.rsqrt(x_float.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight.to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps the normalised rows in x's type instead of three float32 intermediates: half the memory traffic on a CPU."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x_float = x.float()
        inverse = torch.linalg.vector_norm(x_float, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = x_float.mul(inverse).to(x.dtype)
        ctx.save_for_backward(normed, inverse, weight)
        return normed * weight.to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, inverse, weight = ctx.saved_tensors
        dim = grad.shape[-1]
        gain = weight.to(grad.dtype)
        product = (grad * normed).view(-1, dim)
        # Row and column sums as products with a vector: they accumulate in float32 and beat the reduction kernels on a CPU.
        grad_weight = (product.new_ones(1, len(product)) @ product).view(dim).to(weight.dtype) if ctx.needs_input_grad[1] else None
        mean = torch.mv(product, gain / dim).view(inverse.shape)
        grad_x = torch.addcmul(grad * gain, normed, mean, value=-1).mul_(inverse.to(grad.dtype))
        return grad_x, grad_weight, None


def norm_into(x: Tensor, weight: Tensor, eps: float, out: Tensor, inverse: Tensor | None = None) -> Tensor:
    """Compiled: rows x (N, D) of any stride normed into rows `out` (N, D); -> 1 / rms of each row, (N,) float32, `inverse` where given."""
    N, D = x.shape
    inverse = torch.empty(N, dtype=torch.float32) if inverse is None else inverse
    native.call("norm_forward", x.dtype, x, None, weight.detach().float(), float(eps), None, out, inverse, N, D, x.stride(0), out.stride(0))
    return inverse


def norm_gradient_into(
    grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor, out: Tensor, extra: Tensor | None = None, sums: Tensor | None = None
) -> Tensor | None:
    """Compiled: the gradient of x (plus `extra`, strided like `out`) into rows `out`; -> the gradient of weight, (D,) float32, or
    None where it does not require one. sums: that of earlier rows, added to."""
    N, D = x.shape
    grad_weight = torch.zeros(D, dtype=torch.float32) if weight.requires_grad and sums is None else sums
    strides = (grad.stride(0), x.stride(0), out.stride(0))
    native.call("norm_backward", x.dtype, grad, x, weight.detach().float(), inverse, extra, out, grad_weight, N, D, *strides)
    return grad_weight


def norm_rows(x: Tensor, weight: Tensor, eps: float, inverse: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compiled: rows x (N, D) of any stride -> (normed, contiguous; 1 / rms of each (N,) float32, `inverse` where given).

    Sub-layers keep x alone and norm it again in the backward pass: the rows would be a fifth of what is kept, and to write
    and read them takes as long (LAB.md)."""
    rows = new_like(x)
    return rows, norm_into(x, weight, eps, rows, inverse)


class _CompiledRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, inverse = norm_rows(rows, weight, eps)
        ctx.save_for_backward(rows, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        rows, weight, inverse = ctx.saved_tensors
        out = new_like(rows)
        grad_weight = norm_gradient_into(grad.reshape(rows.shape), rows, weight, inverse, out)
        return out.view(grad.shape), grad_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D). The hand-written backward unless a compiler will fuse the plain form anyway."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return rms_norm_reference(x, weight, eps)
    return (_CompiledRMSNorm if native.usable(x) else _RMSNorm).apply(x, weight, eps)
