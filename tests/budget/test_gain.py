"""The law of gains: recovers one it was given, trusts runs of the same model most, and says how sure it is."""

import random

import pytest

from sparing.budget.gain import D0, MOST, GainPoint, add_gain, fit_gain, gain_law


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))


def runs(count, seed, total=1e8, c=0.06, p=0.5, noise=0.1):
    draw = random.Random(seed)
    for _ in range(count):
        size = 10 ** draw.uniform(5, 7)
        gain = c * (size / D0) ** p * (1 + draw.gauss(0, noise))
        yield GainPoint(total, size, 1.25, 1.25 * (1 - gain))


def test_recovers_a_law_from_runs_and_its_intervals_hold():
    inside, errors = [], []
    for seed in range(30):
        law = fit_gain(list(runs(6, seed)), 1e8)
        for point in runs(5, 1000 + seed):
            said = law.gain(point.text_bytes)
            errors.append(abs(said.value / point.gain - 1))
            inside.append(said.low <= point.gain <= said.high)
    assert sorted(errors)[len(errors) // 2] < 0.15 and sum(inside) / len(inside) >= 0.8


def test_one_run_of_the_same_model_outweighs_many_of_another():
    others = list(runs(10, 0, total=1e9, c=0.01))
    (own,) = runs(1, 1, c=0.08, noise=0)
    said = fit_gain([*others, own], 1e8).gain(own.text_bytes)
    assert said.value == pytest.approx(own.gain, rel=0.2)
    assert fit_gain(others, 1e8).gain(own.text_bytes).value < 0.6 * own.gain


def test_no_runs_are_a_wide_interval_and_a_few_a_narrow_one():
    none, some = fit_gain([], 1e8).gain(1e6), fit_gain(list(runs(6, 2)), 1e8).gain(1e6)
    assert none.high / none.low > 3 * some.high / some.low and 0 < none.low < none.high <= MOST


def test_what_was_read_before_gains_no_second_time():
    law = fit_gain(list(runs(8, 3, noise=0)), 1e8)
    first, second = law.gain(1e6).value, law.gain(1e6, read=1e6).value
    both = law.gain(2e6).value
    assert 0 < second < first and (1 - first) * (1 - second) == pytest.approx(1 - both, rel=1e-6)


def test_runs_are_remembered_and_useless_ones_are_not():
    (point,) = runs(1, 4, total=5e7, c=0.2, noise=0)
    before = gain_law("text", 5e7).gain(point.text_bytes)
    assert add_gain("text", point)
    after = gain_law("text", 5e7).gain(point.text_bytes)
    assert abs(after.value - point.gain) < abs(before.value - point.gain) and after.high / after.low < before.high / before.low
    assert not add_gain("text", GainPoint(5e7, 1e6, 1.2, 1.3)), "it lost"
    assert not add_gain("text", GainPoint(5e7, 0.0, 1.2, 1.1))
    code = gain_law("code", 5e7).gain(point.text_bytes)
    assert "none on code yet" in code.source and code.high / code.low > after.high / after.low
