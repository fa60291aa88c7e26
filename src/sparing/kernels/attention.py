"""Causal attention, with optional document boundaries, and whole attention sub-layers, x + attention(norm(x)), over the compiled passes.

On a CPU the fused SDPA kernel wants equal widths of keys and values and was measured slower than explicit products over causal row blocks,
which skip most of the upper triangle; on CUDA SDPA is the fast path, the values padded to the keys' width where the widths differ.

`latent_attention` (MLA) and `grouped_attention` (GQA) are single autograd.Functions, chosen where `native.usable`; the plain paths are
model/attention.py under autograd. One pass lays out and turns the heads, gradients of joined input projections are written side by side,
and no intermediate is copied.
"""

from __future__ import annotations

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels import native, products
from sparing.kernels.native import new, new_like
from sparing.kernels.norm import norm_gradient_into, norm_rows
from sparing.kernels.products import Operand, tensors_of
from sparing.kernels.sizes import ATTENTION_ROWS as ROWS
from sparing.kernels.sizes import PART_TOKENS


class DocumentMask:
    """Keeps attention inside a document. documents_BT: ids; a document is a run of equal ids within a row."""

    def __init__(self, documents_BT: Tensor, dtype: torch.dtype):
        self.documents, self.dtype = documents_BT, dtype

    @classmethod
    def of(cls, documents_BT: Tensor | None, dtype: torch.dtype) -> DocumentMask | None:
        """None where every row holds a single document."""
        if documents_BT is None or bool((documents_BT == documents_BT[:, :1]).all()):
            return None
        return cls(documents_BT, dtype)

    @cached_property
    def bias(self) -> Tensor:
        """(B, 1, T, T) additive, 0 within a document and -inf across."""
        same = self.documents[:, None, :, None] == self.documents[:, None, None, :]
        return torch.zeros((), dtype=self.dtype, device=same.device).where(same, float("-inf"))

    @cached_property
    def first(self) -> Tensor:
        """(B, T) int32: where the document of each position begins."""
        begins = F.pad(self.documents[:, 1:] != self.documents[:, :-1], (1, 0))
        positions = torch.arange(begins.shape[1], device=begins.device)
        return positions.where(begins, 0).cummax(1).values.to(torch.int32)


def attention_reference(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Softmax in float32 over keys at or before each query; the T queries are the last T of S >= T positions."""
    scores = (q_BHTK @ k_BHSK.transpose(-1, -2)).float() * scale
    length, total = scores.shape[-2:]
    future = torch.ones(length, total, dtype=torch.bool, device=scores.device).triu_(total - length + 1)
    scores = scores.masked_fill(future, float("-inf"))
    if bias is not None:
        scores = scores + bias
    return scores.softmax(-1).to(v_BHSV.dtype) @ v_BHSV


def _weights(q: Tensor, k: Tensor, start: int, scale: float, mask: DocumentMask | None, heads: int, group: int = 1) -> Tensor:
    """(B*H, R, S) probabilities of a block of R query rows, from position `start`, over the keys up to its end. group: rows of a position,
    more than one with the compiled pass only."""
    scores = torch.bmm(q, k.transpose(1, 2))
    rows, keys = scores.shape[1:]
    batch = scores.shape[0] // heads
    if native.usable(scores):
        first = None if mask is None else mask.first
        length = 0 if first is None else first.shape[1]
        native.call("softmax_forward", scores.dtype, scores, first, scale, batch, heads, rows, group, keys, length, start)
        return scores
    scores *= scale
    # Only the last square of the block reaches into the future.
    future = torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu_(1)
    scores[:, :, start:].masked_fill_(future, float("-inf"))
    if mask is not None:
        scores.view(batch, heads, rows, keys).add_(mask.bias[:, :, start : start + rows, :keys])
    return torch.softmax(scores, -1)


def _scores_gradient(grad: Tensor, weights: Tensor, start: int, scale: float, group: int = 1) -> Tensor:
    """Gradient of the products q·k from that of the probabilities; `grad` may be overwritten."""
    if native.usable(grad):
        rows, keys = grad.shape[1:]
        native.call("softmax_backward", grad.dtype, grad, weights, scale, grad.shape[0] * rows, rows, group, keys, start)
        return grad
    return torch._softmax_backward_data(grad, weights, -1, weights.dtype).mul_(scale)


def blocks_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: DocumentMask | None, heads: int) -> tuple[Tensor, list[Tensor]]:
    """q (B*H, T*G, K), k (B*H, T, K), v (B*H, T, V) -> (out (B*H, T*G, V), the probabilities of each block of rows, which the backward pass
    takes). Each position has G rows of q, one after the other."""
    T, G = k.shape[1], q.shape[1] // k.shape[1]
    size = ROWS if G == 1 else ROWS // 2  # G rows a position fill a product sooner (measured with G 2 to 4)
    out = v.new_empty(len(v), T * G, v.shape[2])
    blocks = []
    for start in range(0, T, size):
        stop = min(start + size, T)
        rows = slice(start * G, stop * G)
        weights = _weights(q[:, rows], k[:, :stop], start, scale, mask, heads, G)
        torch.bmm(weights, v[:, :stop], out=out[:, rows])
        blocks.append(weights)
    return out, blocks


def blocks_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, blocks: list[Tensor] | tuple[Tensor, ...], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from that of `blocks_forward`'s output."""
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    group = q.shape[1] // k.shape[1]
    for weights in reversed(blocks):
        stop = weights.shape[2]
        start = stop - weights.shape[1] // group
        rows = slice(start * group, stop * group)
        g = grad[:, rows]
        # The last block touches every key, so it initialises the sums that the earlier ones add to.
        grad_v[:, :stop] += torch.bmm(weights.transpose(1, 2), g)
        grad_scores = _scores_gradient(torch.bmm(g, v[:, :stop].transpose(1, 2)), weights, start, scale, group)
        torch.bmm(grad_scores, k[:, :stop], out=grad_q[:, rows])
        grad_k[:, :stop] += torch.bmm(grad_scores.transpose(1, 2), q[:, rows])
    return grad_q, grad_k, grad_v


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: DocumentMask | None, mixed: Tensor) -> list[Tensor]:
    """q (B, H, T*G, K), k (B, H, T, K), v (B, H, T, V), contiguous, into rows `mixed` (B*T, H*G*V); -> what `attend_backward` needs.

    On the compiled passes. G queries of a position, one after the other, share keys and values."""
    (B, H, T, V), G = v.shape, q.shape[2] // v.shape[2]
    if products.usable(q):
        log_sum = torch.empty(B, H, T, G)
        products.call("attention_forward", q, q, k, v, mask and mask.first, scale, mixed, log_sum, B, H, T, G, q.shape[-1], V)
        return [log_sum]
    out, blocks = blocks_forward(*(t.flatten(0, 1) for t in (q, k, v)), scale, mask, H)
    native.call("heads_last", v.dtype, out, mixed, B, H, T, G * V)
    return blocks


def attend_backward(
    grad: Tensor, mixed: Tensor, q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor], scale: float, mask: DocumentMask | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v from that of the rows (B*T, H*G*V) that `attend` made, `mixed`."""
    (B, H, T, V), G = v.shape, q.shape[2] // v.shape[2]
    if products.usable(q):
        grads = tuple(new_like(t) for t in (q, k, v))
        products.call(
            "attention_backward", q, q, k, v, mask and mask.first, scale, mixed, kept[0], grad, *grads, B, H, T, G, q.shape[-1], V
        )  # fmt: skip
        return grads
    grad_out = new(v, B, H, T * G, V)
    native.call("heads_last", v.dtype, grad, grad_out, B, T, H, G * V)
    return blocks_backward(*(t.flatten(0, 1) for t in (grad_out, q, k, v)), kept, scale)


class _BlockAttention(torch.autograd.Function):
    """Row blocks of explicit products; keeps the probabilities in the compute type, so the backward pass does no second softmax."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: DocumentMask | None) -> Tensor:
        B, H, T, _ = q.shape
        q, k, v = (t.reshape(B * H, T, -1) for t in (q, k, v))
        out, blocks = blocks_forward(q, k, v, scale, mask, H)
        ctx.save_for_backward(q, k, v, *blocks)
        ctx.shape, ctx.scale = (B, H, T, -1), scale
        return out.view(ctx.shape)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, v, *blocks = ctx.saved_tensors
        grads = blocks_backward(grad.reshape(q.shape[0], q.shape[1], -1), q, k, v, blocks, ctx.scale)
        return *(g.view(ctx.shape) for g in grads), None, None


def causal_attention(q_BHTK: Tensor, k_BHSK: Tensor, v_BHSV: Tensor, scale: float, mask: DocumentMask | None = None) -> Tensor:
    """q (B,H,T,K), k (B,H,S,K), v (B,H,S,V) -> (B,H,T,V). Block path: S == T on a CPU; CUDA: SDPA."""
    if q_BHTK.shape[2] != k_BHSK.shape[2] or q_BHTK.dtype == torch.float64:
        return attention_reference(q_BHTK, k_BHSK, v_BHSV, scale, mask.bias if mask else None)
    if q_BHTK.is_cuda:
        width = v_BHSV.shape[-1]
        v = F.pad(v_BHSV, (0, q_BHTK.shape[-1] - width)) if width < q_BHTK.shape[-1] else v_BHSV
        bias = None
        if mask is not None:
            T = q_BHTK.shape[2]
            bias = mask.bias.to(q_BHTK.dtype).masked_fill(torch.ones(T, T, dtype=torch.bool, device=q_BHTK.device).triu(1), float("-inf"))
        return F.scaled_dot_product_attention(q_BHTK, k_BHSK, v, attn_mask=bias, is_causal=bias is None, scale=scale)[..., :width]
    return _BlockAttention.apply(q_BHTK, k_BHSK, v_BHSV, scale, mask)


# Whole sub-layers over the compiled passes


class _LatentAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BTD, norm, q_norm, kv_norm, table, eps: float, widths, scale: float, mask, operands, *tensors):
        """operands: q_a, q_b, kv_a, kv_b, o; q_norm and q_b are None where queries are not compressed. widths: (H, nope, rope, value);
        table: complex rotations."""
        q_a, q_b, kv_a, kv_b, o = operands
        (B, T, D), (H, C, R, V) = x_BTD.shape, widths
        N, q_rank, kv_rank = B * T, q_a.shape[0], kv_b.shape[1]
        x, turns = x_BTD.reshape(N, D), torch.view_as_real(table).contiguous()
        both, mixed, out = new(x, N, q_rank + kv_a.shape[0]), new(x, N, H * V), new_like(x)
        heads = [new(x, B, H, T, width) for width in (C + R, C + R, V)]
        inverse, q_inverse, kv_inverse = torch.empty(3, N)
        ctx.widths, ctx.scale, ctx.mask, ctx.operands, ctx.eps = widths, scale, mask, operands, eps
        if products.in_one(x, *operands):
            kept = [torch.empty(B, H, T)]
            first, sizes = _latent_arguments(x, norm, q_norm, kv_norm, turns, B, ctx)
            products.call("latent_forward", x, *first, eps, scale, both, *heads, mixed, *kept, inverse, q_inverse, kv_inverse, out, sizes)
        else:
            normed = norm_rows(x, norm, eps, inverse)[0]
            q_a.nt(normed, out=both[:, :q_rank])
            kv_a.nt(normed, out=both[:, q_rank:])
            q = both
            if q_b is not None:
                q = q_b.nt(norm_rows(both[:, :q_rank], q_norm, eps, q_inverse)[0])
            kv_latent = norm_rows(both[:, q_rank : q_rank + kv_rank], kv_norm, eps, kv_inverse)[0]
            sizes = (0, N, T, H, C, R, V, q.stride(0), both.stride(0), int(table.ndim == 3))
            native.call("heads_forward", x.dtype, q, kv_b.nt(kv_latent), both[:, q_rank + kv_rank :], turns, *heads, *sizes)
            kept = attend(*heads, scale, mask, mixed)
            o.nt(mixed, base=x, out=out)
        q_inverse = None if q_b is None else q_inverse
        ctx.save_for_backward(x, norm, inverse, both, q_norm, q_inverse, kv_norm, kv_inverse, mixed, turns, *heads, *kept)
        return out.view(B, T, D)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        x, norm, inverse, both, q_norm, q_inverse, kv_norm, kv_inverse, mixed, turns, *heads = ctx.saved_tensors
        (B, T, _), (H, C, R, V), operands, eps = grad_BTD.shape, ctx.widths, ctx.operands, ctx.eps
        q_a, q_b, kv_a, kv_b, o = operands
        q_rank, kv_rank = q_a.shape[0], kv_b.shape[1]
        grad, grad_x = grad_BTD.reshape(x.shape), new_like(x)
        if products.in_one(x, *operands):
            norms = [None if w is None or not w.requires_grad else torch.zeros(len(w)) for w in (norm, q_norm, kv_norm)]
            grads = [None if w is None or not w.trainable else new(x, *w.shape) for w in operands]
            first, sizes = _latent_arguments(x, norm, q_norm, kv_norm, turns, B, ctx)
            rows = H * (V + C + V + (C + R if q_b is not None else 0)) + both.shape[1]
            work, kept = new(x, int(sizes[-1]) * T, rows), (both, *heads, inverse, q_inverse, kv_inverse)
            given = (*kept[:4], mixed, heads[3], *kept[5:], grad.contiguous(), work, grad_x)
            products.call("latent_backward", x, *first, ctx.scale, *given, *norms, *grads, sizes)
            found = [g if g is None else g.to(w.weight.dtype) for g, w in zip(grads, operands, strict=True) if w is not None]
            return grad_x.view(grad_BTD.shape), *norms, None, None, None, None, None, None, *found
        heads, kept = heads[:3], heads[3:]
        q_part, kv_part, rope = slice(q_rank), slice(q_rank, q_rank + kv_rank), slice(q_rank + kv_rank, None)
        grad_o = o.tn(grad, mixed)
        grads = attend_backward(o.nn(grad), mixed, *heads, kept, ctx.scale, ctx.mask)
        grad_both, grad_kv = new_like(both), new(x, len(x), H * (C + V))
        grad_q = grad_both if q_b is None else new(x, len(x), H * (C + R))
        sizes = (B, T, H, C, R, V, grad_q.stride(0), both.stride(0), int(turns.ndim == 4))
        native.call("heads_backward", x.dtype, *grads, turns, grad_q, grad_kv, grad_both[:, rope], *sizes)
        grad_kv_norm = norm_gradient_into(kv_b.nn(grad_kv), both[:, kv_part], kv_norm, kv_inverse, grad_both[:, kv_part])
        grad_kv_b = kv_b.tn(grad_kv, norm_rows(both[:, kv_part], kv_norm, eps)[0])
        grad_q_norm, grad_q_b = None, ()
        if q_b is not None:
            q_in = both[:, q_part]
            grad_q_b = q_b.tn(grad_q, norm_rows(q_in, q_norm, eps)[0])
            grad_q_norm = norm_gradient_into(q_b.nn(grad_q), q_in, q_norm, q_inverse, grad_both[:, q_part])
        left, right = grad_both[:, q_part], grad_both[:, q_rank:]
        grad_normed = kv_a.nn(right, base=q_a.nn(left))
        grad_norm = norm_gradient_into(grad_normed, x, norm, inverse, grad_x, extra=grad)
        normed = norm_rows(x, norm, eps)[0]
        return (
            grad_x.view(grad_BTD.shape), grad_norm, grad_q_norm, grad_kv_norm, None, None, None, None, None, None,
            *q_a.tn(left, normed), *grad_q_b, *kv_a.tn(right, normed), *grad_kv_b, *grad_o,
        )  # fmt: skip


def _latent_arguments(x: Tensor, norm: Tensor, q_norm: Tensor | None, kv_norm: Tensor, turns: Tensor, B: int, ctx) -> tuple[tuple, Tensor]:
    """-> what `latent_forward` and `latent_backward` of latent.inc begin with, and their sizes."""
    (H, C, R, V), (q_a, _, _, kv_b, _), (N, D) = ctx.widths, ctx.operands, x.shape
    weights = [w if w is None else w.detach().float() for w in (norm, q_norm, kv_norm, *(o and o.weight for o in ctx.operands))]
    T, part = N // B, min(B, max(1, PART_TOKENS // (N // B)))
    sizes = torch.tensor([B, T, D, H, C, R, V, q_a.shape[0], kv_b.shape[1], turns.ndim == 4, part])
    return (x, *weights[:3], turns, ctx.mask and ctx.mask.first, *weights[3:]), sizes


def latent_attention(
    x_BTD: Tensor, norm: Tensor, q: tuple[Operand, Tensor | None, Operand | None], kv: tuple[Operand, Tensor, Operand], o: Operand,
    table: Tensor, eps: float, widths: tuple[int, int, int, int], scale: float, mask: DocumentMask | None,
) -> Tensor:  # fmt: skip
    """x + MLA(norm(x)), (B, T, D) -> (B, T, D). q: (down, norm, up) or (direct, None, None), kv: (down with rope, norm, up), o: weights as
    in the checkpoint, norms as tensors; widths (H, nope, rope, value); table (T, R/2) or (B, T, R/2) complex64."""
    operands = (q[0], q[2], kv[0], kv[2], o)
    return _LatentAttention.apply(x_BTD, norm, q[1], kv[1], table, eps, widths, scale, mask, operands, *tensors_of(*operands))


def _lay_out(rows: list[Tensor], heads: list[Tensor], turns: Tensor, shape, back: bool = False) -> None:
    """Rows of q, k and v (B*T, heads * K) into heads (B, H, T*G, K) with queries and keys turned, or back. shape: (B, T, H, G, K)."""
    B, T, H, G, K = shape
    for row, head, table, group in zip(rows, heads, (turns, turns, None), (G, 1, 1), strict=False):
        native.call("turn_heads", head.dtype, row, head, table, B, T, H, group, K, row.stride(0), int(turns.ndim == 4), int(back))


def _normed_heads(rows: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows (N, heads * K), contiguous, each head normed by `weight` (K,); -> (the same shape, 1 / rms of each head (N * heads,))."""
    out, inverse = norm_rows(rows.view(-1, len(weight)), weight, eps)
    return out.view(rows.shape), inverse


class _GroupedAttention(torch.autograd.Function):
    """The G query heads that share keys and values are G rows of each position: one product serves all of them, keys and values are not
    repeated, and the product sums their gradients over the group. H counts the heads of keys and values."""

    @staticmethod
    def forward(
        ctx, x_BTD, norm, q_bias, k_bias, v_bias, q_norm, k_norm, table, eps: float, widths, scale: float, mask, operands, *tensors
    ):
        """operands: q, k, v, o. Biases and head norms are None where there are none. widths: (H, G, K); table: complex rotations."""
        (B, T, D), (H, G, K), (q, k, v, o) = x_BTD.shape, widths, operands
        x = x_BTD.reshape(B * T, D)
        normed, inverse = norm_rows(x, norm, eps)
        biases = [None if bias is None else bias.detach().to(x.dtype).expand(len(x), -1) for bias in (q_bias, k_bias, v_bias)]
        rows = [operand.nt(normed, base=bias) for operand, bias in zip((q, k, v), biases, strict=True)]
        # With head norms the backward pass needs what was normed, and makes queries and keys again from that.
        raw, inverses = [], []
        for i, weight in enumerate((q_norm, k_norm) if q_norm is not None else ()):
            raw.append(rows[i].view(-1, K))
            rows[i], head_inverse = _normed_heads(rows[i], weight, eps)
            inverses.append(head_inverse)
        turns = torch.view_as_real(table).contiguous()
        heads = [new(x, B, H, length, K) for length in (T * G, T, T)]
        shape = (B, T, H, G, K)
        _lay_out(rows, heads, turns, shape)
        mixed = new(x, len(x), H * G * K)
        kept = attend(*heads, scale, mask, mixed)
        ctx.save_for_backward(
            x, norm, inverse, mixed, turns, q_norm, k_norm, *(inverses or (None, None)), *(raw or heads[:2]), heads[2], *kept,
        )  # fmt: skip
        ctx.learns = [bias is not None and bias.requires_grad for bias in (q_bias, k_bias, v_bias)]
        ctx.shape, ctx.scale, ctx.mask, ctx.operands, ctx.eps = shape, scale, mask, operands, eps
        return o.nt(mixed, base=x).view(B, T, D)

    @staticmethod
    def backward(ctx, grad_BTD: Tensor):
        (x, norm, inverse, mixed, turns, q_norm, k_norm, *heads), (q, k, v, o) = ctx.saved_tensors, ctx.operands
        inverses, heads, kept = heads[:2], heads[2:5], heads[5:]
        raw = heads[:2]
        if q_norm is not None:
            (B, T, H, G, K) = ctx.shape
            rows = [_normed_heads(one.view(len(x), -1), weight, ctx.eps)[0] for one, weight in zip(raw, (q_norm, k_norm), strict=True)]
            heads = [new(x, B, H, length, K) for length in (T * G, T)] + heads[2:]
            _lay_out(rows, heads[:2], turns, ctx.shape)
        normed, _ = norm_rows(x, norm, ctx.eps)
        grad = grad_BTD.reshape(x.shape)
        grad_o = o.tn(grad, mixed)
        grads = attend_backward(o.nn(grad), mixed, *heads, kept, ctx.scale, ctx.mask)
        rows = [new(x, len(x), operand.shape[0]) for operand in (q, k, v)]
        _lay_out(rows, grads, turns, ctx.shape, back=True)
        grad_head_norms = [None, None]
        if q_norm is not None:
            for i, weight in enumerate((q_norm, k_norm)):
                part = rows[i].view(raw[i].shape)
                grad_head_norms[i] = norm_gradient_into(part, raw[i], weight, inverses[i], part)
        grad_biases = [part.sum(0, dtype=torch.float32) if learns else None for part, learns in zip(rows, ctx.learns, strict=True)]
        left, middle, right = rows
        grad_x = new_like(x)
        grad_normed = v.nn(right, base=k.nn(middle, base=q.nn(left)))
        grad_norm = norm_gradient_into(grad_normed, x, norm, inverse, grad_x, extra=grad)
        return (
            grad_x.view(grad_BTD.shape), grad_norm, *grad_biases, *grad_head_norms, None, None, None, None, None, None,
            *q.tn(left, normed), *k.tn(middle, normed), *v.tn(right, normed), *grad_o,
        )  # fmt: skip


def grouped_attention(
    x_BTD: Tensor, norm: Tensor, operands: tuple[Operand, Operand, Operand, Operand], table: Tensor, eps: float,
    widths: tuple[int, int, int], scale: float, mask: DocumentMask | None,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    head_norms: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:  # fmt: skip
    """x + GQA(norm(x)), (B, T, D) -> (B, T, D). operands: q (H*G*K, D), k and v (H*K, D), o (D, H*G*K); widths (H, G, K), K even; table
    (T, K/2) or (B, T, K/2) complex64. biases: of q, k, v; head_norms: (K,) weights of the norms of query and key heads."""
    rest = (table, eps, widths, scale, mask, operands)
    return _GroupedAttention.apply(x_BTD, norm, *biases, *head_norms, *rest, *tensors_of(*operands))
