"""Packed conversations: whole pieces, each once an epoch, none of which sees another, whatever the number of ranks."""

import numpy as np
import pytest
import torch
from tests.train import tiny

from sparing.data.answers import Pieces, Sequenced
from sparing.data.loader import IGNORED, Batch
from sparing.data.packed import Packed
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.train.objective import NextToken, weight_of
from sparing.train.replicas import Replicas

T, ROWS, PAD = 32, 4, 0


def pieces(count: int = 60, longest: int = T + 1, seed: int = 0) -> Pieces:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        length = int(rng.integers(3, longest + 1))
        trained = [False, *(bool(x) for x in rng.random(length - 2) < 0.5), True]
        made.append(Sequenced(rng.integers(1, 64, length).tolist(), trained))
    return Pieces.of(made)


def segments(batch: Batch):
    """(inputs, main targets) of every piece in a batch, padding left out."""
    for row in range(len(batch)):
        for number in batch.documents[row].unique():
            here = batch.documents[row] == number
            tokens, targets = batch.tokens[row][here].tolist(), batch.targets[row][here][:, 0].tolist()
            if any(target != IGNORED for target in targets):
                yield tuple(tokens), tuple(targets)


def test_every_piece_is_whole_and_comes_once_an_epoch():
    found = pieces()
    feed = Packed(found, T, 1, pad_id=PAD)
    expected = sorted(
        (tuple(ids[:-1].tolist()), tuple(np.where(marks[1:], ids[1:], IGNORED).tolist())) for ids, marks in (found[n] for n in range(60))
    )
    epochs, step = [], 0
    for epoch in range(3):
        seen = []
        while feed.epoch(step) < epoch + 1:
            seen += segments(feed.batch(step))
            step += 1
        assert sorted(seen) == expected
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2], "in another order"
    filled = sum(len(ids) - 1 for ids, _ in (found[n] for n in range(60)))
    assert filled / (step * T / 3) > 0.9, "and little room is left"


def test_the_end_of_an_answer_is_learnt_and_padding_is_not():
    """Though both are the same token."""
    feed = Packed(Pieces.of([Sequenced([5, 6, PAD], [False, False, True])] * 3), T, 2, pad_id=PAD)
    batch = feed.batch(0)
    assert batch.targets[0, :6, 0].tolist() == [IGNORED, PAD] * 3 and bool((batch.targets[0, 6:] == IGNORED).all())
    assert batch.documents[0].tolist() == [0, 0, 1, 1, 2, 2] + [3] * (T - 6)
    assert weight_of(batch) == 6


def test_a_batch_is_a_function_of_its_number():
    found = pieces()
    forward = [Packed(found, T, ROWS, seed=7).batch(step) for step in range(12)]
    feed = Packed(found, T, ROWS, seed=7)
    for step in reversed(range(12)):
        again = feed.batch(step)
        assert torch.equal(again.tokens, forward[step].tokens) and torch.equal(again.targets, forward[step].targets)
        ranks = [feed.batch(step, rank, 2) for rank in range(2)]
        assert torch.equal(torch.stack([part.tokens for part in ranks], 1).flatten(0, 1), again.tokens)
    assert not torch.equal(Packed(found, T, ROWS, seed=8).batch(0).tokens, forward[0].tokens)


@pytest.mark.parametrize("depth", [0, 1])
def test_trained_tokens_are_counted(depth):
    feed = Packed(pieces(), T, ROWS, depth)
    for steps in (0, 1, 5, 11, 30):
        assert feed.trained_tokens(steps) == sum(int(weight_of(feed.batch(step))) for step in range(steps))


def test_modules_that_predict_further_read_prompts_too():
    """Their inputs are the targets of the depth before, which must be there although they count for nothing."""
    (ids, marks), (plain, deep) = pieces(1)[0], (Packed(pieces(1), T, 1, depth).batch(0) for depth in (0, 1))
    inputs = len(ids) - 1
    assert deep.targets[0, :inputs, 0].tolist() == ids[1:].tolist()
    assert deep.targets[0, : inputs - 1, 1].tolist() == ids[2:].tolist() and deep.targets[0, inputs - 1, 1] == IGNORED
    assert deep.weights[0, :inputs].tolist() == marks[1:].astype(float).tolist() and weight_of(deep) == weight_of(plain)


def gradients(model, batch, micro=None, denominator=None):
    for parameter in model.parameters():
        parameter.grad = None
    Replicas(model, NextToken(model.config)).gradients(batch, micro, denominator)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def far(left: dict, right: dict) -> float:
    scale = max(float(grad.abs().max()) for grad in right.values())
    return max(float((left[name] - right[name]).abs().max()) for name in right) / scale


@pytest.fixture(scope="module")
def model():
    made = Transformer(tiny.MODEL)
    init_weights(made, 0)
    with torch.no_grad():  # zero output projections would hide what attention does
        for name, parameter in made.named_parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return made


def test_a_packed_row_is_the_sum_of_its_pieces(model):
    """Nothing leaks from one conversation into the next: not by attention, not by positions, not by the loss's weight."""
    found = pieces(5, longest=9)
    packed = Packed(found, T, 1, 1).batch(0)
    assert len(packed.documents.unique()) >= 4
    together = gradients(model, packed, denominator=10.0)
    total: dict = {}
    for number in range(len(found)):
        alone = Packed(Pieces.of([Sequenced(*(part.tolist() for part in found[number]))]), T, 1, 1).batch(0)
        for name, grad in gradients(model, alone, denominator=10.0).items():
            total[name] = total.get(name, 0) + grad
    assert far(together, total) <= 1e-5


def test_micro_batches_add_up_by_trained_tokens(model):
    """Rows have different numbers of trained tokens: a mean of means would be another gradient."""
    batch = Packed(pieces(), T, 8, 1).batch(0)
    counts = [int(weight_of(batch[row : row + 1])) for row in range(8)]
    assert max(counts) > 1.3 * min(counts)
    assert far(gradients(model, batch, micro=1), gradients(model, batch, micro=8)) <= 1e-5
