"""Scores of answers: nats per token of them, and bits per byte of their text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch

from sparing.data.answers import Pieces
from sparing.data.progress import check
from sparing.data.tokenizer import Tokenizer
from sparing.evals.bpb import ROUND, NllFn


def bytes_of_tokens(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64: bytes of text that each token stands for; 0 for special ones."""
    special = set(tokenizer.special.values())
    return np.array([0 if number in special else len(tokenizer.token_bytes(number)) for number in range(tokenizer.vocab_size)], np.int64)


def score_answers(
    nll_fn: NllFn, pieces: Pieces, lengths: np.ndarray, *, batch_tokens: int = 8192, should_stop: Callable[[], bool] | None = None
) -> dict:
    """{"loss" (nats per trained token, ends of answers included), "bpb" (bits of those that stand for text, per byte of it), "bytes",
    "tokens" (trained ones), "documents" (pieces)}. lengths: `bytes_of_tokens`. Each piece is a row of its own, as it is served.

    Raises Stopped when asked to."""
    nats = text_nats = 0.0
    size = 0
    for _, nll, scored in _groups(nll_fn, pieces, batch_tokens, should_stop):
        of_text = np.where(scored >= 0, lengths[np.maximum(scored, 0)], 0)
        nats += float(nll[scored >= 0].sum())
        text_nats += float(nll[of_text > 0].sum())
        size += int(of_text.sum())
    bits = text_nats / math.log(2) / size if size else None
    return {"loss": nats / pieces.trained_tokens, "bpb": bits, "bytes": size, "tokens": pieces.trained_tokens, "documents": len(pieces)}


def piece_nats(nll_fn: NllFn, pieces: Pieces, *, batch_tokens: int = 8192, should_stop: Callable[[], bool] | None = None) -> np.ndarray:
    """(P,) float64: nats of each piece's trained tokens. Raises Stopped when asked to."""
    nats = np.zeros(len(pieces))
    for group, nll, scored in _groups(nll_fn, pieces, batch_tokens, should_stop):
        nats[group] = np.where(scored >= 0, nll, 0.0).sum(1)
    return nats


def _groups(
    nll_fn: NllFn, pieces: Pieces, batch_tokens: int, should_stop: Callable[[], bool] | None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(numbers of pieces (B,), nats (B, T) float64, the tokens that they are of, -100: of none) of pieces of like length together."""
    order = np.argsort(np.diff(pieces.starts), kind="stable")[::-1]
    at = 0
    while at < len(order):
        check(should_stop)
        width = -(-(len(pieces[order[at]][0]) - 1) // ROUND) * ROUND
        group = order[at : at + max(1, batch_tokens // width)]
        at += len(group)
        tokens = torch.zeros(len(group), width, dtype=torch.int64)
        targets = torch.full((len(group), width), -100, dtype=torch.int64)
        for row, number in enumerate(group):
            ids, trained = pieces[number]
            tokens[row, : len(ids) - 1] = torch.from_numpy(ids[:-1].astype(np.int64))
            targets[row, : len(ids) - 1] = torch.from_numpy(np.where(trained[1:], ids[1:], -100).astype(np.int64))
        with torch.no_grad():
            nll = nll_fn(tokens, targets).float().cpu().double().numpy()
        yield group, nll, targets.numpy()
