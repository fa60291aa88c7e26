import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sparing.data import workers
from sparing.data.pipes import python_path
from sparing.data.progress import Stopped
from sparing.data.workers import encode_chunks


def chunks(texts, size=4):
    return [(start, texts[start : start + size]) for start in range(0, len(texts), size)]


def test_same_order_and_ids_whatever_the_number_of_workers(trained, texts):
    texts = [*texts, "", "日本", "a<|endoftext|>b"]
    for count in (1, 2, 3):
        results = list(encode_chunks(trained, chunks(texts), count))
        assert [key for key, _ in results] == [key for key, _ in chunks(texts)]
        ids = [array for _, arrays in results for array in arrays]
        assert all(array.dtype == trained.dtype for array in ids)
        assert all(np.array_equal(array, trained.encode_array(text)) for array, text in zip(ids, texts, strict=True))


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def started(monkeypatch):
    """The processes that the pool starts."""
    processes = []
    popen = subprocess.Popen

    def start(*args, **kwargs):
        processes.append(popen(*args, **kwargs))
        return processes[-1]

    monkeypatch.setattr(workers.subprocess, "Popen", start)
    return processes


def test_stopping_ends_the_workers_soon(trained, texts, started):
    asked = []
    endless = ((number, texts) for number in range(10**9))
    with pytest.raises(Stopped):
        for _ in encode_chunks(trained, endless, 2, lambda: bool(asked)):
            if len(started) == 2:
                asked.append(True)
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_leaving_early_ends_the_workers(trained, texts, started):
    results = encode_chunks(trained, ((number, texts) for number in range(10**9)), 2)
    next(results)
    results.close()
    assert len(started) == 2 and all(process.poll() is not None for process in started)


def test_a_killed_worker_is_an_error(trained, texts, started):
    with pytest.raises(RuntimeError, match="ended early"):
        for _ in encode_chunks(trained, ((number, texts) for number in range(10**9)), 2):
            if started[0].poll() is None:
                os.kill(started[0].pid, signal.SIGKILL)
    assert all(process.poll() is not None for process in started)


def test_workers_die_with_their_parent(trained, tmp_path):
    trained.save(tmp_path / "tokenizer.json")
    script = f"""
import subprocess
from sparing.data import workers
from sparing.data.tokenizer import Tokenizer
popen = subprocess.Popen
def start(*args, **kwargs):
    process = popen(*args, **kwargs)
    print(process.pid, flush=True)
    return process
workers.subprocess.Popen = start
for _ in workers.encode_chunks(Tokenizer.load({str(tmp_path)!r}), ((n, ["some text " * 1000]) for n in range(10**9)), 2):
    pass
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=dict(os.environ, PYTHONPATH=python_path()))
    pids = [int(parent.stdout.readline()) for _ in range(2)]
    time.sleep(0.5)
    assert all(map(alive, pids))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 300
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))
