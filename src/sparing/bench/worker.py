"""One side of a comparison in a process of its own: it keeps its model, works only when asked, and its memory is its own.

The parent writes one JSON object a line, and the child answers each with one. `Worker` starts the child; nobody runs it by hand.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sparing.base.config import UserError
from sparing.bench.limit import Limit

POLL_S = 0.2
"""How often the parent looks at the limit, and a child at its parent."""
CLOSING_S = 10.0
"""How long a child with nothing left to do may take to end."""
PR_SET_PDEATHSIG = 1


class WorkerError(RuntimeError):
    """A worker failed, in the words of its own exception, ended, or didn't answer within the limit."""


class Worker:
    """Handle of a child process with `threads` threads. `run`, `make` and `call` send it a request and wait for the answer.

    limit: how long answers are waited for; a caller may set another one between requests. Leaving the context by an exception kills the
    child; it also dies with its parent. Use a worker in the thread that made it: on Linux it dies with that thread.

    Every request raises WorkerError for a failure and where the limit is over (the process is killed then), and UserError for a mistake
    of the user's.
    """

    def __init__(self, threads: int, limit: Limit, environment: dict[str, str] | None = None):
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), **(environment or {}))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.limit = limit
        # Its own session: an interrupt at the keyboard is for the parent, which ends the worker itself.
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sparing.bench.worker", str(threads), str(os.getpid())],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True, name="sparing-bench-reader")
        self._reader.start()

    def run(self, function: Callable | str, **arguments: Any) -> Any:
        """The result of a function: itself, or its dotted name. Arguments and result pass through JSON."""
        return self._ask(function=_name(function), arguments=arguments)

    def make(self, function: Callable | str, **arguments: Any) -> None:
        """Keep in the child what `function`, a class for example, returns."""
        self._ask(function=_name(function), arguments=arguments, keep=True)

    def call(self, method: str, **arguments: Any) -> Any:
        """The result of a method of what `make` made."""
        return self._ask(method=method, arguments=arguments)

    def close(self) -> None:
        """Let it end by itself; kill it where it does not."""
        try:
            with suppress(BrokenPipeError):  # unsent bytes to a process that is gone
                self.process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=CLOSING_S)
        finally:
            self.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.kill()

    def _ask(self, **request: Any) -> Any:
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self._answer()
        except (BrokenPipeError, ValueError):  # ValueError: it was killed before
            line = ""
        if not line:
            self.close()
            raise WorkerError(f"the process ended with status {self.process.returncode}")
        answer = json.loads(line)
        if "mistake" in answer:
            raise UserError(answer["mistake"])
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer["result"]

    def _answer(self) -> str:
        while True:
            try:
                return self._lines.get(timeout=max(0.0, min(POLL_S, self.limit.left())))
            except queue.Empty:
                if self.limit.left() <= 0:
                    self.kill()
                    raise WorkerError(f"not done within {self.limit}") from None

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")


def _name(function: Callable | str) -> str:
    return function if isinstance(function, str) else f"{function.__module__}.{function.__qualname__}"


def _die_with_parent(parent: int) -> None:
    """The end of standard input reaches only a child that waits for it; one that computes must end with its parent as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="sparing-bench-parent").start()


def main() -> None:
    """The child: answer requests until standard input ends."""
    _die_with_parent(int(sys.argv[2]))
    # Libraries may print to standard output: keep the pipe for answers and send everything else to standard error.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    made = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "method" in request:
                function = getattr(made, request["method"])
            else:
                module, _, name = request["function"].rpartition(".")
                function = getattr(importlib.import_module(module), name)
            result = function(**request["arguments"])
            if request.get("keep"):
                made, result = result, None
            answer = json.dumps({"result": result})
        except UserError as error:
            answer = json.dumps({"mistake": str(error)})
        except Exception as error:  # whatever a setting dies of goes to the parent, which decides
            answer = json.dumps({"error": " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:2]])})
        print(answer, file=pipe, flush=True)


if __name__ == "__main__":
    main()
