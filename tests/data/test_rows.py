"""The properties of rows, over stores that live in memory."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.base.config import UserError
from sparing.data.loader import IGNORED, Loader
from sparing.data.rows import permutation

bounded = settings(deadline=None, max_examples=80, derandomize=True)
EOT = 0


def store_of(lengths: list[int]) -> SimpleNamespace:
    """Documents of these numbers of tokens; every token of the corpus is different, from 1."""
    stream, starts, token = [], [], 1
    for length in lengths:
        starts.append(len(stream))
        stream += [EOT, *range(token, token + length)]
        token += length
    stream = np.array([*stream, EOT])
    inputs = np.array(lengths, np.int64) + 1
    return SimpleNamespace(starts=np.array(starts, np.int64), lengths=inputs, eot_id=EOT, take=lambda at: stream[at], stream=stream)


corpora = st.lists(st.integers(1, 40), min_size=1, max_size=25)


@bounded
@given(corpora, st.integers(1, 16), st.integers(1, 5), st.integers(0, 3))
def test_an_epoch_has_every_token_of_every_document_once_as_a_target(lengths, seq_len, batch_size, seed):
    loader = Loader(store_of(lengths), seq_len, batch_size, 0, seed)
    rows = loader.rows(np.arange(loader.rows_per_epoch))
    targets = rows.targets[..., 0].flatten()
    targets = targets[targets != IGNORED]
    assert sorted(targets.tolist()) == [EOT] * len(lengths) + list(range(1, sum(lengths) + 1))
    inputs = sum(lengths) + len(lengths)
    padding = loader.rows_per_epoch * seq_len - inputs
    assert int((rows.targets[..., 0] == IGNORED).sum()) == padding < seq_len


@bounded
@given(corpora, st.integers(1, 16), st.integers(0, 3), st.integers(0, 5))
def test_targets_are_the_tokens_ahead_in_the_same_document(lengths, seq_len, mtp_depth, epoch):
    store = store_of(lengths)
    loader = Loader(store, seq_len, 1, mtp_depth)
    rows = loader.rows(np.arange(loader.rows_per_epoch) + epoch * loader.rows_per_epoch)
    ahead = {}  # token -> the tokens after it in its document, end-of-text last
    for start, length in zip(store.starts, store.lengths, strict=True):
        document = store.stream[start : start + length + 1].tolist()
        for index, token in enumerate(document[:-1]):
            ahead[token, document[1] if token == EOT else None] = document[index + 1 :]
    assert rows.targets.shape == (loader.rows_per_epoch, seq_len, 1 + mtp_depth)
    for token, targets in zip(rows.tokens.flatten().tolist(), rows.targets.flatten(0, 1).tolist(), strict=True):
        if token == EOT and targets[0] == IGNORED:
            assert set(targets) == {IGNORED}  # padding
            continue
        wanted = ahead[token, targets[0] if token == EOT else None]
        assert targets == (wanted + [IGNORED] * (1 + mtp_depth))[: 1 + mtp_depth]


@bounded
@given(corpora, st.integers(1, 16))
def test_pieces_are_runs_of_one_document(lengths, seq_len):
    store = store_of(lengths)
    loader = Loader(store, seq_len, 1)
    rows = loader.rows(np.arange(loader.rows_per_epoch))
    owner = np.repeat(np.arange(len(lengths)), store.lengths)
    of_token = dict(zip(store.stream[:-1].tolist(), owner.tolist(), strict=True))
    for tokens, targets, documents in zip(rows.tokens.tolist(), rows.targets[..., 0].tolist(), rows.documents.tolist(), strict=True):
        assert documents[0] == 0 and all(b - a in (0, 1) for a, b in itertools.pairwise(documents))
        seen = {}
        for token, target, piece in zip(tokens, targets, documents, strict=True):
            name = "padding" if target == IGNORED else of_token[target] if token == EOT and target != EOT else of_token[token]
            assert seen.setdefault(piece, name) == name
        assert len(set(seen.values())) == len(seen)
    assert rows.documents.dtype == torch.int32 and rows.tokens.dtype == rows.targets.dtype == torch.int64


@bounded
@given(corpora, st.integers(1, 8), st.integers(1, 7), st.integers(1, 4), st.integers(0, 30))
def test_any_rank_any_step_any_order(lengths, seq_len, batch_size, world, step):
    store = store_of(lengths)
    whole = Loader(store, seq_len, batch_size, 1, seed=7).batch(step)
    fresh = Loader(store, seq_len, batch_size, 1, seed=7)
    for other in (step + 3, max(0, step - 1), 0):
        fresh.batch(other)
    for rank in range(world):
        part = fresh.batch(step, rank, world)
        assert torch.equal(part.tokens, whole.tokens[rank::world])
        assert torch.equal(part.targets, whole.targets[rank::world])
        assert torch.equal(part.documents, whole.documents[rank::world])


def test_epochs_and_seeds_have_their_own_order():
    lengths = [100, 7, 3, 9, 30, 41, 5, 6, 8, 2] * 5
    orders = []
    for seed in (0, 1):
        loader = Loader(store_of(lengths), 8, 1, seed=seed)
        for epoch in range(2):
            orders.append(loader.rows(np.arange(loader.rows_per_epoch) + epoch * loader.rows_per_epoch).tokens)
    for index, order in enumerate(orders):
        assert all(not torch.equal(order, other) for other in orders[:index])
    tails = [{tuple(row) for row in order.tolist()} for order in orders]
    assert tails[0] != tails[1]  # not only the rows are shuffled: the short documents meet others


def test_a_corpus_shorter_than_a_row_is_padded_and_repeated():
    batch = Loader(store_of([3]), 8, 4, 1).batch(0)
    assert batch.tokens.tolist() == [[0, 1, 2, 3, 0, 0, 0, 0]] * 4
    assert batch.targets[0, :, 0].tolist() == [1, 2, 3, 0] + [-100] * 4
    assert batch.targets[0, :, 1].tolist() == [2, 3, 0, -100] + [-100] * 4
    assert batch.documents[0].tolist() == [0] * 4 + [1] * 4


def test_order_is_the_same_for_ever():
    """What a run on another machine, with another numpy, must reproduce."""
    assert permutation(12, 5, 3).tolist() == PERMUTATION
    assert permutation(0, 1).tolist() == [] and sorted(permutation(1000, 9).tolist()) == list(range(1000))
    firsts = np.array([permutation(10, seed)[0] for seed in range(2000)])
    assert (np.abs(np.bincount(firsts, minlength=10) - 200) < 60).all()


PERMUTATION = [6, 2, 3, 11, 4, 10, 8, 0, 9, 7, 5, 1]


def test_micro_batches_and_bad_sizes():
    batch = Loader(store_of([50, 50]), 8, 6).batch(1)
    assert torch.equal(torch.cat([batch[:2].tokens, batch[2:].tokens]), batch.tokens) and batch.to("cpu").tokens.shape == (6, 8)
    assert Loader(store_of([50]), 8, 2).batch(0, rank=3, world=4).tokens.shape == (0, 8)
    for arguments in ((0, 1), (1, 0), (1, 1, -1)):
        with pytest.raises(UserError, match="at least"):
            Loader(store_of([5]), *arguments)
