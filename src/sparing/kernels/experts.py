"""SwiGLU experts over tokens sorted by expert: one product per expert, no padding, the hidden activation recomputed in the backward pass.

`F.grouped_mm` computes the same forward; on a CPU its backward was measured far slower than one product per expert, so it is chosen on CUDA only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu(h: Tensor) -> Tensor:
    """(..., 2F) with the gate's half first -> (..., F): silu(gate) * up (arXiv 2002.05202)."""
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def experts_reference(x_SD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, counts: list[int]) -> Tensor:
    """Rows of x sorted by expert, counts[e] of them for expert e -> (S, D). Plain autograd."""
    out, start = [], 0
    for expert, count in enumerate(counts):
        rows = x_SD[start : start + count]
        hidden = swiglu(F.linear(rows, gate_up_E2FD[expert].to(x_SD.dtype)))
        out.append(F.linear(hidden, down_EDF[expert].to(x_SD.dtype)))
        start += count
    return torch.cat(out)


def _swiglu_backward(h: Tensor, grad_hidden: Tensor) -> tuple[Tensor, Tensor]:
    """(hidden recomputed, gradient of h), from h (S, 2F) and the gradient of hidden (S, F)."""
    gate, up = h.chunk(2, -1)
    act = F.silu(gate)
    grad_h = torch.empty_like(h)
    grad_gate, grad_up = grad_h.chunk(2, -1)
    torch.mul(grad_hidden, act, out=grad_up)
    grad_gate.copy_(torch.ops.aten.silu_backward(grad_hidden * up, gate))
    return act.mul_(up), grad_h


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, gate_up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        gate_up_c, down_c = gate_up.to(x.dtype), down.to(x.dtype)
        h = x.new_empty(len(x), gate_up.shape[1])
        out = torch.empty_like(x)
        spans = _spans(counts)
        for expert, rows in spans:
            torch.mm(x[rows], gate_up_c[expert].t(), out=h[rows])
        hidden = swiglu(h)
        for expert, rows in spans:
            torch.mm(hidden[rows], down_c[expert].t(), out=out[rows])
        ctx.save_for_backward(x, h, gate_up_c, down_c)
        ctx.spans, ctx.dtype = spans, gate_up.dtype
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, h, gate_up, down = ctx.saved_tensors
        grad = grad.contiguous()
        grad_hidden = h.new_empty(len(x), h.shape[1] // 2)
        grad_down = torch.zeros_like(down)
        for expert, rows in ctx.spans:
            torch.mm(grad[rows], down[expert], out=grad_hidden[rows])
        hidden, grad_h = _swiglu_backward(h, grad_hidden)
        grad_x = torch.empty_like(x)
        grad_gate_up = torch.zeros_like(gate_up)
        for expert, rows in ctx.spans:
            torch.mm(grad[rows].t(), hidden[rows], out=grad_down[expert])
            torch.mm(grad_h[rows], gate_up[expert], out=grad_x[rows])
            torch.mm(grad_h[rows].t(), x[rows], out=grad_gate_up[expert])
        return grad_x, grad_gate_up.to(ctx.dtype), grad_down.to(ctx.dtype), None


def _spans(counts: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for experts that received any."""
    spans, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            spans.append((expert, slice(start, start + count)))
        start += count
    return spans


def experts_ffn(x_SD: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor, counts_E: Tensor) -> Tensor:
    """Rows sorted by expert through each row's SwiGLU expert: (S, D) -> (S, D). counts_E: (E,) integers summing to S."""
    if x_SD.is_cuda and hasattr(F, "grouped_mm"):
        ends = counts_E.cumsum(0).to(torch.int32)
        hidden = swiglu(F.grouped_mm(x_SD, gate_up_E2FD.to(x_SD.dtype).transpose(1, 2), offs=ends))
        return F.grouped_mm(hidden, down_EDF.to(x_SD.dtype).transpose(1, 2), offs=ends)
    return _Experts.apply(x_SD, gate_up_E2FD, down_EDF, counts_E.tolist())
