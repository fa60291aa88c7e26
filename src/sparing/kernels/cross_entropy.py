"""Output head and cross-entropy in chunks of tokens: the logits (N, W) never exist as a whole.

The gradients of hidden states and head are computed during the forward pass, chunk by chunk, so that a chunk of logits is read while
it is in cache and nothing of it is kept (the idea of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
CHUNK_TOKENS = 1024


def linear_cross_entropy_reference(x_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, denominator: float) -> Tensor:
    """Sum of the cross-entropy (nats) over targets that are not IGNORE, divided by `denominator`; a float32 scalar."""
    logits = F.linear(x_ND, weight_WD.to(x_ND.dtype)).float()
    return F.cross_entropy(logits, targets_N, ignore_index=IGNORE, reduction="sum") / denominator


def _chunk(x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One chunk: (logits float32, log-normaliser, safe targets, mask)."""
    logits = F.linear(x, weight).float()
    valid = targets != IGNORE
    safe = targets.where(valid, 0).unsqueeze(-1)
    return logits, logits.logsumexp(-1, keepdim=True), safe, valid


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, denominator: float) -> Tensor:
        weight = weight_WD.to(x_ND.dtype)
        grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_WD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits, normaliser, safe, valid = _chunk(x_ND[part], weight, targets_N[part])
            total += (normaliser - logits.gather(-1, safe)).squeeze(-1).where(valid, 0.0).sum()
            if grad_x is None and grad_weight is None:
                continue
            grad = logits.sub_(normaliser).exp_()
            grad.scatter_add_(-1, safe, torch.full_like(normaliser, -1.0))
            if not bool(valid.all()):
                grad *= valid.unsqueeze(-1)
            grad = grad.to(x_ND.dtype)
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[part])
            if grad_weight is not None:
                grad_weight += grad.t() @ x_ND[part]
        ctx.save_for_backward(grad_x, grad_weight)
        ctx.scale = 1.0 / denominator
        return total / denominator

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        scale = grad * ctx.scale
        return (
            None if grad_x is None else grad_x * scale.to(grad_x.dtype),
            None if grad_weight is None else grad_weight * scale,
            None,
            None,
        )


def linear_cross_entropy(x_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, denominator: float) -> Tensor:
    """Mean-like cross-entropy of `x @ weight.T` against targets; see the reference for the definition."""
    return _LinearCrossEntropy.apply(x_ND, weight_WD, targets_N, float(denominator))


def token_nll(x_ND: Tensor, weight_WD: Tensor, targets_N: Tensor) -> Tensor:
    """Cross-entropy (nats) of every token, (N,) float32, 0 where the target is IGNORE; no gradient."""
    with torch.no_grad():
        weight = weight_WD.to(x_ND.dtype)
        out = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits, normaliser, safe, valid = _chunk(x_ND[part], weight, targets_N[part])
            out[part] = (normaliser - logits.gather(-1, safe)).squeeze(-1).where(valid, 0.0)
        return out
