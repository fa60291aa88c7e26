"""Causal attention for query/key and value heads of different width, with optional document boundaries.

On a CPU the fused SDPA kernel wants equal widths and was measured slower than explicit products over causal row blocks, which skip
most of the upper triangle; on CUDA SDPA is the fast path, the values padded to the keys' width where the widths differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 128  # query rows of a block: small enough to skip most of the upper triangle, large enough for efficient products


def document_bias(documents_BT: Tensor, dtype: torch.dtype) -> Tensor | None:
    """(B, 1, T, T) additive bias, 0 within a document and -inf across; None where every row holds a single document."""
    if bool((documents_BT == documents_BT[:, :1]).all()):
        return None
    same = documents_BT[:, None, :, None] == documents_BT[:, None, None, :]
    return torch.zeros((), dtype=dtype, device=same.device).where(same, float("-inf"))


def attention_reference(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax in float32 over keys at or before each query; the T queries are the last T of S >= T positions."""
    scores = (q_BHTK @ k_BHSK.transpose(-1, -2)).float() * scale
    length, total = scores.shape[-2:]
    future = torch.ones(length, total, dtype=torch.bool, device=scores.device).triu_(total - length + 1)
    scores = scores.masked_fill(future, float("-inf"))
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(v_BHSV.dtype) @ v_BHSV


class _BlockAttention(torch.autograd.Function):
    """Row blocks of explicit products; keeps the probabilities in the compute type, so the backward pass does no second softmax."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None) -> Tensor:
        B, H, T, _ = q.shape
        q, k, v = (t.reshape(B * H, T, -1) for t in (q * scale, k, v))
        out = torch.empty(B * H, T, v.shape[-1], dtype=v.dtype, device=v.device)
        blocks = []
        for start in range(0, T, ROWS):
            stop = min(start + ROWS, T)
            scores = torch.bmm(q[:, start:stop], k[:, :stop].transpose(1, 2))
            # Only the last square of the block reaches into the future.
            future = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu_(1)
            scores[:, :, start:].masked_fill_(future, float("-inf"))
            if bias is not None:
                scores.view(B, H, stop - start, stop).add_(bias[:, :, start:stop, :stop])
            weights = torch.softmax(scores, -1)
            torch.bmm(weights, v[:, :stop], out=out[:, start:stop])
            blocks.append(weights)
        ctx.save_for_backward(q, k, v, *blocks)
        ctx.shape, ctx.scale = (B, H, T), scale
        return out.view(B, H, T, -1)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *blocks = ctx.saved_tensors
        B, H, T = ctx.shape
        grad = grad.reshape(B * H, T, -1)
        grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for i, weights in reversed(list(enumerate(blocks))):
            start = i * ROWS
            stop = start + weights.shape[1]
            g = grad[:, start:stop]
            # The last block touches every key, so it initialises the sums that the earlier ones add to.
            grad_v[:, :stop] += torch.bmm(weights.transpose(1, 2), g)
            grad_scores = torch._softmax_backward_data(torch.bmm(g, v[:, :stop].transpose(1, 2)), weights, -1, weights.dtype)
            torch.bmm(grad_scores, k[:, :stop], out=grad_q[:, start:stop])
            grad_k[:, :stop] += torch.bmm(grad_scores.transpose(1, 2), q[:, start:stop])
        return (
            grad_q.mul_(ctx.scale).view(B, H, T, -1),
            grad_k.view(B, H, T, -1),
            grad_v.view(B, H, T, -1),
            None,
            None,
        )


def causal_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """q (B,H,T,K), k (B,H,S,K), v (B,H,S,V) -> (B,H,T,V). bias: `document_bias`, or None. Block path: S == T on a CPU; CUDA: SDPA."""
    if q_BHTK.shape[2] != k_BHSK.shape[2] or q_BHTK.dtype == torch.float64:
        return attention_reference(q_BHTK, k_BHSK, v_BHSV, scale, bias)
    if q_BHTK.is_cuda:
        width = v_BHSV.shape[-1]
        v = F.pad(v_BHSV, (0, q_BHTK.shape[-1] - width)) if width < q_BHTK.shape[-1] else v_BHSV
        if bias is not None:
            T = q_BHTK.shape[2]
            bias = bias.to(q_BHTK.dtype).masked_fill(torch.ones(T, T, dtype=torch.bool, device=bias.device).triu(1), float("-inf"))
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v, attn_mask=bias, is_causal=bias is None, scale=scale)[..., :width]
    return _BlockAttention.apply(q_BHTK, k_BHSK, v_BHSV, scale, bias)
