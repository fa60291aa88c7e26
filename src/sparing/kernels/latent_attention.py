"""A whole attention sub-layer of MLA, x + attention(norm(x)), as one differentiable operation over the compiled passes.

The plain path is `model/attention.py` under autograd; this one is chosen where `native.usable`. Against it, one pass lays out and turns
the heads, gradients of the joined input projections are written side by side, and no intermediate is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import native
from sparing.kernels.attention import DocumentMask, attend, attend_backward
from sparing.kernels.norm import kept_rows, norm_gradient_into, norm_into, normed_again
from sparing.kernels.operands import Operand, tensors_of
from sparing.kernels.pool import new, new_like


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, q_norm, kv_norm, table, eps: float, widths, scale: float, mask, operands, *tensors):
        """operands: q_a, q_b, kv_a, kv_b, o; q_norm and q_b are None where queries are not compressed. widths: (H, nope, rope, value);
        table: complex rotations."""
        q_a, q_b, kv_a, kv_b, o = operands
        (B, T, D), (H, C, R, V) = x_BTD.shape, widths
        x = x_BTD.reshape(B * T, D)
        normed = new_like(x)
        inverse = norm_into(x, norm, eps, normed)
        q_rank, kv_rank = q_a.shape[0], kv_b.shape[1]
        both = new(x, len(x), q_rank + kv_a.shape[0])
        q_a.nt(normed, out=both[:, :q_rank])
        kv_a.nt(normed, out=both[:, q_rank:])
        q, q_latent, q_inverse = both, None, None
        if q_b is not None:
            q_latent = new(x, len(x), q_rank)
            q_inverse = norm_into(both[:, :q_rank], q_norm, eps, q_latent)
            q = q_b.nt(q_latent)
        kv_latent = new(x, len(x), kv_rank)
        kv_inverse = norm_into(both[:, q_rank : q_rank + kv_rank], kv_norm, eps, kv_latent)
        turns = torch.view_as_real(table).contiguous()
        shape = (B, T, H, C, R, V, q.stride(0), both.stride(0), int(table.ndim == 3))
        heads = [new(x, B, H, T, width) for width in (C + R, C + R, V)]
        native.call("heads_forward", x.dtype, q, kv_b.nt(kv_latent), both[:, q_rank + kv_rank :], turns, *heads, *shape)
        mixed, kept = attend(*heads, scale, mask)
        ctx.save_for_backward(
            x, norm, inverse, kept_rows(normed), both, q_norm, q_inverse, kept_rows(q_latent), kv_norm, kv_inverse, kept_rows(kv_latent),
            mixed, turns, *heads, *kept,
        )  # fmt: skip
        ctx.shape, ctx.scale, ctx.mask, ctx.operands, ctx.eps = shape, scale, mask, operands, eps
        return o.nt(mixed, base=x).view(B, T, D)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        (
            x, norm, inverse, normed, both, q_norm, q_inverse, q_latent, kv_norm, kv_inverse, kv_latent, mixed, turns, q, k, v, *kept,
        ) = ctx.saved_tensors  # fmt: skip
        (_, _, H, C, R, V, *_), (q_a, q_b, kv_a, kv_b, o) = ctx.shape, ctx.operands
        q_rank, kv_rank = q_a.shape[0], kv_b.shape[1]
        normed = normed_again(normed, x, norm, ctx.eps)
        kv_latent = normed_again(kv_latent, both[:, q_rank : q_rank + kv_rank], kv_norm, ctx.eps)
        grad = grad_BTD.reshape(x.shape)
        grad_o = o.tn(grad, mixed)
        grads = attend_backward(o.nn(grad), mixed, q, k, v, kept, ctx.scale, ctx.mask)
        grad_both = new_like(both)
        grad_q = grad_both if q_b is None else new(x, len(x), H * (C + R))
        grad_kv = new(x, len(x), H * (C + V))
        native.call("heads_backward", x.dtype, *grads, turns, grad_q, grad_kv, grad_both[:, q_rank + kv_rank :], *ctx.shape)
        part = slice(q_rank, q_rank + kv_rank)
        grad_kv_norm = norm_gradient_into(kv_b.nn(grad_kv), both[:, part], kv_norm, kv_inverse, grad_both[:, part])
        grad_q_b, grad_q_norm = (), None
        if q_b is not None:
            grad_q_b = q_b.tn(grad_q, normed_again(q_latent, both[:, :q_rank], q_norm, ctx.eps))
            grad_q_norm = norm_gradient_into(q_b.nn(grad_q), both[:, :q_rank], q_norm, q_inverse, grad_both[:, :q_rank])
        left, right = grad_both[:, :q_rank], grad_both[:, q_rank:]
        grad_x = new_like(x)
        grad_norm = norm_gradient_into(kv_a.nn(right, base=q_a.nn(left)), x, norm, inverse, grad_x, extra=grad)
        return (
            grad_x.view(grad_BTD.shape), grad_norm, grad_q_norm, grad_kv_norm, None, None, None, None, None, None,
            *q_a.tn(left, normed), *grad_q_b, *kv_a.tn(right, normed), *kv_b.tn(grad_kv, kv_latent), *grad_o,
        )  # fmt: skip


def latent_attention(
    x_BTD: Tensor, norm: Tensor, q: tuple[Operand, Tensor | None, Operand | None], kv: tuple[Operand, Tensor, Operand], o: Operand,
    table: Tensor, eps: float, widths: tuple[int, int, int, int], scale: float, mask: DocumentMask | None,
) -> Tensor:  # fmt: skip
    """x + MLA(norm(x)), (B, T, D) -> (B, T, D). q: (down, norm, up) or (direct, None, None), kv: (down with rope, norm, up), o: weights as
    in the checkpoint, norms as tensors; widths (H, nope, rope, value); table (T, R/2) or (B, T, R/2) complex64."""
    operands = (q[0], q[2], kv[0], kv[2], o)
    return _LatentAttention.apply(x_BTD, norm, q[1], kv[1], table, eps, widths, scale, mask, operands, *tensors_of(*operands))
