"""Rows of a bfloat16 embedding, with a gradient whose sums are float32.

Added up in bfloat16, the gradients of a frequent word stop growing after a few hundred. Only rows that were read exist in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels.pool import new, new_like


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, words: Tensor, weight_WD: Tensor) -> Tensor:
        ctx.save_for_backward(words)
        ctx.shape, ctx.dtype = weight_WD.shape, weight_WD.dtype
        return F.embedding(words, weight_WD)

    @staticmethod
    def backward(ctx, grad: Tensor):
        read, place = ctx.saved_tensors[0].flatten().unique(return_inverse=True)
        grad = grad.flatten(0, -2)
        rows = new(grad, len(read), ctx.shape[1], dtype=torch.float32).zero_()
        rows.index_add_(0, place, new_like(grad, torch.float32).copy_(grad))
        return None, new(grad, *ctx.shape, dtype=ctx.dtype).zero_().index_copy_(0, read, rows.to(ctx.dtype))


def embedding(words: Tensor, weight_WD: Tensor) -> Tensor:
    """(...,) integers -> (..., D) rows of the weight, in its type."""
    return F.embedding(words, weight_WD) if weight_WD.dtype == torch.float32 else _Embedding.apply(words, weight_WD)
