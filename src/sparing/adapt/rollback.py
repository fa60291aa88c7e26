"""The way back from what was learnt: the run that a run began with, byte for byte."""

from __future__ import annotations

from pathlib import Path

from sparing.account.history import inherit
from sparing.account.meter import metered
from sparing.base.config import UserError
from sparing.base.config_file import read_config
from sparing.base.files import link_or_copy
from sparing.base.run import RunFolder, weights_sha256

STATE = ("reasons", "corpus", "start", "origin", "summary", "wakes")
"""What of state/ is about the model and not about its training."""


def rollback(run: RunFolder, out: str, started: float | None = None) -> dict:
    """Make the new folder `out` the run that `run` began with. -> out, run (the one it is), weights_sha256.

    Raises UserError where that one is gone or has changed."""
    start = read_config(run.config_file).start
    if start is None:
        raise UserError(f"{run} began with no other run: there is nothing before it")
    before = RunFolder(start.run)
    if not before.learned_file.exists():
        raise UserError(f"{run} began with {before}, which is gone: if it has moved, say --base RUN")
    if weights_sha256(before) != start.weights_sha256:
        raise UserError(f"{run} began with other weights than {before} has now: name the run that has them, --base RUN")
    made = RunFolder.create(out)
    with made.making(), metered("rollback", made, "rollback", started):
        drafts = read_config(before.config_file).model.mtp_depth > 0
        files = [before.tokenizer_file, before.model_card_file, before.learned_file, *before.beside(drafts)]
        files += [before.state / f"{name}.json" for name in STATE]
        for file in filter(Path.exists, files):
            target = made.path / file.relative_to(before.path)
            target.parent.mkdir(exist_ok=True)
            link_or_copy(file, target)
        if before.adapter_file.exists():
            made.weights.rmdir()
        inherit(made, before, "restored")
        link_or_copy(before.config_file, made.config_file)
    return {"out": str(made.path), "run": str(before.path), "weights_sha256": weights_sha256(made)}
