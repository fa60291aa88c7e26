"""Writes files and folders that are never half there: beside their place first, synced, then renamed over it.

`output_file` and `output_folder` decide where an output is written whose path a user named, and refuse, before the work, what cannot be
written. `read_text` reads files that people write.
"""

from __future__ import annotations

import codecs
import difflib
import errno
import hashlib
import json
import math
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from sparing.base.config import CannotGoOn, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Errors of a disk, a quota or a limit that has no room left."""


POINTER_BEGINS = b"version https://git-lfs.github.com/spec/"
POINTER = "a Git LFS pointer, not the file itself (`git lfs pull` in its repository gets it, or a download from where it is published)"


class DiskFullError(UserError):
    """No room (or no quota) left for a file; whatever was there before is intact."""


class DamagedError(ValueError):
    """A file is missing, truncated or does not have the checksum it was written with."""


@contextmanager
def disk_errors(path: str | Path) -> Iterator[None]:
    """Turn "no space left", "quota exceeded" and "file too large" into one clear line (DiskFullError) about `path`, and a folder that has
    vanished, or the reader of a pipe, into another (CannotGoOn)."""
    try:
        yield
    except OSError as error:
        folder = Path(path).parent
        if isinstance(error, FileNotFoundError) and not folder.is_dir():
            raise CannotGoOn(f"{path} cannot be written: the folder {folder} is gone") from None
        if error.errno == errno.EPIPE:
            raise CannotGoOn(f"{path} cannot be written: who read it has left") from None
        if error.errno not in FULL:
            raise
        raise DiskFullError(f"no room left for {path} ({error.strerror}): free some space; what was saved before is intact") from None


# paths that are not there


def alike(path: str | Path) -> Path | None:
    """Of a path that is not there: the entry of the deepest folder that is, which looks most like what was written; None: none does."""
    missing = Path(path)
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        like = difflib.get_close_matches(missing.name, os.listdir(missing.parent), n=1)
    except OSError:  # a folder that is closed to us
        like = []
    return missing.parent / like[0] if like else None


# outputs that a user names


def output_file(named: str | Path, option: str) -> Path:
    """Where to write the output file that a user named by `option`: the file itself, or the one that it links to. `write_atomic` replaces
    it whole; a device or a pipe is written to and stays what it is.

    To be called before the work. Raises UserError where no file can be written.
    """
    with _naming(named, option):
        mode = _mode(named)
        if stat.S_ISDIR(mode):
            raise UserError(f"{option} {named}: is a folder; name a file in it")
        if mode and not os.access(named, os.W_OK):
            raise UserError(f"{option} {named}: cannot be written; choose another {option}")
        if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
            return Path(named)
        if mode and not stat.S_ISREG(mode):
            raise UserError(f"{option} {named}: is neither a file nor a pipe; choose another {option}")
        path = Path(os.path.realpath(named))
        if not path.parent.is_dir():
            raise UserError(f"{option} {named}: there is no folder {path.parent if Path(named).is_symlink() else Path(named).parent}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise UserError(f"{option} {named}: its folder cannot be written; choose another {option}")
        return path


def output_folder(named: str | Path, option: str) -> Path:
    """Where to make the folder that a user named by `option`. It may be there already, and it may be a link. To be called before the work.

    Raises UserError where no folder can be made.
    """
    with _naming(named, option):
        path = Path(os.path.realpath(named))
        mode = _mode(path)
        if mode and not stat.S_ISDIR(mode):
            raise UserError(f"{option} {named}: is a file, not a folder; choose another {option}")
        there = next(folder for folder in (path, *path.parents) if folder.is_dir())
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{option} {named}: the folder {there} cannot be written; choose another {option}")
        return path


def new_folder(named: str | Path, option: str) -> Path:
    """As `output_folder`, for what takes the place of the folder with all that is in it. Raises UserError where anything is."""
    path = output_folder(named, option)
    if path.exists() and any(path.iterdir()):
        raise UserError(f"{named} already exists and is not empty: choose a new folder for {option}")
    return path


@contextmanager
def _naming(named: str | Path, option: str) -> Iterator[None]:
    """Turn what the system says of a path into one line about `option`."""
    if not str(named):
        raise UserError(f"{option} needs a name")
    try:
        yield
    except OSError as error:  # a name that is too long, links in a circle, a file where a folder should be, a folder that is closed to us
        what = "a pipe that nobody reads" if error.errno == errno.ENXIO else error.strerror
        raise UserError(f"{option} {_short(named)}: {what}; choose another {option}") from None


def is_text(name: str) -> bool:
    """Whether files can hold a name. One that is not UTF-8 comes from the system with surrogates in place of its bytes."""
    return not any("\ud800" <= char <= "\udfff" for char in name)


def _short(path: str | Path) -> str:
    return str(path) if len(str(path)) <= 120 else f"{str(path)[:100]}..."


def _mode(path: str | Path) -> int:
    """What is at `path`, links followed; 0 where nothing is."""
    try:
        return os.stat(path).st_mode
    except FileNotFoundError:
        return 0


# text that people write

TEXT_BYTES = 256 << 20
"""A longer file is no text that a person wrote: it is not read."""
MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def read_text(path: str | Path, option: str = "", limit: int = TEXT_BYTES) -> str:
    """A text file that a person wrote, without its byte order mark, lines ended by \\n.

    Raises UserError, one line that begins with `option` and names the file: it is missing, a folder, larger than `limit` bytes, not UTF-8.
    """
    where = f"{option} {_short(path)}".strip()
    try:
        with open(path, "rb") as file:
            raw = file.read(limit + 1)
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > limit:
        raise UserError(f"{where}: is larger than {limit >> 20} MiB, which no file of this kind is")
    return decoded(raw, where).replace("\r\n", "\n").replace("\r", "\n")


def decoded(raw: bytes, where: str) -> str:
    """UTF-8 text without its byte order mark. Raises UserError, one line that begins with `where`, for other encodings."""
    if raw.startswith(POINTER_BEGINS):
        raise UserError(f"{where}: {POINTER}")
    for mark, name in MARKS.items():
        if raw.startswith(mark):
            raise UserError(f"{where}: is {name} text; save it as UTF-8")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise UserError(f"{where}: line {line} is not UTF-8 text (byte 0x{raw[error.start]:02x}); save it as UTF-8") from None


# writing


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


def name_beside(path: Path, end: str = "tmp") -> Path:
    """A hidden name next to `path`, of this process alone. File systems have names of up to 255 bytes: of a long one stands its hash."""
    name = path.name if len(os.fsencode(path.name)) < 200 else hashlib.sha256(os.fsencode(path.name)).hexdigest()
    return path.with_name(f".{name}.{os.getpid()}.{end}")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A place beside `path` for a whole file, which is synced and renamed over `path` on success; on failure `path` stays as it was.
    A device or a pipe is no file to rename over: the place is `path` itself."""
    path = Path(path)
    beside = name_beside(path)
    with disk_errors(path):
        if stat.S_ISCHR(mode := _mode(path)) or stat.S_ISFIFO(mode):
            yield path
            return
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
    """Write a file beside `path`, sync it, and rename it over `path` on success; on failure `path` stays as it was. A file that was there
    before passes its permissions on."""
    with atomic_path(path) as beside, open(beside, "wb") as file:
        if beside != path and (before := _mode(path)):
            with suppress(OSError):  # a file system without permissions
                os.chmod(beside, stat.S_IMODE(before))
        hashing = _HashingFile(file)
        yield hashing


def write_atomic(path: str | Path, content: str | bytes) -> dict:
    """Write a whole small file atomically; returns its {"sha256", "bytes"}."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return file.digest()


def open_log(named: str | Path, option: str) -> BinaryIO:
    """A log that a user named, open to append to, each write one piece. A new file is its owner's alone; one that is there, a device or a
    pipe stays as it is. Raises UserError where it cannot be written."""
    with _naming(named, option):
        Path(named).parent.mkdir(parents=True, exist_ok=True)
        # Without O_NONBLOCK, opening a pipe would wait for somebody to read it. Windows has none; it has text files.
        at_once, binary = getattr(os, "O_NONBLOCK", 0), getattr(os, "O_BINARY", 0)
        descriptor = os.open(named, os.O_WRONLY | os.O_APPEND | os.O_CREAT | at_once | binary, 0o600)
    if at_once:
        os.set_blocking(descriptor, True)
    return os.fdopen(descriptor, "ab", buffering=0)


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


def is_pointer(path: str | Path) -> bool:
    """Whether a file is what Git leaves in the place of a large one that was not fetched (git-lfs.github.com, spec v1)."""
    with open(path, "rb") as file:
        return file.read(42).startswith(POINTER_BEGINS)


def file_sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits, without reading it whole."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_folder(beside: Path, path: Path) -> None:
    """Rename `beside` to `path`, where an older folder may be in the way."""
    old = name_beside(path, "old")
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
