"""Parsers of other people's formats in a process of their own: one that crashes, hangs or eats memory costs a document, not the run.

A parser is a function `parse(raw, settings) -> (text, metadata)` in a file of this folder, which raises Unreadable. The process runs this
file: `python -m sparing.data.apart MODULE`. It ends by itself when its parent does, because its input ends.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from sparing.data import pipes
from sparing.data.document import Unreadable
from sparing.data.pipes import python_path, receive, send

CPU_S = 60
"""Processor time for one document. Not the clock's, so that a busy machine reads the same documents as an idle one."""
WALL_S = 1800.0
"""For a parser that sleeps."""
MEMORY = 8 << 30
"""Bytes of address space, which libraries reserve more of than they use."""
TEXT = 64 << 20
"""Characters of text of one document."""


_own = threading.local()


def parse(module: str, raw: bytes, settings: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """(text, metadata) by `sparing.data.MODULE.parse` in its process, which is started where none waits. Raises Unreadable."""
    processes = vars(_own).setdefault("processes", {})
    if module not in processes:
        processes[module] = _Process(module)
    try:
        return processes[module].parse(raw, settings)
    except _Gone as fate:
        processes.pop(module).end()
        raise Unreadable(str(fate)) from None
    except BaseException:  # stopped while it waited: the answer would be taken for the next one's
        if not processes[module].waits:
            processes.pop(module).end()
        raise


def end() -> None:
    """End the processes that this thread has started."""
    processes = vars(_own).get("processes", {})
    while processes:
        processes.popitem()[1].end()


def missing(extra: str, *packages: str) -> str:
    """Why a format cannot be read without one of these packages; empty: all are there."""
    absent = [name for name in packages if version(name) is None]
    return f"needs the {absent[0]} package: pip install 'sparing[{extra}]'" if absent else ""


def version(package: str) -> str | None:
    """Of an installed package; None: it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


class _Gone(Exception):
    """What became of a process that gave no answer."""


class _Process:
    def __init__(self, module: str):
        command = [sys.executable, "-P", "-m", "sparing.data.apart", module]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        environment = dict(os.environ, PYTHONPATH=python_path(), OMP_NUM_THREADS="1")
        self.process = subprocess.Popen(command, **pipes, env=environment, start_new_session=True)
        self.waits = True
        """Whether it has answered everything that it was asked."""

    def parse(self, raw: bytes, settings: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        timer, self.waits = threading.Timer(WALL_S, self.process.kill), False
        timer.daemon = True
        timer.start()
        try:
            send(self.process.stdin, json.dumps(settings).encode())
            send(self.process.stdin, raw)
            answer = json.loads(receive(self.process.stdout))
        except (OSError, EOFError):
            raise _Gone(self._fate()) from None
        finally:
            timer.cancel()
        self.waits = True
        if "reason" in answer:
            raise Unreadable(answer["reason"])
        return answer["text"], answer["meta"]

    def _fate(self) -> str:
        status = self.process.wait()
        if status == -getattr(signal, "SIGXCPU", 0) and status:
            return f"its parser took more than {CPU_S} s"
        if status == -getattr(signal, "SIGKILL", 0) and status:
            return "its parser was killed (too much memory or time)"
        return f"its parser crashed (status {status})"

    def end(self) -> None:
        pipes.end(self.process)


def _main(module: str) -> None:
    source, sink = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a parser prints is no answer
    _limit("RLIMIT_AS", MEMORY)
    parser = importlib.import_module(f"sparing.data.{module}").parse
    try:
        while True:
            settings = json.loads(receive(source))
            raw = receive(source)
            _limit("RLIMIT_CPU", int(time.process_time()) + 1 + CPU_S)
            send(sink, json.dumps(_answer(parser, raw, settings)).encode())
    except (EOFError, BrokenPipeError):  # the parent has what it wanted, or is gone
        os._exit(0)


def _answer(parser, raw: bytes, settings: dict) -> dict:
    try:
        text, meta = parser(raw, settings)
    except Unreadable as error:
        return {"reason": str(error)}
    except MemoryError:
        return {"reason": f"its parser needs more than {MEMORY >> 30} GiB of memory"}
    except RecursionError:
        return {"reason": "nested too deeply"}
    except Exception as error:  # a parser's own mistake, of which it can have any kind
        message = " ".join(str(error).split())[:120].replace("(", "[").replace(")", "]")
        return {"reason": f"its parser failed ({type(error).__name__}: {message})"}
    return {"text": text, "meta": meta} if len(text) <= TEXT else {"reason": f"more than {TEXT >> 20} MiB of text"}


def _limit(name: str, value: int) -> None:
    try:
        import resource

        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))
    except (ImportError, AttributeError, ValueError, OSError):  # not on this system
        pass


if __name__ == "__main__":
    _main(sys.argv[1])
