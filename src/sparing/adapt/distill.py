"""Distillation: a student learns from a teacher's distribution of the next token, inside a budget that pays for the teacher too.

The start is a run, or noise and a recipe; the feed, a corpus with the teacher's draws at its positions (`adapt.teacher`); the
objective, the cross-entropy against the drawn distribution, mixed with that of the text's own next token. The teacher is asked once,
before the first step, at the positions that the student will read first. Its draws are kept in the run, and a resumed one reads them.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparing.account.history import inherit
from sparing.account.receipt import read_state
from sparing.adapt import own as own_texts
from sparing.adapt.teacher import Draws, TaughtFeed, Teacher, draws_bytes, opened, same_tokenizer
from sparing.base.config import Budget, Config, ModelConfig, UserError
from sparing.base.config_file import Wishes, read_config, refuse
from sparing.base.files import file_sha256, write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder, weights_sha256
from sparing.budget.flops import forward_flops, parameters, train_flops
from sparing.data.files import absolute
from sparing.data.loader import IGNORED, Batch, Loader
from sparing.data.scan import CorpusFacts, load_sample
from sparing.data.tokenizer import Tokenizer
from sparing.job.begin import Job, derive, keep, look_at, try_out
from sparing.job.corpus import TrainingData, text
from sparing.job.texts import facts_of, with_absolute_paths
from sparing.kernels.vocabulary import linear_cross_entropy
from sparing.model.transformer import Transformer
from sparing.planning.places import SAMPLED, Place, planned_run, with_vocabulary
from sparing.planning.plan import foresee
from sparing.planning.start import with_start
from sparing.resolve import TRAINING_SHARE, Resolved
from sparing.train.objective import NextToken, Objective

LATE = 1.1
"""How much more of a time budget than was planned the teacher may take, before the student begins with what is there."""
NOTE_S = 5.0
"""Between notes of how far the teacher has come."""
TOP_BYTES = 128 * 4
"""Of a position, where the 128 likeliest words are kept with 16 bits each for word and probability."""


@dataclass(frozen=True)
class TaughtData(TrainingData):
    """Text with a teacher's draws."""

    asked: int
    """Positions at which the teacher was asked."""
    flops: float
    """What that took."""

    def spent_flops(self) -> float:
        return self.flops

    def more(self, job: Job, config: Config) -> dict:
        """What the summary says of the teacher, and what the same budget was expected to reach without one."""
        d = config.distill
        rows = [row for row in job.meter.earlier() + job.meter.rows() if row.stage == "teach"]
        words = config.model.vocab_size
        teacher = {
            "run": d.teacher, "weights_sha256": d.weights_sha256, "asked_tokens": self.asked, "samples": d.samples,
            "seconds": sum(row.wall_s for row in rows), "flops": self.flops,
            "cache_bytes": draws_bytes(self.asked, d.samples, words), "top_128_bytes": TOP_BYTES * self.asked,
        }  # fmt: skip
        return {"teacher": teacher, "no_teacher": read_state(job.run, "no_teacher", dict)}


class Taught(NextToken):
    """`NextToken`, where main tokens are learnt from a teacher's draws and from the text. `truth` is the text's share; a position
    without draws is learnt from the text alone. The expected gradient is that of the cross-entropy against the whole distribution."""

    def __init__(self, config: ModelConfig, truth: float, mtp_weight: float = 0.3, sequence_balance: float = 0.0):
        super().__init__(config, mtp_weight, sequence_balance)
        self.truth = truth

    def next_token(self, model: Transformer, hidden_BTD: Tensor, batch: Batch, denominator: float) -> Tensor:
        if batch.drawn is None:
            return super().next_token(model, hidden_BTD, batch, denominator)
        own, drawn = batch.targets[..., :1].flatten(0, 1), batch.drawn.flatten(0, 1)
        asked = (drawn[:, :1] != IGNORED) & (own != IGNORED)
        drawn = drawn.where(asked, IGNORED)
        ones = torch.ones(own.shape, dtype=torch.float32, device=own.device)
        mine = (self.truth * ones).where(asked, ones)
        weights = torch.cat((mine, ((1 - mine) / drawn.shape[1]).expand(-1, drawn.shape[1])), 1)
        if batch.weights is not None:
            weights = weights * batch.weights.flatten()[:, None]
        targets = torch.cat((own, drawn), 1)
        return linear_cross_entropy(hidden_BTD.flatten(0, 1), model.head_weight, targets, denominator, weights)


def objective(config: Config) -> Objective:
    """Raises UserError where a teacher that is asked at every step is gone or has changed."""
    if config.distill.on_policy:
        return own_texts.objective(config)
    t = config.train
    return Taught(config.model, config.distill.truth, t.mtp_weight, t.sequence_balance)


def limit(job: Job, config: Config, model: Transformer, data: TrainingData) -> Config:
    """Limits nothing; a student that writes its own texts is there from here on."""
    if isinstance(data.feed, own_texts.OwnFeed):
        data.feed.model = model
    return config


# a new run


def resolved(job: Job, wishes: Wishes, budget: Budget, teacher: str) -> Config:
    """The configuration of a new run that learns from `teacher`, written into its folder. Raises UserError, before any text is read, for a
    teacher that it cannot learn from."""
    refuse(wishes, "distill", "distill", *(() if wishes.value("distill.on_policy") else ("adapter",)))
    run = opened(teacher)
    theirs = read_config(run.config_file)
    wishes = Wishes.of(with_absolute_paths(wishes), {"distill": {"teacher": absolute(teacher), "weights_sha256": weights_sha256(run)}})
    names_texts = bool(wishes.value("data.paths"))
    if wishes.value("start.run"):
        wishes = with_start(wishes)
        own = wishes.config()
        same_tokenizer(Path(own.data.tokenizer), run.tokenizer_file, (own.tokens, theirs.tokens))
    else:
        if named := wishes.value("data.tokenizer"):
            same_tokenizer(Path(named), run.tokenizer_file, (theirs.tokens, theirs.tokens))
        settled: dict = {"data": {"tokenizer": str(run.tokenizer_file)}} | ({"tokens": asdict(theirs.tokens)} if theirs.tokens else {})
        wishes = with_vocabulary(Wishes.of(wishes, settled))
    if not names_texts and not wishes.value("data.paths"):
        raise UserError("distill needs --data: text for the teacher to read")
    try_out(job, wishes, budget)
    with job.meter.stage("scan"):
        facts = facts_of(wishes.config().data, None, job.signals.should_stop)
    place = look_at(job, wishes, budget)
    own = bool(wishes.value("distill.on_policy"))
    if own:
        wishes = Wishes.of({"train": {"short_seq_len": None}}, wishes)
        config, reasons = derive(job, wishes, budget, facts, place)
        own_texts.checked(config)
    else:
        config, reasons = _shared(job, wishes, budget, facts, place, theirs.model)
    keep(job, config, reasons, facts, facts, place, f"{facts.documents:,} documents, {facts.bytes / 1e6:.1f} MB")
    if own:
        say(f"before each step the student writes the texts at which {teacher} teaches it, behind {config.distill.prompt} tokens of these")
        return config
    _foresee(job, config, facts, place)
    d = config.distill
    size, top = draws_bytes(d.tokens, d.samples, config.model.vocab_size), TOP_BYTES * d.tokens
    say(
        f"{d.teacher} ({parameters(theirs.model).active:,} active parameters) is asked about {d.tokens:,} tokens: {d.samples} words each, "
        f"{size / 1e6:,.1f} MB in the run folder, where the 128 likeliest would take {top / 1e6:,.0f} MB"
    )
    return config


def _shared(job: Job, wishes: Wishes, budget: Budget, facts: CorpusFacts, place: Place, teacher: ModelConfig) -> Resolved:
    """The student's configuration for what the teacher leaves of the budget; `distill.tokens` and `distill.teacher_share` say what the
    teacher does."""
    config, reasons = derive(job, wishes, budget, facts, place)
    if (most := teacher.max_position_embeddings) < config.train.seq_len:
        raise UserError(f"--teacher {config.distill.teacher} reads {most} tokens at most: rows must be no longer, --train.seq-len {most}")
    lasts, unit = job.lasts(budget), budget.unit
    corpus = facts.train_bytes / Tokenizer.load(config.data.tokenizer).bytes_per_token(load_sample(facts.fingerprint)[:SAMPLED])
    if lasts is not None:
        with job.meter.stage("calibrate"), job.signals.interruptible():
            asking = Teacher(config).seconds(config.train.seq_len)
    else:
        asking = 0.0 if unit == "tok" else forward_flops(teacher, config.train.seq_len, mtp=False)
    for _ in range(2):  # a smaller share may be that of a smaller student
        if lasts is not None:
            whole, learning = TRAINING_SHARE * max(0.1, lasts - job.clock.seconds()), 1 / place.tokens_per_second(config)
        else:
            flops = train_flops(config.model, config.train.seq_len, adapter=config.adapter)
            whole, learning = budget.amount, 1.0 if unit == "tok" else flops
        tokens, asked = divided(whole, learning, asking, corpus, wishes.value("distill.tokens"))
        share = 1 - asked * asking / whole
        if share < 0.1:
            raise UserError(f"distill.tokens {asked:,}: asking the teacher so often takes {1 - share:.0%} of the budget; ask less often")
        used = 0.0 if lasts is None else min(1.0, job.clock.seconds() / lasts)  # `derive` takes it off
        part = replace(budget, amount=budget.amount * (used + share * (1 - used)))
        config, reasons = derive(job, wishes, part, facts, place)
    d = replace(config.distill, tokens=asked, teacher_share=round(1 - share, 4))
    reasons |= {
        "distill.tokens": f"of about {tokens:,.0f} that the student reads; the text has about {corpus:,.0f}",
        "distill.teacher_share": "of the budget, for the teacher" if asking else "a budget in tokens is the student's",
    }
    reasons = {name: reason for name, reason in reasons.items() if not wishes.sets(name)}
    return Resolved(replace(config, budget=budget, distill=d), reasons)


def divided(whole: float, learning: float, asking: float, corpus: float, wished: int | None = None) -> tuple[float, int]:
    """-> (tokens that the student trains on, positions at which the teacher is asked) for a budget `whole`. learning, asking: what a token
    costs each of them; corpus: its tokens, each of which is asked about once, however often it is read; wished: positions instead."""
    if wished is not None:
        return max(0.0, whole - wished * asking) / learning, wished
    tokens = whole / (learning + asking)
    if tokens > corpus:
        tokens = (whole - corpus * asking) / learning
    return tokens, max(1, int(min(tokens, corpus)))


def _foresee(job: Job, config: Config, facts: CorpusFacts, place: Place) -> None:
    """Keep the forecast of the whole budget as that without a teacher, and make the run's own, of the student's share."""
    without = read_state(job.run, "prediction", dict)
    if without is None:
        return
    keys = ("bpb", "loss", "tokens")
    write_atomic(job.run.state / "no_teacher.json", json.dumps({key: without[key] for key in keys if key in without}, indent=1))
    share, lasts = 1 - config.distill.teacher_share, job.lasts(config.budget)
    smaller = replace(config, budget=replace(config.budget, amount=share * config.budget.amount))
    planned = planned_run(smaller, facts, place, None if lasts is None else share * lasts)
    forecast = foresee(replace(planned, start_s=job.clock.seconds()))
    write_atomic(job.run.state / "prediction.json", json.dumps(forecast | {"budget": without["budget"]}, indent=1))


# what is kept in the run


def data(job: Job, config: Config) -> TaughtData:
    """The run's text with the teacher's draws; those that are missing are drawn."""
    plain = text(job, config)
    loader, d = plain.feed, config.distill
    each = _descend(job.run, RunFolder(d.teacher), config.train.seq_len)
    if d.on_policy:
        feed = own_texts.OwnFeed(loader, job.run, d.prompt, config.train.seed)
        return TaughtData(feed, plain.tokenizer, plain.held_out, 0, 0.0)
    store = loader.store
    positions = int(store.starts[-1] + store.lengths[-1])
    t, tokenizer = config.train, file_sha256(job.run.tokenizer_file)
    parts = (store.manifest["files"], tokenizer, d.weights_sha256, d.samples, t.seq_len, t.seed)
    key = hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
    draws = Draws(job.run.state / "teacher", key, positions, d.samples, config.model.vocab_size)
    rows = min(loader.rows_per_epoch, -(-(d.tokens or store.tokens) // config.train.seq_len))
    if draws.rows < rows and not draws.ended:
        with job.meter.stage("teach"), job.signals.interruptible():
            _teach(job, config, loader, draws, rows)
    asked = draws.rows * config.train.seq_len
    return TaughtData(TaughtFeed(loader, draws), plain.tokenizer, plain.held_out, asked, asked * each)


def _teach(job: Job, config: Config, loader: Loader, draws: Draws, rows: int) -> None:
    """Ask the teacher about the first `rows` rows of the first epoch, from where an earlier attempt ended; not beyond its share."""
    teacher, lasts = Teacher(config, draws.kernels), job.lasts(config.budget)
    draws.kernels = teacher.kernels
    draws.note(draws.rows)
    ends = None if lasts is None else job.clock.seconds() + LATE * config.distill.teacher_share * max(0.0, lasts - job.clock.seconds())
    flops = forward_flops(teacher.config, config.train.seq_len, mtp=False)
    said = noted = time.monotonic()
    done = draws.rows
    while done < rows:
        job.signals.check()
        if ends is not None and job.clock.seconds() > ends:
            job.cut_short(f"the teacher's share of the budget is used up: it was asked about {done:,} of {rows:,} rows")
            break
        some = np.arange(done, min(rows, done + teacher.rows))
        position, _, _ = loader.places(some)
        inside = position >= 0
        words = teacher.draw(loader.rows(some), position)
        draws.put(position[inside], words[inside])
        done += len(some)
        job.meter.add(int(inside.sum()), inside.sum() * flops)
        now = time.monotonic()
        if now - noted > NOTE_S:
            draws.note(done)
            job.clock.record()
            noted = now
        if now - said > 2 * NOTE_S:
            say(f"the teacher: {done * config.train.seq_len:,} of {rows * config.train.seq_len:,} tokens")
            said = now
    draws.note(done, ended=done < rows)
    job.clock.record()


def _descend(run: RunFolder, teacher: RunFolder, seq_len: int) -> float:
    """Note once, for the receipt, what the teacher had cost; -> operations of asking it about one token."""
    if (known := read_state(run, "teacher", dict)) is not None:
        return float(known["flops_per_token"])
    inherit(run, RunFolder.open(teacher.path), "teacher")
    flops = forward_flops(read_config(teacher.config_file).model, seq_len, mtp=False)
    write_atomic(run.state / "teacher.json", json.dumps({"run": str(teacher), "flops_per_token": flops}))
    return flops
