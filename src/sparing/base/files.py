"""Writes files and folders that are never half there: beside their place first, synced, then renamed over it."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from sparing.base.config import UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit that has no room left."""


class DiskFullError(UserError):
    """No room (or no quota) left for a file; whatever was there before is intact."""


class DamagedError(ValueError):
    """A file is missing, truncated or does not have the checksum it was written with."""


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into one clear line (DiskFullError) about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
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
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A place beside `path` for a whole file, which is synced and renamed over `path` on success; on failure `path` stays as it was."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with disk_errors(path):
        try:
            yield beside
            with open(beside, "rb") as file:
                os.fsync(file.fileno())
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
        sync_folder(path.parent)


@contextmanager
def atomic_file(path: str | Path) -> Iterator[_HashingFile]:
    """Write a file beside `path`, sync it, and rename it over `path` on success; on failure `path` stays as it was."""
    with atomic_path(path) as beside, open(beside, "wb") as file:
        hashing = _HashingFile(file)
        yield hashing


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


def to_json(value: Any) -> Any:
    """What JSON can say: not-a-number and infinity become null."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else to_json(value.item()) if hasattr(value, "item") else str(value)


def from_json(text: str | bytes) -> Any:
    """Like `json.loads`, with null for the NaN and Infinity that other programs (and we, once) write. Raises ValueError."""
    return json.loads(text, parse_constant=lambda name: None)


def read_lines(path: Path) -> list[dict]:
    """The JSON objects of a line-by-line log; a line that a kill cut short is left out. No file: an empty list."""
    objects = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            objects.append(from_json(line))
        except ValueError:
            continue
    return [item for item in objects if isinstance(item, dict)]


def file_sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits, without reading it whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(beside: Path, path: Path) -> None:
    """Rename `beside` to `path`, where an older folder may be in the way."""
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    if path.exists():
        os.rename(path, old)
    os.rename(beside, path)
    sync_folder(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def link_or_copy(source: Path, path: Path) -> None:
    """Put the (immutable) file `source` at `path` too, atomically: a hard link where the file system has them, else a copy."""
    with atomic_path(path) as beside:
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError:
            shutil.copyfile(source, beside)
