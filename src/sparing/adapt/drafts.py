"""A module that drafts, for a model that has none: multi-token prediction (DeepSeek-V3 §2.2), learnt beside frozen weights.

The model's layers stay as they are, to the last bit, and so does every text that it writes: the engine verifies each draft. The module
is a layer like the model's last one, and begins as its copy. At each position it reads what the model made of it and the word that
follows, and its target is the model's own distribution one position further on, by draws (`adapt.teacher.drawn`). It chooses among the
commonest words of the text alone, so that its output head is a small part of the model's.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from sparing.adapt.teacher import PART, drawn, strata
from sparing.base.config import Budget, Config, UserError
from sparing.base.config_file import Wishes, refuse
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.base.run import fill
from sparing.data.loader import IGNORED, Batch
from sparing.data.store import TokenStore
from sparing.evals.bpb import NllFn, bpb
from sparing.infer.packed_weights import draft_words
from sparing.job.begin import Job, derive, keep, look_at, try_out
from sparing.job.corpus import EVAL_TOKENS, TrainingData, text
from sparing.job.start import FromRun
from sparing.job.texts import facts_of, with_absolute_paths
from sparing.kernels.vocabulary import linear_cross_entropy, logits_of
from sparing.model.transformer import Transformer
from sparing.planning.start import with_start
from sparing.train.objective import Loss, weight_of

COUNTED = 4_000_000
"""Tokens of the text in which words are counted."""
FASTER = 3.0
"""How many times as many tokens a second as in training the whole model, at most: how much text is tokenised follows from it."""
BATCH_TOKENS = 2048
SETTLED = {"bias_update_rate": 0.0, "sequence_balance": 0.0, "short_seq_len": None}
TO_STREAM = ("o_proj.weight", "down_proj.weight", "experts.down_proj")
OPTIM = {
    "matrix": "adamw", "lr": 1e-3, "lr_embed": 1e-3, "lr_head": 1e-3, "lr_router": 1e-3, "lr_norm": 1e-3, "beta1": 0.9, "beta2": 0.99,
    "eps": 1e-8, "weight_decay": 0.0, "warmup": 0.1, "decay": 0.9, "final_lr": 0.0,
}  # fmt: skip
"""How the module learns: a copy of a trained layer in another place, so faster than a model that goes on. With a shorter warm-up the first
steps double the loss (LAB.md)."""


@dataclass(frozen=True)
class DraftData(TrainingData):
    """Text, and the words among which the module chooses."""

    words: np.ndarray
    covered: float
    """Share of the text that these words are."""
    models: list[Transformer] = field(default_factory=list)
    """The model that learns, once it is there."""

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """evaluate(nll) -> loss and bits per byte of the model, which stay, and how often its likeliest token is the module's too."""
        context = config.train.eval_context or config.train.seq_len
        options = {"batch": max(1, EVAL_TOKENS // context), "max_bytes": config.train.eval_bytes, "should_stop": should_stop}

        def evaluate(nll: NllFn) -> dict:
            result = bpb(nll, self.tokenizer, self.held_out, context, **options)
            wrong = bpb(self.disagreements, self.tokenizer, self.held_out, context, **options)
            return result | {"agreement": 1 - wrong["loss"]}

        return evaluate

    @torch.no_grad()
    def disagreements(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """(B, T) float32: 1 where the module's likeliest token is not the model's, 0 elsewhere and where there is no target."""
        (model,), words = self.models, torch.from_numpy(self.words)
        tokens, targets = tokens_BT.to(model.device), targets_BT.to(model.device)
        before = model.states(tokens)
        after = model.next_depth(before, 0, targets.clamp(min=0))
        head, wrong = chosen_rows(model, words), torch.zeros(targets.shape, device=model.device)
        for row, (theirs, mine) in enumerate(zip(before.hidden[:, 1:], after.hidden[:, :-1], strict=True)):
            likeliest = logits_of(theirs, model.head_weight).argmax(-1)
            wrong[row, :-1] = (words.to(model.device)[logits_of(mine, head).argmax(-1)] != likeliest).float()
        return wrong.where(targets != IGNORED, 0.0)

    def score(self, evaluation: dict) -> dict:
        return super().score(evaluation) | {"drafts": {"agreement": evaluation.get("agreement")}}

    def more(self, job: Job, config: Config) -> dict:
        return {"draft_words": len(self.words), "draft_words_share": self.covered}


def chosen_rows(model: Transformer, words: Tensor) -> Tensor:
    """(words, D): their rows of the output head, in the type of the activations."""
    return model.head_weight.detach().index_select(0, words.to(model.device)).to(model.compute_dtype)


class Drafting:
    """The module's cross-entropy against what the frozen model says one position further on, among the chosen words."""

    parts = ("loss",)

    def __init__(self, words: np.ndarray, samples: int, seed: int):
        self.words, self.samples, self.seed = torch.from_numpy(words), samples, seed

    def __call__(self, model: Transformer, batch: Batch, denominator: float | None = None, share: float = 1.0) -> Loss:
        denominator = weight_of(batch) if denominator is None else denominator
        own = batch.targets[..., 0]
        with torch.no_grad():
            before = model.states(batch.tokens, batch.documents)
        after = model.next_depth(before, 0, own.clamp(min=0))
        scored = (own[:, :-1] != IGNORED) & (own[:, 1:] != IGNORED)
        if batch.documents is not None:
            scored &= batch.documents[:, :-1] == batch.documents[:, 1:]
        head = chosen_rows(model, self.words)
        targets = self._draws(before.hidden[:, 1:].flatten(0, 1), head).masked_fill_(~scored.flatten()[:, None], IGNORED)
        weights = torch.full(targets.shape, 1 / self.samples, device=targets.device)
        loss = linear_cross_entropy(after.hidden[:, :-1].flatten(0, 1), head, targets, denominator, weights)
        return Loss(loss, loss.detach()[None])

    @torch.no_grad()
    def _draws(self, hidden_ND: Tensor, head: Tensor) -> Tensor:
        """(N, S) places in `words`, drawn from the model's distribution among them."""
        at = torch.from_numpy(strata(np.arange(len(hidden_ND)), self.samples, self.seed)).to(hidden_ND.device)
        return torch.cat([drawn(logits_of(x, head).float(), some) for x, some in zip(hidden_ND.split(PART), at.split(PART), strict=True)])


def objective(words: np.ndarray, config: Config) -> Drafting:
    return Drafting(words, config.drafts.samples, config.train.seed)


class WithDrafts:
    """A run's weights, and a module that begins as a copy of its last layer. Its outputs to the residual stream are zero at first, and
    so is its projection of the embedding: it says again what the model says of the next token, which is nearer than noise."""

    def model(self, config: Config) -> Transformer:
        """Raises UserError as `FromRun.model` does."""
        base = FromRun().model(replace(config, model=replace(config.model, mtp_depth=0)))
        model = Transformer(config.model)
        state, last = base.state_dict(), config.model.num_layers - 1
        with torch.no_grad():
            before, at = f"model.layers.{last}.", f"model.layers.{last + 1}."
            module = {name.replace(before, at): value for name, value in state.items() if name.startswith(before)}
            module |= {name: torch.zeros_like(value) for name, value in module.items() if name.endswith(TO_STREAM)}
            eye, ones, gain = torch.eye(config.model.hidden_size), torch.ones(config.model.hidden_size), state["model.norm.weight"]
            module |= {f"{at}enorm.weight": ones, f"{at}hnorm.weight": ones, f"{at}eh_proj.weight": torch.cat((0 * eye, eye), 1)}
            module |= {f"{at}shared_head.norm.weight": gain.square().mean().sqrt() * ones}
            fill(model.state_dict(), (state | module).items(), config.start.run)
        return model


def limit(job: Job, config: Config, model: Transformer, data: TrainingData) -> Config:
    """Let the module alone learn."""
    assert isinstance(data, DraftData)
    model.requires_grad_(False)
    model.model.layers[config.model.num_layers].requires_grad_(True)
    data.models[:] = [model]
    return config


def resolved(job: Job, wishes: Wishes, budget: Budget) -> Config:
    """The configuration of a new run that gets a drafting module, written into its folder. Raises UserError, before any text is read, for
    a model that has one."""
    refuse(wishes, "distill --mtp", "drafts")
    own = with_absolute_paths(wishes)
    wishes = with_start(own)
    c = wishes.config().model
    if c.mtp_depth:
        raise UserError(f"--mtp: {wishes.value('start.run')} has a module that drafts already")
    derived = Wishes.of({"train": SETTLED, "optim": OPTIM, "drafts": {}}, wishes, {"model": {"mtp_depth": 1}})
    if not own.sets("train.batch_size"):
        length = min(own.value("train.seq_len", 512), c.max_position_embeddings)
        derived = Wishes.of(derived, {"train": {"seq_len": length, "batch_size": max(1, BATCH_TOKENS // length)}})
    try_out(job, derived, budget)
    with job.meter.stage("scan"):
        facts = facts_of(derived.config().data, None, job.signals.should_stop)
    place = look_at(job, derived, budget)
    config, reasons = derive(job, derived, budget, facts, place)
    drafts = replace(config.drafts, words=min(config.drafts.words, c.vocab_size) // 16 * 16 or c.vocab_size)
    data = config.data
    if data.max_tokens and not own.sets("data.max_tokens"):
        data = replace(data, max_tokens=int(FASTER * data.max_tokens))
    config = replace(config, drafts=drafts, data=data)
    reasons |= {"drafts.words": "the commonest of the text", "model.mtp_depth": "the module that is trained"}
    keep(job, config, reasons, facts, facts, place, f"{facts.documents:,} documents, {facts.bytes / 1e6:.1f} MB")
    (job.run.state / "prediction.json").unlink(missing_ok=True)  # it is of a model that learns the text
    return config


def data(job: Job, config: Config) -> DraftData:
    """The run's text; its commonest words are written beside the weights, where the engine finds them."""
    plain = text(job, config)
    counts = _counts(plain.feed.store, config.model.vocab_size)
    file = job.run.draft_words_file
    if not file.exists():
        words = np.sort(np.argsort(-counts, kind="stable")[: config.drafts.words])
        write_atomic(file, json.dumps(words.tolist()))
    words = np.array(draft_words(job.run, config.model), np.int64)
    covered = float(counts[words].sum() / max(1, counts.sum()))
    say(f"drafts choose among {len(words):,} of {config.model.vocab_size:,} words, which are {covered:.1%} of the text")
    return DraftData(plain.feed, plain.tokenizer, plain.held_out, words, covered)


def _counts(store: TokenStore, size: int) -> np.ndarray:
    """(V,) how often each word is among the first tokens of the store."""
    return np.bincount(store.take(np.arange(min(store.tokens, COUNTED))), minlength=size)
