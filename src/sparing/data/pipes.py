"""Messages between this process and Python processes that it starts: a uint64 length and that many bytes; nothing is pickled."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import BinaryIO


def python_path() -> str:
    """Where this package is, before whatever the parent's path says: works from a checkout as from an installation."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])


def send(pipe: BinaryIO, raw: bytes) -> None:
    pipe.write(len(raw).to_bytes(8, "little"))
    pipe.write(raw)
    pipe.flush()


def receive(pipe: BinaryIO) -> bytes:
    """Raises EOFError where the other side is gone."""
    size = pipe.read(8)
    if len(size) < 8:
        raise EOFError
    size = int.from_bytes(size, "little")
    raw = pipe.read(size)
    if len(raw) < size:
        raise EOFError
    return raw


def end(process: subprocess.Popen) -> None:
    """Kill a process, wait for it, and close the pipes to it."""
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            pipe.close()
        except OSError:  # unsent bytes to a process that is gone
            pass
