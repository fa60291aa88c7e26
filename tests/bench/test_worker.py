"""A side in a process of its own."""

import pytest

pytest.importorskip("transformers")

import torch
from bench_tiny import TINY
from safetensors.torch import save_file

from sparing.bench.ours import save_initial_weights
from sparing.bench.worker import Worker, WorkerError


def test_steps_go_on_where_they_stopped_and_memory_is_the_models(tmp_path):
    save_initial_weights(TINY, 0, tmp_path / "weights")
    save_file({"tokens": torch.randint(0, TINY.vocab_size, (4, 2, 32)).int()}, tmp_path / "batches")
    build = {"model": TINY, "weights": tmp_path / "weights", "batches": tmp_path / "batches", "optimizer": {"lr": 0.01}}
    with Worker(1) as one, Worker(1) as two:
        for worker in (one, two):
            worker.build("ours", **build, setting={"precision": "float32"})
        whole = one.ask("steps", first=0, count=4)
        parts = [loss for first in (0, 2) for loss in two.ask("steps", first=first, count=2)["losses"]]
        assert whole["losses"] == parts and whole["seconds"] > 0
        assert 0 < one.ask("memory")["bytes"] < 2**30


def test_failures_are_answers_and_the_end_of_a_process_is_one(tmp_path):
    with Worker(1) as worker:
        with pytest.raises(WorkerError, match="AttributeError"):
            worker.ask("no such request")
        with pytest.raises(WorkerError, match=r"No such file|does not exist"):
            worker.build("ours", TINY, tmp_path / "none", tmp_path / "none", {}, {})
        worker.process.kill()
        with pytest.raises(WorkerError, match="ended with status"):
            worker.ask("memory")
