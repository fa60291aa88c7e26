"""The meter on real work: stages add up, a kill loses little, prices change under way, and it costs next to nothing itself."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from sparing.account.history import entries, entries_of
from sparing.account.meter import Meter
from sparing.base.config import UserError
from sparing.base.hardware import machine
from sparing.base.run import RunFolder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def run(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    folder.config_file.write_text("")
    return folder


MACHINE = machine(with_gpus=False)


def work(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def test_stages_nest_and_add_up_to_the_whole(run, home):
    started = time.monotonic() - 0.5
    with Meter("train", MACHINE, run, started=started) as meter:
        with meter.stage("train"):
            meter.add(tokens=100, flops=1e6)
            work(0.2)
            begun = time.monotonic()
            with meter.stage("evaluate"):
                time.sleep(0.1)
            slept = time.monotonic() - begun
            meter.add(tokens=50, flops=5e5)
        begun = time.monotonic()
        with meter.stage("evaluate"):
            time.sleep(0.1)
        slept += time.monotonic() - begun
        wall = time.monotonic() - started
    rows = {row.stage: row for row in entries_of(run)}
    assert set(rows) == {"setup", "train", "evaluate"} and all(row.status == "done" for row in rows.values())
    assert sum(row.wall_s for row in rows.values()) == pytest.approx(wall, abs=0.1)
    assert rows["setup"].wall_s >= 0.5 and rows["evaluate"].wall_s == pytest.approx(slept, abs=0.1)
    assert (rows["train"].tokens, rows["train"].flops) == (150, 1.5e6)
    assert all(row.kwh > 0 and row.co2e_g > 0 and row.usd > 0 and row.memory_bytes > 1e6 for row in rows.values())
    assert rows["train"].energy_how in ("measured", "estimated") and "cpu: " in rows["train"].energy_source
    assert {row.uid for row in entries(home / "ledger.sqlite")} == {row.uid for row in rows.values()}


def test_money_and_carbon_follow_the_users_prices(run, home):
    home.mkdir()
    (home / "prices.toml").write_text(
        "[machine.mine]\nkind = 'cpu'\n" + f"match = ['{MACHINE.cpu}']\n" + "cores = 1\npeak_bf16 = 1\npeak_fp8 = 0\npeak_int8 = 0\n"
        "peak_fp32 = 1\nmemory_bytes = 1\nbandwidth = 1\nlink = 0\nnetwork = 0\nwatts_idle = 3600\nwatts_busy = 3600\n"
        "[price.mine]\nlifetime_years = 1\nutilisation = 1\npurchase = 0\n[electricity.WORLD]\nusd_per_kwh = 10\n"
        "[carbon.WORLD]\ngco2e_per_kwh = 100\n[pue.own]\nvalue = 2\n"
    )
    with Meter("train", MACHINE, run) as meter:
        time.sleep(0.3)
    (row,) = entries_of(run)
    if row.energy_how == "measured":
        pytest.skip("RAPL measures here: the watts are not ours to say")
    watts = 3600 * MACHINE.cores_physical
    assert row.kwh_cpu == pytest.approx(watts * row.wall_s / 3.6e6, rel=0.01)
    assert (
        row.kwh == pytest.approx(2 * row.kwh_cpu) and row.usd == pytest.approx(10 * row.kwh) and row.co2e_g == pytest.approx(100 * row.kwh)
    )
    assert meter.tariff.rates.pue == 2


def eventually(holds, seconds=30):
    """Another thread's work, on a machine that may be busy with other things."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def test_changed_prices_count_from_then_on(run, home, monkeypatch):
    monkeypatch.setattr("sparing.account.meter.RELOAD_S", 0.1)
    monkeypatch.setattr("sparing.account.meter.SAMPLE_S", 0.05)
    home.mkdir()
    said = []
    with Meter("train", MACHINE, run, say=said.append) as meter:
        eventually(lambda: meter.per_second() is not None)
        before, rate = meter.latest()[1], meter.per_second()[0]
        (home / "prices.toml").write_text("[electricity.WORLD\n")
        eventually(lambda: len(said) == 1)
        (home / "prices.toml").write_text("[electricity.WORLD]\nusd_per_kwh = 1000\n")
        eventually(lambda: len(said) == 2)
        eventually(lambda: (meter.per_second() or (0,))[0] > 5 * rate and meter.latest()[1] > before)
    assert len(said) == 2 and "not used" in said[0] and said[1].startswith("prices changed: $")


def test_a_price_file_that_cannot_be_is_refused_at_the_start(run, home):
    home.mkdir()
    (home / "prices.toml").write_text("[electricity.NOWHERE]\n")
    with pytest.raises(UserError, match="lacks usd_per_kwh"):
        Meter("train", MACHINE, run)


def test_failures_and_interruptions_are_told_apart(run):
    for error, status in ((ValueError("it broke"), "failed"), (KeyboardInterrupt(), "interrupted")):
        with pytest.raises(type(error)), Meter("train", MACHINE, run) as meter, meter.stage("tokenise"):
            raise error
        rows = [row for row in entries_of(run) if row.status == status]
        assert [row.stage for row in rows] == ["setup", "tokenise"]
    assert rows[0].error == "" and [row.error for row in entries_of(run) if row.error] == ["it broke"]


TRAINER = """
import sys, time
from sparing.base.hardware import machine
from sparing.account.meter import Meter
from sparing.base.run import RunFolder
with Meter("train", machine(with_gpus=False), RunFolder(sys.argv[1])) as meter, meter.stage("train"):
    while True:
        meter.add(tokens=1)
        time.sleep(0.01)
        print(time.monotonic(), flush=True)
"""


def test_a_kill_loses_seconds_and_a_resumed_run_appends(run):
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", TRAINER, str(run)], stdout=subprocess.PIPE, text=True)
        first = float(process.stdout.readline())
        time.sleep(4)
        process.send_signal(signal.SIGKILL)
        last = float(process.stdout.read().split()[-1])
        process.wait()
    rows = [row for row in entries_of(run) if row.stage == "train"]
    assert len(rows) == 2 and all(row.status == "killed" for row in rows)
    assert rows[0].uid != rows[1].uid
    assert last - first - 3.5 <= rows[1].wall_s <= last - first + 0.5 and rows[1].tokens > 50


@pytest.mark.slow  # processor time: a busy or slow machine takes twice as much
def test_metering_costs_less_than_half_a_percent(run):
    with Meter("train", MACHINE, run) as meter:
        begun = time.monotonic()
        with meter.stage("train"):
            while time.monotonic() - begun < 4:
                for _ in range(5):  # fifty steps of 100 ms would be ten a second
                    meter.add(tokens=1, flops=1.0)
                work(0.02)
        wall = time.monotonic() - begun
    assert meter.own_s < 0.005 * wall, f"{100 * meter.own_s / wall:.3f} %"
    assert meter.own_s > 0


READ_ONLY = """
import os, sys
from sparing.base.hardware import machine
from sparing.account.history import entries_of
from sparing.account.meter import Meter
from sparing.base.run import RunFolder
run = RunFolder(sys.argv[1])
meter = Meter("generate", machine(with_gpus=False), run, first="generate")
os.setgid(65534); os.setuid(65534)  # now, for Python itself may lie where only root may read
before = sorted(os.listdir(run.path))
with meter:
    meter.add(tokens=7)
assert sorted(os.listdir(run.path)) == before
print(sum(row.tokens for row in entries_of(run)), len(entries_of(run)))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody who may not write")
def test_a_read_only_run_is_metered_in_the_workspace(run):
    with Meter("train", MACHINE, run) as meter:
        meter.add(tokens=1000)
    public = tempfile.mkdtemp()  # pytest's own folders are closed to others
    try:
        shutil.copytree(run.path, f"{public}/run")
        os.makedirs(f"{public}/home")
        os.chmod(public, 0o755)
        os.chmod(f"{public}/home", 0o777)
        for folder, _, files in os.walk(f"{public}/run"):
            os.chmod(folder, 0o555)
            for name in files:
                os.chmod(f"{folder}/{name}", 0o444)
        environment = os.environ | {"SPARING_HOME": f"{public}/home"}
        process = subprocess.run([sys.executable, "-c", READ_ONLY, f"{public}/run"], env=environment, capture_output=True, text=True)
        assert process.returncode == 0, process.stderr
        assert process.stdout.split() == ["1007", "2"]
    finally:
        shutil.rmtree(public)
