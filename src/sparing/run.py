"""The run folder: the only thing that passes from one stage to the next.

Layout: config.toml tokenizer.json weights/ state/ metrics.jsonl ledger.sqlite report.html MODEL_CARD.md (docs/architecture.md).
Nothing here is ever half written: a file is written beside its place, synced, and renamed over it; a folder likewise. Tensors are
streamed, so saving and loading need the memory of one tensor besides the model's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from sparing.config import UserError
from sparing.lock import take_lock

if TYPE_CHECKING:  # torch takes a second to import, and half of what opens a run folder never touches a tensor
    import torch

CHECKSUMS = "checksums.json"
_LOCKED: dict[str, list] = {}  # real path -> [open lock file, depth]: a process may lock its own run folder again


class DiskFullError(UserError):
    """No room (or no quota) left for a file; whatever was there before is intact."""


class DamagedError(ValueError):
    """A file is missing, truncated or does not have the checksum it was written with."""


class RunFolder:
    """Paths of one run. `create` makes the folder, `open` finds an existing one; `lock` keeps other writers out."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.toml"
        self.tokenizer_file = self.path / "tokenizer.json"
        self.weights = self.path / "weights"
        self.weights_file = self.weights / "model.safetensors"
        self.state = self.path / "state"
        self.metrics_file = self.path / "metrics.jsonl"
        self.ledger_file = self.path / "ledger.sqlite"
        self.report_file = self.path / "report.html"
        self.model_card_file = self.path / "MODEL_CARD.md"

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def create(cls, path: str | Path) -> RunFolder:
        """Make a run folder, or take over one that died before its config was written. UserError where other files are already."""
        run = cls(path)
        if run.config_file.exists():
            raise UserError(f"{path} already holds a run: continue it with `sparing resume {path}`, or choose another --out")
        if run.path.exists() and not run.path.is_dir():
            raise UserError(f"{path} is a file, not a folder: choose another --out")
        ours = {"weights", "state", "data", "tokenizer.json", "metrics.jsonl"}
        strangers = {entry.name for entry in run.path.glob("[!.]*") if not entry.name.startswith("ledger.")} - ours
        if strangers:
            raise UserError(f"{path} is not empty (it has {min(strangers)}): choose a new folder for --out")
        try:
            for folder in (run.path, run.weights, run.state):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {path}: {error.strerror}") from None
        return run

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Find an existing run folder. Raises UserError when `path` is none."""
        run = cls(path)
        if not run.path.is_dir():
            raise UserError(f"{path}: no such run folder")
        if not run.config_file.exists():
            inside = sorted(entry.parent.name for entry in run.path.glob("*/config.toml"))
            hint = f"; did you mean {run.path / inside[0]}?" if inside else ""
            raise UserError(f"{path} is not a run folder: it has no config.toml{hint}")
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """One writer at a time. Raises UserError, naming the other process, when the folder is being written.

        A POSIX record lock (on Windows `msvcrt.locking`): it ends with the process, however it ends, and worker processes do not inherit
        it, so a worker that outlives a killed trainer does not keep `resume` out. Re-entrant within a process.
        """
        key = str(self.path.resolve())
        if key not in _LOCKED:
            _LOCKED[key] = [take_lock(self.path), 0]
        _LOCKED[key][1] += 1
        try:
            yield
        finally:
            _LOCKED[key][1] -= 1
            if _LOCKED[key][1] == 0:
                _LOCKED.pop(key)[0].close()


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into one clear line (DiskFullError) about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise DiskFullError(f"no room left for {path} ({error.strerror}): free some space; what was saved before is intact") from None


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


class _HashingFile:
    """A file being written, with the SHA-256 of what went in."""

    def __init__(self, file: BinaryIO):
        self.file, self.sha256, self.bytes = file, hashlib.sha256(), 0

    def write(self, data) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.bytes += memoryview(data).nbytes

    def digest(self) -> dict:
        return {"sha256": self.sha256.hexdigest(), "bytes": self.bytes}


@contextmanager
def atomic_file(path: str | Path) -> Iterator[_HashingFile]:
    """Write a file beside `path`, sync it, and rename it over `path` on success; on failure `path` stays as it was."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            with open(beside, "wb") as file:
                hashing = _HashingFile(file)
                yield hashing
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_atomic(path: str | Path, content: str | bytes) -> dict:
    """Write a whole small file atomically; returns its {"sha256", "bytes"}."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return file.digest()


def append_durably(path: Path, line: str) -> None:
    """Append one line to a log and sync it: for what must be on disk before it takes effect. A line that a kill cut short is ended."""
    with disk_errors(path), open(path, "a+b") as file:
        file.seek(0, os.SEEK_END)
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a line-by-line log; a line that a kill cut short is left out. No file: an empty list."""
    objects = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            objects.append(json.loads(line))
        except ValueError:
            continue
    return [item for item in objects if isinstance(item, dict)]


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
        raise DamagedError(f"{path}: {error}") from None


def write_folder(path: Path, files: Mapping[str, Mapping[str, torch.Tensor] | str]) -> None:
    """Write a folder of files (tensors by name -> safetensors; text as it is) with their checksums, beside `path`, then rename it.

    Killed at any instant, `path` is whole or as it was (between the two renames of a replacement: absent).
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    with disk_errors(path):
        try:
            beside.mkdir(parents=True)
            sums = {name: (write_atomic if isinstance(body, str) else write_tensors)(beside / name, body) for name, body in files.items()}
            write_atomic(beside / CHECKSUMS, json.dumps(sums, indent=1))
            replace_folder(beside, path)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


def replace_folder(beside: Path, path: Path) -> None:
    """Rename `beside` to `path`, where an older folder may be in the way."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.rename(path, old)
    os.rename(beside, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def verify_folder(path: Path) -> None:
    """Compare a folder written by `write_folder` with its checksums. Raises DamagedError naming the first file that differs."""
    try:
        sums = json.loads((path / CHECKSUMS).read_text())
        for name, expected in sums.items():
            with open(path / name, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                    raise DamagedError(f"{path / name} does not have its checksum")
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # the list itself is damaged
        raise DamagedError(f"{path}: {error}") from None


def link_or_copy(source: Path, path: Path) -> None:
    """Put the (immutable) file `source` at `path` too, atomically: a hard link where the file system has them, else a copy."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.unlink(missing_ok=True)
    with disk_errors(path):
        try:
            try:
                os.link(source, beside)
            except OSError:
                shutil.copyfile(source, beside)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(path.parent)
