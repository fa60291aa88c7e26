import math
import random

import pytest
import torch

from sparing.base.config import UserError
from sparing.data.progress import Stopped
from sparing.data.tokenizer import train_tokenizer
from sparing.evals.bpb import bpb, nll_from_logits

DOCUMENTS = [
    "The first document, of a few words.",
    "Äußerst “typographic”, naïve: 日本語 🎉🎉 and so on. " * 9,
    "x",
    "def f(x):\n    return x ** 2\n" * 20,
    "",
    "the end",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 300)


@pytest.fixture(scope="module")
def trigram():
    """A random model whose logits depend on the last two tokens of the row, so that context matters and must not leak between rows."""
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 300, 300, generator=generator)

    def logits(tokens: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.full_like(tokens[:, :1], 299), tokens[:, :-1]], 1)
        return one[tokens] + two[before]

    return logits


def slow(logits, tokenizer, documents, context):
    """The definition, a token at a time, in plain Python floats."""
    nats = tokens = size = count = 0
    for text in documents:
        ids = [tokenizer.eot_id, *tokenizer.encode(text)]
        size += len(text.encode())
        count += len(ids) > 1
        for position in range(1, len(ids)):
            begin = (position - 1) // context * context  # of the window that scores this token
            row = logits(torch.tensor([ids[begin:position]]))[0, -1].double()
            nats += float(torch.logsumexp(row, 0) - row[ids[position]])
            tokens += 1
    return {
        "bpb": nats / math.log(2) / size,
        "loss": nats / tokens,
        "bytes": size,
        "tokens": tokens,
        "documents": count,
        "context": context,
    }


@pytest.mark.parametrize("context", [1, 7, 64, 1000])
@pytest.mark.parametrize("batch", [1, 3])
def test_equals_the_definition(trigram, tokenizer, context, batch):
    found = bpb(nll_from_logits(trigram), tokenizer, DOCUMENTS, context, batch=batch)
    wanted = slow(trigram, tokenizer, DOCUMENTS, context)
    assert found.keys() == wanted.keys()
    assert found == {**wanted, "bpb": pytest.approx(wanted["bpb"], rel=1e-6), "loss": pytest.approx(wanted["loss"], rel=1e-6)}
    assert found["documents"] == 5 and found["bytes"] == sum(len(text.encode()) for text in DOCUMENTS)


def test_a_uniform_model_costs_the_logarithm_of_the_vocabulary(tokenizer):
    found = bpb(nll_from_logits(lambda tokens: torch.zeros(*tokens.shape, 300)), tokenizer, DOCUMENTS, 16)
    assert found["loss"] == pytest.approx(math.log(300)) and found["bpb"] == pytest.approx(
        math.log2(300) * found["tokens"] / found["bytes"]
    )


def test_order_of_documents_and_pooling_do_not_matter(trigram, tokenizer, monkeypatch):
    wanted = bpb(nll_from_logits(trigram), tokenizer, DOCUMENTS, 16)
    monkeypatch.setattr("sparing.evals.bpb.SORT_TOKENS", 50)
    shuffled = DOCUMENTS[:]
    random.Random(1).shuffle(shuffled)
    found = bpb(nll_from_logits(trigram), tokenizer, iter(shuffled), 16, batch=2)
    assert found == {**wanted, "bpb": pytest.approx(wanted["bpb"]), "loss": pytest.approx(wanted["loss"])}


def test_shapes_that_the_model_sees(tokenizer):
    shapes, scored = [], 0

    def nll(tokens, targets):
        nonlocal scored
        shapes.append(tuple(tokens.shape))
        scored += int((targets != -100).sum())
        assert tokens.dtype == targets.dtype == torch.int64
        return torch.where(targets == -100, torch.nan, 1.0)  # whatever stands at padding must not count

    found = bpb(nll, tokenizer, DOCUMENTS, 128, batch=2)
    assert all(rows <= 2 and width in (64, 128) for rows, width in shapes)
    assert scored == found["tokens"] and found["loss"] == 1.0


def test_gradients_are_off_and_inputs_are_checked(trigram, tokenizer):
    def nll(tokens, targets):
        assert not torch.is_grad_enabled()
        return torch.ones(tokens.shape)

    bpb(nll, tokenizer, DOCUMENTS, 8)
    with pytest.raises(UserError, match="nothing to evaluate"):
        bpb(nll, tokenizer, ["", ""], 8)
    with pytest.raises(UserError, match="context"):
        bpb(nll, tokenizer, DOCUMENTS, 0)
    with pytest.raises(Stopped):
        bpb(nll, tokenizer, DOCUMENTS, 8, should_stop=lambda: True)


def test_max_bytes_reads_that_much(trigram, tokenizer):
    found = bpb(nll_from_logits(trigram), tokenizer, DOCUMENTS, 16, max_bytes=300)
    assert 297 <= found["bytes"] <= 300
    everything = bpb(nll_from_logits(trigram), tokenizer, DOCUMENTS, 16)
    assert bpb(nll_from_logits(trigram), tokenizer, DOCUMENTS, 16, max_bytes=10**6)["bpb"] == pytest.approx(everything["bpb"])
