"""Scores of answers against a cross-entropy that is written out."""

import math

import numpy as np
import pytest
import torch

from sparing.data.answers import Pieces, Sequenced
from sparing.data.tokenizer import train_tokenizer
from sparing.evals.answers import bytes_of_tokens, score_answers


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["naïve café " * 30], 300)


def test_bytes_of_tokens(tokenizer):
    lengths = bytes_of_tokens(tokenizer)
    text = "naïve 🙂 café"
    assert lengths[tokenizer.encode(text)].sum() == len(text.encode()) and lengths[tokenizer.eot_id] == 0


def test_loss_counts_ends_and_bits_per_byte_do_not(tokenizer):
    rng = np.random.default_rng(0)
    made, nats, text_nats, size, count = [], 0.0, 0.0, 0, 0
    for asked, said in (("naïve", " café"), ("a", "🙂 naïve" * 9), ("café" * 40, "x")):
        prompt, answer = tokenizer.encode(asked), [*tokenizer.encode(said), tokenizer.eot_id]
        made.append(Sequenced([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)))
        size, count = size + len(said.encode()), count + len(answer)
    table = torch.from_numpy(rng.random(tokenizer.vocab_size))
    for piece in made:
        for number, trained in zip(piece.ids, piece.trained, strict=True):
            nats += float(table[number]) * trained
            text_nats += float(table[number]) * (trained and number != tokenizer.eot_id)

    def nll(tokens, targets):
        assert tokens.shape == targets.shape and tokens.shape[1] % 64 == 0
        return table[targets.clamp(min=0)]  # of what is not to be scored too

    for batch_tokens in (64, 100_000):
        found = score_answers(nll, Pieces.of(made), bytes_of_tokens(tokenizer), batch_tokens=batch_tokens)
        assert found["loss"] == pytest.approx(nats / count) and (found["tokens"], found["documents"], found["bytes"]) == (count, 3, size)
        assert found["bpb"] == pytest.approx(text_nats / math.log(2) / size)
