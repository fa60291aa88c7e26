"""The two ends of the vocabulary: rows of the embedding, and the output head with its cross-entropy.

Head and cross-entropy go through chunks of tokens: the logits (N, W) never exist as a whole. The gradients of hidden states and head are
computed during the forward pass, chunk by chunk, so that a chunk of logits is read while it is in cache and nothing of it is kept (the idea
of Liger Kernel's fused linear cross-entropy, arXiv 2410.10989).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.kernels import native, products
from sparing.kernels.native import new, new_like
from sparing.kernels.products import Frozen
from sparing.kernels.sizes import HEAD_TOKENS, SCORED_LOGITS

IGNORE = -100
FEW = 1 / 16
"""Share of rows without a target that the head computes too: gathering the others costs passes."""


def linear_cross_entropy_reference(
    x_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, denominator: float, weights_N: Tensor | None = None
) -> Tensor:
    """Sum of the cross-entropy (nats) over targets that are not IGNORE, each times its weight, over `denominator`; a float32 scalar.

    targets_N, weights_N: (N,), or (N, K) where each row has K targets."""
    logits = F.linear(x_ND, weight_WD.to(x_ND.dtype)).float()
    each = logits if targets_N.dim() == 1 else logits.repeat_interleave(targets_N.shape[1], 0)
    nll = F.cross_entropy(each, targets_N.flatten(), ignore_index=IGNORE, reduction="none")
    return (nll if weights_N is None else nll * weights_N.flatten()).sum() / denominator


def _softmax_and_nll(logits: Tensor, targets: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """(gradient of the logits, cross-entropy of each row in float32, 0 where it does not count), from logits in the compute type.
    Both are multiplied by the rows' weights.

    One softmax kernel in the compute type instead of four float32 passes. What must be exact is summed in float32: the target's
    gradient is minus the sum of the others', so it keeps its precision where the target's probability is near 1, and so does the loss.
    """
    valid = targets != IGNORE
    if native.usable(logits):
        nll = torch.empty(len(logits), dtype=torch.float32)
        many, strides = _per_row(targets), (*logits.shape, logits.stride(0))
        native.call("cross_entropy", logits.dtype, logits, targets.contiguous(), weights, many, 1.0, nll, *strides)
        return logits, nll
    if targets.dim() == 2:
        return _several(logits.float(), targets.where(valid, 0), (1.0 if weights is None else weights) * valid, logits.dtype)
    probability = logits.softmax(-1)
    rows, words = probability.shape
    # Flat positions: indexed writes touch one number a row, where scatter_ would copy the whole matrix.
    place = torch.arange(0, rows * words, words, device=targets.device) + targets.where(valid, 0)
    flat = probability.view(-1)
    target = flat.index_select(0, place).float()
    flat.index_fill_(0, place, 0.0)
    others = torch.mv(probability, probability.new_ones(words)).float()  # a product: accumulates in float32
    nll = torch.where(target > 0.5, -torch.log1p(-others.clamp(max=0.75)), -target.clamp(min=1e-38).log())
    flat.index_copy_(0, place, -others.to(probability.dtype))
    if weights is not None:
        probability *= weights.where(valid, 0.0).unsqueeze(-1).to(probability.dtype)
        nll = nll * weights
    elif not bool(valid.all()):
        probability *= valid.unsqueeze(-1)
    return probability, nll.where(valid, 0.0)


def _several(logits: Tensor, targets: Tensor, weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`_softmax_and_nll` of float32 logits (N, W) with targets and weights (N, K). Of each row: the weights' sum times softmax, minus the
    weights where the targets are."""
    log_sum, times = logits.logsumexp(-1), weights.sum(-1)
    nll = times * log_sum - (logits.gather(1, targets) * weights).sum(-1)
    probability = (logits - log_sum.unsqueeze(-1)).exp_() * times.unsqueeze(-1)
    return probability.scatter_add_(1, targets, -weights).to(dtype), nll


def _per_row(targets: Tensor) -> int:
    """How many targets a row has."""
    return 1 if targets.dim() == 1 else targets.shape[1]


def _scored(targets: Tensor) -> Tensor:
    """(N,) bool: the rows that have a target."""
    return targets != IGNORE if targets.dim() == 1 else (targets != IGNORE).any(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_WD: Tensor, targets_N: Tensor, denominator: float, weights_N: Tensor | None) -> Tensor:
        weight = weight_WD.to(x_ND.dtype)
        grad_x = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_WD, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float32, device=x_ND.device)
        for start in range(0, len(x_ND), HEAD_TOKENS):
            part = slice(start, start + HEAD_TOKENS)
            grad, nll = _softmax_and_nll(F.linear(x_ND[part], weight), targets_N[part], None if weights_N is None else weights_N[part])
            total += nll.sum()
            if grad_x is not None:
                torch.mm(grad, weight, out=grad_x[part])
            if grad_weight is not None:
                grad_weight += grad.t() @ x_ND[part]
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight_WD.dtype))
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
            None,
        )


def _own_head(
    x_ND: Tensor, weight_WD: Tensor | Frozen, targets_N: Tensor, weights_N: Tensor | None, scale: float, learns: bool,
    grad_weight: Tensor | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """-> (cross-entropy of each row times its weight (N,) float32, gradient of `scale` times their sum (N, D), None unless
    `learns`), by our own products; grad_weight (W, D) float32 is filled. Rows that are not scored, as those of questions, are
    left out where they are more than FEW of all."""
    rows = x_ND, targets_N, weights_N
    places = _scored(targets_N).nonzero().squeeze(1)
    whole = len(places) >= (1 - FEW) * len(x_ND)
    if not whole:
        rows = tuple(t if t is None else t.index_select(0, places) for t in rows)
    x, targets, weights = (t if t is None else t.contiguous() for t in rows)
    nll, grad_x = torch.empty(len(x), dtype=torch.float32), new_like(x) if learns else None
    sizes = (*x.shape, weight_WD.shape[0])
    many = _per_row(targets)
    products.call("head_loss", x, x, *products.held(weight_WD), targets, weights, many, scale, nll, grad_x, grad_weight, *sizes)
    if whole:
        return nll, grad_x
    if grad_weight is not None and not len(places):
        grad_weight.zero_()
    grads = None if grad_x is None else new_like(x_ND).zero_().index_copy_(0, places, grad_x)
    return nll.new_zeros(len(x_ND)).index_copy_(0, places, nll), grads


class _CompiledCrossEntropy(torch.autograd.Function):
    """Gradients are computed with the loss and already divided; `backward` only passes them on."""

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_WD: Tensor | Frozen, targets_N: Tensor, denominator: float, weights_N: Tensor | None) -> Tensor:
        grad_weight = new_like(weight_WD, torch.float32) if ctx.needs_input_grad[1] else None
        nll, grad_x = _own_head(x_ND, weight_WD, targets_N, weights_N, 1.0 / denominator, True, grad_weight)
        if grad_weight is not None and weight_WD.dtype != torch.float32:
            grad_weight = new_like(weight_WD).copy_(grad_weight)
        ctx.save_for_backward(grad_x, grad_weight)
        return nll.sum() / denominator

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_x, grad_weight = ctx.saved_tensors
        if float(grad) != 1.0:
            grad_x, grad_weight = grad_x * grad.to(grad_x.dtype), None if grad_weight is None else grad_weight * grad
        return grad_x, grad_weight, None, None, None


def _check(targets_N: Tensor, words: int) -> None:
    """Raises IndexError for a target that would be read from another row, or past the end. Not looked for on a GPU."""
    if not targets_N.is_cuda and len(targets_N) and int(targets_N.max()) >= words:
        raise IndexError(f"target {int(targets_N.max())} is no word of a vocabulary of {words}")


def linear_cross_entropy(
    x_ND: Tensor, weight_WD: Tensor | Frozen, targets_N: Tensor, denominator: float, weights_N: Tensor | None = None
) -> Tensor:
    """Mean-like cross-entropy of `x @ weight.T` against targets, each times its weight (float32); see the reference for the definition.
    Several targets in a row, as draws from a distribution, cost little more than one: the row's softmax is the same for all.
    Our own products read a weight of few bits as it is; others get one copy of it in x's type.

    Raises IndexError for a target that is no word (not looked for on a GPU, where it would cost a wait)."""
    words = weight_WD.shape[0]
    _check(targets_N, words)
    frozen = isinstance(weight_WD, Frozen)
    readable = products.even(x_ND.shape[1], words) and (frozen or weight_WD.dtype in native.SUFFIXES)
    compiled = readable and len(x_ND) and torch.is_grad_enabled() and products.usable(x_ND)
    if frozen and not compiled:
        weight_WD = weight_WD.shared(x_ND.dtype)
    return (_CompiledCrossEntropy if compiled else _LinearCrossEntropy).apply(
        x_ND, weight_WD, targets_N, float(denominator), None if weights_N is None else weights_N.contiguous()
    )


def logits_of(x_ND: Tensor, weight_WD: Tensor | Frozen) -> Tensor:
    """x @ weight.T in x's type, in one product."""
    return weight_WD(x_ND) if isinstance(weight_WD, Frozen) else F.linear(x_ND, weight_WD.to(x_ND.dtype))


def token_nll(x_ND: Tensor, weight_WD: Tensor | Frozen, targets_N: Tensor) -> Tensor:
    """Cross-entropy (nats) of every token, (N,) float32, 0 where the target is IGNORE; softmax in float32, no gradient.

    Raises IndexError as `linear_cross_entropy` does."""
    with torch.no_grad():
        words = weight_WD.shape[0]
        if isinstance(weight_WD, Frozen) and products.usable(x_ND) and products.even(*weight_WD.shape):
            _check(targets_N, words)
            return _own_head(x_ND, weight_WD, targets_N, None, 0.0, False, None)[0]
        weight = weight_WD.shared(x_ND.dtype) if isinstance(weight_WD, Frozen) else weight_WD.to(x_ND.dtype)
        out = torch.empty(len(x_ND), dtype=torch.float32, device=x_ND.device)
        rows = max(1, min(HEAD_TOKENS, SCORED_LOGITS // words))
        for start in range(0, len(x_ND), rows):
            part = slice(start, start + rows)
            logits = F.linear(x_ND[part], weight).float()
            out[part] = F.cross_entropy(logits, targets_N[part], ignore_index=IGNORE, reduction="none")
        return out


class _Embedding(torch.autograd.Function):
    """Whose gradient is summed in float32: in bfloat16 those of a frequent word stop growing after a few hundred. Only rows that were read
    exist in float32; the rest of the gradient is zeros in memory that was used before."""

    @staticmethod
    def forward(ctx, words: Tensor, weight_WD: Tensor) -> Tensor:
        ctx.save_for_backward(words)
        ctx.shape, ctx.dtype = weight_WD.shape, weight_WD.dtype
        return F.embedding(words, weight_WD)

    @staticmethod
    def backward(ctx, grad: Tensor):
        read, place = ctx.saved_tensors[0].flatten().unique(return_inverse=True)
        grad = grad.flatten(0, -2)
        rows = new(grad, len(read), ctx.shape[1], dtype=torch.float32).zero_()
        rows.index_add_(0, place, grad if grad.dtype == torch.float32 else new_like(grad, torch.float32).copy_(grad))
        return None, new(grad, *ctx.shape, dtype=ctx.dtype).zero_().index_copy_(0, read, rows.to(ctx.dtype))


def embedding(words: Tensor, weight_WD: Tensor) -> Tensor:
    """(...,) integers -> (..., D) rows of the weight, in its type."""
    plain = weight_WD.dtype == torch.float32 and not native.usable(weight_WD)
    return F.embedding(words, weight_WD) if plain else _Embedding.apply(words, weight_WD)
