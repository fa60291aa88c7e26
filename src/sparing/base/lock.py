"""A lock on a folder that ends with the process that holds it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from sparing.base.config import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

LOCK_BYTE = 1 << 30
"""Windows keeps others from reading what is locked: this byte lies beyond the owner's name."""


def take_lock(path: Path) -> BinaryIO:
    """The lock of the folder `path`, held until the file that is returned is closed. UserError, naming whoever has it."""
    try:
        file = open(path / ".lock", "a+b")
    except OSError as error:
        raise UserError(f"cannot write in {path}: {error.strerror}") from None
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(file.fileno(), LOCK_BYTE, os.SEEK_SET)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except OSError:
        file.seek(0)
        owner = file.read().decode(errors="replace").strip() or "another process"
        file.close()
        raise UserError(f"{path} is being written by {owner}: wait until it has finished, or stop it first") from None
    file.truncate(0)
    file.write(f"process {os.getpid()}".encode())
    file.flush()
    return file
