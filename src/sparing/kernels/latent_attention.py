"""A whole attention sub-layer of MLA, x + attention(norm(x)), as one differentiable operation over the compiled passes.

The plain path is `model/attention.py` under autograd; this one is chosen where `native.usable`. Against it, one pass lays out and turns
the heads, gradients of the joined input projections are written side by side, and no intermediate is copied.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import native
from sparing.kernels.attention import DocumentMask, blocks_backward, blocks_forward
from sparing.kernels.norm import norm_gradient_into, norm_into


def joined(first: Tensor, second: Tensor, dtype: torch.dtype) -> Tensor:
    """Two weights with equal columns, one above the other, in `dtype`."""
    out = torch.empty(len(first) + len(second), first.shape[1], dtype=dtype)
    out[: len(first)].copy_(first)
    out[len(first) :].copy_(second)
    return out


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, q_a, q_norm, q_b, kv_a, kv_norm, kv_b, o, table, eps: float, widths, scale: float, mask):
        """q_norm and q_b are None where queries are not compressed. widths: (H, nope, rope, value); table: complex rotations."""
        (B, T, D), (H, C, R, V) = x_BTD.shape, widths
        dtype, N, K = x_BTD.dtype, B * T, C + R
        x = x_BTD.reshape(N, D)
        normed = torch.empty_like(x)
        inverse = norm_into(x, norm, eps, normed)
        w_in, w_kv, w_o = joined(q_a, kv_a, dtype), kv_b.to(dtype), o.to(dtype)
        both = normed @ w_in.t()
        q_rank, kv_rank = len(q_a), kv_b.shape[1]
        q, q_latent, q_inverse, w_q = both, None, None, None
        if q_b is not None:
            w_q, q_latent = q_b.to(dtype), x.new_empty(N, q_rank)
            q_inverse = norm_into(both[:, :q_rank], q_norm, eps, q_latent)
            q = q_latent @ w_q.t()
        kv_latent = x.new_empty(N, kv_rank)
        kv_inverse = norm_into(both[:, q_rank : q_rank + kv_rank], kv_norm, eps, kv_latent)
        kv = kv_latent @ w_kv.t()
        turns = torch.view_as_real(table).contiguous()
        shape = (B, T, H, C, R, V, q.stride(0), both.stride(0), int(table.ndim == 3))
        heads = [x.new_empty(B * H, T, width) for width in (K, K, V)]
        native.call("heads_forward", dtype, q, kv, both[:, q_rank + kv_rank :], turns, *heads, *shape)
        out, blocks = blocks_forward(*heads, scale, mask, H)
        mixed = x.new_empty(N, H * V)
        native.call("heads_last", dtype, out, mixed, B, H, T, V)
        ctx.save_for_backward(
            x, norm, inverse, normed, w_in, both, q_norm, q_inverse, q_latent, w_q, kv_norm, kv_inverse, kv_latent, w_kv,
            w_o, mixed, turns, *heads, *blocks,
        )  # fmt: skip
        ctx.shape, ctx.scale, ctx.ranks = shape, scale, (q_rank, kv_rank)
        return torch.addmm(x, mixed, w_o.t()).view(B, T, D)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        (
            x, norm, inverse, normed, w_in, both, q_norm, q_inverse, q_latent, w_q, kv_norm, kv_inverse, kv_latent, w_kv,
            w_o, mixed, turns, q, k, v, *blocks,
        ) = ctx.saved_tensors  # fmt: skip
        B, T, H, C, R, V, *_ = ctx.shape
        q_rank, kv_rank = ctx.ranks
        dtype, N = x.dtype, len(x)
        grad = grad_BTD.reshape(N, -1)
        grad_o, grad_mixed = grad.t() @ mixed, grad @ w_o
        grad_out = torch.empty_like(v)
        native.call("heads_last", dtype, grad_mixed, grad_out, B, T, H, V)
        grads = blocks_backward(grad_out, q, k, v, blocks, ctx.scale)
        grad_both = torch.empty_like(both)
        grad_q = grad_both if w_q is None else x.new_empty(N, H * (C + R))
        grad_kv = x.new_empty(N, H * (C + V))
        grad_rope = grad_both[:, q_rank + kv_rank :]
        native.call("heads_backward", dtype, *grads, turns, grad_q, grad_kv, grad_rope, *ctx.shape)
        grad_kv_b = grad_kv.t() @ kv_latent
        part = slice(q_rank, q_rank + kv_rank)
        grad_kv_norm = norm_gradient_into(grad_kv @ w_kv, both[:, part], kv_norm, kv_inverse, grad_both[:, part])
        grad_q_b = grad_q_norm = None
        if w_q is not None:
            grad_q_b = grad_q.t() @ q_latent
            grad_q_norm = norm_gradient_into(grad_q @ w_q, both[:, :q_rank], q_norm, q_inverse, grad_both[:, :q_rank])
        grad_in = grad_both.t() @ normed
        grad_x = torch.empty_like(x)
        grad_norm = norm_gradient_into(grad_both @ w_in, x, norm, inverse, grad_x, extra=grad)
        return (
            grad_x.view(grad_BTD.shape), grad_norm, grad_in[:q_rank], grad_q_norm, grad_q_b, grad_in[q_rank:], grad_kv_norm, grad_kv_b,
            grad_o, None, None, None, None, None,
        )  # fmt: skip


def latent_attention(
    x_BTD: Tensor, norm: Tensor, q: tuple[Tensor, Tensor | None, Tensor | None], kv: tuple[Tensor, Tensor, Tensor], o: Tensor,
    table: Tensor, eps: float, widths: tuple[int, int, int, int], scale: float, mask: DocumentMask | None,
) -> Tensor:  # fmt: skip
    """x + MLA(norm(x)), (B, T, D) -> (B, T, D). q: (down, norm, up) or (direct, None, None), kv: (down with rope, norm, up), o: weights as
    in the checkpoint; widths (H, nope, rope, value); table (T, R/2) or (B, T, R/2) complex64."""
    return _LatentAttention.apply(x_BTD, norm, *q, *kv, o, table, eps, widths, scale, mask)
