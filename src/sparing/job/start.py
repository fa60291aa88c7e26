"""Where a run's weights come from: random numbers, or another run (an imported model is one too)."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Protocol

from sparing.account.history import inherit
from sparing.base.config import Config, ModelConfig, UserError
from sparing.base.config_file import Wishes, build, read_config
from sparing.base.files import DamagedError, link_or_copy, write_atomic
from sparing.base.origin import inherit_origin
from sparing.base.run import RunFolder, fill, run_tensors, weights_sha256
from sparing.job.texts import corpora
from sparing.model.init import init_weights
from sparing.model.low_rank import add_low_rank, fill_frozen
from sparing.model.transformer import Transformer


class Start(Protocol):
    """Where a run's weights come from."""

    def model(self, config: Config) -> Transformer:
        """The model before the first step, float32, on the CPU. Not asked for where the run has a checkpoint."""
        ...


class Noise:
    """Random weights from the run's seed."""

    def model(self, config: Config) -> Transformer:
        model = Transformer(config.model)
        init_weights(model, config.train.seed)
        return model


class FromRun:
    """The weights of the run that `config.start` names, with low-rank updates beside them where `config.adapter` asks for those."""

    def model(self, config: Config) -> Transformer:
        """Raises UserError where that run is gone, has changed, or is damaged."""
        run = RunFolder(config.start.run)
        file = run.learned_file
        if not file.exists():
            raise UserError(f"start.run {config.start.run}: its weights are gone")
        if weights_sha256(run) != config.start.weights_sha256:
            raise UserError(f"start.run {config.start.run}: its weights have changed since this run was begun")
        model = Transformer(config.model)
        adapter = config.adapter
        try:
            if adapter is None:
                fill(model.state_dict(), run_tensors(run), file)
            else:
                fill_frozen(model, run_tensors(run), None if adapter.base == "float32" else adapter.base, file)
                add_low_rank(model, adapter, config.train.seed)
        except DamagedError as error:
            raise UserError(f"start.run {config.start.run} has no usable weights: {error}") from None
        return model


def start_of(config: Config) -> Start:
    """The start that a configuration names."""
    return Noise() if config.start is None else FromRun()


SETTLED = ("model.hidden_size", "model.num_layers", "model.num_heads", "model.vocab_size", "data.tokenizer")
"""Fields whose reason is the run that a run starts from."""


def with_start(wishes: Wishes) -> Wishes:
    """Wishes with all that the run in `start.run` settles: model, tokenizer, hash of the weights; and its row length and its texts where
    none are set.

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
    defaults: dict = {"train": {"seq_len": config.train.seq_len}}
    if not wishes.value("data.paths"):
        if not corpora(run):
            raise UserError(f"start.run {run} does not say what it was trained on: name texts to go on with")
        defaults["data"] = {"text_key": config.data.text_key, "holdout_fraction": config.data.holdout_fraction}
        settled["data"]["paths"] = config.data.paths
    return Wishes.of(defaults, wishes, settled)


def keep_origin(run: RunFolder, config: Config) -> None:
    """Note in state/start.json, and in the ledgers for the receipt, which run `run` was started from; take over its chat template and
    where its model came from."""
    note = run.state / "start.json"
    if config.start is None or note.exists():
        return
    parent = RunFolder(config.start.run)
    template = parent.path / "chat_template.jinja"
    if template.exists():
        link_or_copy(template, run.path / template.name)
    if parent.path.is_dir():
        inherit(run, parent, "first weights")
        inherit_origin(run, parent)
    write_atomic(note, json.dumps(asdict(config.start)))
