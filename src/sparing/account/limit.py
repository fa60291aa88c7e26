"""Turns a budget in money or energy into seconds, by the power that is drawn and the prices in force."""

from __future__ import annotations

import time

from sparing.account.meter import Meter
from sparing.base.config import Budget


class Limit:
    """`limit(seconds used) -> seconds at which the budget is used up`, if it goes on being spent as in the last half minute."""

    def __init__(self, budget: Budget, meter: Meter):
        """budget: in usd or kwh, for all attempts at the run that `meter` meters; earlier ones count with what their rows say."""
        assert budget.unit in ("usd", "kwh"), budget
        self.budget, self.meter = budget, meter
        self.before = sum(row.usd if budget.unit == "usd" else row.kwh for row in meter.earlier())

    def rate(self) -> float:
        """US dollars or kWh a second: measured, or, in the first seconds, at full power."""
        measured, rates = self.meter.per_second(), self.meter.tariff.rates
        if measured is not None:
            return measured[0] if self.budget.unit == "usd" else measured[1]
        return (rates.per_hour() if self.budget.unit == "usd" else rates.watts_busy * rates.pue / 1000) / 3600

    def __call__(self, used_s: float) -> float:
        clock, usd, kwh = self.meter.latest()
        left = self.budget.amount - self.before - (usd if self.budget.unit == "usd" else kwh)
        return max(used_s, used_s - (time.monotonic() - clock) + left / max(self.rate(), 1e-15))
