"""Checkpoints: state/step-00000123/{weights.safetensors optimizer.safetensors state.json checksums.json}.

The number is that of finished steps. Weights are of the type they are trained in, under Hugging Face's names; the newest are hard-linked to
weights/model.safetensors too, so that a killed run can be served. An adapter run has its low-rank factors instead, and adapter/. Kept: the
newest two, and state/pre-decay, from which a finished run can be extended. Step 0 is saved like any other, so there is always something to
go back to.

Between steps a checkpoint is copied in memory, and written while the next steps are made; it counts when all ranks have written theirs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import partial
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn

from sparing.base.config import Config, PrecisionConfig, UserError
from sparing.base.files import DamagedError, DiskFullError, disk_errors, link_or_copy, replace_folder
from sparing.base.hardware import free_memory
from sparing.base.run import RunFolder, begin_folder, end_folder, read_tensors, stream_tensors, verify_folder, write_into
from sparing.kernels import native
from sparing.model.low_rank import learned
from sparing.parallel.owners import Replicated
from sparing.train.optim import Optimizer

KEEP = 2
SPARE = 2.0
"""A checkpoint is written beside the steps where so many times its bytes of memory are free for the copy; else before the next step."""
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


@dataclass
class Writing:
    """A folder that is being written, and this rank's part of it."""

    folder: Path
    began: float = field(default_factory=time.monotonic)
    thread: Thread = field(init=False)
    sums: dict[str, dict] = field(default_factory=dict)
    """Checksums of the files that are written."""
    failure: Exception | None = None
    ended: float = 0.0
    of: tuple[int, int] = (0, 0)
    """Steps and batches."""
    keep: bool = False
    """As the checkpoint before the decay."""

    @property
    def beside(self) -> Path:
        return self.folder.with_name(f".{self.folder.name}.tmp")  # the same for all ranks

    def attempt(self, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # told where ranks meet
            self.failure = error

    def write(self, files: Mapping[str, Any]) -> None:
        self.attempt(lambda: self.sums.update(write_into(self.beside, files)))
        self.ended = time.monotonic()


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
        self._writing: Writing | None = None

    def _weights(self) -> dict[str, Tensor]:
        """What is saved and loaded: live tensors by name."""
        return learned(self.model) if self.adapts else self.model.state_dict()

    @property
    def _newest(self) -> Path:
        return self.run.adapter_file if self.adapts else self.run.weights_file

    def folders(self) -> list[Path]:
        """Checkpoints, oldest first."""
        return sorted(self.run.state.glob("step-*"))

    def save(self, state: TrainState, *, keep_as_pre_decay: bool = False, copied: bool = False) -> None:
        """Begin to write a checkpoint, which `settle` ends. copied: from a copy, so that steps may be made meanwhile.

        There is no other one that is not settled. Raises DiskFullError, on all ranks where one of them cannot write, with everything older
        intact."""
        state.fingerprint, state.arithmetic = self.fingerprint, self.arithmetic
        if self._saved == (state.step, state.cursor) and not keep_as_pre_decay:
            return  # a signal right after a save
        folder, text = self.run.state / f"step-{state.step:08d}", json.dumps(asdict(state), indent=1)
        self._writing = self._begin(folder, self.optimizer.state(), text, copied)
        self._writing.of, self._writing.keep = (state.step, state.cursor), keep_as_pre_decay

    @property
    def pending(self) -> bool:
        """Whether there is a checkpoint to settle."""
        return self._writing is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes its part of it."""
        return self._writing is not None and self._writing.thread.is_alive()

    def settle(self) -> float:
        """Wait until the checkpoint that was begun is written, and let it count; -> the seconds that it took.

        Where ranks have shares, all call this together. Raises as `save`."""
        writing, self._writing = self._writing, None
        self._end(writing)
        self._saved = writing.of
        if self.world.rank == 0:
            self._newest.parent.mkdir(exist_ok=True)
            link_or_copy(writing.folder / WEIGHTS, self._newest)
            if self.adapts and self.run.weights.is_dir():  # made before it was known what would be in it
                self.run.weights.rmdir()
            if writing.keep:
                self._keep(writing.folder)
            self._prune(writing.of[0])
        return writing.ended - writing.began

    def _begin(self, folder: Path, moments: Mapping[str, Tensor], text: str, copied: bool) -> Writing:
        """Begin to write a folder with the weights, what `moments` has (where ranks have shares: each its own), and `text`.

        copied: from a copy, if there is memory for it, so that the tensors may change."""
        shares, world = self.owners.mine is not None, self.world
        writing = Writing(folder)
        files: dict[str, Any] = {}
        if moments:
            name = f"optimizer-{world.rank + 1:05d}-of-{world.size:05d}.safetensors" if shares else OPTIMIZER
            files[name] = self.owners.labelled(moments)
        weights, size = self._weights(), sum(tensor.nbytes for tensor in moments.values())
        if world.rank == 0:
            size += sum(dtype.itemsize * prod(shape) for dtype, shape in self.owners.layout(weights).values())
        copied = copied and free_memory() > SPARE * size
        if copied:
            files = {name: {key: _copy(tensor) for key, tensor in tensors.items()} for name, tensors in files.items()}
        self._together(writing, partial(begin_folder, writing.beside) if world.rank == 0 else None)
        if not shares:
            files[WEIGHTS] = {name: _copy(tensor) for name, tensor in weights.items()} if copied else weights
        elif copied:
            files |= {WEIGHTS: wholes} if (wholes := self._wholes(weights)) else {}
        else:
            self._together(writing, partial(self._stream, writing, weights))
        if world.rank == 0:
            files[STATE] = text
        writing.thread = Thread(target=writing.write, args=(files,), name="sparing-checkpoint", daemon=True)
        writing.thread.start()
        if not copied:  # the next step changes what is being written
            writing.thread.join()
        return writing

    def _end(self, writing: Writing) -> None:
        """Wait for all ranks, and give the folder its name. Raises DiskFullError."""
        writing.thread.join()
        self._together(writing)
        parts = [writing.sums]
        if self.owners.mine is not None:
            parts = [json.loads(text) for text in self.world.gather(json.dumps(writing.sums))]
        if self.world.rank == 0:
            end_folder(writing.beside, writing.folder, {name: value for part in parts for name, value in part.items()})
        if self.owners.mine is not None:
            self.world.agree([0.0])  # nobody goes on, and perhaps dies, before it is whole

    def _together(self, writing: Writing, work: Callable[[], object] | None = None) -> None:
        """Do what may fill a disk, here or elsewhere. Raises DiskFullError where it has, or had before, on all ranks that save."""
        if work:
            writing.attempt(work)
        failed = writing.failure is not None
        if self.owners.mine is not None:
            failed = any(self.world.agree([float(failed)]))
        if failed:
            if self.world.rank == 0:
                shutil.rmtree(writing.beside, ignore_errors=True)
            raise writing.failure or DiskFullError(f"{writing.folder}: another rank could not write its part")

    def _wholes(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy of whole weights, on rank 0. All ranks go through them."""
        found = {}
        for name, tensor in self.owners.wholes(weights):
            if self.world.rank == 0:
                found[name] = _copy(tensor)
        return found

    def _stream(self, writing: Writing, weights: Mapping[str, Tensor]) -> None:
        """Write whole weights, tensor by tensor, on rank 0. All ranks go through them, even where the disk is full."""
        wholes = self.owners.wholes(weights)
        try:
            if self.world.rank == 0:
                with disk_errors(writing.beside):
                    writing.sums[WEIGHTS] = stream_tensors(writing.beside / WEIGHTS, self.owners.layout(weights), wholes)
        finally:
            for _ in wholes:
                pass

    def keep_best(self, step: int, loss: float) -> None:
        """Write the weights aside: none scored better until now."""
        self._end(self._begin(self.run.state / BEST, {}, json.dumps({"step": step, "loss": loss}), copied=False))

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


def _copy(tensor: Tensor) -> Tensor:
    """A tensor as it is now, on the CPU."""
    return tensor.detach().clone() if tensor.device.type == "cpu" else tensor.detach().cpu()


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
