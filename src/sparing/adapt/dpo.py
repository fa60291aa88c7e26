"""Direct preference optimisation: a run learns from pairs of answers, of which one is better (Rafailov and others, arXiv 2305.18290).

Conversations are read and prepared as for `sft`. A piece is one answer behind its question; pieces 2 i and 2 i + 1 are a pair. A row holds
whole pairs, so threads and micro-batches may divide rows as they like. What the start says of the answers is computed once, before the
first step, and kept in the run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparing.adapt import sft
from sparing.adapt.logprobs import loss_of_logprobs, token_logprobs
from sparing.base.config import Budget, Config, DpoConfig, UserError
from sparing.base.config_file import Wishes
from sparing.base.files import DamagedError
from sparing.base.hardware import cores
from sparing.base.messages import say
from sparing.base.run import read_tensors, verify_folder, write_folder
from sparing.budget.flops import forward_flops
from sparing.data.answers import Cutting, Pieces, Sequenced, sequences
from sparing.data.chats import Chat
from sparing.data.loader import IGNORED, Batch
from sparing.data.packed import Packed
from sparing.data.progress import check
from sparing.evals.answers import bytes_of_tokens, score_answers
from sparing.evals.bpb import NllFn, bpb
from sparing.job.begin import Job
from sparing.job.corpus import EVAL_TOKENS
from sparing.job.start import start_of
from sparing.kernels.products import fitting
from sparing.model.transformer import Transformer
from sparing.train.objective import Loss
from sparing.train.replicas import Replicas

LR = {"lora": 5e-5, "full": 5e-6}
"""A twentieth of what `sft` learns with: the answers are the model's own or near to them, and only their difference is to be learnt."""
FILE = "reference.safetensors"


@dataclass
class PairCutting(Cutting):
    """Makes two pieces of a preference, the better answer first; each may be half as long as a row."""

    def __post_init__(self) -> None:
        self.length = (self.length - 1) // 2  # `Packed` counts an input more for a pair than there is

    def __call__(self, chat: Chat) -> list[Sequenced]:
        """The pair; nothing where the template refuses it, or an answer begins behind the length."""
        found: list[Sequenced] = []
        for messages in (chat.messages, chat.rejected):
            try:
                if messages is None:
                    raise UserError("there is no worse answer (rejected) beside the better one")
                made = sequences(chat._replace(messages=messages), self.template, self.tokenizer, chat.common)
                if len(made) != 1:
                    raise UserError("the chat template shows an answer otherwise once another follows it")
            except UserError as error:
                self.counts["refused"] += 1
                self.refusal = self.refusal or f"{error}, {chat.source}:{chat.line}"
                return []
            found += made
        cut = [Sequenced(piece.ids[: self.length + 1], [False, *piece.trained[1 : self.length + 1]]) for piece in found]
        self.counts["truncated"] += any(len(part.ids) < len(piece.ids) for part, piece in zip(cut, found, strict=True))
        self.counts["lost"] += sum(sum(piece.trained) - sum(part.trained) for part, piece in zip(cut, found, strict=True))
        if not all(any(part.trained[1:]) for part in cut) or cut[0].ids == cut[1].ids:
            self.counts["empty"] += 1
            self.counts["unused"] += 1
            return []
        self.counts["chats"] += 1
        self.counts["pieces"] += 2
        self.counts["tokens"] += sum(len(part.ids) for part in cut)
        self.counts["trained"] += sum(sum(part.trained) for part in cut)
        return cut


@dataclass(frozen=True)
class PairBatch(Batch):
    """Rows of pairs: documents 2 i and 2 i + 1 of a row are a pair's better and worse answer."""

    reference: Tensor | None = None
    """(B, D) float32: the start's log-probability of each document's answer, D even."""
    pairs: Tensor | None = None
    """(B, D / 2) bool: which pairs there are."""


class Pairs(Packed):
    """A feed of whole pairs, packed into rows as conversations are."""

    def __init__(self, pieces: Pieces, reference_P2: np.ndarray, seq_len: int, batch_size: int, seed: int, pad_id: int):
        """reference_P2: the start's log-probabilities of each pair's answers."""
        whole = Pieces(pieces.tokens, pieces.trained, pieces.starts[::2])
        super().__init__(whole, seq_len, batch_size, 0, seed, pad_id)
        self.answers, self.reference_P2 = pieces, reference_P2
        self._most = max(1, seq_len // max(1, int(self._inputs.min())))
        """Pairs in a row."""

    def rows(self, numbers: range) -> PairBatch:
        T, count = self.seq_len, len(numbers)
        tokens = np.full((count, T), self.pad_id, np.int64)
        targets = np.full((count, T, 1), IGNORED, np.int64)
        documents = np.full((count, T), 2 * self._most, np.int32)
        reference = np.zeros((count, 2 * self._most), np.float32)
        for index, number in enumerate(numbers):
            epoch, row = self._place(number)
            at = document = 0
            for pair in self._epoch(epoch).row(row):
                for side in range(2):
                    ids, marks = self.answers[2 * pair + side]
                    inputs = slice(at, at + len(ids) - 1)
                    tokens[index, inputs], documents[index, inputs] = ids[:-1], document
                    targets[index, inputs, 0] = np.where(marks[1:], ids[1:], IGNORED)
                    reference[index, document] = self.reference_P2[pair, side]
                    at, document = at + len(ids) - 1, document + 1
        there = np.zeros((count, 2 * self._most + 1), bool)
        np.put_along_axis(there, documents, True, 1)
        pairs = there[:, : 2 * self._most : 2]
        arrays = {
            "tokens": tokens, "targets": targets, "documents": documents, "divisor": pairs.sum(1, dtype=np.float32),
            "reference": reference, "pairs": pairs,
        }  # fmt: skip
        return PairBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def pair_losses(chosen: Tensor, rejected: Tensor, settings: DpoConfig, lengths: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """(P,) losses. chosen, rejected: (P,) how much more likely the model finds each answer than its start does, in nats. lengths: their
    tokens, for `ipo`."""
    if settings.loss == "ipo":
        assert lengths is not None
        margin = chosen / lengths[0].clamp(min=1.0) - rejected / lengths[1].clamp(min=1.0)
        return (margin - 1 / (2 * settings.beta)) ** 2
    margin, smoothing = settings.beta * (chosen - rejected), settings.label_smoothing
    return -F.logsigmoid(margin) * (1 - smoothing) - F.logsigmoid(-margin) * smoothing


class Preference:
    """The loss of pairs; parts: the loss, the share of pairs whose better answer gained more, the mean margin (nats), and what the better
    answer gained."""

    parts = ("loss", "accuracy", "margin", "chosen_gain")

    def __init__(self, settings: DpoConfig):
        self.settings = settings

    def __call__(self, model: Transformer, batch: PairBatch, denominator: float | None = None, share: float = 1.0) -> Loss:
        denominator = float(batch.divisor.sum()) if denominator is None else denominator
        there, counted = batch.pairs, (batch.targets[..., 0] != IGNORED).float()

        def loss(logprobs_BT: Tensor) -> tuple[Tensor, Tensor]:
            gains = by_document(logprobs_BT, batch) - batch.reference
            tokens = by_document(counted, batch)
            chosen, rejected = gains[:, ::2][there], gains[:, 1::2][there]
            each = pair_losses(chosen, rejected, self.settings, (tokens[:, ::2][there], tokens[:, 1::2][there]))
            margin = chosen - rejected
            total = each.sum() / denominator
            others = torch.stack([(margin > 0).float().sum(), margin.sum(), chosen.sum()]) / denominator
            return total, torch.cat([total.reshape(1), others])

        return loss_of_logprobs(model, batch, loss)


def by_document(values_BT: Tensor, batch: PairBatch) -> Tensor:
    """(B, D) sums over each row's documents, padding left out."""
    sums = values_BT.new_zeros(len(values_BT), batch.reference.shape[1] + 1)
    return sums.scatter_add(1, batch.documents.long(), values_BT)[:, :-1]


@dataclass(frozen=True)
class PairData(sft.ChatData):
    """Pairs to learn from, and pairs to score."""

    reference_H2: np.ndarray
    """The start's log-probabilities of the held-out answers."""
    settings: DpoConfig

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """evaluate(nll) -> loss (of pairs), accuracy, margin; the bits per byte of the better answers; old_loss and old_bpb of old text."""
        context, lengths = config.train.seq_len, bytes_of_tokens(self.tokenizer)
        better = Pieces.of([Sequenced(*map(list, self.scored[number])) for number in range(0, len(self.scored), 2)])
        sizes = torch.tensor([float(self.scored[number][1].sum()) for number in range(len(self.scored))]).view(-1, 2)

        def evaluate(nll: NllFn) -> dict:
            gains = torch.from_numpy(answer_logprobs(nll, self.scored, should_stop) - self.reference_H2).float()
            loss = pair_losses(gains[:, 0], gains[:, 1], self.settings, (sizes[:, 0], sizes[:, 1])).mean()
            margin = gains[:, 0] - gains[:, 1]
            result = score_answers(nll, better, lengths, batch_tokens=EVAL_TOKENS, should_stop=should_stop)
            result |= {"answer_loss": result["loss"], "loss": float(loss), "accuracy": float((margin > 0).float().mean())}
            result |= {"margin": float(margin.mean()), "pairs": len(margin), "context": context}
            if self.old:
                old = bpb(nll, self.tokenizer, self.old, context, batch=max(1, EVAL_TOKENS // context), should_stop=should_stop)
                result |= {f"old_{key}": old[key] for key in ("loss", "bpb", "bytes", "tokens")}
            return result

        return evaluate

    def score(self, evaluation: dict) -> dict:
        result = super().score(evaluation)
        return result | {"new": result["new"] | {key: evaluation.get(key) for key in ("accuracy", "margin", "pairs")}}


def answer_logprobs(nll: NllFn, pieces: Pieces, should_stop: Callable[[], bool]) -> np.ndarray:
    """(P, 2) float64 log-probabilities of the answers of pairs, each in a row of its own."""
    found = np.zeros(len(pieces))
    for tokens, targets, numbers in _rows_of(pieces):
        check(should_stop)
        found[numbers] = -nll(tokens, targets).double().sum(1).cpu().numpy()
    return found.reshape(-1, 2)


def _rows_of(pieces: Pieces) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """(tokens, targets, which pieces), about EVAL_TOKENS at a time, of like length."""
    order = np.argsort(-np.diff(pieces.starts), kind="stable").tolist()
    width = int(np.diff(pieces.starts).max()) - 1
    size = max(1, EVAL_TOKENS // width)
    for numbers in (order[start : start + size] for start in range(0, len(order), size)):
        longest = max(len(pieces[number][0]) for number in numbers) - 1
        tokens = np.zeros((len(numbers), longest), np.int64)
        targets = np.full((len(numbers), longest), IGNORED, np.int64)
        for row, number in enumerate(numbers):
            ids, trained = pieces[number]
            tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], np.where(trained[1:], ids[1:], IGNORED)
        yield torch.from_numpy(tokens), torch.from_numpy(targets), numbers


# a run


def resolved(job: Job, wishes: Wishes, budget: Budget) -> Config:
    """The configuration of a new run that learns from pairs. Raises UserError, as `sft.resolved`."""
    return sft.resolved(job, wishes, budget, PairCutting, _derived)


def _derived(wishes: Wishes, tokens: float) -> tuple[dict, dict[str, str]]:
    method = "full" if wishes.get("adapter") is None else "lora"
    rates = ("lr",) if method == "lora" else ("lr", "lr_embed", "lr_head", "lr_router", "lr_norm")
    settings = {"optim": dict.fromkeys(rates, LR[method]), "train": {"mtp_weight": 0.0, "sequence_balance": 0.0, "bias_update_rate": 0.0}}
    return settings, {"optim.lr": "a twentieth of what answers are learnt with: only their difference is to be learnt"}


def data(job: Job, config: Config) -> PairData:
    """Batches and scores of the run's pairs; the start's log-probabilities are computed where they are missing."""
    pieces, tokenizer = sft.prepared(job, config, PairCutting)
    reference = _reference(job, config, pieces)
    t = config.train
    feed = Pairs(pieces["train"], reference["train"], t.seq_len, t.batch_size, t.seed, tokenizer.eot_id)
    old = sft.old_text(job, config, tokenizer)
    return PairData(feed, tokenizer, [], pieces["held_out"], old, reference["held_out"], config.dpo)


def _reference(job: Job, config: Config, pieces: dict[str, Pieces]) -> dict[str, np.ndarray]:
    """What the start says of the answers, by part: (pairs, 2) log-probabilities."""
    folder = job.run.state / "reference"
    key = {"weights": config.start.weights_sha256, "pieces": {part: [len(found), len(found.tokens)] for part, found in pieces.items()}}
    try:
        verify_folder(folder)
        if json.loads((folder / "key.json").read_text()) == key:
            return {part: tensor.numpy() for part, tensor in read_tensors(folder / FILE)}
    except DamagedError:
        pass
    with job.meter.stage("reference"), job.signals.interruptible():
        found = _computed(job, config, pieces)
    write_folder(folder, {FILE: {part: torch.from_numpy(array) for part, array in found.items()}, "key.json": json.dumps(key)})
    say(f"what the start says of {sum(map(len, found.values())):,} pairs is kept in {folder}")
    return found


def _computed(job: Job, config: Config, pieces: dict[str, Pieces]) -> dict[str, np.ndarray]:
    t, should_stop = config.train, job.signals.should_stop
    device = t.device or ("cuda" if job.machine.gpus else "cpu")
    model = start_of(config).model(config).to(device).eval()
    model.compute_dtype = getattr(torch, t.dtype)
    count = 1 if device == "cuda" else cores()
    replicas = Replicas(model, None, count, kernels=t.kernels or fitting(count, count, device, t.dtype)[0])
    tokens = sum(len(found.tokens) for found in pieces.values())
    job.meter.add(tokens, tokens * forward_flops(config.model, t.seq_len, mtp=False))

    def exact(tokens: Tensor, targets: Tensor) -> Tensor:
        """As the objective computes them: the head in float32."""
        return replicas.apply(lambda model, *rows: -token_logprobs(model, model.hidden(rows[0]), rows[1]), tokens, targets)

    by_part = {"train": exact, "held_out": replicas.nll}  # held-out ones as evaluations compute them
    return {part: answer_logprobs(by_part[part], pieces[part], should_stop) for part in sft.PARTS}
