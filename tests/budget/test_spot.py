"""Expected hours on machines that vanish, against numbers computed by hand."""

import math

import pytest

from sparing.budget.spot import spot_hours, young_daly


def test_the_best_interval_is_that_of_young():
    assert young_daly(5, 0.1) == pytest.approx(600)  # sqrt(2 x 5 s x 36,000 s)
    assert young_daly(20, 1) == pytest.approx(379.4733)  # sqrt(2 x 20 x 3,600)
    assert young_daly(5, 0) == math.inf and young_daly(0, 1) == 0


def test_no_other_interval_loses_less():
    save_s, rate = 12.0, 0.3

    def share(interval):  # of an hour: saving, and half an interval a failure
        return save_s / interval + rate * interval / 2 / 3600

    best = young_daly(save_s, rate)
    assert all(share(best) < share(best * factor) for factor in (0.5, 0.9, 1.1, 2))


def test_hours_with_failures():
    # saving 5 / 600 of the time; lost a failure 300 + 300 s, so 60 s of each hour
    assert spot_hours(10, 0.1, 5, 300) == pytest.approx(10 * (1 + 1 / 120) / (1 - 1 / 60))
    assert spot_hours(10, 0.1, 5, 300) == pytest.approx(10.25424, abs=1e-5)
    assert spot_hours(2, 1, 0, 360) == pytest.approx(2 / 0.9)  # a tenth of each hour is spent on starting again
    assert spot_hours(10, 0, 5, 300) == 10


def test_where_nothing_gets_done_there_is_no_end():
    assert spot_hours(1, 10, 5, 360) == math.inf
