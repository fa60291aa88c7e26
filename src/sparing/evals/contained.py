"""Runs code that a model wrote, contained: `contained_child` says how. Where the system cannot contain it, nothing is run."""

from __future__ import annotations

import functools
import json
import os
import secrets
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from sparing.base.config import CannotGoOn

CHILD = Path(__file__).with_name("contained_child.py")
LOOK_S = 0.1
"""Between looks at what a program does."""
OUTPUT = 1 << 20
"""Bytes that a program may write; one that writes more is ended."""
PROBE = """
import ctypes, os, socket, threading
def left_open(attempt):
    try:
        attempt()
    except (OSError, MemoryError):
        return False
    return True
parent = os.getppid()
attempts = {
    "the network": lambda: socket.socket(),
    "processes": lambda: os.fork() or os._exit(0),
    "programs": lambda: os.execv("/bin/true", ["true"]),
    "files": lambda: open("/etc/passwd").read(),
    "writing": lambda: open("/tmp/contained", "w"),
    "other processes": lambda: open(f"/proc/{parent}/mem", "rb").read(1),
    "signals": lambda: os.kill(parent, 0),
    "memory": lambda: bytearray(2 << 30),
}
found = [name for name, attempt in attempts.items() if left_open(attempt)]
threading.Thread(target=len, args=("",)).start()
"""


class Limits(NamedTuple):
    """What a program may use."""

    cpu_s: int = 5
    asleep_s: float = 5.0
    """In all, while no thread of it computes or wants to."""
    wall_s: float = 120.0
    """For what waits in no such way; a busy machine should not reach it."""
    memory: int = 512 << 20
    """Bytes of address space."""


class Outcome(NamedTuple):
    """What became of a program."""

    passed: bool
    reason: str
    """passed, failed, time, memory, output, ended: a short word, the same for the same cause."""
    detail: str = ""
    output: bytes = b""
    """What it wrote, at most OUTPUT bytes."""


class Uncontained(CannotGoOn):
    """The system cannot contain code, so it is not run."""


def run(program: str, tests: Sequence[str] = (), stdin: str = "", limits: Limits = Limits()) -> Outcome:  # noqa: B008
    """Run a program, then each test in its names. Raises Uncontained, where nothing was run, if that is impossible on this machine."""
    if reason := uncontained():
        raise Uncontained(reason)
    return _run(program, tests, stdin, limits)


@functools.cache
def uncontained() -> str | None:
    """Why code cannot be contained here; None: it can, which a trial has shown: once for each process, in about 0.1 s."""
    try:
        outcome = _run(PROBE, ["assert not found, found"], "", Limits())
        return None if outcome.passed else f"code cannot be contained on this machine ({outcome.reason} {outcome.detail}): none is run"
    except (OSError, Uncontained) as error:
        return f"code cannot be contained on this machine ({error}): none is run"


def _run(program: str, tests: Sequence[str], stdin: str, limits: Limits) -> Outcome:
    token = secrets.token_hex(16)
    request = {"program": program, "tests": list(tests), "stdin": stdin, "token": token}
    request |= {"seconds": limits.cpu_s, "bytes": limits.memory}
    told, tell = os.pipe()
    with os.fdopen(told, "rb") as told_file:
        try:
            process = _start(tell)
        finally:
            os.close(tell)
        with process:
            try:
                process.stdin.write(json.dumps(request).encode())
                process.stdin.close()
            except BrokenPipeError:
                pass  # it died at once: there will be no word of it
            try:
                output, word, cut = _listen(process, told_file, limits)
            finally:
                process.kill()
    return _outcome(process.returncode, word, token, cut, output)


def _start(tell: int) -> subprocess.Popen:
    """A new Python whose descriptor 3 is `tell`, with no other of ours, and none of our environment."""
    # -P, -s, -S: nobody else's modules. Equal programs must behave equally, so strings are hashed as always.
    command = [sys.executable, "-P", "-s", "-S", "-B", "-c", BEGIN, str(CHILD), str(tell)]
    environment = {"PYTHONHASHSEED": "0", "PYTHONIOENCODING": "utf-8:backslashreplace"}
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, **streams, env=environment, cwd="/", pass_fds=(tell,), start_new_session=True)


BEGIN = "import os, sys; os.dup2(int(sys.argv[2]), 3); exec(compile(open(sys.argv[1]).read(), sys.argv[1], 'exec'))"
"""Descriptors are numbered by chance, and a file's path may hold anything."""


def _listen(process: subprocess.Popen, told: object, limits: Limits) -> tuple[bytes, bytes, str]:
    """(what it wrote, its last word, "time" or "output" where it was not left to end)."""
    looked, asleep, heard = time.monotonic(), 0.0, {process.stdout: bytearray(), told: bytearray()}
    ends = looked + limits.wall_s
    with selectors.DefaultSelector() as selector:
        for file in heard:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(LOOK_S)
            if (now := time.monotonic()) >= looked + LOOK_S:
                asleep += LOOK_S if _asleep(process.pid) else 0.0  # and no more, however long we had to wait ourselves
                looked = now
            if asleep > limits.asleep_s or now > ends:
                return bytes(heard[process.stdout]), bytes(heard[told]), "time"
            for key, _ in ready:
                piece = os.read(key.fd, 1 << 16)
                heard[key.fileobj] += piece
                if not piece:
                    selector.unregister(key.fileobj)
                if len(heard[key.fileobj]) > OUTPUT:
                    return bytes(heard[process.stdout][:OUTPUT]), bytes(heard[told]), "output"
    return bytes(heard[process.stdout]), bytes(heard[told]), ""


def _asleep(pid: int) -> bool:
    """Whether no thread of a process computes, waits for its turn, or for a disk (proc_pid_stat(5))."""
    try:
        stats = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
    except OSError:  # it is ending
        return False
    return bool(stats) and not any(stat.rpartition(")")[2].split()[0] in "RD" for stat in stats)


def _outcome(status: int, word: bytes, token: str, cut: str, output: bytes) -> Outcome:
    said = word.decode(errors="replace")
    if cut:
        return Outcome(False, cut, output=output)
    if not said.startswith(f"{token} "):
        return Outcome(False, "time" if status in (-9, -24) else "ended", output=output)  # SIGKILL: of the limit on CPU time
    reason, _, detail = said.removeprefix(f"{token} ").partition(" ")
    if reason == "uncontained":
        raise Uncontained(detail)
    return Outcome(reason == "passed", reason, detail, output)
