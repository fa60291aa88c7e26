"""Budgets in money and energy during training: they end the schedule, follow prices that change, and survive a resumption."""

import json
import time

import pytest
from tests.train import tiny

from sparing.account.history import TRAINING, entries_of
from sparing.account.limit import Limit
from sparing.account.meter import Meter
from sparing.base.config import Budget
from sparing.base.files import read_lines
from sparing.base.hardware import machine

MOST = 1.06
"""Of the budget: wide, for the clock is real and the runs are seconds long; tests/train/test_pace.py has the bound with a made-up clock."""
MACHINE = machine(with_gpus=False)


@pytest.fixture(scope="module", autouse=True)
def warm(tmp_path_factory):
    """A process's first steps load kernels, which takes seconds on a busy machine."""
    tiny.fit(tiny.new_run(tmp_path_factory.mktemp("warm") / "run"), tiny.config(tiny.steps(3)))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("sparing.account.meter.SAMPLE_S", 0.1)
    monkeypatch.setattr("sparing.account.meter.RELOAD_S", 0.2)
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
    """Batches that take a while, so that a short run has few of them; `at` is called with each number."""

    def __init__(self, config, at=lambda step: None):
        self.inner, self.at = tiny.Counting(config), at

    def batch(self, step, rank=0, world=1):
        self.at(step)
        time.sleep(0.03)
        return self.inner.batch(step)


def fit(run, budget, *, at=lambda step: None, verb="train"):
    config = tiny.config(budget, evals=1)
    with Meter(verb, MACHINE, run, started=time.monotonic()) as meter, meter.stage("train"):
        if meter.energy_how == "measured":
            pytest.skip("RAPL measures here: the watts are not ours to say")
        return tiny.fit(run, config, loader=Slow(config, at), started=meter.started, meter=meter, limit=Limit(budget, meter))


def spent(run, what="usd") -> float:
    """What all attempts cost. Skips where the machine stood still for a good part of the run: no plan can foresee that."""
    rows = [row for row in entries_of(run) if row.verb in TRAINING]
    tokens = tiny.TRAIN.batch_size * tiny.TRAIN.seq_len
    if max(tokens / line["tokens_per_s"] for line in read_lines(run.metrics_file) if "loss" in line) > 0.6:
        pytest.skip("a step took ten times as long as the others: this machine is too busy to test budgets of seconds on")
    return sum(getattr(row, what) for row in rows)


def test_a_money_budget_ends_where_it_says(tmp_path, home):
    price(home, 1.0)  # a tenth of a cent a second
    run = tiny.new_run(tmp_path / "run")
    result = fit(run, Budget(0.006, "usd"))
    assert 0.7 * 0.006 <= spent(run) <= MOST * 0.006
    assert result.seconds < MOST * 6
    plans = read_lines(run.state / "plan.jsonl")
    assert plans[-1]["total_steps"] == result.steps and {plan["budget"] for plan in plans} == {0.006}


def test_an_energy_budget_too(tmp_path, home):
    price(home, 1.0)
    run = tiny.new_run(tmp_path / "run")
    fit(run, Budget(0.004, "kwh"))
    assert 0.7 * 0.004 <= spent(run, "kwh") <= MOST * 0.004


def test_a_price_that_rises_shortens_the_run_and_it_says_so(tmp_path, home, capsys):
    price(home, 1.0)
    run = tiny.new_run(tmp_path / "run")
    result = fit(run, Budget(0.009, "usd"), at=lambda step: price(home, 2.0) if step == 60 else None)
    said = capsys.readouterr().err
    assert 0.7 * 0.009 <= spent(run) <= MOST * 0.009
    assert result.seconds < 8.0  # at the old price it would have been nine
    assert "prices changed: $" in said and "planned again:" in said and "the budget lasts" in said


def test_what_earlier_attempts_spent_is_spent(tmp_path, home):
    price(home, 1.0)
    run = tiny.new_run(tmp_path / "run")

    class Killed(Exception):
        pass

    begun = time.monotonic()

    def kill(step):
        if time.monotonic() > begun + 2:  # of six seconds
            raise Killed

    with pytest.raises(Killed):
        fit(run, Budget(0.006, "usd"), at=kill)
    before = sum(row.usd for row in entries_of(run))
    assert before > 0.001
    fit(run, Budget(0.006, "usd"), verb="resume")
    assert 0.7 * 0.006 <= spent(run) <= MOST * 0.006
    assert len({row.uid.split("-")[0] for row in entries_of(run)}) == 2
    assert [json.loads(line)["step"] for line in open(run.metrics_file) if '"loss"' in line] == sorted(
        {json.loads(line)["step"] for line in open(run.metrics_file) if '"loss"' in line}
    )
