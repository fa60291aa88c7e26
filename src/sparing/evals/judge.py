"""Judges texts by verifiers that may never come back, in a process that is ended when one does not: `python -m sparing.evals.judge`.

Regular expressions of users, and formulas of models, can take for ever. Each judgement has CPU_S of CPU time, so that a busy machine
judges as an idle one does; the process that used it up is replaced. Messages are JSON, one a line.
"""

from __future__ import annotations

import atexit
import json
import math
import os
import re
import selectors
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import IO, Any

CPU_S, WALL_S = 3.0, 60.0
MEMORY = 4 << 30
"""Bytes of address space."""
START_S = 60.0
FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)```", re.DOTALL)


def parse_json(text: str) -> Any:
    """A JSON value. Raises ValueError, of what only Python would read too."""

    def refuse(name: str):
        raise ValueError(f"{name} is no JSON")

    def number(digits: str) -> float:
        value = float(digits)
        return value if math.isfinite(value) else refuse(digits)

    try:
        return json.loads(text, parse_constant=refuse, parse_float=number)
    except RecursionError:
        raise ValueError("too deep") from None


def schema_validator(schema: Any):
    """What says whether a value keeps to a JSON schema (draft 2020-12 where it names no other). Raises ValueError for what is no schema, or
    refers to another document: nothing is fetched."""
    from jsonschema_rs import validator_for

    def refuse(uri: str):
        raise ValueError(f"{uri} is another document")

    return validator_for(schema, retriever=refuse)


def judge_format(pattern: str, text: str) -> tuple[bool, str]:
    """Whether the whole text has the form of a regular expression."""
    good = re.fullmatch(pattern, text.strip(), re.DOTALL) is not None
    return good, "right" if good else "another form"


def judge_schema(schema: str, text: str) -> tuple[bool, str]:
    """Whether a text, or the last block of code in it, is JSON that keeps to a schema."""
    blocks = FENCED.findall(text)
    try:
        value = parse_json(blocks[-1] if blocks else text)
    except ValueError:
        return False, "no JSON"
    good = schema_validator(json.loads(schema)).is_valid(value)
    return good, "right" if good else "against the schema"


def judge_math(answer: str, text: str) -> tuple[bool, str]:
    """Whether the last formula of a text equals the answer."""
    from math_verify import parse, verify

    found = parse(text)
    if not found:
        return False, "no formula"
    wanted = parse(answer if "$" in answer or "\\boxed" in answer else f"${answer}$")
    good = bool(wanted) and verify(wanted, found)
    return good, "right" if good else "another value"


KINDS = {"format": judge_format, "schema": judge_schema, "math": judge_math}


class Judge:
    """The process, started at the first question and again after one that it did not come back from."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._lock = threading.Lock()

    def ask(self, kind: str, answer: str, text: str) -> tuple[bool, str]:
        """(right, why). Out of time, memory, or its mind: wrong, and why."""
        with self._lock:
            process = self._running()
            try:
                process.stdin.write(json.dumps([kind, answer, text]).encode() + b"\n")
                process.stdin.flush()
                line = _line(process.stdout, WALL_S)
            except BrokenPipeError:
                line = b""
            if line:
                return tuple(json.loads(line))
            self.end()
            return False, "out of time" if process.returncode in (-signal.SIGPROF, -signal.SIGKILL) else "broke the verifier"

    def _running(self) -> subprocess.Popen:
        if self._process is None:
            command = [sys.executable, "-m", "sparing.evals.judge"]
            streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self._process = subprocess.Popen(command, **streams, start_new_session=True)  # an interrupt is for its parent
            atexit.register(self.end)
            _line(self._process.stdout, START_S)
        return self._process

    def end(self) -> None:
        """Stop the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            atexit.unregister(self.end)
            with suppress(OSError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(1.0)
            process.kill()
            process.wait()
            process.stdout.close()


def _line(stream: IO[bytes], seconds: float) -> bytes:
    """One line of a pipe; empty: it ended, or nothing came in time."""
    ends, read = time.monotonic() + seconds, b""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        while not read.endswith(b"\n"):
            if not selector.select(max(0.0, ends - time.monotonic())):
                return b""
            if not (piece := os.read(stream.fileno(), 1 << 16)):
                return b""
            read += piece
    return read


def main() -> None:
    """Answer questions until the input ends."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with suppress(ImportError):
        import math_verify  # noqa: F401  (it takes a second, which is not the first answer's)
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    out.write(b"ready\n")
    out.flush()
    for line in sys.stdin.buffer:
        kind, answer, text = json.loads(line)
        _timer(CPU_S)
        try:
            found = KINDS[kind](answer, text)
        except Exception as error:
            found = False, f"broke the verifier ({type(error).__name__})"
        _timer(0.0)
        out.write(json.dumps(found).encode() + b"\n")
        out.flush()


def _timer(seconds: float) -> None:
    """End this process after so much more CPU time; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
