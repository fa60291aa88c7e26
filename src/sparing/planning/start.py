"""What a run takes over from the one that it starts from, and what that one has read and scores, which a forecast is made of."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from sparing.account.history import stages_of
from sparing.account.receipt import read_state
from sparing.base.config import Config, DataConfig, ModelConfig, UserError
from sparing.base.config_file import Wishes, build, read_config, write_config
from sparing.base.files import write_atomic
from sparing.base.hardware import cores
from sparing.base.messages import say
from sparing.base.run import RunFolder, base_of, weights_sha256
from sparing.budget.flops import parameters
from sparing.budget.gain import gain_law
from sparing.budget.predict import Beginning, Corpus
from sparing.data.prepare import held_out_texts
from sparing.data.scan import CorpusFacts

SCORE_BYTES = 32_000
"""Of held-out text, on which a plan scores the models that it compares: some ten seconds for a model of 135 M parameters."""
SCORE_TOKENS = 8192
"""Of a forward pass."""

SETTLED = ("model.hidden_size", "model.num_layers", "model.num_heads", "model.vocab_size", "data.tokenizer")
"""Fields whose reason is the run that a run starts from."""


def reasons_of(run: RunFolder) -> dict[str, str]:
    """Why each derived value of the run's configuration is what it is, by dotted name."""
    return read_state(run, "reasons", dict) or {}


def rebase(run: str, base: str | None) -> None:
    """Note that what `run` began with, or one of the adapter runs that it goes on from, is now in the folder `base`; also for the stages
    that it was made by. None: nothing moved.

    Raises UserError where `run` is no adapter run and began with none, and where `base` has the weights of none of them."""
    if base is None:
        return
    begun, moved = list(_begun(RunFolder.open(run))), RunFolder.open(Path(base).resolve())
    if not begun:
        raise UserError(f"--base {base}: {run} is no adapter, it has weights of its own")
    digest = weights_sha256(moved) if moved.learned_file.exists() else None
    found = next(((folder, config) for folder, config in begun if config.start.weights_sha256 == digest), None)
    if found is None:
        raise UserError(f"--base {base}: {run} was not trained on its weights (those were {begun[0][1].start.weights_sha256[:12]}...)")
    folder, config = found
    if config.start.run != str(moved):
        with folder.lock():
            changed = replace(config, start=replace(config.start, run=str(moved)))
            write_atomic(folder.config_file, write_config(changed, reasons_of(folder)))
    for stage in stages_of(RunFolder(run)):
        if any(config.start.weights_sha256 == digest for _, config in _begun(stage)):
            rebase(str(stage.path), base)


def _begun(run: RunFolder) -> Iterator[tuple[RunFolder, Config]]:
    """(run, its configuration) of a run that began with another one's weights, and of each adapter run behind it that is there."""
    while run.config_file.exists() and (config := read_config(run.config_file)).start is not None:
        yield run, config
        run = RunFolder(config.start.run)
        if not run.adapter_file.exists():
            return


def with_start(wishes: Wishes) -> Wishes:
    """Wishes with all that the run in `start.run` settles: model, tokenizer, hash of the weights; and its texts where none are set.

    Raises UserError where it is no run with weights and a tokenizer, where nobody names texts, and for wishes that it contradicts.
    """
    if not wishes.value("start.run"):
        if wishes.get("adapter") is not None:
            raise UserError("adapter: low-rank updates go beside the weights of a run: name one as start.run")
        return wishes
    run = RunFolder.open(Path(wishes.value("start.run")).resolve())
    config = read_config(run.config_file)
    for file in (run.learned_file, run.tokenizer_file):
        if not file.exists():
            raise UserError(f"{run} has no {file.name}: no run can start from it")
    base: RunFolder | None = run
    while base is not None:  # an adapter run's has to be there too
        base = base_of(base)
    shape = asdict(config.model)
    wished = build(ModelConfig, shape | wishes.get("model", {}))
    for field in fields(ModelConfig):
        if getattr(wished, field.name) != getattr(config.model, field.name):
            raise UserError(f"model.{field.name} {getattr(wished, field.name)}: {run} has {getattr(config.model, field.name)}, which stays")
    own = wishes.value("data.tokenizer")
    if own and Path(own).resolve() != run.tokenizer_file:
        raise UserError(f"data.tokenizer {own}: a run that starts from {run} keeps its tokenizer")
    digest = weights_sha256(run)
    if wishes.value("start.weights_sha256", digest) != digest:
        raise UserError(f"start.weights_sha256: {run} has other weights, {digest}")
    settled = {"model": shape, "data": {"tokenizer": str(run.tokenizer_file)}, "start": {"run": str(run), "weights_sha256": digest}}
    if config.tokens:
        settled["tokens"] = asdict(config.tokens)
    # Rows may be shorter than the parent's; scores are of as long a context as the parent's are.
    defaults: dict = {"train": {"eval_context": config.train.eval_context or config.train.seq_len}}
    if not wishes.value("data.paths"):
        if not corpora(run):
            raise UserError(f"start.run {run} does not say what it was trained on: name texts to go on with")
        texts = texts_of(run, config.data)
        defaults["data"] = {"text_key": texts.text_key, "holdout_fraction": texts.holdout_fraction}
        settled["data"]["paths"] = texts.paths
    return Wishes.of(defaults, wishes, settled)


def texts_of(run: RunFolder, data: DataConfig) -> DataConfig:
    """What a run with this configuration learns from: what it has chosen from `data` and keeps (`job.begin`), where it chose."""
    chosen = read_state(run, "selected", dict)
    if not data.sample or chosen is None or chosen["whole"]:
        return replace(data, sample=())
    return replace(data, paths=(str(run.state / "selected" / "documents"),), text_key="text", sample=())


def corpora(run: RunFolder) -> list[dict]:
    """What the run was trained on, one after the other: {"paths", "fingerprint", "documents", "bytes"} and, of newer
    runs, "counts" (`data.accounts`). Empty: nothing is known of it."""
    entries = read_state(run, "corpus", list) or []
    return [entry for entry in entries if isinstance(entry, dict) and entry.keys() >= {"paths", "fingerprint", "documents", "bytes"}]


def beginning(config: Config, kind: str, bytes_per_token: float, before: float | None = None) -> Beginning | None:
    """What is known of the run that `config` starts from; None: it starts from noise. kind: of its corpus. before: its bits per byte on
    held-out text, where they were measured."""
    if config.start is None:
        return None
    read, parent = 0.0, config.start
    while parent is not None:
        run = RunFolder(parent.run)
        read += bytes_per_token * float((read_state(run, "summary", dict) or {}).get("tokens") or 0)
        known = run.config_file.exists()
        parent = read_config(run.config_file).start if known else None
    began_as_noise = known and (run.state / "summary.json").exists()
    return Beginning(None if began_as_noise else gain_law(kind, parameters(config.model).total), read, before)


def scored(wishes: Wishes, corpus: Corpus) -> dict[str, Any]:
    """The score of the model that a run would start from, on SCORE_BYTES of the text that is held out of `corpus`: name, run, bpb, loss,
    bytes, context, seconds. Loads torch. Raises UserError for a corpus that is known by its size alone."""
    if not isinstance(corpus, CorpusFacts):
        raise UserError("--from needs --data: the model is scored on text that is held out of it")
    import torch

    from sparing.evals.bpb import bpb
    from sparing.infer.generate import load
    from sparing.kernels.formats import this_machine
    from sparing.kernels.products import fitting
    from sparing.train.replicas import Replicas

    began, config = time.monotonic(), wishes.config()
    run, data = RunFolder(config.start.run), config.data
    say(f"scoring {run} on {SCORE_BYTES / 1e3:.0f} kB of held-out text")
    model, context = load(run.path), config.train.eval_context
    count, dtype = cores(), this_machine().training_dtype("cpu")
    model.network.compute_dtype = getattr(torch, dtype)
    replicas = Replicas(model.network, None, count, kernels=fitting(count, count, "cpu", dtype, model.network.config)[0])
    batch = max(count, SCORE_TOKENS // context)
    result = bpb(replicas.nll, model.tokenizer, held_out_texts(data, corpus), context, batch=batch, max_bytes=SCORE_BYTES)
    return {"name": run.path.name, "run": str(run), **result, "seconds": time.monotonic() - began}
