"""A side in a process of its own."""

import json
import threading
import time
from dataclasses import asdict

import pytest
import torch
from bench_tiny import TINY
from safetensors.torch import save_file

from sparing.base.config import UserError
from sparing.bench.limit import Limit, in_parallel
from sparing.bench.quality import parse_runs
from sparing.bench.throughput import Ours, save_initial_weights, square_product
from sparing.bench.worker import Worker, WorkerError


def test_steps_go_on_where_they_stopped_and_memory_is_the_models(tmp_path):
    save_initial_weights(asdict(TINY), 0, str(tmp_path / "weights"))
    save_file({"tokens": torch.randint(0, TINY.vocab_size, (4, 2, 32)).int()}, tmp_path / "batches")
    files = {"model": asdict(TINY), "weights": str(tmp_path / "weights"), "batches": str(tmp_path / "batches"), "optimizer": {"lr": 0.01}}
    with Worker(1, Limit(60)) as one, Worker(1, Limit(60)) as two:
        for worker in (one, two):
            worker.make(Ours, **files, setting={"precision": "float32"})
        whole = one.call("steps", first=0, count=4)
        parts = [loss for first in (0, 2) for loss in two.call("steps", first=first, count=2)["losses"]]
        assert whole["losses"] == parts and whole["seconds"] > 0
        assert 0 < one.call("memory") < 2**30


def test_failures_are_answers_and_the_end_of_a_process_is_one(tmp_path):
    with Worker(1, Limit(60)) as worker:
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.call("no such method")
        with pytest.raises(WorkerError, match=r"No such file|does not exist"):
            none = str(tmp_path / "none")
            worker.make(Ours, model=asdict(TINY), weights=none, batches=none, optimizer={}, setting={"precision": "float32"})
        with pytest.raises(UserError, match="SIDE:BUDGET"):  # a mistake of the user's stays one
            worker.run(parse_runs, text="dense")
        worker.process.kill()
        with pytest.raises(WorkerError, match="ended with status"):
            worker.run("os.getpid")


def work(worker: Worker) -> None:
    """A minute of products, in which the process looks at nothing else."""
    worker.run(square_product, dtype="float32", sizes=[1000] * 10000, seconds=60)


def test_an_answer_that_is_late_costs_the_process():
    with Worker(1, Limit(60)) as worker:
        worker.run("os.getpid")
        worker.limit = Limit(60).within(1)
        before = time.monotonic()
        with pytest.raises(WorkerError, match="not done within 1 s"):
            work(worker)
        assert time.monotonic() - before < 50 and worker.process.poll() is not None


def test_a_worker_that_is_left_by_an_interruption_is_killed_at_once():
    before = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Worker(1, Limit(60)) as worker:
        arguments = {"dtype": "float32", "sizes": [1000] * 10000, "seconds": 60}
        request = {"function": "sparing.bench.throughput.square_product", "arguments": arguments}
        worker.process.stdin.write(json.dumps(request) + "\n")
        worker.process.stdin.flush()
        raise KeyboardInterrupt
    assert worker.process.poll() is not None and time.monotonic() - before < 50


def test_one_failure_ends_all_that_run_beside_it():
    def one(fails: bool) -> None:
        if fails:
            started.wait()
            raise ValueError("fails")
        with Worker(1, limit.within(60)) as worker:
            workers.append(worker)
            worker.run("os.getpid")
            started.set()
            work(worker)

    workers, limit, started = [], Limit(60), threading.Event()
    before = time.monotonic()
    with pytest.raises(ValueError, match="fails"):
        in_parallel(2, limit, one, [True, False])
    assert time.monotonic() - before < 50
    assert all(worker.process.poll() is not None for worker in workers)
