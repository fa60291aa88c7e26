"""The loader over a real store on disk, alone and in real groups of processes."""

import hashlib

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparing.base.config import DataConfig
from sparing.data import store as store_module
from sparing.data.loader import Loader
from sparing.data.prepare import prepare
from sparing.data.store import TokenStore


@pytest.fixture(scope="module")
def made(corpus, tmp_path_factory):
    return prepare(DataConfig(paths=(corpus,)), 400, tmp_path_factory.mktemp("home"))


def digest(batch) -> str:
    return hashlib.sha256(
        b"".join(part.contiguous().numpy().tobytes() for part in (batch.tokens, batch.targets, batch.documents))
    ).hexdigest()


def test_an_epoch_is_the_corpus(made):
    loader = Loader(made, 64, 4, 1)
    rows = loader.rows(np.arange(loader.rows_per_epoch))
    targets = rows.targets[..., 0]
    counts = torch.bincount(targets[targets >= 0], minlength=made.vocab_size)
    wanted = np.zeros(made.vocab_size, np.int64)
    for shard in made.manifest["shards"]:
        wanted += np.bincount(np.fromfile(made.path / shard["tokens"], made.manifest["dtype"])[1:], minlength=made.vocab_size)
    assert counts.tolist() == wanted.tolist()
    assert loader.epoch(0) == 0 and loader.epoch(loader.rows_per_epoch) == 4


def test_shards_do_not_change_the_batches(made, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(store_module, "SHARD_TOKENS", 3000)
    monkeypatch.setattr("sparing.data.prepare.CHUNK_BYTES", 3000)
    sharded = prepare(DataConfig(paths=(corpus,)), 400, tmp_path)
    assert len(sharded.manifest["shards"]) > 3 and len(made.manifest["shards"]) == 1
    for step in (0, 5, 100):
        assert digest(Loader(sharded, 64, 4, 2).batch(step)) == digest(Loader(made, 64, 4, 2).batch(step))


STEPS = (0, 1, 2, 7, 40)


def _rank(rank: int, path: str, meeting: str, out: str) -> None:
    """One of three processes; groups of one, two and three of them put the same batches together."""
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=3)
    for world in (1, 2, 3):
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        loader = Loader(TokenStore(path), 32, 6, 1, seed=3)
        parts = {step: loader.batch(step, rank, world) for step in (STEPS if rank % 2 else STEPS[::-1])}  # each in its own order
        for step in STEPS:
            for name in ("tokens", "targets", "documents"):
                part = getattr(parts[step], name)
                whole = torch.zeros((6, *part.shape[1:]), dtype=torch.int64)
                whole[rank::world] = part.long()
                dist.all_reduce(whole, group=group)  # each row comes from one rank
                if rank == 0:
                    with open(f"{out}{world}", "a") as file:
                        file.write(f"{step} {name} {hashlib.sha256(whole.numpy().tobytes()).hexdigest()}\n")
    dist.barrier()
    dist.destroy_process_group()


def test_one_token_order_under_one_two_and_three_ranks(made, tmp_path):
    mp.spawn(_rank, (str(made.path), str(tmp_path / "meeting"), str(tmp_path / "out")), nprocs=3)
    logs = [(tmp_path / f"out{world}").read_text() for world in (1, 2, 3)]
    assert logs[0] == logs[1] == logs[2] and len(logs[0].splitlines()) == 3 * len(STEPS)
    wanted = hashlib.sha256(Loader(made, 32, 6, 1, seed=3).batch(7).tokens.numpy().tobytes()).hexdigest()
    assert f"7 tokens {wanted}" in logs[0]


def test_resuming_at_any_step_goes_on_in_the_same_order(made):
    undisturbed = Loader(made, 32, 5, 1)
    wanted = [digest(undisturbed.batch(step)) for step in range(60)]
    for resume in (1, 13, 59):
        fresh = Loader(TokenStore(made.path), 32, 5, 1)
        assert [digest(fresh.batch(step)) for step in range(resume, 60)] == wanted[resume:]
