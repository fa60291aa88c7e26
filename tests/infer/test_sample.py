import numpy as np
import pytest

import sparing.infer.sample as sample
from sparing.infer.request import Sampling
from sparing.infer.sample import choose, draw, edited, largest, logprob, noise, truncated
from sparing.kernels.decode import library

LOGITS = np.log(np.array([0.1, 0.6, 0.25, 0.05], np.float32))


def shares(n=4000, logits=LOGITS, **settings):
    s = Sampling(max_tokens=1, **settings)
    return np.bincount([choose(logits, s, 11, i) for i in range(n)], minlength=len(logits)) / n


def test_draws_follow_the_probabilities():
    assert np.allclose(shares(), [0.1, 0.6, 0.25, 0.05], atol=0.03)
    sharp = np.array([0.1, 0.6, 0.25, 0.05]) ** 2
    assert np.allclose(shares(temperature=0.5), sharp / sharp.sum(), atol=0.03)
    assert shares(50, temperature=0).tolist() == shares(50, temperature=1e-300).tolist() == [0, 1, 0, 0]


def test_truncation():
    assert np.allclose(shares(top_k=2), np.array([0, 0.6, 0.25, 0]) / 0.85, atol=0.03)
    assert np.allclose(shares(top_p=0.7), np.array([0, 0.6, 0.25, 0]) / 0.85, atol=0.03)
    assert np.allclose(shares(min_p=0.2), np.array([0, 0.6, 0.25, 0]) / 0.85, atol=0.03)
    assert shares(50, top_p=0.5).tolist() == [0, 1, 0, 0]
    assert shares(top_k=99)[3] > 0
    tied = truncated(np.zeros(5, np.float32), Sampling(max_tokens=1, top_k=2))
    assert np.isfinite(tied).tolist() == [True, True, False, False, False]


def test_penalties_and_bias():
    z = np.array([2.0, -1.0, 0.5, 0.0], np.float32)
    assert edited(z, Sampling(1, repetition_penalty=2.0), [0, 1], [0]).tolist() == [1.0, -2.0, 0.5, 0.0]
    got = edited(z, Sampling(1, presence_penalty=0.5, frequency_penalty=0.25), [3], [0, 0, 2])
    assert got.tolist() == [1.0, -1.0, -0.25, 0.0]  # the prompt's tokens are not counted
    assert edited(z, Sampling(1, logit_bias={3: 5.0}), [], []).argmax() == 3


def test_a_grammar_masks_and_ends():
    class Only:
        def __init__(self):
            self.allowed = [3, 1]

        def mask(self):
            return np.arange(4) == (self.allowed[0] if self.allowed else -1)

        def advance(self, token):
            self.allowed.pop(0)

    grammar = Only()
    s = Sampling(1, grammar=grammar)
    for expected in (3, 1):
        assert choose(LOGITS, s, 0, 0) == expected
        grammar.advance(expected)
    assert choose(LOGITS, s, 0, 0) is None


@pytest.mark.skipif(library() is None, reason="there is no C compiler")
def test_compiled_draws_are_the_reference(monkeypatch):
    z = np.random.default_rng(0).normal(0, 3, 5000).astype(np.float32)
    z[::7] = -np.inf
    fast = [draw(z, 1.25, seed=3, position=i) for i in range(300)]
    monkeypatch.setattr(sample, "library", lambda: None)
    plain = [draw(z, 1.25, seed=3, position=i) for i in range(300)]
    assert np.mean(np.array(fast) == plain) > 0.99  # two candidates may be level in float32
    assert len(set(fast)) > 30 and all(np.isfinite(z[i]) for i in fast)


def test_noise_is_gumbel_and_of_its_own_for_each_position():
    a = noise(1, 2, 200_000)
    assert a.mean() == pytest.approx(0.5772, abs=0.01) and a.std() == pytest.approx(1.2825, abs=0.01)
    others = [noise(1, 3, 200_000), noise(2, 2, 200_000), np.roll(a, 1)]
    assert all(abs(np.corrcoef(a, b)[0, 1]) < 0.01 for b in others)


def test_logprobs_are_normalised():
    got = logprob(LOGITS + 3, 0, 2)
    assert got.logprob == pytest.approx(np.log(0.1), abs=1e-6)
    assert [token for token, _ in got.top] == [1, 2]


def test_top_p_of_nothing_leaves_the_likeliest():
    assert {choose(LOGITS, Sampling(1, top_p=0.0, temperature=1.5), seed, 0) for seed in range(50)} == {int(LOGITS.argmax())}


@pytest.mark.parametrize("count", [1, 2, 5, 40, 99, 100, 300])
def test_the_largest_are_those_of_a_stable_sort(count):
    z = np.random.default_rng(count).integers(0, 30, 100).astype(np.float64)
    z[::7] = -np.inf
    assert largest(z, count).tolist() == np.argsort(-z, kind="stable")[:count].tolist()


@pytest.mark.parametrize("share", [1e-9, 0.3, 0.9, 0.999999])
@pytest.mark.parametrize("flat", [0.0, 0.1, 3.0])
def test_top_p_keeps_what_a_sorted_vocabulary_keeps(share, flat):
    """Of 5,000 tokens, whether a few have most of the probability, or all have as much."""
    z = np.random.default_rng(3).normal(size=5000) * flat
    p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
    order = np.argsort(-p, kind="stable")
    wanted = order[np.cumsum(p[order]) - p[order] < share]
    kept = np.flatnonzero(np.isfinite(truncated(z, Sampling(max_tokens=1, top_p=share))))
    assert set(kept) == set(wanted) or (len(wanted) == 0 and kept.tolist() == [order[0]])
