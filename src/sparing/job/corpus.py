"""What a run learns from and is scored on: by default the text that `[data]` names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from sparing.account.receipt import read_state
from sparing.base.config import Config
from sparing.base.files import atomic_path
from sparing.data.loader import Loader
from sparing.data.prepare import prepare
from sparing.data.progress import Bars
from sparing.data.tokenizer import Tokenizer
from sparing.evals.bpb import NllFn, bpb
from sparing.job.begin import Job
from sparing.job.texts import with_own_tokenizer
from sparing.planning.start import texts_of
from sparing.train.log import TrainResult
from sparing.train.trainer import Feed

EVAL_TOKENS = 8192
"""Tokens of a forward pass in evaluations."""


class Prompt(NamedTuple):
    """What a model goes on with: the text as it is shown, and its tokens."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class TrainingData:
    """Batches, and the held-out documents that a run is scored on and continues at its end."""

    keeps_best: ClassVar[bool] = False
    """The weights with the lowest held-out loss are what stays of a run, not the last ones."""
    feed: Feed
    tokenizer: Tokenizer
    held_out: list[str]

    def prompts(self, count: int) -> list[Prompt]:
        """What a run goes on with at its end: beginnings of held-out documents."""
        return [Prompt(text := _beginning(document), self.tokenizer.encode_prompt(text)) for document in self.held_out[:count]]

    def score(self, evaluation: dict) -> dict:
        """What a summary says of an evaluation, beside that of the run's start."""
        return {"new": {key: evaluation.get(key) for key in ("loss", "bpb", "bytes")}}

    def trained_tokens(self, result: TrainResult) -> int:
        """How many tokens the run was taught to write."""
        return result.tokens

    def reserve_s(self, job: Job, config: Config) -> float:
        """Seconds that the end of the run takes besides the last evaluation and what is written then."""
        return 0.0

    def spent_flops(self) -> float:
        """Operations before the first step that a budget in operations pays for."""
        return 0.0

    def more(self, job: Job, config: Config) -> dict:
        """What the summary has besides."""
        return {}

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """evaluate(nll) -> the loss and bits per byte of the held-out documents."""
        context = config.train.eval_context or config.train.seq_len
        options = {"batch": max(1, EVAL_TOKENS // context), "max_bytes": config.train.eval_bytes, "should_stop": should_stop}
        return lambda nll: bpb(nll, self.tokenizer, self.held_out, context, **options)


@dataclass(frozen=True)
class ChosenData(TrainingData):
    """Texts that were chosen for being like a sample, some of which is scored besides."""

    sample: list[str]

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """evaluate(nll) -> what it is of held-out documents, and as sample_loss and sample_bpb that of the sample."""
        held_out, context = super().scorer(config, should_stop), config.train.eval_context or config.train.seq_len
        options = {"batch": max(1, EVAL_TOKENS // context), "should_stop": should_stop}

        def evaluate(nll: NllFn) -> dict:
            found = bpb(nll, self.tokenizer, self.sample, context, **options)
            return held_out(nll) | {f"sample_{key}": found[key] for key in ("loss", "bpb", "bytes", "tokens")}

        return evaluate

    def score(self, evaluation: dict) -> dict:
        return super().score(evaluation) | {"sample": {key: evaluation.get(f"sample_{key}") for key in ("loss", "bpb", "bytes")}}

    def more(self, job: Job, config: Config) -> dict:
        return {"selected": read_state(job.run, "selected", dict)}


def _beginning(document: str) -> str:
    """Up to its third line or 120 characters, not ending inside a word."""
    start = "\n".join(document.splitlines()[:3])[:120]
    return start if len(start) < 120 or " " not in start else start.rsplit(" ", 1)[0]


def text(job: Job, config: Config) -> TrainingData:
    """Tokenise the run's corpus, or open what is tokenised already. Raises UserError, and Stopped on a signal."""
    run, t = job.run, config.train
    data = with_own_tokenizer(run, texts_of(run, config.data))
    with Bars() as bars:
        store = prepare(data, config.model.vocab_size, progress=bars, should_stop=lambda: job.signals.requested)
    for name in ("tokenizer.json", "quarantine.jsonl") if job.leads else ():
        if name == "quarantine.jsonl" or not run.tokenizer_file.exists():
            source = store.path
            if name == "quarantine.jsonl" and data.paths != config.data.paths:
                source = run.state / "selected"  # of the pool
            with atomic_path(run.path / name) as beside:
                shutil.copyfile(source / name, beside)
    tokenizer = store.tokenizer if config.tokens is None else Tokenizer.load(store.path, config.tokens)
    loader = Loader(store, t.seq_len, t.batch_size, config.model.mtp_depth, t.seed, tokenizer.first_id)
    if not config.data.sample:
        return TrainingData(loader, tokenizer, list(store.held_out()))
    with open(run.state / "selected" / "sample.jsonl", encoding="utf-8") as file:
        return ChosenData(loader, tokenizer, list(store.held_out()), [json.loads(line)["text"] for line in file])
