"""Budgets in money and energy during training: they end the schedule, follow prices that change, and survive a resumption.

Steps take as long as the test's clock says, so that a busy machine changes nothing.
"""

import json

import pytest
from tests.train import tiny

from sparing.account.history import TRAINING, entries_of
from sparing.account.limit import Limit
from sparing.account.meter import Meter
from sparing.base.config import Budget
from sparing.base.files import read_lines
from sparing.base.hardware import machine

STEP_S = 0.03
LEAST, MOST = 0.95, 1.015
"""Of a budget."""
MACHINE = machine(with_gpus=False)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, clock):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sparing.account.meter.SAMPLE_S", 0.1)
    monkeypatch.setattr("sparing.account.meter.RELOAD_S", 0.2)
    monkeypatch.setattr(Meter, "_watch", lambda self: None)  # its samples are taken by the test's clock
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def price(home, usd_per_kwh: float) -> None:
    """A machine that draws 3.6 kW whatever it does: a thousandth of a kWh a second."""
    watts = 3600 / MACHINE.cores_physical
    (home / "prices.toml").write_text(
        f"[machine.mine]\nkind = 'cpu'\nmatch = ['{MACHINE.cpu}']\ncores = 1\npeak_bf16 = 1\npeak_fp8 = 0\npeak_int8 = 0\npeak_fp32 = 1\n"
        f"memory_bytes = 1\nbandwidth = 1\nlink = 0\nnetwork = 0\nwatts_idle = {watts}\nwatts_busy = {watts}\n"
        "[price.mine]\nlifetime_years = 1\nutilisation = 1\npurchase = 0\n[pue.own]\nvalue = 1\n"
        f"[electricity.WORLD]\nusd_per_kwh = {usd_per_kwh}\n[carbon.WORLD]\ngco2e_per_kwh = 100\n"
    )


class Slow:
    """Batches that take STEP_S; `at` is called with each number."""

    def __init__(self, config, clock, at):
        self.inner, self.clock, self.at = tiny.Counting(config), clock, at

    def batch(self, step, rank=0, world=1):
        self.at(step)
        self.clock.advance(STEP_S)
        return self.inner.batch(step)


def fit(run, budget, clock, *, at=lambda step: None, verb="train"):
    config = tiny.config(budget, evals=1)
    with Meter(verb, MACHINE, run) as meter, meter.stage("train"), clock.calling(meter.sample, every=0.1):
        if meter.energy_how == "measured":
            pytest.skip("RAPL measures here: the watts are not ours to say")
        return tiny.fit(run, config, loader=Slow(config, clock, at), started=meter.started, meter=meter, limit=Limit(budget, meter))


def spent(run, what="usd") -> float:
    """What all attempts cost."""
    return sum(getattr(row, what) for row in entries_of(run) if row.verb in TRAINING)


def test_a_money_budget_ends_where_it_says(tmp_path, home, clock):
    price(home, 1.0)  # a tenth of a cent a second
    run = tiny.new_run(tmp_path / "run")
    result = fit(run, Budget(0.006, "usd"), clock)
    assert LEAST * 0.006 <= spent(run) <= MOST * 0.006
    assert LEAST * 6 < result.seconds < MOST * 6
    plans = read_lines(run.state / "plan.jsonl")
    assert plans[-1]["total_steps"] == result.steps and {plan["budget"] for plan in plans} == {0.006}


def test_an_energy_budget_too(tmp_path, home, clock):
    price(home, 1.0)
    run = tiny.new_run(tmp_path / "run")
    fit(run, Budget(0.004, "kwh"), clock)
    assert LEAST * 0.004 <= spent(run, "kwh") <= MOST * 0.004


def test_a_price_that_rises_shortens_the_run_and_it_says_so(tmp_path, home, clock, capsys):
    price(home, 1.0)
    run = tiny.new_run(tmp_path / "run")
    result = fit(run, Budget(0.009, "usd"), clock, at=lambda step: price(home, 2.0) if step == 60 else None)
    said = capsys.readouterr().err
    assert LEAST * 0.009 <= spent(run) <= MOST * 0.009
    # 1.8 s at the old price, and what is left at the new one; at the old one it would have been nine.
    assert result.seconds == pytest.approx(1.8 + (9 - 1.8) / 2, rel=0.05)
    assert "prices changed: $" in said and "planned again:" in said and "the budget lasts 5 s, not 9 s" in said


def test_what_earlier_attempts_spent_is_spent(tmp_path, home, clock):
    price(home, 1.0)
    run = tiny.new_run(tmp_path / "run")

    class Killed(Exception):
        pass

    def kill(step):
        if step == 67:  # after two seconds of six
            raise Killed

    with pytest.raises(Killed):
        fit(run, Budget(0.006, "usd"), clock, at=kill)
    assert spent(run) == pytest.approx(0.002, rel=0.05)
    clock.advance(100)  # the time that it lay dead is nobody's
    fit(run, Budget(0.006, "usd"), clock, verb="resume")
    assert LEAST * 0.006 <= spent(run) <= MOST * 0.006
    assert len({row.uid.split("-")[0] for row in entries_of(run)}) == 2
    steps = [json.loads(line)["step"] for line in open(run.metrics_file) if '"loss"' in line]
    assert steps == sorted(set(steps))
