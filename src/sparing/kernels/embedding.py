"""Rows of a bfloat16 embedding, with a gradient whose sums are float32.

Added up in bfloat16, the gradients of a frequent word stop growing after a few hundred. Only rows that were read exist in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, words: Tensor, weight_WD: Tensor) -> Tensor:
        ctx.save_for_backward(words)
        ctx.shape, ctx.dtype = weight_WD.shape, weight_WD.dtype
        return F.embedding(words, weight_WD)

    @staticmethod
    def backward(ctx, grad: Tensor):
        read, place = ctx.saved_tensors[0].flatten().unique(return_inverse=True)
        rows = grad.new_zeros(len(read), ctx.shape[1], dtype=torch.float32).index_add_(0, place, grad.flatten(0, -2).float())
        return None, grad.new_zeros(ctx.shape, dtype=ctx.dtype).index_copy_(0, read, rows.to(ctx.dtype))


def embedding(words: Tensor, weight_WD: Tensor) -> Tensor:
    """(...,) integers -> (..., D) rows of the weight, in its type."""
    return F.embedding(words, weight_WD) if weight_WD.dtype == torch.float32 else _Embedding.apply(words, weight_WD)
