"""A teacher's draws: words from its distribution of the next token, at positions of a prepared corpus, kept on disk for a student.

A whole distribution is as many numbers a position as there are words; its k likeliest would be biased. So some words are drawn, and
the weight (times drawn) / (draws) of each is right on average (RS-KD; Anshumann and others 2025, arXiv 2503.16870). Draws are
stratified: draw k falls into the k-th of equal parts of the cumulative distribution. Each word's expected weight is that of independent
draws, and varies less: a word of probability 1/2 gets half of the draws every time.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparing.base.config import Config, UserError
from sparing.base.config_file import read_config
from sparing.base.files import write_atomic
from sparing.base.hardware import cores
from sparing.base.run import RunFolder, weights_sha256
from sparing.data.loader import IGNORED, Batch, Loader
from sparing.data.split import mix
from sparing.data.tokenizer import Tokenizer
from sparing.infer.network import load_transformer
from sparing.kernels import native
from sparing.kernels.products import fitting
from sparing.kernels.vocabulary import logits_of
from sparing.model.transformer import Transformer
from sparing.train.replicas import Replicas

PART = 128
"""Positions whose logits exist at once in a thread."""
TOGETHER = {"cpu": 1024, "cuda": 8192}
"""Tokens of a thread's forward pass: a small teacher's single rows would take twice as long (LAB.md)."""
_MOST = 1 - 2**-24
"""The largest float32 below 1."""


def opened(path: str) -> RunFolder:
    """The teacher's run. Raises UserError where it has no weights or no tokenizer."""
    run = RunFolder.open(path)
    for file in (run.learned_file, run.tokenizer_file):
        if not file.exists():
            raise UserError(f"--teacher {path}: it has no {file.name}: no run can learn from it")
    return run


def same_tokenizer(student: Path, teacher: Path, tokens: tuple[object, object]) -> None:
    """Raises UserError, which names the first difference, where two tokenizer.json do not cut text alike. tokens: what begins and ends a
    text, of both.

    A draw is a number: under another vocabulary it would be another word."""
    texts = [path.read_text(encoding="utf-8") for path in (student, teacher)]
    if texts[0] != texts[1] and (different := _difference(*(json.loads(text) for text in texts))):
        raise UserError(f"--teacher: its tokenizer is another one than the student's ({different}): draws cannot be learnt from")
    begins = [Tokenizer(text, of).first_id for text, of in zip(texts, tokens, strict=True)]
    if begins[0] != begins[1]:
        raise UserError(f"--teacher: its texts begin with token {begins[1]}, the student's with {begins[0]}: both must begin alike")


def _difference(student: dict, teacher: dict) -> str | None:
    words, others = (content["model"].get("vocab") or {} for content in (student, teacher))
    if len(words) != len(others):
        return f"{len(others):,} words, not {len(words):,}"
    if words != others and isinstance(words, dict):
        word = min((word for word in words if others.get(word) != words[word]), key=words.__getitem__)
        return f"{word!r} is {words[word]} in one and {others.get(word, 'no word')} in the other"
    for name in ("model", "added_tokens", "normalizer", "pre_tokenizer"):
        if student.get(name) != teacher.get(name):
            return f"the same words, but another {name}" if name != "model" else "the same words, but other merges"
    return None


def drawn(logits_NV: Tensor, at_NS: Tensor) -> Tensor:
    """(N, V) float32 logits, and places (N, S) in [0, 1) of their cumulative distribution -> (N, S) the words there, ascending where the
    places are."""
    sums = logits_NV.softmax(-1).cumsum_(-1)
    return torch.searchsorted(sums, at_NS * sums[:, -1:], right=True).clamp_(max=logits_NV.shape[1] - 1)


def strata(positions: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """(N,) positions -> (N, samples) float32: one place in each of equal parts of [0, 1), a pure function of (position, samples, seed)."""
    numbers = positions.astype(np.uint64)[:, None] * np.uint64(samples) + np.arange(samples, dtype=np.uint64)
    jitter = (mix(mix(numbers ^ np.uint64(mix(seed % (1 << 64)))) + np.uint64(1)) >> np.uint64(40)).astype(np.float64) / (1 << 24)
    return np.minimum((np.arange(samples) + jitter) / samples, _MOST).astype(np.float32)


class Teacher:
    """A run's model that is asked what comes next: on all cores, in 16 bits where those are fast, without gradients."""

    def __init__(self, config: Config, kernels: native.Path | None = None):
        """config: the student's; its `distill` says which run. kernels: which compute; None: the fastest here. Raises UserError where
        that run is gone or has changed."""
        d, t = config.distill, config.train
        run = opened(d.teacher)
        if d.weights_sha256 and weights_sha256(run) != d.weights_sha256:
            raise UserError(f"distill.teacher {run}: its weights have changed since this run was begun: put them back")
        self.config = read_config(run.config_file).model
        device, dtype = t.device or "cpu", getattr(torch, t.dtype)
        count = 1 if device == "cuda" else cores()
        self.model = load_transformer(run, self.config, device, dtype)
        self.model._table(t.seq_len)  # threads must not make it at once
        self.rows = count * max(1, TOGETHER[device] // t.seq_len)
        """Of one `draw`."""
        self.kernels = kernels or t.kernels or fitting(count, count, device, t.dtype)[0]
        self.replicas = Replicas(self.model, None, count, kernels=self.kernels)
        self.words = min(self.config.vocab_size, config.model.vocab_size)
        self.samples, self.seed = d.samples, t.seed

    @torch.no_grad()
    def draw(self, batch: Batch, positions_BT: np.ndarray) -> np.ndarray:
        """(B, T) tokens, and the positions that they have in the corpus -> (B, T, S) words that may come next, int64."""
        at = torch.from_numpy(strata(positions_BT.ravel(), self.samples, self.seed)).view(*positions_BT.shape, -1)
        return self.replicas.apply(self._draw, batch.tokens, batch.documents, at).cpu().numpy()

    def _draw(self, model: Transformer, tokens_BT: Tensor, documents_BT: Tensor, at_BTS: Tensor) -> Tensor:
        with torch.no_grad():  # each thread has its own switch
            hidden, at = model.hidden(tokens_BT, documents_BT).flatten(0, 1), at_BTS.flatten(0, 1)
            parts = zip(hidden.split(PART), at.split(PART), strict=True)
            words = [drawn(logits_of(x, model.head_weight)[:, : self.words].float(), places) for x, places in parts]
            return torch.cat(words).view(at_BTS.shape)

    def seconds(self, seq_len: int) -> float:
        """What a position takes, measured on tokens of no meaning."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.words, (self.rows, seq_len), generator=generator)
        batch = Batch(tokens, tokens[..., None], torch.zeros_like(tokens, dtype=torch.int32))
        positions = np.arange(tokens.numel()).reshape(tokens.shape)
        self.draw(batch, positions)  # compiles and fills caches
        before = time.monotonic()
        self.draw(batch, positions)
        return (time.monotonic() - before) / tokens.numel()


class Draws:
    """Words that a teacher drew, on disk: of each position in the corpus `samples` numbers in ascending order, 0 where it was not
    asked, else the word + 1. A word that was drawn more than once stands there as often: these are its counts.

    Where a folder has draws under another key, they are begun anew: key says what they are of.
    """

    def __init__(self, folder: Path, key: str, positions: int, samples: int, words: int):
        """Raises OSError where there is no room for the whole file."""
        self.samples, self._note_file = samples, folder / "note.json"
        self.dtype = np.dtype(np.uint16 if words < 1 << 16 else np.uint32)
        self.bytes = draws_bytes(positions, samples, words)
        path = folder / "draws.bin"
        folder.mkdir(parents=True, exist_ok=True)
        try:
            note = json.loads(self._note_file.read_text(encoding="utf-8"))
            known = note["key"] == key and path.stat().st_size == self.bytes
            self.rows, self.ended, self.kernels = (int(note["rows"]), bool(note["ended"]), note["kernels"]) if known else (0, False, None)
        except (OSError, ValueError, KeyError, TypeError):
            known, self.rows, self.ended, self.kernels = False, 0, False, None
        if not known:
            with open(path, "wb") as file:
                if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process in the middle of a write
                    os.posix_fallocate(file.fileno(), 0, self.bytes)
                else:
                    file.truncate(self.bytes)
        self.key = key
        self.kernels: native.Path | None
        """Which computed what is there, so that the rest is computed by the same."""
        self._words = np.memmap(path, self.dtype, "r+", shape=(positions, samples))

    def take(self, positions: np.ndarray) -> Tensor:
        """(..., S) int64; IGNORED where the teacher was not asked. Negative positions are padding."""
        words = self._words[np.maximum(positions, 0)].astype(np.int64) - 1
        words[(words < 0) | (positions < 0)[..., None]] = IGNORED
        return torch.from_numpy(words)

    def put(self, positions: np.ndarray, words: np.ndarray) -> None:
        """(N,) positions, (N, S) words."""
        self._words[positions] = words + 1

    def note(self, rows: int, ended: bool = False) -> None:
        """The first `rows` rows of the corpus are on disk. ended: there will be no more of them."""
        self._words.flush()
        self.rows, self.ended = rows, ended
        write_atomic(self._note_file, json.dumps({"key": self.key, "rows": rows, "ended": ended, "kernels": self.kernels}))


def draws_bytes(positions: int, samples: int, words: int) -> int:
    """Bytes on disk."""
    return positions * samples * (2 if words < 1 << 16 else 4)


class TaughtFeed:
    """A loader's batches, with the draws of every position."""

    def __init__(self, loader: Loader, draws: Draws):
        self.loader, self.draws = loader, draws

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        rows = self.loader.numbers(step, rank, world)
        batch = self.loader.rows(rows)
        return replace(batch, drawn=self.draws.take(self.loader.places(rows)[0]))
