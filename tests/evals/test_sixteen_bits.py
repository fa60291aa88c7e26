"""The choice between two ways of scoring, on the text itself."""

import math

import pytest
import torch

from sparing.evals.sixteen_bits import PIECE_TOKENS, CheaperNll


def scorer(loss, calls):
    def nll(tokens, targets):
        calls.append(int((targets != -100).sum()))
        return torch.where(targets == -100, math.nan, loss)  # whatever stands at padding must not count

    return nll


@pytest.mark.parametrize(
    ("change", "cheaper"), [(1.0, True), (1.0004, True), (0.9996, True), (1.0006, False), (0.9, False), (math.nan, False)]
)
def test_sixteen_bits_are_taken_where_they_change_little(change, cheaper):
    exact_calls, cheaper_calls = [], []
    nll = CheaperNll(exact := scorer(3.0, exact_calls), half := scorer(3.0 * change, cheaper_calls))
    targets = torch.zeros(4, PIECE_TOKENS, dtype=torch.int64)
    targets[0, 0] = -100
    tokens = torch.zeros_like(targets)
    few = nll(tokens, targets)
    assert nll.chosen is None, "of the piece, one token does not count"
    assert float(few[targets != -100].unique()) == 3.0, "until then the exact ones count"
    assert exact_calls == [PIECE_TOKENS - 1, 4 * PIECE_TOKENS - 1] and cheaper_calls == [PIECE_TOKENS - 1]
    found = nll(tokens, targets)
    assert nll.chosen is (half if cheaper else exact)
    assert float(found[targets != -100].unique()) == pytest.approx(3.0 * change if cheaper else 3.0)
    before = len(exact_calls), len(cheaper_calls)
    nll(tokens, targets)
    assert (len(exact_calls) - before[0], len(cheaper_calls) - before[1]) == ((0, 1) if cheaper else (1, 0))
