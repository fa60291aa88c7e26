"""Bits per byte: a model's cross-entropy on text, per byte of UTF-8, so that models with different tokenizers can be compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F

from sparing.base.config import UserError
from sparing.data.progress import check
from sparing.data.tokenizer import Tokenizer
from sparing.evals.select import select

NllFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(tokens, targets), both (B, T) int64 on the CPU, target -100: not scored -> (B, T): nats of each target, given its row so far."""
SORT_TOKENS = 1 << 20
"""Windows of about this many tokens together are sorted by length at a time."""
ROUND = 64
"""Short windows are padded to a multiple of this: few distinct shapes, little waste."""


def bpb(
    nll_fn: NllFn,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    context: int,
    *,
    batch: int = 8,
    max_bytes: int | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict:
    """Score documents -> {"bpb", "loss" (nats per token), "bytes", "tokens" (scored), "documents", "context"}.

    Each document is its beginning token (`Tokenizer.first_id`), t1 .. tn; t1 .. tn are scored once each, in windows of `context` inputs
    that do not overlap and carry one token over: window w reads positions wC .. wC + C - 1 and is scored on wC + 1 .. wC + C. The end of
    the document is not scored, as it has no bytes. `max_bytes`: see `select`. `batch` windows go to `nll_fn` at once; the result does not
    depend on it but for rounding.
    Raises UserError when there is no text, Stopped when asked to.
    """
    if context < 1 or batch < 1:
        raise UserError(f"context and batch must be at least 1, not {context} and {batch}")
    counts = {"bytes": 0, "tokens": 0, "documents": 0}
    nats = 0.0
    group: list[list[int]] = []
    size = 0
    for window in _windows(tokenizer, documents if max_bytes is None else select(documents, max_bytes), context, counts):
        group.append(window)
        size += len(window) - 1
        if size >= SORT_TOKENS:
            nats += _score(nll_fn, group, context, batch, should_stop)
            group, size = [], 0
    nats += _score(nll_fn, group, context, batch, should_stop)
    if not counts["tokens"]:
        raise UserError("nothing to evaluate on: the held-out text is empty")
    return {"bpb": nats / math.log(2) / counts["bytes"], "loss": nats / counts["tokens"], **counts, "context": context}


def nll_from_logits(logits_fn: Callable[[torch.Tensor], torch.Tensor]) -> NllFn:
    """Adapter for a callable tokens (B, T) -> logits (B, T, V)."""

    def nll(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = logits_fn(tokens).float()
        flat = F.cross_entropy(logits.flatten(0, 1), targets.flatten().to(logits.device), ignore_index=-100, reduction="none")
        return flat.view(targets.shape)

    return nll


def _windows(tokenizer: Tokenizer, documents: Iterable[str], context: int, counts: dict[str, int]) -> Iterator[list[int]]:
    """Slices of context + 1 tokens, the last of a document shorter."""
    for text in documents:
        ids = tokenizer.encode(text)
        if not ids:
            continue
        counts["bytes"] += len(text.encode())
        counts["tokens"] += len(ids)
        counts["documents"] += 1
        tokens = [tokenizer.first_id, *ids]
        for start in range(0, len(ids), context):
            yield tokens[start : start + context + 1]


def _score(nll_fn: NllFn, windows: list[list[int]], context: int, batch: int, should_stop: Callable[[], bool] | None) -> float:
    """Sum of nats, float64."""
    windows.sort(key=len, reverse=True)
    total = 0.0
    for start in range(0, len(windows), batch):
        check(should_stop)
        group = windows[start : start + batch]
        width = min(context, -(-(len(group[0]) - 1) // ROUND) * ROUND)
        tokens = torch.zeros(len(group), width, dtype=torch.int64)
        targets = torch.full((len(group), width), -100, dtype=torch.int64)
        for row, window in enumerate(group):
            piece = torch.tensor(window)
            tokens[row, : len(window) - 1] = piece[:-1]
            targets[row, : len(window) - 1] = piece[1:]
        with torch.no_grad():
            nll = nll_fn(tokens, targets)
        total += float(torch.where(targets != -100, nll.float().cpu().double(), 0.0).sum())
    return total
