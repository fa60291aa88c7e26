"""A whole attention sub-layer of GQA, x + attention(norm(x)), as one differentiable operation over the compiled passes.

The plain path is `model/attention.py` under autograd; this one is chosen where `native.usable`. The G query heads that share keys and
values are laid out as G rows of each position. So one product serves all of them, keys and values are not repeated, and the product sums
their gradients over the group. H here counts the heads of keys and values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import native
from sparing.kernels.attention import DocumentMask, attend, attend_backward
from sparing.kernels.norm import kept_rows, norm_gradient_into, norm_into, normed_again
from sparing.kernels.operands import Operand, tensors_of
from sparing.kernels.pool import new, new_like


def _lay_out(rows: tuple[Tensor, ...], heads: list[Tensor] | tuple[Tensor, ...], turns: Tensor, shape, back: bool) -> None:
    """Rows of q, k and v (B*T, heads * K) into heads (B, H, T*G, K) with queries and keys turned, or back. shape: (B, T, H, G, K)."""
    B, T, H, G, K = shape
    for row, head, table, group in zip(rows, heads, (turns, turns, None), (G, 1, 1), strict=True):
        native.call("turn_heads", head.dtype, row, head, table, B, T, H, group, K, row.stride(0), int(turns.ndim == 4), int(back))


class _GroupedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, table, eps: float, widths, scale: float, mask, operands, *tensors):
        """operands: q, k, v, o. widths: (H, G, K); table: complex rotations."""
        (B, T, D), (H, G, K), (q, k, v, o) = x_BTD.shape, widths, operands
        x = x_BTD.reshape(B * T, D)
        normed = new_like(x)
        inverse = norm_into(x, norm, eps, normed)
        rows = new(x, len(x), (G + 2) * H * K).split([G * H * K, H * K, H * K], 1)
        for operand, part in zip((q, k, v), rows, strict=True):
            operand.nt(normed, out=part)
        turns = torch.view_as_real(table).contiguous()
        heads = [new(x, B, H, length, K) for length in (T * G, T, T)]
        shape = (B, T, H, G, K)
        _lay_out(rows, heads, turns, shape, back=False)
        mixed, kept = attend(*heads, scale, mask)
        ctx.save_for_backward(x, norm, inverse, kept_rows(normed), mixed, turns, *heads, *kept)
        ctx.shape, ctx.scale, ctx.mask, ctx.operands, ctx.eps = shape, scale, mask, operands, eps
        return o.nt(mixed, base=x).view(B, T, D)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        (x, norm, inverse, normed, mixed, turns, *heads), (q, k, v, o) = ctx.saved_tensors, ctx.operands
        heads, kept = heads[:3], heads[3:]
        normed = normed_again(normed, x, norm, ctx.eps)
        grad = grad_BTD.reshape(x.shape)
        grad_o = o.tn(grad, mixed)
        grads = attend_backward(o.nn(grad), mixed, *heads, kept, ctx.scale, ctx.mask)
        sizes = [q.shape[0], k.shape[0], v.shape[0]]
        rows = new(x, len(x), sum(sizes)).split(sizes, 1)
        _lay_out(rows, grads, turns, ctx.shape, back=True)
        left, middle, right = rows
        grad_x = new_like(x)
        grad_normed = v.nn(right, base=k.nn(middle, base=q.nn(left)))
        grad_norm = norm_gradient_into(grad_normed, x, norm, inverse, grad_x, extra=grad)
        return (
            grad_x.view(grad_BTD.shape), grad_norm, None, None, None, None, None, None,
            *q.tn(left, normed), *k.tn(middle, normed), *v.tn(right, normed), *grad_o,
        )  # fmt: skip


def grouped_attention(
    x_BTD: Tensor, norm: Tensor, operands: tuple[Operand, Operand, Operand, Operand], table: Tensor, eps: float,
    widths: tuple[int, int, int], scale: float, mask: DocumentMask | None,
) -> Tensor:  # fmt: skip
    """x + GQA(norm(x)), (B, T, D) -> (B, T, D). operands: q (H*G*K, D), k and v (H*K, D), o (D, H*G*K); widths (H, G, K), K even; table
    (T, K/2) or (B, T, K/2) complex64."""
    return _GroupedAttention.apply(x_BTD, norm, table, eps, widths, scale, mask, operands, *tensors_of(*operands))
