"""The run folder: the only thing that passes from one stage to the next.

Layout: config.toml tokenizer.json weights/ state/ metrics.jsonl ledger.sqlite report.html MODEL_CARD.md (docs/architecture.md).
Nothing here is ever half written: a file is written beside its place, synced, and renamed over it; a folder likewise. Tensors are
streamed, so saving and loading need the memory of one tensor besides the model's.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.base.config import UserError
from sparing.base.files import (
    POINTER,
    DamagedError,
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
from sparing.base.lock import LOCK, folder_lock

if TYPE_CHECKING:  # torch takes a second to import, and half of what opens a run folder never touches a tensor
    import torch

CHECKSUMS = "checksums.json"


class RunFolder:
    """Paths of one run. `create` makes the folder, `open` finds an existing one; `lock` keeps other writers out."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.weights = self.path / "weights"
        self.weights_file = self.weights / "model.safetensors"
        self.adapter_file = self.path / "adapter" / "adapter_model.safetensors"
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

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make a run folder, or take over one that died before its config was written. UserError where other files are already."""
        run, folder = cls(_utf8(path)), output_folder(path, "--out")
        if run.config_file.exists():
            raise UserError(f"{path} already holds a run: continue it with `sparing resume {path}`, or choose another --out")
        ours = {"weights", "adapter", "state", "data", "tokenizer.json", "metrics.jsonl"}
        strangers = {entry.name for entry in run.path.glob("[!.]*") if not entry.name.startswith("ledger.")} - ours
        if strangers:
            raise UserError(f"{path} is not empty (it has {min(strangers)}): choose a new folder for --out")
        try:
            for part in (folder, run.weights, run.state):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Find an existing run folder. Raises UserError when `path` is none."""
        run = cls(_utf8(path))
        if not run.path.is_dir():
            raise UserError(f"{path}: " + ("is a file, not a run folder" if run.path.exists() else "no such run folder"))
        if not run.config_file.exists():
            inside = sorted(entry.parent.name for entry in run.path.glob("*/config.toml"))
            hint = f"; did you mean {run.path / inside[0]}?" if inside else ""
            raise UserError(f"{path} is not a run folder: it has no config.toml{hint}")
        return run

    def lock(self) -> AbstractContextManager[None]:
        """Keep other writers out: a context manager. Raises UserError where the folder is being written, naming the other process."""
        return folder_lock(self.path)


def _utf8(path: str | Path) -> str | Path:
    """`path`, if configurations and ledgers can hold it. Raises UserError."""
    whole = os.path.realpath(path)
    if not is_text(whole):
        raise UserError(f"{os.fsencode(whole).decode(errors='backslashreplace')} is not UTF-8 text: a run folder's path must be")
    return path


def looks_like_run(folder: str | Path) -> bool:
    """Whether a folder holds a run, one whose configuration is not written yet included."""
    inside = partial(os.path.join, folder)
    folders = os.path.isdir(inside("state")) and any(os.path.isdir(inside(name)) for name in ("weights", "adapter"))
    return folders and any(os.path.isfile(inside(name)) for name in ("config.toml", LOCK))


_DTYPES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
           "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL"}  # fmt: skip


def write_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> dict:
    """Write a safetensors file atomically, one tensor after the other; returns its {"sha256", "bytes"}.

    Not by safetensors' `save_file`, which first gathers the bytes of all tensors: a second copy of the model. The format: 8 bytes
    of length, a JSON header padded to 8 bytes, the tensors' bytes (github.com/huggingface/safetensors, "Format").
    """
    import torch

    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype = _DTYPES[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return file.digest()


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
    shutil.rmtree(beside, ignore_errors=True)
    with disk_errors(path):
        try:
            beside.mkdir(parents=True)
            sums = {name: (write_atomic if isinstance(body, str) else write_tensors)(beside / name, body) for name, body in files.items()}
            write_atomic(beside / CHECKSUMS, json.dumps(sums, indent=1))
            replace_folder(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


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
