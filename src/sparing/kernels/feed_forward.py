"""Whole feed-forward sub-layers over the compiled passes: x + down(swiglu(up(norm(x)))), dense and as a mixture of experts.

The plain paths are `model/experts.py` and `kernels/experts.py` under autograd; these are chosen where `native.usable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import native, products
from sparing.kernels.experts import ROWS, group_rows
from sparing.kernels.norm import kept_rows, norm_gradient_into, norm_into, normed_again
from sparing.kernels.pool import new, new_like


def _swiglu(h: Tensor, scale: Tensor | None = None) -> Tensor:
    """(N, 2F) -> (N, F), times scale (N,) float32."""
    out = new(h, len(h), h.shape[1] // 2)
    native.call("swiglu_forward", h.dtype, h, scale, out, *out.shape)
    return out


def _swiglu_backward(h: Tensor, grad: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> (gradient of h, `_swiglu(h, scale)` again, gradient of scale)."""
    grad_h, hidden = new_like(h), new_like(grad)
    grad_scale = None if scale is None else torch.empty_like(scale)
    native.call("swiglu_backward", h.dtype, h, scale, grad, grad_h, hidden, grad_scale, *grad.shape)
    return grad_h, hidden, grad_scale


def _rows(x: Tensor, tokens: Tensor) -> Tensor:
    """x (N, D) -> (S, D)."""
    return torch.index_select(x, 0, tokens, out=new(x, len(tokens), x.shape[1]))


def _combine(rows: Tensor, places: Tensor, base: Tensor | None) -> Tensor:
    """base + the sum of each token's rows: rows (S, D), places (N, K) -> (N, D)."""
    out = new(rows, len(places), rows.shape[1])
    native.call("combine", rows.dtype, rows, places, base, out, *places.shape, rows.shape[1])
    return out


def _up(x: Tensor, gate: Tensor, up: Tensor, by) -> Tensor:
    """Both projections side by side: (N, 2F)."""
    h = new(x, len(x), 2 * len(gate))
    by[0].nt(x, gate, out=h[:, : len(gate)])
    by[1].nt(x, up, out=h[:, len(gate) :])
    return h


def _up_backward(grad_h: Tensor, x: Tensor, gate: Tensor, up: Tensor, by) -> tuple[Tensor, Tensor, Tensor]:
    """-> gradients of x, gate, up."""
    left, right = grad_h[:, : len(gate)], grad_h[:, len(gate) :]
    return by[1].nn(right, up, base=by[0].nn(left, gate)), by[0].tn(left, x, gate.dtype), by[1].tn(right, x, up.dtype)


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, gate, up, down, eps: float, by):
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        normed = new_like(x)
        inverse = norm_into(x, norm, eps, normed)
        h = _up(normed, gate, up, by)
        ctx.save_for_backward(x, norm, inverse, kept_rows(normed), gate, up, down, h)
        ctx.by, ctx.eps = by, eps
        return by[2].nt(_swiglu(h), down, base=x).view_as(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        x, norm, inverse, normed, gate, up, down, h = ctx.saved_tensors
        grad = grad_BTD.reshape(x.shape)
        by = ctx.by
        normed = normed_again(normed, x, norm, ctx.eps)
        grad_h, hidden, _ = _swiglu_backward(h, by[2].nn(grad, down))
        grad_normed, grad_gate, grad_up = _up_backward(grad_h, normed, gate, up, by)
        grad_x = new_like(x)
        grad_norm = norm_gradient_into(grad_normed, x, norm, inverse, grad_x, extra=grad)
        return grad_x.view_as(grad_BTD), grad_norm, grad_gate, grad_up, by[2].tn(grad, hidden, down.dtype), None, None


def dense_feed_forward(
    x_BTD: Tensor, norm: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, eps: float, by=(products,) * 3
) -> Tensor:
    """x + down(silu(gate n) * up n) with n = norm(x): (B, T, D) -> (B, T, D). by: each weight's products (`kernels.products` or alike)."""
    return _Dense.apply(x_BTD, norm, gate_FD, up_FD, down_DF, eps, by)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, normed, gate_up, down, weights, experts, by, shared_gate, shared_up, shared_down):
        source, places, groups = group_rows(experts, len(gate_up), 1 if products.usable(normed) else ROWS)
        ends = torch.tensor(groups).cumsum(0)
        tokens = (source // experts.shape[1]).clamp_(max=len(normed) - 1)
        rows = _rows(normed, tokens)
        h = by[0].grouped_nt(rows, gate_up, ends)
        # Filler rows have gate 0: they reach neither the output nor a gradient.
        gates = torch.cat((weights.flatten(), weights.new_zeros(1))).index_select(0, source)
        y = by[1].grouped_nt(_swiglu(h, gates), down, ends)
        base, h_shared = residual, None
        if shared_gate is not None:
            h_shared = _up(normed, shared_gate, shared_up, by[2:])
            base = by[4].nt(_swiglu(h_shared), shared_down, base=residual)
        ctx.save_for_backward(
            normed, kept_rows(rows), h, gate_up, down, gates, tokens, places, ends, shared_gate, shared_up, shared_down, h_shared
        )
        ctx.by = by
        return _combine(y, places, base)

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, rows, h, gate_up, down, gates, tokens, places, ends, shared_gate, shared_up, shared_down, h_shared = ctx.saved_tensors
        by, grad = ctx.by, grad.contiguous()
        rows = _rows(normed, tokens) if rows is None else rows
        grad_y = _rows(grad, tokens)
        grad_h, hidden, grad_gates = _swiglu_backward(h, by[1].grouped_nn(grad_y, down, ends), gates)
        grad_weights = grad_gates.index_select(0, places.flatten()).view_as(places)
        grad_rows = by[0].grouped_nn(grad_h, gate_up, ends)
        grads = by[0].grouped_tn(grad_h, rows, ends, gate_up.dtype), by[1].grouped_tn(grad_y, hidden, ends, down.dtype)
        base, shared = None, (None, None, None)
        if h_shared is not None:
            grad_shared, hidden, _ = _swiglu_backward(h_shared, by[4].nn(grad, shared_down))
            base, grad_gate, grad_up = _up_backward(grad_shared, normed, shared_gate, shared_up, by[2:])
            shared = grad_gate, grad_up, by[4].tn(grad, hidden, shared_down.dtype)
        return grad, _combine(grad_rows, places, base), *grads, grad_weights, None, None, *shared


def mixture_feed_forward(
    residual_ND: Tensor, normed_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_NK: Tensor, experts_NK: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None], by=(products,) * 5,
) -> Tensor:  # fmt: skip
    """residual + routed experts (`kernels.experts.mixture_reference`) + shared expert (gate, up, down) of the normed rows: (N, D). by: the
    products of gate_up, down and the shared three."""
    return _Mixture.apply(residual_ND, normed_ND, gate_up_E2FD, down_EDF, weights_NK, experts_NK, by, *shared)
