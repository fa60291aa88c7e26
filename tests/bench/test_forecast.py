"""Predictions against what came: recorded before, untouched by what the runs teach."""

import json

import pytest

from sparing.account.receipt import at
from sparing.base.config import UserError
from sparing.bench.forecast import forecast, parse_sides, wishes_of
from sparing.bench.results import ROW_KEYS
from sparing.budget.estimate import DESCRIPTION
from sparing.kernels.formats import this_machine


@pytest.fixture
def calibrated(measured):
    """A machine that was measured before: no steps timed, a peak known."""
    timings = {"description": DESCRIPTION, "limit": 60.0, "peak_flops": 1e11, "rows": []}
    known = {f"peak_flops_cpu_{this_machine().training_dtype('cpu')}": 1e11, "step_timings_cpu": timings}
    measured(**known, formats=dict(this_machine().formats))


def test_predictions_are_recorded_then_runs_are_made_and_compared(text, tmp_path, calibrated):
    out, runs = tmp_path / "out", "dense32:9ktok, moe32:9ktok"
    rows = forecast(str(text / "train"), runs, threads=1, out=str(out))
    assert all(set(ROW_KEYS) <= set(row) for row in rows)
    known = json.loads((out / "predictions.json").read_text())
    results = [json.loads((out / f"{n:02d}-{side}32-9ktok.json").read_text()) for n, side in enumerate(("dense", "moe"))]
    dense, moe = (plan["config"]["model"] for plan in known["plans"])
    assert dense["num_dense_layers"] == 1000 and moe["num_dense_layers"] == 1
    speed = rows[:3]
    assert speed[0]["formats"]["peer"] == this_machine().training_dtype("cpu")
    assert [row["ours"] for row in speed[:2]] == [at(plan, "tokens_per_s")["value"] for plan in known["plans"]]
    assert [row["peer"] for row in speed[:2]] == [at(result["actual"], "tokens_per_s")["value"] for result in results]
    errors = [abs(row["peer"] / row["ours"] - 1) for row in speed[:2]]
    assert speed[2]["ours"] == pytest.approx(50 * sum(errors)) and speed[2]["runs"] == 2
    assert speed[2]["intervals_hold_percent"] == 50 * sum(row["low"] <= row["peer"] <= row["high"] for row in speed[:2])
    assert not (out / "home/laws").exists(), "a run has taught those that came after it"
    with pytest.raises(UserError, match="predictions are of other runs"):
        forecast(str(text / "train"), "moe32:9ktok", threads=1, out=str(out))


def test_sides():
    assert parse_sides("auto:1m, moe256:4m") == [("auto", "1m"), ("moe256", "4m")]
    assert wishes_of("auto") == {} and wishes_of("moe256")["model"] == {"hidden_size": 256, "n_routed_experts": 16}
    for wrong in ("auto", "dense:1m", "moe0:1m", "auto64:1m", "moe64:soon"):
        with pytest.raises(UserError):
            parse_sides(wrong)
