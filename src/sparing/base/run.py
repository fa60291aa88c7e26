"""The run folder: the only thing that passes from one stage to the next.

Layout: config.toml tokenizer.json weights/ state/ metrics.jsonl ledger.sqlite report.html MODEL_CARD.md (docs/architecture.md).
Nothing here is ever half written: a file is written beside its place, synced, and renamed over it; a folder likewise. Tensors are
streamed, so saving and loading need the memory of one tensor besides the model's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING
from weakref import finalize

from sparing.base.config import AdapterConfig, UserError
from sparing.base.config_file import read_config
from sparing.base.files import (
    POINTER,
    DamagedError,
    alike,
    atomic_file,
    disk_errors,
    file_sha256,
    is_pointer,
    is_text,
    name_beside,
    output_folder,
    replace_folder,
    write_atomic,
)
from sparing.base.held import held_as
from sparing.base.lock import LOCK, folder_lock

if TYPE_CHECKING:  # torch takes a second to import, and half of what opens a run folder never touches a tensor
    import torch

CHECKSUMS = "checksums.json"
BEGUN = ("weights", "adapter", "state", "tokenizer.json", "chat_template.jinja", "MODEL_CARD.md", "answers.jsonl", "draft_words.json",
         "quarantine.jsonl", "metrics.jsonl")  # fmt: skip
"""What a verb may have written before the configuration. `making` takes all of it away."""
OWN = (*BEGUN, "config.toml", "packed", "report.html", "tensorboard")
"""What else belongs to it, besides ledger and lock."""


class RunFolder:
    """Paths of one run. `create` makes the folder, `open` finds an existing one; `lock` keeps other writers out."""

    made = False
    """Whether `create` has made the folder, and not found it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.weights = self.path / "weights"
        self.weights_file = self.weights / "model.safetensors"
        self.adapter_file = self.path / "adapter" / "adapter_model.safetensors"
        self.draft_words_file = self.path / "draft_words.json"
        self.state = self.path / "state"
        self.metrics_file = self.path / "metrics.jsonl"
        self.ledger_file = self.path / "ledger.sqlite"
        self.report_file = self.path / "report.html"
        self.model_card_file = self.path / "MODEL_CARD.md"

    def __str__(self) -> str:
        return str(self.path)

    @property
    def learned_file(self) -> Path:
        """What it has learned: weights, or the updates that an adapter run keeps instead."""
        return self.adapter_file if self.adapter_file.exists() else self.weights_file

    def beside(self, drafts: bool) -> list[Path]:
        """What is no weight and still belongs to the model: how it is talked with, and the words among which its module chooses, where it
        drafts."""
        files = [self.path / "chat_template.jinja", *([self.draft_words_file] if drafts else [])]
        return [file for file in files if file.exists()]

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make a run folder, or take over one that died before its config was written. UserError where other files are already."""
        run, folder = cls.vacant(path)
        run.made = not folder.exists()
        try:
            for part in (folder, run.weights, run.state):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}") from None
        return run

    @classmethod
    def vacant(cls, path: str | Path) -> tuple[RunFolder, Path]:
        """-> (the run that `create` would make, where links lead). To be called before the work. UserError where it would refuse."""
        run, folder = cls(_utf8(path)), output_folder(path, "--out")
        if run.config_file.exists():
            raise UserError(f"{path} already holds a run: continue it with `sparing resume {path}`, or choose another --out")
        died = looks_like_run(folder)
        entries = (entry for entry in run.path.glob("[!.]*") if not entry.name.startswith("ledger."))
        strangers = {entry.name for entry in entries if not (entry.name in BEGUN if died else _is_bare(entry))}
        if strangers:
            raise UserError(f"{path} is not empty (it has {min(strangers)}): choose a new folder for --out")
        return run, folder

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Find an existing run folder. Raises UserError when `path` is none, with the folder that was meant, or how it becomes one."""
        run = cls(_utf8(path))
        imported = f"; a model of another program is imported first: sparing import {path} --out RUN"
        if not run.path.exists():
            like = alike(run.path)
            raise UserError(f"{path}: no such run folder" + (f"; did you mean {like}?" if like else ""))
        if not run.path.is_dir():
            raise UserError(f"{path}: is a file, not a run folder" + (imported if run.path.suffix == ".gguf" else ""))
        if not run.config_file.exists():
            inside = sorted(entry.parent.name for entry in run.path.glob("*/config.toml"))
            hint = f"; did you mean {run.path / inside[0]}?" if inside else ""
            hint = "; what began it ended before it had one: begin again with the same --out" if looks_like_run(path) else hint
            theirs = any((run.path / name).exists() for name in ("config.json", "adapter_config.json"))
            raise UserError(f"{path} is not a run folder: it has no config.toml{imported if theirs else hint}")
        return run

    def lock(self) -> AbstractContextManager[None]:
        """Keep other writers out: a context manager. Raises UserError where the folder is being written, naming the other process."""
        return folder_lock(self.path)

    @contextmanager
    def making(self) -> Iterator[None]:
        """The lock, for whoever makes a run: where that fails before the run has a configuration, nothing of it stays."""
        with self.lock():
            try:
                yield
            except BaseException:
                if not self.config_file.exists():
                    self.remove()
                raise

    def remove(self) -> None:
        """Take away the run, for whoever makes it, and its folder, where that is new; what others have put into it stays. The caller holds
        the lock, or has held it."""
        folder = Path(os.path.realpath(self.path))
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.name in OWN or (self.made and entry.name.startswith((".", "ledger."))):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
        if self.made:
            with suppress(OSError):  # it has files of others
                folder.rmdir()


def _utf8(path: str | Path) -> str | Path:
    """`path`, if configurations and ledgers can hold it. Raises UserError."""
    whole = os.path.realpath(path)
    if not is_text(whole):
        raise UserError(f"{os.fsencode(whole).decode(errors='backslashreplace')} is not UTF-8 text: a run folder's path must be")
    return path


def _is_bare(entry: Path) -> bool:
    """Whether it is a folder that `create` made just before its process died: before the lock, when nothing is in it yet."""
    return entry.name in ("weights", "state") and entry.is_dir() and not any(entry.iterdir())


def looks_like_run(folder: str | Path) -> bool:
    """Whether a folder holds a run, one whose configuration is not written yet included."""
    inside = partial(os.path.join, folder)
    folders = os.path.isdir(inside("state")) and any(os.path.isdir(inside(name)) for name in ("weights", "adapter"))
    return folders and any(os.path.isfile(inside(name)) for name in ("config.toml", LOCK))


_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
           "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip
_TYPES = {stored: ours for ours, stored in _DTYPES.items()}


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> dict:
    """Write a safetensors file atomically, one tensor after the other; returns its {"sha256", "bytes"}.

    Not by safetensors' `save_file`, which first gathers the bytes of all tensors: a second copy of the model.
    """
    return stream_tensors(path, {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}, tensors.items())


def stream_tensors(
    path: str | Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, torch.Tensor]]
) -> dict:
    """Like `write_tensors`, of tensors that come one by one: `layout` has the type and shape of each, in the order in which they come.

    The format: 8 bytes of length, a JSON header padded to 8 bytes, the tensors' bytes (github.com/huggingface/safetensors, "Format").
    """
    import torch

    with atomic_file(path) as file:
        file.write(tensors_header(layout))
        for (name, expected), (given, tensor) in zip(layout.items(), tensors, strict=True):
            assert (given, tensor.dtype, tuple(tensor.shape)) == (name, *expected), (given, tensor.dtype, tensor.shape, name, expected)
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return file.digest()


def tensors_header(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """What a file of `stream_tensors` begins with."""
    header, end = {}, 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPES[str(dtype).removeprefix("torch.")], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def read_tensors(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of a safetensors file, one at a time, on the CPU. Raises DamagedError when it is no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, FileNotFoundError) as error:
        pointer = isinstance(error, SafetensorError) and is_pointer(path)
        raise DamagedError(f"{path}: {POINTER if pointer else error}") from None


SCALE = "_scale"
"""`NAME_scale` has the factor of each row of the int8 codes `NAME` (`model.linear.Adaptable.freeze`)."""


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of a safetensors file as floats, by their names in the state dict. Each is read when it is asked for, and int8 codes are
    multiplied by their scales then. Read and not mapped: pages of a mapping are resident until all of the file is closed, which would make
    whoever fills a model hold it twice. Raises DamagedError, also for a tensor that is missing."""

    def __init__(self, path: str | Path):
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            with safe_open(path, framework="pt") as checked:
                stored = list(checked.keys())
            self._file = open(path, "rb", buffering=0)
        except (SafetensorError, OSError) as error:
            pointer = isinstance(error, SafetensorError) and is_pointer(path)
            raise DamagedError(f"{path}: {POINTER if pointer else error}") from None
        finalize(self, self._file.close)
        self._lock, length = Lock(), struct.unpack("<Q", self._file.read(8))[0]
        header, self._begin = json.loads(self._file.read(length)), 8 + length
        self._entries = {name: header[name] for name in stored}
        self._scaled = {name for name in stored if name + SCALE in self._entries}
        self._names = [name for name in stored if name.removesuffix(SCALE) not in self._scaled or name in self._scaled]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._read(name)
        return tensor.float().mul_(self._read(name + SCALE).unsqueeze(-1)) if name in self._scaled else tensor

    def _read(self, name: str) -> torch.Tensor:
        import torch

        entry = self._entries.get(name)
        if entry is None or entry["dtype"] not in _TYPES:
            raise DamagedError(f"{self.path}: " + (f"{name} is missing" if entry is None else f"{name} has the type {entry['dtype']}"))
        tensor = torch.empty(entry["shape"], dtype=getattr(torch, _TYPES[entry["dtype"]]))
        room = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        try:
            with self._lock:
                self._file.seek(self._begin + entry["data_offsets"][0])
                while room:
                    count = self._file.readinto(room)
                    if not count:
                        raise DamagedError(f"{self.path}: {name} is cut off")
                    room = room[count:]
        except OSError as error:
            raise DamagedError(f"{self.path}: {error}") from None
        return tensor


class AdaptedTensors(Mapping[str, "torch.Tensor"]):
    """The weights of an adapter run as floats: those of its base, as they were held in training, each with its low-rank update."""

    def __init__(self, base: Mapping[str, torch.Tensor], factors: Mapping[str, torch.Tensor], adapter: AdapterConfig):
        """Raises DamagedError where a factor has no weight to go beside."""
        self.base, self.factors, self.adapter, learned = base, factors, adapter, set(factors)
        self.updated = {name for name in base if {factor_name(name, "A"), factor_name(name, "B")} <= learned}
        if stray := learned - {factor_name(name, part) for name in self.updated for part in "AB"}:
            raise DamagedError(f"{min(stray)} updates no weight of its base")

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, name: str) -> torch.Tensor:
        from sparing.base.int4_groups import from_int4, to_int4
        from sparing.base.int8_rows import from_int8, to_int8

        weight = self.base[name]
        match held_as(name, tuple(weight.shape), self.adapter.base or "float32"):
            case "int4":
                weight = from_int4(to_int4(weight), weight.shape[-2])
            case "int8":
                weight = from_int8(*to_int8(weight))
            case "bfloat16":
                weight = weight.bfloat16()
        if name not in self.updated:
            return weight
        down, up = (self.factors[factor_name(name, part)].float() for part in "AB")
        experts, (out, columns), rank = weight.shape[:-2].numel(), weight.shape[-2:], self.adapter.rank
        if down.shape != (experts * rank, columns) or up.shape != (out, rank * experts):
            raise DamagedError(f"factors of {name} are {tuple(down.shape)} and {tuple(up.shape)}, which does not fit {tuple(weight.shape)}")
        if weight.ndim == 3:
            down, up = down.unflatten(0, (experts, rank)), up.unflatten(1, (rank, experts)).permute(2, 0, 1)
        return weight.float().add_(up @ down, alpha=self.adapter.alpha / rank)


def factor_name(weight: str, part: str) -> str:
    """The name of a weight's factor A or B (`model.linear.Adaptable`)."""
    return f"{weight.removesuffix('weight')}lora_{part}.weight" if weight.endswith(".weight") else f"{weight}_lora_{part}.weight"


def base_of(run: RunFolder) -> RunFolder | None:
    """The run beside whose weights an adapter run learned, checked; None: `run` has weights of its own.

    Raises UserError where it is gone or has other weights."""
    if not run.adapter_file.exists():
        return None
    start = read_config(run.config_file).start
    assert start is not None, run
    base = RunFolder(start.run)
    if not base.learned_file.exists():
        raise UserError(f"{run} is an adapter of {base}, which is gone: if it has moved, say --base RUN")
    if weights_sha256(base) != start.weights_sha256:
        raise UserError(f"{run} is an adapter of other weights than {base} has: name the run that it was trained on, --base RUN")
    return base


def weights_sha256(run: RunFolder) -> str:
    """What identifies a run's weights: the SHA-256 of their file, or of an adapter's and its base's, one after the other."""
    digest = file_sha256(run.learned_file)
    if not run.adapter_file.exists():
        return digest
    start = read_config(run.config_file).start
    return hashlib.sha256(f"{digest} {start.weights_sha256}".encode()).hexdigest()


def tensors_of(run: RunFolder) -> Mapping[str, torch.Tensor]:
    """The weights of a run as floats (float32 or bfloat16), whatever they are stored in, one at a time; an adapter run's are merged.

    Raises DamagedError, and UserError for an adapter run whose base is gone or another."""
    base = base_of(run)
    if base is None:
        return StoredTensors(run.weights_file)
    return AdaptedTensors(tensors_of(base), StoredTensors(run.adapter_file), read_config(run.config_file).adapter)


def run_tensors(run: RunFolder) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, floats) of each of a run's weights, one at a time. Whatever reads a run's weights reads them here, or in `tensors_of`."""
    yield from tensors_of(run).items()


def fill(state: Mapping[str, torch.Tensor], tensors: Iterable[tuple[str, torch.Tensor]], where: str | Path) -> None:
    """Copy tensors into a state dict, in place. Raises DamagedError where one has no place or another shape, and where one is missing."""
    left = dict(state)
    for name, tensor in tensors:
        if name not in left or left[name].shape != tensor.shape:
            raise DamagedError(f"{where}: {name} {tuple(tensor.shape)} does not belong to the model")
        left.pop(name).copy_(tensor)
    if left:
        raise DamagedError(f"{where}: {next(iter(left))} is missing")


def write_folder(path: Path, files: Mapping[str, Mapping[str, torch.Tensor] | str]) -> None:
    """Write a folder of files (tensors by name -> safetensors; text as it is) with their checksums, beside `path`, then rename it.

    Killed at any instant, `path` is whole or as it was (between the two renames of a replacement: absent).
    """
    beside = name_beside(path)
    begin_folder(beside)
    try:
        end_folder(beside, path, write_into(beside, files))
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def begin_folder(beside: Path) -> None:
    """Make the folder `beside`, empty, for what several processes write into it, until one of them ends it."""
    shutil.rmtree(beside, ignore_errors=True)
    with disk_errors(beside):
        beside.mkdir(parents=True)


def write_into(beside: Path, files: Mapping[str, Mapping[str, torch.Tensor] | str]) -> dict[str, dict]:
    """Write files of a folder that was begun; -> their checksums by name."""
    with disk_errors(beside):
        return {name: (write_atomic if isinstance(body, str) else write_tensors)(beside / name, body) for name, body in files.items()}


def end_folder(beside: Path, path: Path, sums: dict[str, dict]) -> None:
    """Write the checksums of all files of a folder that was begun, and rename it to `path`."""
    with disk_errors(path):
        write_atomic(beside / CHECKSUMS, json.dumps(sums, indent=1))
        replace_folder(beside, path)


def verify_folder(path: Path) -> None:
    """Compare a folder written by `write_folder` with its checksums. Raises DamagedError naming the first file that differs."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        for name, expected in sums.items():
            if file_sha256(path / name) != expected["sha256"]:
                raise DamagedError(f"{path / name} does not have its checksum")
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the list itself is damaged
        raise DamagedError(f"{path}: {error}") from None
