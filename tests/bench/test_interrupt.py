"""A figure that is interrupted or killed in the middle of a worker's work: it ends at once, and no worker is left."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparing.base.hardware import cores

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
WITHIN_S = 120.0
"""A second or two, and what a machine adds that is busy with other tests: much less than what is interrupted would take."""


def workers_of(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            stat, command = (folder / "stat").read_text(), (folder / "cmdline").read_text()
        except OSError:  # it has ended
            continue
        if stat.rpartition(")")[2].split()[1] == str(parent) and "sparing.bench.worker" in command:
            found.append(int(folder.name))
    return found


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def at_work(pid: int) -> bool:
    """It has imported what it needs, and computes."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11]
    return int(ticks) / os.sysconf("SC_CLK_TCK") > 2.0


@pytest.fixture
def bench(text, tmp_path):
    """A function: starts a bench whose runs take minutes -> (its process, its workers) once they are at work."""
    started = []

    def start(*words: str, workers: int) -> tuple[subprocess.Popen, list[int]]:
        command = [sys.executable, "-m", "sparing", "bench", *words, "--data", str(text / "train"), "--val", str(text / "val")]
        environment = dict(os.environ, SPARING_HOME=str(tmp_path / "home"))
        process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
        started.append(process)
        end = time.monotonic() + 600
        while len(found := workers_of(process.pid)) < workers or not all(map(at_work, found)):
            assert process.poll() is None and time.monotonic() < end, process.communicate(timeout=5)
            time.sleep(0.1)
        return process, found

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_an_interruption_is_answered_at_once(bench):
    """In two threads that wait for a worker each."""
    words = ("--grid", "64x1@1e-2,64x1@2e-2", "--budget", "500Mtok", "--parallel", "2")
    process, workers = bench("train", "tune", *words, workers=min(2, cores()))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=WITHIN_S) == 130
    assert all(map(gone, workers))
    assert "sparing: interrupted; go on with: sparing bench train tune" in process.stderr.read()


HASTY = """
import json, os, signal
from sparing.bench.limit import Limit
from sparing.bench.worker import Worker
worker = Worker(1, Limit(600))
arguments = {"dtype": "float32", "sizes": [1000] * 10000, "seconds": 600}
worker.process.stdin.write(json.dumps({"function": "sparing.bench.throughput.square_product", "arguments": arguments}) + "\\n")
worker.process.stdin.flush()
print(worker.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_worker_whose_parent_is_killed_before_it_has_begun_does_not_begin():
    done = subprocess.run([sys.executable, "-c", HASTY], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL
    end = time.monotonic() + 90  # of 600 s of work
    while not gone(int(done.stdout)):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.1)


def test_a_parent_that_is_killed_leaves_no_worker(bench):
    process, workers = bench("train", "quality", "--runs", "yardstick:30m", "--yardstick", "64x1@1e-2", workers=1)
    process.kill()
    process.wait()
    end = time.monotonic() + WITHIN_S
    while not all(map(gone, workers)):
        assert time.monotonic() < end, "a worker outlives its parent"
        time.sleep(0.05)
