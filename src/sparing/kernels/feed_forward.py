"""Whole feed-forward sub-layers over the compiled passes: x + down(swiglu(up(norm(x)))), dense and as a mixture of experts.

The plain paths are `model/experts.py` and `kernels/experts.py` under autograd; these are chosen where `native.usable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import native, products
from sparing.kernels.experts import ROWS, group_rows
from sparing.kernels.norm import kept_rows, norm_gradient_into, norm_into, normed_again
from sparing.kernels.operands import Operand, tensors_of
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


def _up(x: Tensor, gate: Operand, up: Operand) -> Tensor:
    """Both projections side by side: (N, 2F)."""
    width = gate.shape[0]
    h = new(x, len(x), 2 * width)
    gate.nt(x, out=h[:, :width])
    up.nt(x, out=h[:, width:])
    return h


def _up_backward(grad_h: Tensor, x: Tensor, gate: Operand, up: Operand) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """-> (gradient of x, gradients of gate and up)."""
    left, right = grad_h.chunk(2, 1)
    return up.nn(right, base=gate.nn(left)), (*gate.tn(left, x), *up.tn(right, x))


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, eps: float, operands, *tensors):
        """operands: gate, up, down."""
        gate, up, down = operands
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        normed = new_like(x)
        inverse = norm_into(x, norm, eps, normed)
        h = _up(normed, gate, up)
        ctx.save_for_backward(x, norm, inverse, kept_rows(normed), h)
        ctx.operands, ctx.eps = operands, eps
        return down.nt(_swiglu(h), base=x).view_as(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        (x, norm, inverse, normed, h), (gate, up, down) = ctx.saved_tensors, ctx.operands
        grad = grad_BTD.reshape(x.shape)
        normed = normed_again(normed, x, norm, ctx.eps)
        grad_h, hidden, _ = _swiglu_backward(h, down.nn(grad))
        grad_normed, grads = _up_backward(grad_h, normed, gate, up)
        grad_x = new_like(x)
        grad_norm = norm_gradient_into(grad_normed, x, norm, inverse, grad_x, extra=grad)
        return grad_x.view_as(grad_BTD), grad_norm, None, None, *grads, *down.tn(grad, hidden)


def dense_feed_forward(x_BTD: Tensor, norm: Tensor, eps: float, operands: tuple[Operand, Operand, Operand]) -> Tensor:
    """x + down(silu(gate n) * up n) with n = norm(x): (B, T, D) -> (B, T, D). operands: gate (F, D), up (F, D), down (D, F)."""
    return _Dense.apply(x_BTD, norm, eps, operands, *tensors_of(*operands))


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, normed, weights, experts, operands, *tensors):
        """operands: the experts' gate_up and down, and those of the shared expert where there is one: gate, up, down."""
        gate_up, down, *shared = operands
        source, places, groups = group_rows(experts, gate_up.shape[0], 1 if products.usable(normed) else ROWS)
        ends = torch.tensor(groups).cumsum(0)
        tokens = (source // experts.shape[1]).clamp_(max=len(normed) - 1)
        rows = _rows(normed, tokens)
        h = gate_up.grouped_nt(rows, ends)
        # Filler rows have gate 0: they reach neither the output nor a gradient.
        gates = torch.cat((weights.flatten(), weights.new_zeros(1))).index_select(0, source)
        y = down.grouped_nt(_swiglu(h, gates), ends)
        base, h_shared = residual, None
        if shared:
            h_shared = _up(normed, *shared[:2])
            base = shared[2].nt(_swiglu(h_shared), base=residual)
        ctx.save_for_backward(normed, kept_rows(rows), h, gates, tokens, places, ends, h_shared)
        ctx.operands = operands
        return _combine(y, places, base)

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, rows, h, gates, tokens, places, ends, h_shared = ctx.saved_tensors
        (gate_up, down, *shared), grad = ctx.operands, grad.contiguous()
        rows = _rows(normed, tokens) if rows is None else rows
        grad_y = _rows(grad, tokens)
        grad_h, hidden, grad_gates = _swiglu_backward(h, down.grouped_nn(grad_y, ends), gates)
        grad_weights = grad_gates.index_select(0, places.flatten()).view_as(places)
        grad_rows = gate_up.grouped_nn(grad_h, ends)
        grads = (*gate_up.grouped_tn(grad_h, rows, ends), *down.grouped_tn(grad_y, hidden, ends))
        base = None
        if shared:
            grad_shared, hidden, _ = _swiglu_backward(h_shared, shared[2].nn(grad))
            base, shared_grads = _up_backward(grad_shared, normed, *shared[:2])
            grads += (*shared_grads, *shared[2].tn(grad, hidden))
        return grad, _combine(grad_rows, places, base), grad_weights, None, None, *grads


def mixture_feed_forward(
    residual_ND: Tensor, normed_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, operands: tuple[Operand, ...]
) -> Tensor:
    """residual + routed experts (`kernels.experts.mixture_reference`) + shared expert of the normed rows: (N, D). operands: the experts'
    gate_up (E, 2F, D) and down (E, D, F), and gate, up and down of the shared expert where there is one."""
    return _Mixture.apply(residual_ND, normed_ND, weights_NK, experts_NK, operands, *tensors_of(*operands))
