"""The figures of `bench precision`: what the rows say, what is kept, what is refused; the speed figure's own measurement."""

import json
from dataclasses import asdict, replace

import pytest
import torch

from sparing.base.config import PrecisionConfig, UserError
from sparing.bench import precision_loss, precision_speed
from sparing.bench.eight_bits import SMALL
from sparing.bench.figures import bench
from sparing.bench.precision_loss import interval, rows_of
from sparing.bench.precision_speed import PrecisionSide
from sparing.kernels.formats import this_machine


def test_the_interval_is_students():
    mean, half = interval([0.001, 0.002, 0.003, 0.002, 0.002])
    assert mean == pytest.approx(0.002)
    assert half == pytest.approx(2.776 * 0.000707107 / 5**0.5, rel=1e-5)
    assert interval([0.5, 0.5]) == (0.5, 0.0)


def result(loss: float, share: float = 1.0) -> dict:
    return {"loss": loss, "share": share, "tokens_per_s": 1.0, "dtype": "float32"}


def test_the_upper_end_counts():
    plain, ours = [result(4.0), result(5.0)], [result(4.004), result(5.01, 0.93)]
    upper, mean, share = rows_of("int8", plain, ours, "1Mtok")
    assert mean["ours"] == pytest.approx(0.0015) and mean["half"] == pytest.approx(12.706 * 0.0005, rel=1e-3)
    assert upper["ours"] == pytest.approx(mean["ours"] + mean["half"]) and upper["peer"] == 0.0025 and upper["runs"] == 2
    assert share["ours"] == 0.93 and share["peer"] == 0.9
    assert len(rows_of("storage", plain, ours, "1Mtok")) == 2  # it has no products in 8 bits


def test_finished_runs_are_kept(tmp_path, monkeypatch):
    """Every seed's pair once; a second call makes none; the same seed on both sides."""
    asked = []

    class Fake:
        def __init__(self, threads, limit, environment=None):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def run(self, function, side, seed, **more):
            asked.append((side, seed))
            return result(4.0 + 0.01 * seed + (0.001 if side == "int8" else 0.0))

    monkeypatch.setattr(precision_loss, "Worker", Fake)
    rows = precision_loss.precision_loss("x", "y", "1Mtok", seeds=3, sides="int8", out=str(tmp_path))
    assert asked == [(side, seed) for seed in range(3) for side in ("none", "int8")]
    assert rows[1]["ours"] == pytest.approx(0.00025, rel=0.01)
    assert json.dumps(rows)
    precision_loss.precision_loss("x", "y", "1Mtok", seeds=3, sides="int8", out=str(tmp_path))
    assert len(asked) == 6


def test_what_is_refused():
    for options, words in [({"sides": "int4"}, "int4"), ({"seeds": 1}, "--seeds 1")]:
        with pytest.raises(UserError, match=words):
            bench("precision", "loss", data="x", val="y", **options)
    with pytest.raises(UserError, match="no figure 'lost'; did you mean loss"):
        bench("precision", "lost")
    with pytest.raises(UserError, match="bench precision loss needs --data"):
        bench("precision", "loss")


def test_speed_takes_turns(monkeypatch):
    """Small, but all of it: three processes, whole steps, products."""
    monkeypatch.setattr(precision_speed, "REQUIRED", {"cpu": {64: 0.5}})
    rows = precision_speed.precision_speed("64", "int8", rounds=2, rows=2)
    assert all(row["formats"] == {"ours": "int8", "peer": this_machine().training_dtype("cpu")} for row in rows)
    whole, stored, *products = rows
    assert [r["name"] for r in rows[:2]] == ["whole step, int8 products, d 64", "whole step, int8 and storage, d 64"]
    for r in (whole, stored):
        assert (
            r["ours"] > 0
            and r["peer"] > 0
            and r["required"] == 0.5
            and r["share"] == 1.0
            and len(r["ratios"]) == r["runs"] == 2
            and r["how"]
        )
    assert [r["name"] for r in products] == [f"products {shape}, int8, d 64" for shape in ("nt", "nn", "tn")]


def test_a_side_is_kept_as_it_says():
    """What is timed is what the memory figure measures: the same products, weights, averages and activations."""
    full, small = (PrecisionSide(asdict(p), width=64, rows=2, length=32) for p in (PrecisionConfig(), replace(SMALL, linear="int8")))
    for side in (full, small):
        before = side.trainer.model.model.layers[1].mlp.experts.down_proj.detach().clone()
        assert side.step()["tokens_per_s"] > 0
        assert not torch.equal(side.trainer.model.model.layers[1].mlp.experts.down_proj, before)
    assert small.step()["share"] == 1.0 and full.step()["share"] == 0.0
    kinds = {t.dtype for name, t in small.trainer.optimizer.state().items() if "/momentum/" in name}
    assert kinds == {torch.int8} and small.trainer.model.lm_head.weight.dtype == torch.bfloat16
    assert all(block.int8_activations for block in small.trainer.model.model.layers) and not full.trainer.policy.sites


def test_speed_without_8_bit_arithmetic_says_so_and_takes_a_small_model(slow_formats, monkeypatch, capfd):
    made = []

    class Fake:
        def __init__(self, threads, limit):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def make(self, function, width, rows, precision):
            made.append((width, rows, precision["linear"], precision["activations"]))

        def call(self, method, **more):
            return {"tokens_per_s": 1.0, "passes_s": 1.0, "update_s": 1.0, "share": 1.0}

        def run(self, function, **more):
            return {"nt": 0.1}

    monkeypatch.setattr(precision_speed, "Worker", Fake)
    rows = precision_speed.precision_speed(rounds=2)
    assert made == [(64, 2, "none", "full"), (64, 2, "int8", "full"), (64, 2, "int8", "full")]
    assert all(row["formats"] == {"ours": "int8", "peer": "float32"} and row["runs"] == 2 for row in rows)
    slow = "int8: this processor multiplies it 50 times slower than float32 (measured)"
    assert f"no 8-bit arithmetic here that is faster ({slow})" in " ".join(capfd.readouterr().err.split())
    made.clear()
    rows = precision_speed.precision_speed(kind="int8", limit="15s")
    assert [width for width, *_ in made[::3]] == [256, 512, 1024] and f"--kind {slow}" in " ".join(capfd.readouterr().err.split())
    assert all(row["ours"] is None and "a round would take about 102 s" in row["cut_short"] for row in rows)


def test_loss_leaves_out_8_bits_that_would_take_forever(slow_formats, capfd):
    assert precision_loss._sides_here("cpu") == ["fp8"]
    assert "skipped: int8: this processor multiplies it 50 times slower" in " ".join(capfd.readouterr().err.split())
