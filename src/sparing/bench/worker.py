"""One side of a comparison in a process of its own: it keeps its model, works only when told to, and its memory is its own.

The parent writes one JSON object a line, the child answers each with one. Run by `Worker`, never by hand.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from sparing.account.power import peak_memory, resident_memory
from sparing.account.power import reset_peak_memory as forget_peak
from sparing.config import ModelConfig, UserError, YarnConfig


class WorkerError(RuntimeError):
    """What a side could not do, in the words of its own exception; a setting that fails is skipped, not fatal."""


class Worker:
    """Handle of a child process. `ask` sends a request and waits for the answer (a dict), raising WorkerError for a failure."""

    def __init__(self, threads: int, environment: dict[str, str] | None = None):
        environment = dict(os.environ, OMP_NUM_THREADS=str(threads), **(environment or {}))
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        command = [sys.executable, "-m", "sparing.bench.worker", str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)

    def ask(self, do: str, **request) -> dict:
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write(json.dumps({"do": do, **request}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"the process ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def build(self, side: str, model: ModelConfig, weights: Path, batches: Path, optimizer: dict, setting: dict | None = None) -> dict:
        """Make `ours` or `peer` from a safetensors file of weights, to train on the `tokens` (N, B, T) of another."""
        request = {"side": side, "model": asdict(model), "weights": str(weights), "batches": str(batches)}
        return self.ask("build", **request, optimizer=optimizer, setting=setting or {})

    def close(self) -> None:
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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

        yarn = YarnConfig(**model["yarn"]) if model["yarn"] else None
        config = ModelConfig(**{**model, "yarn": yarn})
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

    def steps(self, first: int, count: int) -> dict:
        """Train on batches first..first+count (the list starts over at its end); `seconds` of the steps alone, and their losses."""
        assert self.side is not None and self.batches is not None
        start = time.perf_counter()
        losses = [self.side.step(self.batches[i % len(self.batches)]) for i in range(first, first + count)]
        return {"seconds": time.perf_counter() - start, "losses": losses}

    def memory(self) -> dict:
        """`bytes`: the most that was resident since the model was built, over what was resident before it was."""
        return {"bytes": resident_bytes("VmHWM") - self.baseline}

    def peak(self, sizes: list[int]) -> dict:
        """`flops`: the best square bfloat16 product on this process's threads, FLOP/s."""
        from sparing.train.peak import measure_peak

        return {"flops": measure_peak(sizes=tuple(sizes)).flops}

    def make(self, function: str, **arguments) -> dict:
        """Keep what a function of this folder returns, for `step`."""
        self.side = self.run(function, **arguments)
        return {}

    def step(self) -> dict:
        """A step of what was made."""
        assert self.side is not None
        return self.side.step()

    def run(self, function: str, **arguments):
        """A function `module.name` of this folder, from start to end in this process."""
        module, name = function.split(".")
        return getattr(importlib.import_module(f"sparing.bench.{module}"), name)(**arguments)


def main() -> None:
    # Libraries may print to standard output: keep the pipe for answers and send everything else to standard error.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its children by closing the pipe
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    child = Child()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(child, request.pop("do"))(**request)
        except UserError as error:
            answer = {"error": str(error)}
        except Exception as error:  # whatever a setting dies of goes to the parent, which decides
            answer = {"error": " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:2]])}
        print(json.dumps(answer), file=pipe, flush=True)


if __name__ == "__main__":
    main()
