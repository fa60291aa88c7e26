"""A figure's limit in seconds: what does not fit is left out, and said to be."""

import time

import pytest

from sparing.base.config import UserError
from sparing.bench.figures import bench
from sparing.bench.limit import RUN_S, Limit, Rounds, run_seconds


def test_rounds_end_where_another_would_not_fit(capsys):
    rounds = Rounds(50, Limit(0.5))
    for _ in rounds:
        time.sleep(0.1)
    assert 1 <= rounds.made < 5 and rounds.more()["cut_short"] == rounds.cut_short
    assert f"cut short: {rounds.made} of 50 rounds" in " ".join(capsys.readouterr().err.split())
    whole = Rounds(3, Limit(60))
    assert list(whole) == [0, 1, 2] and whole.made == 3 and whole.more() == {}


def test_one_round_is_always_tried():
    rounds = Rounds(2, Limit(0.0))
    assert list(rounds) == [0] and rounds.made == 1


def test_a_limit_ends_with_the_one_around_it():
    outer = Limit(60)
    inner = outer.within(3600)
    assert 50 < inner.left() <= 60 and outer.within(1).left() <= 1
    outer.over()
    assert inner.left() < 0


def test_limits_are_times():
    assert Limit.of("90s").seconds == 90 and Limit.of_runs("2h", ["5Mtok"]).seconds == 7200
    for wrong in ("50Mtok", 300, "soon"):
        with pytest.raises(UserError, match=r"--limit .*must be a time"):
            bench("train", "startup", runs=1, limit=wrong)


def test_training_runs_have_theirs_from_their_budgets():
    assert 600 < run_seconds("10m") < 3600 and run_seconds("6Mtok") == RUN_S
    assert Limit.of_runs(None, ["10m", "6Mtok"]).seconds == run_seconds("10m") + RUN_S


def test_a_figure_says_how_many_rounds_it_made():
    (row,) = bench("train", "startup", runs=500, limit="2s")["rows"]
    assert 1 <= row["runs"] < 100 and row["cut_short"].startswith(f"{row['runs']} of 500 rounds")
