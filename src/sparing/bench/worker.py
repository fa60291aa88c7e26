"""One side of a comparison in a process of its own: it keeps its model, works only when told to, and its memory is its own.

The parent writes one JSON object a line, the child answers each with one. Run by `Worker`, never by hand.
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
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from sparing.account.power import peak_memory, resident_memory
from sparing.account.power import reset_peak_memory as forget_peak
from sparing.base.config import ModelConfig, UserError
from sparing.base.config_file import build
from sparing.bench.limit import Limit

POLL_S = 0.2
"""Between looks at the limit, and of a child at its parent."""
CLOSING_S = 10.0
"""For a child with nothing left to do."""
PR_SET_PDEATHSIG = 1


class WorkerError(RuntimeError):
    """What a side could not do, in the words of its own exception; a setting that fails is skipped, not fatal."""


class Worker:
    """Handle of a child process. `ask` sends a request and waits for the answer (a dict).

    limit: until when answers are waited for; a figure may set another one between requests. A worker that is left by an exception, an
    interruption say, is killed; one whose parent is killed dies too. Use it in the thread that made it: it dies with that thread.
    """

    def __init__(self, threads: int, limit: Limit, environment: dict[str, str] | None = None):
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), **(environment or {}))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", "sparing.bench.worker", str(threads)]
        self.limit = limit
        # Its own session: an interrupt at the keyboard is for the parent, which ends the worker itself.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True, name="sparing-bench-reader")
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def ask(self, do: str, **request) -> dict:
        """Raises WorkerError for a failure, and when the answer is not there within the limit: then the process is killed. Raises
        UserError for a mistake of the user's."""
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
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
        return answer

    def _answer(self) -> str:
        while True:
            try:
                return self._lines.get(timeout=max(0.0, min(POLL_S, self.limit.left())))
            except queue.Empty:
                if self.limit.left() <= 0:
                    self.kill()
                    raise WorkerError(f"not done within {self.limit}") from None

    def build(self, side: str, model: ModelConfig, weights: Path, batches: Path, optimizer: dict, setting: dict) -> dict:
        """Make `ours` or `peer` from a safetensors file of weights, to train on the `tokens` (N, B, T) of another."""
        request = {"side": side, "model": asdict(model), "weights": str(weights), "batches": str(batches)}
        return self.ask("build", **request, optimizer=optimizer, setting=setting)

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


def resident_bytes(field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most since `forget_peak`; 0 where /proc does not exist) of this process, in bytes."""
    return resident_memory() if field == "VmRSS" else peak_memory()[0]


class Child:
    """The far end of the pipe: one method for each request."""

    def __init__(self) -> None:
        self.side = self.batches = None
        self.baseline = 0

    def build(self, side: str, model: dict, weights: str, batches: str, optimizer: dict, setting: dict) -> dict:
        from safetensors.torch import load_file

        config = build(ModelConfig, model)
        if side == "ours":
            from sparing.bench import ours

            setting, make = ours.OurSetting(**setting), ours.OursSide
        else:
            from sparing.bench import peer

            peer.import_transformers().DeepseekV3ForCausalLM  # noqa: B018  (its import is part of the baseline, not of the model)
            setting, make = peer.PeerSetting(**setting), peer.PeerSide
        self.batches = load_file(batches)["tokens"].long()
        self.baseline = resident_bytes("VmRSS")
        self.side = make(config, setting, Path(weights), optimizer)
        forget_peak()
        return {}

    def steps(self, first: int, count: int, rows: int | None = None) -> dict:
        """Train on batches first..first+count (the list starts over at its end), or on their first `rows` rows; `seconds` of the steps
        alone, and their losses."""
        assert self.side is not None and self.batches is not None
        start = time.perf_counter()
        losses = [self.side.step(self.batches[i % len(self.batches)][:rows]) for i in range(first, first + count)]
        return {"seconds": time.perf_counter() - start, "losses": losses}

    def memory(self) -> dict:
        """`bytes`: the most that was resident since the model was built, over what was resident before it was."""
        return {"bytes": resident_bytes("VmHWM") - self.baseline}

    def peak(self, dtype: str, sizes: list[int], seconds: float) -> dict:
        """`flops`: the best square product in `dtype` on this process's threads, FLOP/s, within about `seconds`; `cut_short`: None, or
        which sizes were left out."""
        import torch

        from sparing.train.peak import measure_peak

        found = measure_peak("cpu", getattr(torch, dtype), tuple(sizes), seconds=seconds)
        return {"flops": found.flops, "cut_short": found.cut_short()}

    def make(self, function: str, **arguments) -> dict:
        """Keep what a function of this folder returns, for `step`."""
        self.side = self.run(function, **arguments)
        return {}

    def step(self, **arguments) -> dict:
        """A step of what was made."""
        assert self.side is not None
        return self.side.step(**arguments)

    def run(self, function: str, **arguments) -> dict:
        """A function `module.name` of this folder, from start to end in this process."""
        module, name = function.split(".")
        return getattr(importlib.import_module(f"sparing.bench.{module}"), name)(**arguments) or {}


def _die_with_parent() -> None:
    """The end of standard input tells only a child that is waiting for it; one that computes must end with its parent as well."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="sparing-bench-parent").start()


def main() -> None:
    _die_with_parent()
    # Libraries may print to standard output: keep the pipe for answers and send everything else to standard error.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    child = Child()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(child, request.pop("do"))(**request)
        except UserError as error:
            answer = {"mistake": str(error)}
        except Exception as error:  # whatever a setting dies of goes to the parent, which decides
            answer = {"error": " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:2]])}
        print(json.dumps(answer), file=pipe, flush=True)


if __name__ == "__main__":
    main()
