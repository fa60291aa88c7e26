"""A lock on a folder: one writer at a time. It ends with the process that holds it, however that ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparing.base.config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK = ".lock"
LOCK_BYTE = 1 << 30
"""Windows keeps others from reading what is locked: this byte lies beyond the owner's name."""
_HELD: set[Path] = set()
"""Folders that this process has locked: the system grants its record locks to a process again and again."""


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Hold the lock of the folder `path`. Raises UserError, naming whoever has it.

    A POSIX record lock (on Windows `msvcrt.locking`). Worker processes do not inherit it, so one that outlives a killed trainer does not
    keep `resume` out.
    """
    folder = path.resolve()
    refusal = "{} is being written by {}: wait until it has finished, or stop it first"
    if folder in _HELD:
        raise UserError(refusal.format(path, f"process {os.getpid()}"))
    try:
        file = open(path / LOCK, "a+b")
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}") from None
    with file:
        try:
            if fcntl:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.lseek(file.fileno(), LOCK_BYTE, os.SEEK_SET)
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError:
            file.seek(0)
            raise UserError(refusal.format(path, file.read().decode(errors="replace").strip() or "another process")) from None
        file.truncate(0)
        file.write(f"process {os.getpid()}".encode())
        file.flush()
        _HELD.add(folder)
        try:
            yield
        finally:
            _HELD.discard(folder)
