"""The loader over a real store on disk."""

import hashlib

import numpy as np
import pytest
import torch

from sparing.base.config import DataConfig
from sparing.data import store as store_module
from sparing.data.loader import Loader
from sparing.data.prepare import prepare


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
