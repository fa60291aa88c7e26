"""Feed-forward layers: SwiGLU, and a mixture of SwiGLU experts, tokens grouped by expert, one product per expert, activations recomputed.

`F.grouped_mm` computes the same products; on a CPU its backward was measured far slower than one product per expert, so it is chosen
on CUDA only. Gates scale the expert's hidden activation (F wide) rather than its output (D wide): same function, fewer numbers.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels import native, products
from sparing.kernels.native import new, new_like
from sparing.kernels.norm import norm_gradient_into, norm_rows
from sparing.kernels.products import Operand, tensors_of
from sparing.kernels.sizes import EXPERT_ROWS as ROWS


def swiglu_reference(h: Tensor) -> Tensor:
    """(..., 2F) with the gate's half first -> (..., F): silu(gate) * up (arXiv 2002.05202). Plain autograd."""
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def _swiglu_gradient(h: Tensor, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden recomputed, gradient of h), from h (..., 2F) and the gradient of hidden (..., F)."""
    gate, up = h.chunk(2, -1)
    act = F.silu(gate)
    grad_gate = torch.ops.aten.silu_backward(grad_hidden * up, gate)
    return act * up, torch.cat((grad_gate, grad_hidden * act), -1)


class _SwiGLU(torch.autograd.Function):
    """Keeps its input only."""

    @staticmethod
    def forward(ctx, h: Tensor) -> Tensor:
        ctx.save_for_backward(h)
        return swiglu_reference(h)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _swiglu_gradient(ctx.saved_tensors[0], grad)[1]


def swiglu(h: Tensor) -> Tensor:
    """(..., 2F) -> (..., F); see the reference."""
    return _SwiGLU.apply(h)


def mixture_reference(x_ND: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
    """Sum over each token's K experts of weight * expert(x): (N, D). Plain autograd, expert by expert."""
    out = torch.zeros_like(x_ND)
    for expert in range(len(gate_up_E2FD)):
        tokens, slot = (experts_NK == expert).nonzero(as_tuple=True)
        hidden = swiglu_reference(F.linear(x_ND[tokens], gate_up_E2FD[expert].to(x_ND.dtype)))
        y = F.linear(hidden, down_EDF[expert].to(x_ND.dtype))
        out = out.index_add(0, tokens, y * weights_NK[tokens, slot, None].to(x_ND.dtype))
    return out


def group_rows(experts_NK: Tensor, num_experts: int, multiple: int) -> tuple[Tensor, Tensor, list[int]]:
    """Where each choice goes when rows are grouped by expert and every group is filled up to a multiple of rows.

    -> (source (S,): the choice that fills each row, N*K for filler; place (N, K): the row of each choice; rows of each group).
    """
    flat = experts_NK.flatten()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    sizes = (counts + multiple - 1) // multiple * multiple
    # A sorted row moves down by the filler of all groups before its own.
    shift = (sizes - counts).cumsum(0) - (sizes - counts)
    rows = torch.arange(len(flat), device=flat.device) + shift.index_select(0, flat.index_select(0, order))
    place = torch.empty_like(order).scatter_(0, order, rows)
    groups = sizes.tolist()
    source = torch.full((sum(groups),), len(flat), dtype=order.dtype, device=flat.device).scatter_(0, rows, order)
    return source, place.view_as(experts_NK), groups


def _sum_rows(rows_SD: Tensor, places_NK: Tensor) -> Tensor:
    """Sum of each token's K rows."""
    out = rows_SD.index_select(0, places_NK[:, 0])
    for k in range(1, places_NK.shape[1]):
        out += rows_SD.index_select(0, places_NK[:, k])
    return out


class Dispatched(NamedTuple):
    """Rows that reached the experts of this rank, grouped by expert."""

    rows_SD: Tensor
    gates_S: Tensor
    """Gate weight of each row, float32; 0 where a row only fills its group up."""
    ends_E: Tensor
    """Where the rows of each expert that is held here end, int64, on the CPU."""
    back: Any
    """What the dispatcher's `combine` needs."""


class Dispatcher(Protocol):
    """Takes tokens to the experts that were chosen for them, on whichever rank those are, and brings the results back. Differentiable."""

    def dispatch(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, held: int) -> Dispatched:
        """This rank's tokens, their gate weights (float32) and choices among all experts -> what this rank's `held` experts work on."""

    def combine(self, y_SD: Tensor, sent: Dispatched) -> Tensor:
        """The experts' outputs for `sent.rows_SD`, gates applied -> each of this rank's tokens' sum, (N, D)."""


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weights: Tensor, source: Tensor, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(places)
        # Filler rows have gate 0: they reach neither the output nor a gradient.
        return x.index_select(0, tokens), torch.cat((weights.flatten(), weights.new_zeros(1))).index_select(0, source)

    @staticmethod
    def backward(ctx, grad_rows: Tensor, grad_gates: Tensor):
        (places,) = ctx.saved_tensors
        return _sum_rows(grad_rows, places), grad_gates.index_select(0, places.flatten()).view_as(places), None, None, None


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        return _sum_rows(y, places)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class Local:
    """The dispatcher of a rank that holds all experts; one that does not can group what it has received by this one."""

    def dispatch(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, held: int) -> Dispatched:
        source, places, groups = group_rows(experts_NK, held, ROWS)
        tokens = (source // experts_NK.shape[1]).clamp_(max=len(x_ND) - 1)
        rows, gates = _Send.apply(x_ND, weights_NK, source, tokens, places)
        ends = torch.tensor(groups, device="cpu").cumsum(0)  # read as numbers by every product
        return Dispatched(rows, gates, ends, (tokens, places))

    def combine(self, y_SD: Tensor, sent: Dispatched) -> Tensor:
        return _Return.apply(y_SD, *sent.back)


LOCAL = Local()


class _GroupedExperts(torch.autograd.Function):
    """Grouped rows through their experts, activations recomputed."""

    @staticmethod
    def forward(ctx, rows: Tensor, gates: Tensor, ends: Tensor, gate_up: Operand, down: Operand, *tensors: Tensor) -> Tensor:
        h = gate_up.cast(rows.dtype).grouped_nt(rows, ends)
        narrow = gates.to(rows.dtype).unsqueeze(-1)
        ctx.save_for_backward(rows, h, narrow, ends)
        ctx.gate_up, ctx.down, ctx.dtype = gate_up, down, gates.dtype
        return down.cast(rows.dtype).grouped_nt(swiglu_reference(h).mul_(narrow), ends)

    @staticmethod
    def backward(ctx, grad_y: Tensor):
        rows, h, gates, ends = ctx.saved_tensors
        gate_up, down = ctx.gate_up, ctx.down
        # Cast again: kept, the copies would be half of the weights' memory.
        grad_gated = down.cast(rows.dtype).grouped_nn(grad_y, ends)
        hidden, grad_h = _swiglu_gradient(h, grad_gated * gates)
        grad_gates = (grad_gated * hidden).sum(-1, dtype=ctx.dtype)
        hidden *= gates
        grads = (*gate_up.grouped_tn(grad_h, rows, ends), *down.grouped_tn(grad_y, hidden, ends))
        return gate_up.cast(rows.dtype).grouped_nn(grad_h, ends), grad_gates, None, None, None, *grads


def _mixture_grouped(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """The same by `F.grouped_mm` and autograd."""
    source, places, groups = group_rows(experts, len(gate_up), 1)
    ends = torch.tensor(groups, device=x.device).cumsum(0).to(torch.int32)
    h = F.grouped_mm(x.index_select(0, source // experts.shape[1]), gate_up.to(x.dtype).transpose(1, 2), offs=ends)
    gates = weights.flatten().index_select(0, source).to(x.dtype).unsqueeze(-1)
    y = F.grouped_mm(swiglu(h) * gates, down.to(x.dtype).transpose(1, 2), offs=ends)
    return y.index_select(0, places.flatten()).unflatten(0, places.shape).sum(1)


def mixture(
    x_ND: Tensor, gate_up: Operand, down: Operand, weights_NK: Tensor, experts_NK: Tensor, dispatcher: Dispatcher = LOCAL
) -> Tensor:
    """(N, D) tokens through their K experts, weighted by their gates and summed: (N, D). See `mixture_reference`. gate_up (E, 2F, D) and
    down (E, D, F): the experts that are held here."""
    everything = isinstance(dispatcher, Local) and gate_up.joins and down.joins
    if everything and x_ND.is_cuda and x_ND.dtype == torch.bfloat16 and hasattr(F, "grouped_mm"):
        return _mixture_grouped(x_ND, gate_up.weight, down.weight, weights_NK, experts_NK)
    sent = dispatcher.dispatch(x_ND, weights_NK, experts_NK, gate_up.shape[0])
    y = _GroupedExperts.apply(sent.rows_SD, sent.gates_S, sent.ends_E, gate_up, down, *gate_up.tensors, *down.tensors)
    return dispatcher.combine(y, sent)


# Whole sub-layers over the compiled passes: x + down(swiglu(up(norm(x)))), dense and as a mixture. The plain paths are above and in
# model/experts.py, under autograd.


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


class _Groups(NamedTuple):
    """Rows for experts, grouped."""

    tokens_S: Tensor
    """Which row of the input each row is."""
    gates_S: Tensor
    """Float32."""
    ends_E: Tensor
    """Where each expert's rows end."""


def _arguments(x: Tensor, operands: tuple[Operand, ...], groups: _Groups | None) -> tuple[tuple, tuple]:
    """-> what `feed_forward` and `feed_forward_backward` of floats.c begin with, and end with."""
    weights = [o.weight.detach().float() for o in operands]
    both = weights[:2] if groups is None else (weights[0], None)
    tokens, gates, ends = groups or (None, None, torch.tensor([len(x)]))
    return (x, tokens, *both, weights[-1], gates), (ends, len(ends), *weights[-1].shape[-2:])


def _forward(x: Tensor, operands: tuple[Operand, ...], groups: _Groups | None = None, base: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """A dense feed-forward of x (N, D) by gate, up and down, plus `base`, or the experts' of groups by gate_up and down.

    -> (h (S, 2F) before the activation, out (S, D))."""
    if products.in_one(x, *operands):
        first, last = _arguments(x, operands, groups)
        rows, (D, F) = len(x) if groups is None else len(groups.tokens_S), last[-2:]
        h, out = new(x, rows, 2 * F), new(x, rows, D)
        products.call("feed_forward", x, *first, base, h, out, *last)
        return h, out
    if groups is None:
        gate, up, down = operands
        h = _up(x, gate, up)
        return h, down.nt(_swiglu(h), base=base)
    gate_up, down = operands
    rows = _rows(x, groups.tokens_S)
    h = gate_up.grouped_nt(rows, groups.ends_E)
    return h, down.grouped_nt(_swiglu(h, groups.gates_S), groups.ends_E)


def _backward(
    x: Tensor, operands: tuple[Operand, ...], h: Tensor, grad: Tensor, groups: _Groups | None = None
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """grad: (N, D). -> (gradient of x's rows (S, D), of the gates (S,), of the operands' tensors)."""
    if products.in_one(x, *operands):
        first, last = _arguments(x, operands, groups)
        grad_rows, grad_gates = new(x, len(h), x.shape[1]), None if groups is None else torch.empty_like(groups.gates_S)
        grads = [new(x, *o.shape) if o.weight.requires_grad else None for o in operands]
        parts = grads if groups is None else [grads[0], None, grads[1]]
        products.call("feed_forward_backward", x, *first, h, grad.contiguous(), grad_rows, grad_gates, *parts, *last)
        return grad_rows, grad_gates, tuple(g if g is None else g.to(o.weight.dtype) for g, o in zip(grads, operands, strict=True))
    if groups is None:
        gate, up, down = operands
        grad_h, hidden, _ = _swiglu_backward(h, down.nn(grad))
        left, right = grad_h.chunk(2, 1)
        grads = (*gate.tn(left, x), *up.tn(right, x), *down.tn(grad, hidden))
        return up.nn(right, base=gate.nn(left)), None, grads
    (gate_up, down), (tokens, gates, ends) = operands, groups
    rows = _rows(x, tokens)
    grad_y = _rows(grad, tokens)
    grad_h, hidden, grad_gates = _swiglu_backward(h, down.grouped_nn(grad_y, ends), gates)
    grads = (*gate_up.grouped_tn(grad_h, rows, ends), *down.grouped_tn(grad_y, hidden, ends))
    return gate_up.grouped_nn(grad_h, ends), grad_gates, grads


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, eps: float, operands, *tensors):
        """operands: gate, up, down."""
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        rows, inverse = norm_rows(x, norm, eps)
        h, out = _forward(rows, operands, base=x)
        ctx.save_for_backward(x, norm, inverse, h)
        ctx.operands, ctx.eps = operands, eps
        return out.view_as(x_BTD)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        x, norm, inverse, h = ctx.saved_tensors
        grad = grad_BTD.reshape(x.shape)
        grad_normed, _, grads = _backward(norm_rows(x, norm, ctx.eps)[0], ctx.operands, h, grad)
        grad_x = new_like(x)
        grad_norm = norm_gradient_into(grad_normed, x, norm, inverse, grad_x, extra=grad)
        return grad_x.view_as(grad_BTD), grad_norm, None, None, *grads


def dense_feed_forward(x_BTD: Tensor, norm: Tensor, eps: float, operands: tuple[Operand, Operand, Operand]) -> Tensor:
    """x + down(silu(gate n) * up n) with n = norm(x): (B, T, D) -> (B, T, D). operands: gate (F, D), up (F, D), down (D, F)."""
    return _Dense.apply(x_BTD, norm, eps, operands, *tensors_of(*operands))


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(ctx, residual, normed, weights, experts, operands, *tensors):
        """operands: the experts' gate_up and down, and those of the shared expert where there is one: gate, up, down."""
        source, places, sizes = group_rows(experts, operands[0].shape[0], 1 if products.usable(normed) else ROWS)
        tokens = (source // experts.shape[1]).clamp_(max=len(normed) - 1)
        # Filler rows have gate 0: they reach neither the output nor a gradient.
        gates = torch.cat((weights.flatten(), weights.new_zeros(1))).index_select(0, source)
        groups = _Groups(tokens, gates, torch.tensor(sizes).cumsum(0))
        h, y = _forward(normed, operands[:2], groups)
        base, h_shared = residual, None
        if operands[2:]:
            h_shared, base = _forward(normed, operands[2:], base=residual)
        ctx.save_for_backward(normed, h, places, h_shared, *groups)
        ctx.operands = operands
        return _combine(y, places, base)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (normed, h, places, h_shared, *groups), operands, grad = ctx.saved_tensors, ctx.operands, grad.contiguous()
        grad_rows, grad_gates, grads = _backward(normed, operands[:2], h, grad, _Groups(*groups))
        grad_weights = grad_gates.index_select(0, places.flatten()).view_as(places)
        base = None
        if operands[2:]:
            base, _, shared = _backward(normed, operands[2:], h_shared, grad)
            grads += shared
        return grad, _combine(grad_rows, places, base), grad_weights, None, None, *grads


def mixture_feed_forward(
    residual_ND: Tensor, normed_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, operands: tuple[Operand, ...]
) -> Tensor:
    """residual + routed experts (`mixture_reference`) + shared expert of the normed rows: (N, D). operands: the experts'
    gate_up (E, 2F, D) and down (E, D, F), and gate, up and down of the shared expert where there is one."""
    return _Mixture.apply(residual_ND, normed_ND, weights_NK, experts_NK, operands, *tensors_of(*operands))
