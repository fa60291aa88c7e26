"""What decides whether something is kept, on numbers that say what is true."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.adapt import gate
from sparing.adapt.from_use import _apart, _bad, _grounds
from sparing.adapt.gate import Measured, Sizes

COUNT = 60


def measured(seed: int, gain: float = 0.0, touch: float = 0.5, forgotten: float = 0.0) -> tuple[Measured, Sizes]:
    """Weights under which trusted answers are likelier by `gain` nats a token than at first, and by `touch` behind their own question, and
    old text less likely by the share `forgotten`; with the noise of answers that differ."""
    rng = np.random.default_rng(seed)
    sizes = Sizes(rng.integers(10, 90, COUNT).astype(float), rng.integers(200, 400, 32).astype(float), np.full(16, 40.0))
    difficulty, noise = rng.normal(2.0, 0.5, COUNT), np.random.default_rng(seed + abs(int(1000 * gain + 100 * touch)))
    right = sizes.right * (difficulty - gain + noise.normal(0, 0.05, COUNT))
    crossed = right + sizes.right * (touch + noise.normal(0, 0.1, COUNT))
    old = sizes.old * (3.2 + rng.normal(0, 0.3, 32)) * (1 + forgotten + noise.normal(0, 0.0002, 32))
    return Measured(right, crossed, old, sizes.own * (1.5 + gain)), sizes


def grounds(after: Measured, before: Measured, sizes: Sizes, feedback: float = 0.5) -> dict:
    learnt = gate.mean_of(sizes.right * feedback + np.linspace(-9, 9, COUNT), sizes.right)
    return {"feedback_belongs": learnt, "trusted_belongs": gate.belonging(before, sizes)} | _grounds(before, after, sizes)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 50))
def test_good_answers_pass_and_each_kind_of_bad_one_does_not(seed):
    before, sizes = measured(seed)
    good, _ = measured(seed, gain=0.3)
    assert _bad(grounds(good, before, sizes)) is None
    assert "do not improve" in _bad(grounds(before, before, sizes)), "nothing was learnt"
    assert "do not improve" in _bad(grounds(measured(seed, gain=-0.1)[0], before, sizes))
    loose, _ = measured(seed, gain=0.3, touch=0.3)  # mixed up: likelier, whatever is asked
    assert "belong less to their questions" in _bad(grounds(loose, before, sizes))
    assert _apart(grounds(good, before, sizes)) is None
    assert "do not belong to their questions" in _apart(grounds(good, before, sizes, feedback=0.02))


def test_what_is_no_number_is_bad():
    before, sizes = measured(0)
    good, _ = measured(0, gain=0.3)
    for name in ("right", "crossed"):
        broken = good._replace(**{name: np.full(COUNT, np.nan)})
        assert _bad(grounds(broken, before, sizes)) is not None
    assert not gate.old_change(before, good._replace(old=np.full(32, np.nan))).high <= 0.1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.sampled_from([-0.01, 0.0, 0.0005, 0.002, 0.05]))
def test_the_bound_of_old_text_holds_what_is_true(seed, forgotten):
    before, _ = measured(seed)
    after, _ = measured(seed, gain=0.1, forgotten=forgotten)
    found = gate.old_change(before, after, 0.01)
    assert found.low - 2e-4 <= forgotten <= found.high + 2e-4 and found.high - found.low < 1e-3
    assert (found.high <= 0.001) == (forgotten <= 0.0005)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 50), st.floats(1, 100)), min_size=1, max_size=40))
def test_a_mean_lies_within_its_bounds_or_nearly(rows):
    values, sizes = map(np.array, zip(*rows, strict=True))
    found = gate.mean_of(values, sizes, 0.01)
    spread = (values / sizes).min() - 1e-9, (values / sizes).max() + 1e-9
    assert spread[0] <= found.low <= found.high <= spread[1] and spread[0] <= found.value <= spread[1]
    assert found == gate.mean_of(values, sizes, 0.01), "the same at every call"
