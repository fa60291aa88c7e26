"""A real training process to start, watch and kill."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent


class Process:
    """A run of `tiny.main` in a process of its own."""

    def __init__(self, starter: "Starter", pid: int, out: Path):
        self.starter, self.pid, self.out, self.status = starter, pid, out, None

    def output(self) -> str:
        return self.out.read_text()

    def wait(self) -> int:
        if self.status is None:
            self.status = int(self.starter.ask({"wait": self.pid}))
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def until(self, happened, limit_s: float = 600.0) -> None:
        """Poll until happened() is true, or the process has nothing more to show."""
        end = time.monotonic() + limit_s
        while not happened():
            assert time.monotonic() < end, f"waited in vain; its output:\n{self.output()}"
            time.sleep(0.0005)

    def until_says(self, text: str, limit_s: float = 600.0) -> None:
        self.until(lambda: self.out.exists() and text in self.output(), limit_s)


class Starter:
    def __init__(self, folder: Path):
        self.data, self.folder, self.started = folder / "data", folder, 0
        self.server = subprocess.Popen(
            [sys.executable, HERE / "tiny.py", "--zygote"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.server.stdout.readline() == "ready\n"

    def ask(self, request: dict) -> str:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return self.server.stdout.readline()

    def __call__(self, run: Path, *options: object) -> Process:
        self.started += 1
        out = self.folder / f"out{self.started}"
        out.touch()
        argv = [str(run), "--data", str(self.data), *map(str, options)]
        return Process(self, int(self.ask({"argv": argv, "out": str(out)})), out)


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(RUN, *options) -> Process: begins or resumes RUN."""
    starter = Starter(tmp_path_factory.mktemp("runs"))
    yield starter
    starter.server.stdin.close()
    starter.server.wait()
