"""Provides a run's first weights: random numbers, or those of another run (an imported model is a run too)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Protocol

from torch import Tensor

from sparing.account.history import inherit
from sparing.base.config import Config, UserError
from sparing.base.files import DamagedError, link_or_copy, write_atomic
from sparing.base.origin import inherit_origin
from sparing.base.run import RunFolder, fill, run_tensors, weights_sha256
from sparing.model.init import init_weights, initial, unfilled
from sparing.model.low_rank import adapted, add_low_rank, fill_frozen, hold_of, unfilled_adapted
from sparing.model.transformer import Transformer


class Start(Protocol):
    """Where a run's weights come from."""

    def model(self, config: Config) -> Transformer:
        """The model before the first step, float32, on the CPU. Not asked for where the run has a checkpoint."""
        ...


class Divisible(Start, Protocol):
    """A start that no rank needs to hold whole."""

    def unfilled(self, config: Config) -> Transformer:
        """`model` without its numbers, on the meta device."""
        ...

    def tensors(self, config: Config) -> Iterator[tuple[str, Tensor]]:
        """The state dict of `model`, to the bit, whole tensors one at a time. Raises as `model`."""
        ...


class Noise:
    """Random weights from the run's seed."""

    def model(self, config: Config) -> Transformer:
        model = Transformer(config.model)
        init_weights(model, config.train.seed)
        return model

    def unfilled(self, config: Config) -> Transformer:
        return unfilled(config.model)

    def tensors(self, config: Config) -> Iterator[tuple[str, Tensor]]:
        return initial(config.model, config.train.seed)


class FromRun:
    """The weights of the run that `config.start` names, with low-rank updates beside them where `config.adapter` asks for those."""

    def model(self, config: Config) -> Transformer:
        """Raises UserError where that run is gone, has changed, or is damaged."""
        run = _parent(config)
        model, adapter, file = Transformer(config.model), config.adapter, run.learned_file
        with _usable(config):
            if adapter is None:
                fill(model.state_dict(), run_tensors(run), file)
            else:
                fill_frozen(model, run_tensors(run), hold_of(adapter), file)
                add_low_rank(model, adapter, config.train.seed)
        return model

    def unfilled(self, config: Config) -> Transformer:
        return unfilled(config.model) if config.adapter is None else unfilled_adapted(config.model, config.adapter)

    def tensors(self, config: Config) -> Iterator[tuple[str, Tensor]]:
        run, adapter = _parent(config), config.adapter
        with _usable(config):
            tensors = run_tensors(run)
            yield from tensors if adapter is None else adapted(config.model, adapter, config.train.seed, tensors)


def _parent(config: Config) -> RunFolder:
    """The run that `config.start` names, as it was when this one was begun. Raises UserError."""
    run = RunFolder(config.start.run)
    if not run.learned_file.exists():
        raise UserError(f"start.run {config.start.run}: its weights are gone: if they have moved, say --base RUN")
    if weights_sha256(run) != config.start.weights_sha256:
        raise UserError(f"start.run {config.start.run}: its weights have changed since this run was begun: name those, --base RUN")
    return run


@contextmanager
def _usable(config: Config) -> Iterator[None]:
    """Raises UserError for a DamagedError."""
    try:
        yield
    except DamagedError as error:
        raise UserError(f"start.run {config.start.run} has no usable weights: {error}") from None


def start_of(config: Config) -> Divisible:
    """The start that a configuration names."""
    return Noise() if config.start is None else FromRun()


def keep_origin(run: RunFolder, config: Config) -> None:
    """Note in state/start.json, and in the ledgers for the receipt, which run `run` was started from; take over what else
    belongs to its model, and where that came from."""
    note = run.state / "start.json"
    if config.start is None or note.exists():
        return
    parent = RunFolder(config.start.run)
    for file in parent.beside(config.model.mtp_depth > 0 and config.drafts is None):
        link_or_copy(file, run.path / file.name)
    if parent.path.is_dir():
        inherit(run, parent, "first weights")
        inherit_origin(run, parent)
    write_atomic(note, json.dumps(asdict(config.start)))
