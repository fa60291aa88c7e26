"""What choosing texts takes, and how much is kept."""

import pytest

from sparing.budget.selecting import LOOKED_BYTES_PER_S, SHARE, kept_bytes, looked_at, selecting_s


def test_a_budget_in_time_bounds_how_much_is_looked_at():
    pool = 10 * SHARE * 600 * LOOKED_BYTES_PER_S
    assert looked_at(pool, 600) == pytest.approx(0.1) and looked_at(pool, 600, workers=4) == pytest.approx(0.4)
    assert looked_at(pool / 100, 600) == 1 and looked_at(pool, None) == 1
    assert selecting_s(pool, 600).value < 0.25 * 600 < selecting_s(pool, None).value


def test_what_is_kept_is_trained_on_once():
    assert kept_bytes(1e6, 4.0, 0.0) == 4e6
    assert kept_bytes(1e6, 4.0, 0.02) * 0.98 == pytest.approx(4e6)
