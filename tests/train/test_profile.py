"""Timed steps for the planner: measured once, remembered, measured again when what a step is described by has changed."""

import pytest

from sparing.base.hardware import load_calibration, machine, save_calibration
from sparing.budget.estimate import FEATURES, fit
from sparing.train import profile


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    monkeypatch.setattr(profile, "PROBES", ((0, False, 64, 256), (0, True, 64, 256)))
    monkeypatch.setattr(profile, "TOKENS", 512)
    here = machine(with_gpus=False)
    save_calibration(here, {"peak_flops_cpu_bfloat16": 1e15, "peak_flops_cpu_float32": 1e15})  # a quick look is enough
    return here


def test_measured_once_and_remembered(quick, monkeypatch):
    said = []
    found = profile.step_timings(quick, seconds=2.0, say=said.append)
    assert len(found["rows"]) == 2 and all(row["seconds"] > 0 and len(row["features"]) == len(FEATURES) for row in found["rows"])
    assert load_calibration(quick)["step_timings_cpu"] == found and len(said) == 1
    monkeypatch.setattr(profile, "_stepper", lambda *_: pytest.fail("measured again"))
    assert profile.step_timings(quick, seconds=2.0, say=said.append) == found and len(said) == 1
    assert fit(found["rows"], found["peak_flops"]).scatter > 0


def test_old_descriptions_are_measured_anew(quick):
    save_calibration(quick, {"step_timings_cpu": {"peak_flops": 1.0, "rows": [{"features": [1.0], "seconds": 1.0}]}})
    assert len(profile.step_timings(quick, seconds=2.0)["rows"]) == 2


def test_time_is_limited(quick):
    assert len(profile.step_timings(quick, seconds=0.0)["rows"]) == 1
