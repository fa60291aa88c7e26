"""Spot against on demand, in money: from the tables' prices, and from failures that a workspace has seen."""

import json

import pytest

from sparing.account.ledger import Entry, Ledger, workspace_file
from sparing.account.prices import rates_for
from sparing.base.config import Budget, UserError
from sparing.base.hardware import Gpu, Machine
from sparing.budget.spot import spot_hours
from sparing.planning import rent

H100S = Machine("Linux", "", 8, 16, 0, (Gpu("H100", 0, ""),) * 8)


def row(uid, run, pid, started, status, hours, rent="spot", verb="train"):
    rates = json.dumps({"sources": {"usd_per_hour": f"{rent} of h100: somebody"}})
    return Entry(uid, run, f"/runs/{run}", verb, "train", status, started, wall_s=hours * 3600, host="a", pid=pid, rates=rates)


ROWS = [
    row("1", "x", 1, 0, "killed", 2),
    row("2", "x", 1, 1, "done", 1),  # another stage of the same attempt
    row("3", "x", 2, 9, "killed", 3),
    row("4", "x", 3, 20, "done", 4),
    row("5", "y", 4, 0, "killed", 5),  # never went on: perhaps somebody did not want it
    row("6", "z", 5, 0, "killed", 50, rent="purchase"),
    row("7", "z", 6, 9, "done", 50, rent="purchase"),
    row("8", "x", 7, 30, "killed", 50, verb="eval"),
]


def test_failures_are_runs_on_spot_machines_that_were_killed_and_went_on():
    assert rent.failures(ROWS) == (2, 15.0)
    assert rent.failures([]) == (0, 0)


def test_where_the_rate_is_from(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    assert rent.rate(0.3, 2) == (0.6, "--failures-per-hour")
    assert rent.rate(None, 4)[0] == pytest.approx(0.4) and "assumed" in rent.rate(None, 4)[1]
    ledger = Ledger(workspace_file())
    for one in ROWS:
        ledger.put(one)
    ledger.close()
    assert rent.rate(None, 4) == (pytest.approx(2 / 15), "2 in 15 h of this workspace's runs on spot machines")


def test_two_hours_in_money(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    demand, spot = (rates_for(H100S, rent=how).usd_per_hour for how in ("on_demand", "spot"))
    machine = rent.rented("H100", 8, 1)
    told = rent.lines(Budget(7200, "s"), *machine, 1, 0.1)
    assert told[0] == f"on demand: ${2 * demand:.4g} for 2h: 2 h at ${demand:.4g}"
    hours = spot_hours(2, 0.1, 5, 300)
    assert told[1] == f"on spot: ${hours * spot:.4g}, {hours * spot / 2 / demand:.0%} of that: {hours:.3g} h at ${spot:.4g}"
    assert "best checkpoint interval: 600 s" in told[3]
    assert f"${4 * demand:.4g} for 2h" in rent.lines(Budget(7200, "s"), *rent.rented("H100", 8, 2), 2, 0)[0]
    assert "an hour of progress" in rent.lines(Budget(1e9, "tok"), *machine, 1, 0)[0]
    assert "leave no time" in rent.lines(Budget(7200, "s"), *machine, 1, 100)[1]
    told = rent.lines(Budget(2 * demand, "usd"), *machine, 1, 0.1)[1]
    assert f"{2 * demand / spot:.3g} h at" in told and f"progress of {2 * demand / spot * 2 / hours:.3g} h" in told


def test_what_has_no_price_is_told_and_a_rate_below_0_refused():
    with pytest.raises(UserError, match="T4 is in no table"):
        rent.rented("T4", 1, 1)
    with pytest.raises(UserError, match="--failures-per-hour -1"):
        rent.lines(Budget(7200, "s"), *rent.rented("H100", 8, 1), 1, -1.0)
