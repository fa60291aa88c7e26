"""Whole feed-forward sub-layers over the compiled passes: x + down(swiglu(up(norm(x)))), dense and as a mixture of experts.

The plain paths are `model/experts.py` and `kernels/experts.py` under autograd; these are chosen where `native.usable`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import native
from sparing.kernels.experts import ROWS, group_rows, spans_of
from sparing.kernels.latent_attention import joined
from sparing.kernels.norm import norm_gradient_into, norm_into


def _swiglu(h: Tensor, scale: Tensor | None = None) -> Tensor:
    """(N, 2F) -> (N, F), times scale (N,) float32."""
    out = h.new_empty(len(h), h.shape[1] // 2)
    native.call("swiglu_forward", h.dtype, h, scale, out, *out.shape)
    return out


def _swiglu_backward(h: Tensor, grad: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """-> (gradient of h, `_swiglu(h, scale)` again, gradient of scale)."""
    grad_h, hidden = torch.empty_like(h), torch.empty_like(grad)
    grad_scale = None if scale is None else torch.empty_like(scale)
    native.call("swiglu_backward", h.dtype, h, scale, grad, grad_h, hidden, grad_scale, *grad.shape)
    return grad_h, hidden, grad_scale


def _combine(rows: Tensor, places: Tensor, base: Tensor | None) -> Tensor:
    """base + the sum of each token's rows: rows (S, D), places (N, K) -> (N, D)."""
    out = rows.new_empty(len(places), rows.shape[1])
    native.call("combine", rows.dtype, rows, places, base, out, *places.shape, rows.shape[1])
    return out


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, gate, up, down, eps: float):
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        normed = torch.empty_like(x)
        inverse = norm_into(x, norm, eps, normed)
        w_up, w_down = joined(gate, up, x.dtype), down.to(x.dtype)
        h = normed @ w_up.t()
        ctx.save_for_backward(x, norm, inverse, normed, w_up, w_down, h)
        return torch.addmm(x, _swiglu(h), w_down.t()).view_as(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        x, norm, inverse, normed, w_up, w_down, h = ctx.saved_tensors
        grad = grad_BTD.reshape(x.shape)
        grad_h, hidden, _ = _swiglu_backward(h, grad @ w_down)
        grad_up = grad_h.t() @ normed
        grad_x = torch.empty_like(x)
        grad_norm = norm_gradient_into(grad_h @ w_up, x, norm, inverse, grad_x, extra=grad)
        width = len(w_up) // 2
        return grad_x.view_as(grad_BTD), grad_norm, grad_up[:width], grad_up[width:], grad.t() @ hidden, None


def dense_feed_forward(x_BTD: Tensor, norm: Tensor, gate_FD: Tensor, up_FD: Tensor, down_DF: Tensor, eps: float) -> Tensor:
    """x + down(silu(gate n) * up n) with n = norm(x): (B, T, D) -> (B, T, D)."""
    return _Dense.apply(x_BTD, norm, gate_FD, up_FD, down_DF, eps)


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, normed, gate_up, down, weights, experts, shared_gate, shared_up, shared_down):
        source, places, groups = group_rows(experts, len(gate_up), ROWS)
        tokens = (source // experts.shape[1]).clamp_(max=len(normed) - 1)
        gate_up_c, down_c = gate_up.to(normed.dtype), down.to(normed.dtype)
        spans = spans_of(groups)
        rows = normed.index_select(0, tokens)
        h = normed.new_empty(len(rows), gate_up.shape[1])
        for expert, span in spans:
            torch.mm(rows[span], gate_up_c[expert].t(), out=h[span])
        # Filler rows have gate 0: they reach neither the output nor a gradient.
        gates = torch.cat((weights.flatten(), weights.new_zeros(1))).index_select(0, source)
        hidden = _swiglu(h, gates)
        y = torch.empty_like(rows)
        for expert, span in spans:
            torch.mm(hidden[span], down_c[expert].t(), out=y[span])
        base, shared = residual, (None, None, None)
        if shared_gate is not None:
            w_up, w_down = joined(shared_gate, shared_up, normed.dtype), shared_down.to(normed.dtype)
            h_shared = normed @ w_up.t()
            base, shared = torch.addmm(residual, _swiglu(h_shared), w_down.t()), (w_up, w_down, h_shared)
        ctx.save_for_backward(normed, rows, h, gate_up_c, down_c, gates, tokens, places, *shared)
        ctx.spans = spans
        return _combine(y, places, base)

    @staticmethod
    def backward(ctx, grad: Tensor):
        normed, rows, h, gate_up, down, gates, tokens, places, w_up, w_down, h_shared = ctx.saved_tensors
        grad = grad.contiguous()
        grad_y = grad.index_select(0, tokens)
        grad_hidden = h.new_empty(len(rows), h.shape[1] // 2)
        for expert, span in ctx.spans:
            torch.mm(grad_y[span], down[expert], out=grad_hidden[span])
        grad_h, hidden, grad_gates = _swiglu_backward(h, grad_hidden, gates)
        grad_weights = grad_gates.index_select(0, places.flatten()).view_as(places)
        # An expert without tokens has gradient zero.
        grad_gate_up, grad_down = torch.zeros_like(gate_up), torch.zeros_like(down)
        grad_rows = torch.empty_like(rows)
        for expert, span in ctx.spans:
            torch.mm(grad_y[span].t(), hidden[span], out=grad_down[expert])
            torch.mm(grad_h[span].t(), rows[span], out=grad_gate_up[expert])
            torch.mm(grad_h[span], gate_up[expert], out=grad_rows[span])
        base, shared = None, (None, None, None)
        if w_up is not None:
            grad_shared, hidden, _ = _swiglu_backward(h_shared, grad @ w_down)
            grad_up, width = grad_shared.t() @ normed, len(w_up) // 2
            base, shared = grad_shared @ w_up, (grad_up[:width], grad_up[width:], grad.t() @ hidden)
        return grad, _combine(grad_rows, places, base), grad_gate_up, grad_down, grad_weights, None, *shared


def mixture_feed_forward(
    residual_ND: Tensor, normed_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_NK: Tensor, experts_NK: Tensor,
    shared: tuple[Tensor, Tensor, Tensor] | tuple[None, None, None],
) -> Tensor:  # fmt: skip
    """residual + routed experts (`kernels.experts.mixture_reference`) + shared expert (gate, up, down) of the normed rows: (N, D)."""
    return _Mixture.apply(residual_ND, normed_ND, gate_up_E2FD, down_EDF, weights_NK, experts_NK, *shared)
