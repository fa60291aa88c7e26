"""The yardstick trains, keeps its budget and is scored like our own runs."""

import time

import pytest

pytest.importorskip("transformers")

from tests.bench.conftest import text  # noqa: F401

from benchmarks import yardstick
from benchmarks.yardstick import Yardstick, _scale, parse_yardstick, train_yardstick, tune
from sparing.base.config import UserError

SMALL = Yardstick(hidden_size=64, layers=1, lr=1e-2, batch=4, vocab_size=512, seq_len=32)


def train(folder, budget, **options):
    return train_yardstick(SMALL, [str(folder / "train")], [str(folder / "val")], budget, dtype="float32", **options)


def test_tokens_are_a_budget_and_more_of_them_help(text):  # noqa: F811
    little, more = train(text, "128tok"), train(text, "8ktok", contexts=(32, 16))
    assert (little["steps"], more["steps"], more["tokens"]) == (1, 62, 62 * 128)
    assert more["bpb"] < little["bpb"] - 0.5
    assert more["bpb_by_context"][16] != more["bpb_by_context"][32] == more["bpb"]


def test_time_is_a_budget(text, monkeypatch):  # noqa: F811
    monkeypatch.setattr(yardstick, "EVAL_BYTES", 5000)  # a slow machine needs the whole budget to read 200 kB
    started = time.monotonic()
    result = train(text, "6s", started=started, val_bytes=1000)
    assert result["steps"] > 1
    assert 3 < result["seconds"] < 30, "on a busy machine the end is not exact"


def test_the_schedule_warms_up_and_falls_to_its_end():
    y = Yardstick(warmup=0.1, final_lr=0.1)
    values = [_scale(progress / 100, y) for progress in range(101)]
    assert values[0] < 0.02 and max(values) == pytest.approx(1.0) and values.index(max(values)) == 10
    assert values[10:] == sorted(values[10:], reverse=True) and values[-1] == pytest.approx(0.1)


def test_bad_options_are_refused(text):  # noqa: F811
    assert parse_yardstick(" 128x4@4e-3") == Yardstick(hidden_size=128, layers=4, lr=4e-3)
    for wrong in ("128x4", "axb@1", ""):
        with pytest.raises(UserError, match="WIDTHxLAYERS@LR"):
            parse_yardstick(wrong)
    with pytest.raises(UserError, match="in tokens"):
        tune(str(text / "train"), str(text / "val"), budget="5m")
    with pytest.raises(UserError, match="time or tokens"):
        train(text, "$5")
