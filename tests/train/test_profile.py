"""Timed steps for the planner: measured once, remembered, measured again when what a step is described by has changed."""

import pytest

from sparing.base.hardware import load_calibration, machine, save_calibration
from sparing.budget.estimate import FEATURES, fit
from sparing.resolve import LADDER
from sparing.train import profile


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    monkeypatch.setattr(profile, "PROBES", ((LADDER[0], False, 64, 256), (LADDER[0], True, 64, 256)))
    monkeypatch.setattr(profile, "TOKENS", 512)
    here = machine(with_gpus=False)
    save_calibration(here, {"peak_flops_cpu_bfloat16": 1e15, "peak_flops_cpu_float32": 1e15})  # a quick look is enough
    return here


def test_measured_once_and_remembered(quick, monkeypatch):
    said = []
    found = profile.measure(quick, "cpu", seconds=2.0, say=said.append)
    assert len(found["rows"]) == 2 and all(row["seconds"] > 0 and len(row["features"]) == len(FEATURES) for row in found["rows"])
    assert load_calibration(quick)["step_timings_cpu"] == found
    monkeypatch.setattr(profile.subprocess, "Popen", lambda *_, **__: pytest.fail("measured again"))
    assert profile.step_timings(quick, seconds=2.0, say=said.append) == found and not said
    assert fit(found["rows"], found["peak_flops"]).scatter > 0


def test_old_descriptions_are_measured_anew(quick):
    save_calibration(quick, {"step_timings_cpu": {"peak_flops": 1.0, "rows": [{"features": [1.0], "seconds": 1.0}]}})
    assert profile._known(quick, "cpu", 2.0) is None


def test_time_is_limited(quick):
    assert len(profile.measure(quick, "cpu", seconds=0.0)["rows"]) == 1


def test_another_process_measures(tmp_path, monkeypatch):
    """And a longer limit measures again, while a failure leaves the default rates."""
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    here, said = machine(with_gpus=False), []
    found = profile.step_timings(here, seconds=0.5, say=said.append)
    assert found["rows"] and found["limit"] == 0.5 and load_calibration(here)["step_timings_cpu"] == found
    monkeypatch.setattr(profile.sys, "executable", "/bin/false")
    assert profile.step_timings(here, seconds=0.4) == found
    assert profile.step_timings(here, seconds=1.0, say=said.append)["rows"] == [] and "not measured" in said[-1]
