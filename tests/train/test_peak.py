"""Measuring the peak is bounded: sizes grow, and the next one is begun only if it fits."""

import time

import pytest
import torch

from sparing.base.hardware import load_calibration, machine, save_calibration
from sparing.train import peak
from sparing.train.peak import measure_peak, peak_flops, peak_seconds


class Clock:
    """Stands in for time.perf_counter: a product of two n x n matrices takes 2 n^3 / speed seconds."""

    def __init__(self, speed: float, monkeypatch):
        self.now, self.sizes = 0.0, []
        multiply = torch.Tensor.__matmul__

        def slow(a, b):
            self.sizes.append(len(a))
            self.now += 2.0 * len(a) ** 3 / speed
            return multiply(a[:1], b[:, :1])

        monkeypatch.setattr(torch.Tensor, "__matmul__", slow)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)


def test_sizes_grow_while_they_fit(monkeypatch):
    clock = Clock(1e12, monkeypatch)
    found = measure_peak(seconds=3.0)
    assert found.flops == pytest.approx(1e12) and found.size == 4096 and found.cut_short() is None
    assert sorted(set(clock.sizes)) == list(peak.PEAK_SIZES)


@pytest.mark.parametrize("speed, size", [(1e11, 2048), (1e10, 1024), (1.4e9, 512)])
def test_a_slow_machine_stays_within_the_limit_and_says_so(monkeypatch, speed, size):
    clock = Clock(speed, monkeypatch)
    found = measure_peak(seconds=3.0)
    assert clock.now <= 3.0 and found.size == max(clock.sizes) == size and found.flops == pytest.approx(speed)
    assert f"{size} x {size}" in found.cut_short()


def test_even_the_smallest_size_is_left_when_it_takes_too_long(monkeypatch):
    clock = Clock(1e7, monkeypatch)
    assert measure_peak(seconds=3.0).flops == pytest.approx(1e7) and clock.sizes == [256]


def test_a_known_peak_gets_a_quick_look_at_a_size_that_fits(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    save_calibration(machine(), {"formats": {"float32": 1e10, "bfloat16": 1e8}, "peak_flops_cpu_float32": 1e10})
    clock, told = Clock(2e10, monkeypatch), []
    assert peak_flops(machine(), seconds=1.0, cut_short=told.append) == pytest.approx(2e10)
    assert set(clock.sizes) == {1024} and told == []
    assert load_calibration(machine())["peak_flops_cpu_float32"] == pytest.approx(2e10)
    clock.sizes.clear()
    assert peak_flops(machine(), seconds=1.0) == pytest.approx(2e10) and clock.sizes == [], "not twice within a minute"


def test_the_share_of_a_budget():
    assert peak_seconds(None) == peak_seconds(3600.0) == peak.PEAK_S and peak_seconds(60.0) == 0.6 and peak_seconds(5.0) == 0.2
