"""The step-time model: recovers rates, interpolates between timings, and its intervals say how well."""

import random
from dataclasses import replace

import numpy as np
import pytest

from sparing.base.config import Config, TrainConfig
from sparing.budget.estimate import DEFAULTS, FEATURES, StepModel, features, fit, profile_model
from sparing.resolve import LADDER, shaped

PEAK = 4e11
TRUE = np.array(DEFAULTS["cpu"]) * np.exp([0.4, -0.2, -0.4, 0.5, -0.2, 0.6, 0.1, -0.3, 0.2, 0.7])


def config(rung, moe=False, seq_len=256, vocab=4096, **train):
    return Config(
        model=shaped(LADDER[rung], vocab, seq_len, moe),
        train=TrainConfig(seq_len=seq_len, batch_size=4096 // seq_len, device="cpu", replicas=2, **train),
    )


PROBES = [
    config(2),
    config(2, True),
    config(0, vocab=2048),
    config(4, True),
    config(2, seq_len=512, vocab=2048),
    config(3, seq_len=512, vocab=8192),
]
OTHERS = [config(1), config(1, True), config(3, True, 512), config(5), config(4), config(5, True, 512, 8192)]


def timings(configs, noise=0.0, seed=0):
    draw = random.Random(seed)
    return [
        {"features": list(x), "seconds": float(x @ TRUE) * (1 + draw.gauss(0, noise))}
        for x in (features(c, c.train.seq_len, PEAK) for c in configs)
    ]


def misses(model):
    return [model.step_seconds(c).value / row["seconds"] - 1 for c, row in zip(OTHERS, timings(OTHERS), strict=True)]


def test_learns_a_machine_from_a_few_steps():
    assert max(map(abs, misses(fit([], PEAK)))) > 0.1  # the defaults are off
    assert max(map(abs, misses(fit(timings(PROBES), PEAK)))) < 0.09
    assert sorted(map(abs, misses(fit(timings(PROBES, 0.03), PEAK))))[3] < 0.05


def test_two_timings_help_already():
    assert np.mean(np.abs(misses(fit(timings(PROBES[:2]), PEAK)))) < 0.5 * np.mean(np.abs(misses(fit([], PEAK))))


def test_intervals_hold_what_they_should():
    inside = []
    for seed in range(20):
        model = fit(timings(PROBES, 0.04, seed), PEAK)
        for c, row in zip(OTHERS, timings(OTHERS, 0.04, 100 + seed), strict=True):
            step = model.step_seconds(c)
            inside.append(step.low <= row["seconds"] <= step.high)
    assert np.mean(inside) >= 0.75
    assert fit([], PEAK).scatter > 2 * fit(timings(PROBES, 0.04), PEAK).scatter


def test_speed_is_tokens_over_seconds_and_short_rows_are_faster():
    model = fit(timings(PROBES), PEAK)
    whole = config(3, seq_len=512)
    cut = replace(whole, train=replace(whole.train, short_seq_len=256))
    assert model.tokens_per_second(whole).value == pytest.approx(4096 / model.step_seconds(whole).value)
    assert model.step_seconds(cut).value < model.step_seconds(whole).value
    assert model.step_seconds(cut, 512).value == model.step_seconds(whole).value


def test_what_costs_time():
    base = config(3, True)
    before = dict(zip(FEATURES, features(base, 256, PEAK), strict=True))
    again = dict(zip(FEATURES, features(replace(base, train=replace(base.train, recompute=True)), 256, PEAK), strict=True))
    assert again["products"] == pytest.approx(4 / 3 * before["products"]) and again["head"] == before["head"]
    adamw = features(replace(base, optim=replace(base.optim, matrix="adamw")), 256, PEAK)
    assert before["muon"] > 0 == adamw[FEATURES.index("muon")]
    halves = features(replace(base, train=replace(base.train, micro_batch_size=8)), 256, PEAK)
    assert halves[FEATURES.index("launches")] == 2 * before["launches"]


def test_a_machine_that_is_not_here():
    slow, fast = profile_model(config(4), 1e12, "cpu", "x"), profile_model(config(4), 2e12, "cpu", "x")
    assert fast.value == 2 * slow.value and slow.low < slow.value < slow.high and "x" in slow.source
    assert isinstance(fit([], PEAK), StepModel)
