"""RMSNorm: `x / rms(x) * weight`, the statistics in float32 (arXiv 1910.07467; rounding order of `DeepseekV3RMSNorm`)."""

from __future__ import annotations

import torch
from torch import Tensor


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
        grad_weight = (product.new_ones(1, len(product)) @ product).view(dim)
        mean = torch.mv(product, gain / dim).view(inverse.shape)
        grad_x = torch.addcmul(grad * gain, normed, mean, value=-1).mul_(inverse.to(grad.dtype))
        return grad_x, grad_weight.to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., D), weight (D,) -> (..., D). The hand-written backward unless a compiler will fuse the plain form anyway."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)
