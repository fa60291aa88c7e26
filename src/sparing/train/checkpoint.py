"""Checkpoints: state/step-00000123/{weights.safetensors optimizer.safetensors state.json checksums.json}.

The number is that of finished steps. Weights are of the type they are trained in, under Hugging Face's names; the newest are hard-linked to
weights/model.safetensors too, so that a killed run can be served. An adapter run has its low-rank factors instead, and adapter/. Kept: the
newest two, and state/pre-decay, from which a finished run can be extended. Step 0 is saved like any other, so there is always something to
go back to.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sparing.base.config import Config, PrecisionConfig, UserError
from sparing.base.files import DamagedError, DiskFullError, disk_errors, link_or_copy, replace_folder
from sparing.base.run import RunFolder, begin_folder, end_folder, read_tensors, stream_tensors, verify_folder, write_folder, write_into
from sparing.kernels import native
from sparing.model.low_rank import learned
from sparing.parallel.owners import Replicated
from sparing.train.optim import Optimizer

KEEP = 2
FORMAT = 1
BEST = "best"
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
OPTIMIZERS = "optimizer*.safetensors"
"""One file, or one of each rank, of whole tensors: which rank had which does not matter to who reads them."""


@dataclass
class TrainState:
    """What a run knows besides its tensors."""

    step: int = 0
    """Finished optimizer steps."""
    cursor: int = 0
    """The next batch of the loader; ahead of `step` by the batches skipped."""
    tokens: int = 0
    """Trained on so far."""
    seconds: float = 0.0
    """Of the budget, used when this was saved."""
    guard: dict = field(default_factory=dict)
    """Its memory (`Guard.state`)."""
    skipped: list[int] = field(default_factory=list)
    """Batches not learnt from."""
    precision: dict = field(default_factory=dict)
    """Which linears are not in 8 bits (`Policy.state`)."""
    fingerprint: dict[str, str] = field(default_factory=dict)
    arithmetic: str = ""
    """What computed it (`native.arithmetic`): elsewhere sums round otherwise."""
    format: int = FORMAT


LATER_FIELDS = ("attention_bias", "head_norm", "partial_rotary_factor", "selection_bias", "llama3", "linear_rope_factor")
"""Fields that the configuration did not have from the start. At their defaults they are not hashed, so that older checkpoints still fit.
Every new field of a hashed section belongs here."""


def _text(value: object) -> str:
    """`repr`, without later fields that are at their defaults."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_text, value))}{',' if len(value) == 1 else ''})"
    if not is_dataclass(value):
        return repr(value)
    hashed = (one for one in fields(value) if one.name not in LATER_FIELDS or getattr(value, one.name) != one.default)
    return f"{type(value).__name__}({', '.join(f'{one.name}={_text(getattr(value, one.name))}' for one in hashed)})"


def fingerprint(config: Config) -> dict[str, str]:
    """Hashes of what must be the same on resuming: the model's shape, and what else decides about losses."""

    def digest(*parts: object) -> str:
        return hashlib.sha256(f"({', '.join(map(_text, parts))}{',' if len(parts) == 1 else ''})".encode()).hexdigest()[:16]

    train = config.train
    rows = (train.seq_len, train.short_seq_len, train.short_until, train.batch_size, train.micro_batch_size, train.replicas)
    recipe = (config.optim, rows, train.dtype, train.document_mask, train.mtp_weight)
    p = config.precision
    if p != PrecisionConfig():
        recipe += (p,)
    recipe += tuple(section for section in (config.dpo, config.grpo) if section is not None)
    found = {"model": digest(config.model), "recipe": digest(recipe, train.bias_update_rate, train.sequence_balance, train.seed)}
    if config.adapter is not None:
        found["model"] = digest(config.model, config.adapter, config.start.weights_sha256)
    if config.esft is not None:
        found["model"] = digest(config.model, config.esft, config.start.weights_sha256)
    if (p.weights, p.moments) != ("float32", "float32"):
        found["storage"] = digest(p.weights, p.compensation, p.moments)
    return found


class Checkpoints:
    """Saving to and loading from one run's state/. `say` gets a line about anything unusual."""

    def __init__(
        self, run: RunFolder, model: nn.Module, optimizer: Optimizer, config: Config, say: Callable[[str], None], kernels: native.Path,
        owners: Replicated,
    ):  # fmt: skip
        """kernels: which compute in training. owners: where each rank has a share of what is saved, all of them save together."""
        self.run, self.model, self.optimizer, self.say, self.adapts = run, model, optimizer, say, config.adapter is not None
        self.owners, self.world = owners, owners.world
        self.fingerprint = fingerprint(config)
        self.arithmetic = native.arithmetic(kernels)
        self._saved: tuple[int, int] | None = None

    def _weights(self) -> dict[str, Tensor]:
        """What is saved and loaded: live tensors by name."""
        return learned(self.model) if self.adapts else self.model.state_dict()

    @property
    def _newest(self) -> Path:
        return self.run.adapter_file if self.adapts else self.run.weights_file

    def folders(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.run.state.glob("step-*"))

    def save(self, state: TrainState, *, keep_as_pre_decay: bool = False) -> Path:
        """Write a checkpoint. Raises DiskFullError with everything older intact."""
        state.fingerprint, state.arithmetic = self.fingerprint, self.arithmetic
        folder = self.run.state / f"step-{state.step:08d}"
        if self._saved == (state.step, state.cursor) and not keep_as_pre_decay:
            return folder  # a signal right after a save
        text = json.dumps(asdict(state), indent=1)
        self._write(folder, self.optimizer.state(), text)
        self._saved = (state.step, state.cursor)
        if self.world.rank:
            return folder
        self._newest.parent.mkdir(exist_ok=True)
        link_or_copy(folder / WEIGHTS, self._newest)
        if self.adapts and self.run.weights.is_dir():  # made before it was known what would be in it
            self.run.weights.rmdir()
        if keep_as_pre_decay:
            self._keep(folder)
        self._prune(state.step)
        return folder

    def _write(self, folder: Path, moments: Mapping[str, Tensor], text: str) -> None:
        """Write a folder with the weights, what `moments` has (where ranks have shares: each its own), and `text`. Raises DiskFullError, on
        all ranks where one of them cannot write."""
        if self.owners.mine is None:
            write_folder(folder, {WEIGHTS: self._weights()} | ({OPTIMIZER: moments} if moments else {}) | {STATE: text})
            return
        world, beside = self.world, folder.with_name(f".{folder.name}.tmp")
        name = f"optimizer-{world.rank + 1:05d}-of-{world.size:05d}.safetensors"
        files = {name: self.owners.labelled(moments)} if moments else {}
        files |= {STATE: text} if world.rank == 0 else {}
        failure, sums = None, {}
        for work in (partial(begin_folder, beside) if world.rank == 0 else None, partial(write_into, beside, files), self._stream):
            try:
                sums |= (work(beside) if work == self._stream else work() if work else None) or {}
            except DiskFullError as error:
                failure = error
            if any(world.agree([float(failure is not None)])):
                shutil.rmtree(beside, ignore_errors=True)
                raise failure or DiskFullError(f"{folder}: another rank could not write its part")
        parts = [json.loads(text) for text in world.gather(json.dumps(sums))]
        if world.rank == 0:
            end_folder(beside, folder, {name: value for part in parts for name, value in part.items()})
        world.agree([0.0])  # nobody goes on, and perhaps dies, before it is whole

    def _stream(self, beside: Path) -> dict[str, dict]:
        """Write whole weights, tensor by tensor, on rank 0. All ranks go through them, even where the disk is full."""
        weights = self._weights()
        wholes = self.owners.wholes(weights)
        try:
            if self.world.rank:
                return {}
            layout = self.owners.layout(weights)
            with disk_errors(beside):
                return {WEIGHTS: stream_tensors(beside / WEIGHTS, layout, wholes)}
        finally:
            for _ in wholes:
                pass

    def keep_best(self, step: int, loss: float) -> None:
        """Write the weights aside: none scored better until now."""
        self._write(self.run.state / BEST, {}, json.dumps({"step": step, "loss": loss}))

    def best(self) -> dict | None:
        """{"step", "loss"} of the weights written aside; None where there are none, or they are damaged."""
        try:
            verify_folder(self.run.state / BEST)
            return json.loads((self.run.state / BEST / STATE).read_text())
        except DamagedError:
            return None

    def forget_best_after(self, step: int) -> None:
        """Steps after this one are made anew, with their evaluations."""
        if (best := self.best()) is None or best["step"] > step:
            shutil.rmtree(self.run.state / BEST, ignore_errors=True)

    @torch.no_grad()
    def use_best(self) -> None:
        """Make the weights written aside the run's and the model's."""
        file = self.run.state / BEST / WEIGHTS
        if self.world.rank == 0:
            link_or_copy(file, self._newest)
        self.owners.fill(self._weights(), read_tensors(file), BEST)

    def _keep(self, folder: Path) -> None:
        beside = self.run.state / ".pre-decay.tmp"
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        for file in folder.iterdir():
            link_or_copy(file, beside / file.name)
        replace_folder(beside, self.run.state / "pre-decay")

    def _prune(self, step: int) -> None:
        """Keep the newest two up to `step`; later ones are of a future that was given up (a rollback, a damaged newest)."""
        folders = self.folders()
        past = [folder for folder in folders if folder.name <= f"step-{step:08d}"]
        leftovers = [path for pattern in ("damaged-*", ".*.tmp", ".*.old") for path in self.run.state.glob(pattern) if path.is_dir()]
        for folder in [*(set(folders) - set(past[-KEEP:])), *leftovers]:
            shutil.rmtree(folder, ignore_errors=True)

    def load_newest(self, before: int | None = None) -> TrainState | None:
        """Load the newest intact checkpoint (of less than `before` steps) into model and optimizer; None when there is none.

        Damaged ones are set aside, said, and passed over. Raises UserError when a checkpoint belongs to another model, or when there
        are checkpoints and none is intact.
        """
        folders = [folder for folder in self.folders() if before is None or folder.name < f"step-{before:08d}"]
        for folder in reversed(folders):
            try:
                return self._load(folder)
            except DamagedError as error:
                self.say(f"checkpoint {folder.name} is damaged ({error}): going back to the one before")
                shutil.rmtree(folder.with_name("damaged-" + folder.name), ignore_errors=True)
                folder.rename(folder.with_name("damaged-" + folder.name))
        if folders:
            raise UserError(f"{self.run.state}: every checkpoint is damaged: train again from the start, with another --out")
        return None

    @torch.no_grad()
    def _load(self, folder: Path) -> TrainState:
        verify_folder(folder)
        state = TrainState(**json.loads((folder / STATE).read_text()))
        if state.fingerprint["model"] != self.fingerprint["model"]:
            raise UserError(f"{folder} is of another model than config.toml describes: restore the [model] section the run began with")
        if state.fingerprint.get("storage") != self.fingerprint.get("storage"):
            raise UserError(
                f"{folder} keeps its numbers otherwise than config.toml says: restore weights, compensation and moments of [precision]"
            )
        if state.fingerprint["recipe"] != self.fingerprint["recipe"]:
            self.say("config.toml was changed since the checkpoint: from here on losses differ from what they would have been")
        if state.arithmetic and state.arithmetic != self.arithmetic:
            self.say(f"begun with {state.arithmetic}, going on with {self.arithmetic}: from here on the run is not bit for bit the same")
        self.owners.fill(self._weights(), read_tensors(folder / WEIGHTS), folder.name)
        self.optimizer.reset()
        names = set()
        stored = (found for file in sorted(folder.glob(OPTIMIZERS)) for found in read_tensors(file))
        for name, tensor in self.owners.moments(stored):
            self.optimizer.load(name, tensor)
            names.add(name)
        if missing := self.optimizer.state().keys() - names:
            raise DamagedError(f"{folder.name}: no tensor {min(missing)}")
        return state


def rewind(run: RunFolder) -> int:
    """Make the checkpoint before the decay the newest, so that a finished run goes on with more budget; -> its step.

    The learning rate is still at its peak there: the longer run is the one that the larger budget would have made from the start. What the
    first decay cost counts as spent. The caller holds the run's lock. Raises UserError where there is no such checkpoint."""
    kept = run.state / "pre-decay"
    try:
        step = int(json.loads((kept / STATE).read_text())["step"])
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{run}: cannot be extended, its checkpoint before the decay is missing or damaged ({error})") from None
    target, beside = run.state / f"step-{step:08d}", run.state / ".extend.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    for file in kept.iterdir():
        link_or_copy(file, beside / file.name)
    replace_folder(beside, target)
    for folder in run.state.glob("step-*"):
        if folder.name > target.name:
            shutil.rmtree(folder)
    (run.state / "plan.jsonl").unlink(missing_ok=True)  # the old plan's total was the old budget's
    return step
