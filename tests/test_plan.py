"""`sparing plan` from the command line, the questions it answers and refuses, and the prediction that `train` leaves."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sparing import api
from sparing.account import prices
from sparing.base import hardware
from sparing.base.config import Budget, ChatsConfig, Config, DataConfig, TrainConfig, UserError
from sparing.base.hardware import save_calibration
from sparing.budget.estimate import DEFAULTS, DESCRIPTION
from sparing.budget.predict import check_begun
from sparing.budget.units import parse_budget
from sparing.cli.main import main
from sparing.kernels import native
from sparing.planning.places import Given, elsewhere, planned_run, this_machine
from sparing.planning.plan import plan

KEYS = (
    "parameters.total parameters.active kv_cache_bytes_per_token flops memory_bytes.weights memory_bytes.gradients memory_bytes.optimizer "
    "memory_bytes.activations memory_bytes.total time_s device_hours energy_kwh co2e_g cost_usd bpb"
).split()
PEAK = 4e11


@pytest.fixture(autouse=True)
def calibrated(tmp_path, monkeypatch):
    """A workspace whose calibration says that this machine has the default rates."""
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SPARING_COUNTRY", raising=False)
    monkeypatch.setattr(prices, "_told", {"stale"})
    row = {"features": [0.1] * len(DEFAULTS["cpu"]), "seconds": 0.1 * sum(DEFAULTS["cpu"])}
    timings = {"description": DESCRIPTION, "limit": 60.0, "peak_flops": PEAK, "rows": [row]}
    known = {"step_timings_cpu": timings, "peak_flops_cpu_bfloat16": PEAK}
    assert save_calibration(this_machine(), known)  # for other processes
    monkeypatch.setattr(hardware, "_memory", lambda: 8 << 30)  # the answers must not depend on where the tests run
    monkeypatch.setattr(hardware, "_physical", lambda cpus: 2)
    assert save_calibration(this_machine(), known)


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for i in range(40):
        (folder / f"{i:02d}.txt").write_text("\n".join(f"The {i} of {j} went to the sea and came back." for j in range(200)))
    return str(folder)


def at(result, dotted):
    for key in dotted.split("."):
        result = result[key]
    return result


def test_every_number_has_an_interval_and_a_source(corpus):
    result = plan(data=[corpus], budget="5m")
    for key in KEYS:
        number = at(result, key)
        assert set(number) == {"value", "low", "high", "source"} and number["source"], key
        assert number["low"] <= number["value"] <= number["high"], key
    total = sum(at(result, f"memory_bytes.{part}")["value"] for part in ("weights", "gradients", "optimizer", "activations", "process"))
    assert at(result, "memory_bytes.total")["value"] == pytest.approx(total - at(result, "memory_bytes.reused")["value"])
    assert result["time_s"]["value"] <= 300 <= result["time_s"]["high"]
    assert "[model]" in result["recipe"] and result["reasons"]


def test_json_is_one_object_and_presets_need_nothing_else(capsys):
    assert main(["plan", "deepseek-v3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert at(result, "parameters.total")["value"] == pytest.approx(671.03e9, rel=1e-3)
    assert at(result, "parameters.active")["value"] == pytest.approx(36.62e9, rel=1e-3)
    assert result["kv_cache_bytes_per_token"]["value"] == 70_272
    for key in KEYS:
        assert set(at(result, key)) == {"value", "low", "high", "source"}, key
    for name in ("laptop", "one-gpu", "h200", "node8", "cluster", "v2-lite"):
        assert main(["plan", name]) == 0
        assert "bpb" in capsys.readouterr().out


def test_it_answers_in_three_seconds_without_torch(corpus):
    """A process of its own, interpreter and scan included. Counted in processor time, for a machine that does something else too."""
    code = "import sys; from sparing.cli.main import main; r = main(sys.argv[1:]); assert 'torch' not in sys.modules; sys.exit(r)"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code, "plan", "--data", corpus, "--budget", "5m"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 3


@pytest.mark.parametrize(("budget", "unit"), [("$0.02", "usd"), ("0.005kWh", "kwh"), ("20Mtok", "tok"), ("1e14flop", "flop")])
def test_every_unit_of_a_budget(budget, unit):
    result = plan("laptop", budget=budget)
    assert result["config"]["budget"]["unit"] == unit
    spent = {"usd": "cost_usd", "kwh": "energy_kwh", "tok": "tokens", "flop": "flops"}[unit]
    amount = result["config"]["budget"]["amount"]
    assert 0.9 * amount < result[spent]["value"] <= 1.0001 * amount


def test_more_budget_reaches_further_and_costs_more():
    small, large = plan("laptop", budget="5m"), plan("laptop", budget="5h")
    assert large["bpb"]["value"] < small["bpb"]["value"] and large["cost_usd"]["value"] > 20 * small["cost_usd"]["value"]
    where = plan("laptop", budget="5m", country="NOR"), plan("laptop", budget="5m", country="POL")
    assert where[0]["co2e_g"]["value"] < where[1]["co2e_g"]["value"] / 10


def test_other_machines():
    here, there = plan("laptop", budget="20m"), plan("laptop", budget="20m", machine="h100")
    assert there["tokens_per_s"]["value"] > here["tokens_per_s"]["value"] and there["bpb"]["value"] < here["bpb"]["value"]
    assert there["cost_usd"]["value"] == pytest.approx(2.29 * there["time_s"]["value"] / 3600)
    assert plan("laptop", budget="20m", machine="h100", rent="spot")["cost_usd"]["value"] < there["cost_usd"]["value"]
    assert "hardware table" in there["tokens_per_s"]["source"] and "timed steps" in here["tokens_per_s"]["source"]


def test_the_cheapest_budget_for_a_target():
    result = plan("laptop", target_bpb=1.5)
    seconds = result["config"]["budget"]["amount"]
    assert result["bpb"]["value"] <= 1.505
    assert plan("laptop", budget=f"{0.8 * seconds:.0f}s")["bpb"]["value"] > 1.5
    with pytest.raises(UserError, match=r"--target-bpb 0.2: not reachable .* nearest: \d"):
        plan("laptop", target_bpb=0.2)


def test_what_serves_in_a_given_memory():
    small, large = plan("laptop", fits="450MB"), plan("laptop", fits="600MB")
    assert small["serving_bytes"]["value"] <= 450e6 < large["serving_bytes"]["value"] <= 600e6
    assert large["parameters"]["total"]["value"] > small["parameters"]["total"]["value"]
    both = plan("laptop", fits="8GB", budget="5m")  # what five minutes buy fits anyway
    assert both["parameters"] == plan("laptop", budget="5m")["parameters"]
    with pytest.raises(UserError, match=r"--fits 10MB: the smallest model serves in \d+MB"):
        plan("laptop", fits="10MB")


def test_alternatives_side_by_side(capsys):
    result = plan("laptop", budget="$0.5", compare=True)
    rows = {row["name"]: row for row in result["alternatives"]}
    assert {"dense", "mixture of experts", "with MTP", "8-bit storage", "h100 on-demand", "h100 spot", "h100 own"} <= rows.keys()
    share = 1.0 if native.passes() is None else 0.92  # plain kernels keep nothing in few bits
    assert rows["8-bit storage"]["memory_bytes"]["value"] < share * rows["as resolved"]["memory_bytes"]["value"]
    works = [row for row in rows.values() if "problem" not in row]
    assert all(row["cost_usd"]["value"] <= 0.5 for row in works)
    assert rows["h100 spot"]["tokens"]["value"] > rows["h100 on-demand"]["tokens"]["value"]
    assert rows["h100 own"]["pays_after_hours"] > 1000  # a purchase is not what fifty cents are for
    chosen = rows[result["buy"]]
    eligible = [row["bpb"]["value"] for row in works if "pays_after_hours" not in row and "if it were" not in row["name"]]
    assert chosen["bpb"]["value"] <= min(eligible) * 1.0031
    assert main(["plan", "laptop", "--budget", "$0.5", "--compare"]) == 0
    assert f"buy: {result['buy']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("plan", "needs --budget, --target-bpb or --fits"),
        ("plan laptop --budget 5parsec", "unknown unit 'parsec'"),
        ("plan laptop --budget -5m", "must be positive"),
        ("plan laptop --budget 2s", "nearest that works: "),
        ("plan laptop --budget 100tok", "less than one batch; nearest that works: 4096tok"),
        ("plan laptop --budget 0.000005kWh", "nearest that works: "),
        ("plan laptop --budget 5m --target-bpb 1.2", "choose one of"),
        ("plan laptop --target-bpb 1.2x", "'1.2x' is not a number"),
        ("plan laptop --fits 8XB", "unknown unit"),
        ("plan laptop --machine h1000", "unknown machine 'h1000'; nearest: h100"),
        ("plan laptop --country GER", "unknown country 'GER'; nearest: "),
        ("plan laptop --rent lease", "choose own, on_demand or spot"),
        ("plan labtop", "nearest preset: laptop"),
        ("plan missing.toml --budget 5m", "missing.toml: No such file"),
        ("plan laptop --budget 40h --model.hidden-size 4096 --model.num-layers 16", "GB are there; what fits: --"),
        ("plan --data {tmp}/little --budget 5m", "less than one batch: give "),
        ("plan --data {tmp}/nothing --budget 5m", "nothing"),
        ("plan {tmp}/odd.toml --budget 5m", "unknown key data_byte; nearest: data_bytes"),
        ("plan {tmp}/number.toml --budget 5m", "[plan]: country = 49 is not text"),
        ("plan {tmp}/text.toml --budget 5m", "[plan]: data_bytes = '5 GB' is not a number above 0"),
        ("plan laptop --budget 1e6flop", "budget 1Mflop is less than one batch; nearest that works: "),
    ],
)
def test_what_cannot_work_is_one_line_with_what_does(tmp_path, capsys, words, says):
    (tmp_path / "little").mkdir()
    (tmp_path / "little" / "a.txt").write_text("only this\n" * 20)
    (tmp_path / "little" / "b.txt").write_text("and that\n" * 20)
    (tmp_path / "odd.toml").write_text("[plan]\ndata_byte = 3\n")
    (tmp_path / "number.toml").write_text("[plan]\ndata_bytes = 1e9\ncountry = 49\n")
    (tmp_path / "text.toml").write_text("[plan]\ndata_bytes = '5 GB'\n")
    assert main(words.format(tmp=tmp_path).split()) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("sparing: ")]
    assert captured.out == "" and len(lines) == 1 and says in lines[0]


def test_the_nearest_budget_that_works_does():
    with pytest.raises(UserError) as error:
        plan("laptop", budget="3s")
    assert plan("laptop", budget=str(error.value).rsplit(" ", 1)[1])["tokens"]["value"] > 0


def test_train_writes_its_prediction_first_and_learns_from_the_run(corpus, tmp_path):
    small = {
        "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512},
        "train": {"seq_len": 64, "batch_size": 4, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 4, "evals": 0},
    }
    summary = api.train([corpus], "30ktok", str(tmp_path / "run"), small)
    before = json.loads((tmp_path / "run" / "state" / "prediction.json").read_text())
    for key in KEYS:
        assert set(at(before, key)) == {"value", "low", "high", "source"}, key
    assert before["tokens"]["value"] == 30_000 and before["kind"] == "text" and before["stages"]["train"]["time_s"]["value"] > 0
    law = json.loads((tmp_path / "home" / "laws" / "text.json").read_text())
    assert law["points"][0]["bpb"] == summary["bpb"] and law["points"][0]["active"] == summary["active_parameters"]


def test_a_budget_in_money_becomes_seconds(corpus, tmp_path):
    """This machine at $500 an hour: a dollar lasts seven seconds. So short a run may miss its end by more than the 2 % of a longer one."""
    home = Path(tmp_path / "home")
    home.mkdir(exist_ok=True)
    core = 500 / hardware.machine(with_gpus=False).cores_physical * 4 * 0.3 * prices.YEAR_HOURS
    (home / "prices.toml").write_text(f"[price.cpu]\npurchase = {core}\n[machine.cpu]\nwatts_busy = 4.0\n")
    small = {"model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512}, "train": {"seq_len": 64, "batch_size": 4}}
    summary = api.train([corpus], "$1", str(tmp_path / "run"), small, samples=0)
    assert summary["budget"] == "$1" and 0.7 < summary["cost_usd"] < 1.3
    assert "lasts about 7 s" in (tmp_path / "run" / "config.toml").read_text()


def test_a_runs_own_configuration_is_a_recipe(tmp_path):
    first = plan("laptop", budget="5m")
    (tmp_path / "config.toml").write_text(first["recipe"] + "\n[plan]\ndata_bytes = 100e6\n")
    again = plan(str(tmp_path / "config.toml"))
    assert again["config"] == first["config"] and again["bpb"] == first["bpb"]


def test_a_run_that_has_begun_is_refused_until_one_step_fits():
    """The budget that the refusal names is not refused, and not much longer than the shortest one that is not."""
    config = Config(data=DataConfig(paths=("text",)), train=TrainConfig(batch_size=8, seq_len=512, eval_bytes=100_000))

    def begun(amount: float, after_s: float = 3.0, **changes) -> None:
        wished = replace(config, budget=Budget(amount, "s"), **changes)
        check_begun(replace(planned_run(wished, Given(1e7), elsewhere("h100", "own"), amount), start_s=after_s))

    with pytest.raises(UserError, match=r"^budget 4s: 3 s have gone by now, and .* more; nearest that works: (\S+)$") as error:
        begun(4.0)
    works = parse_budget(str(error.value).split()[-1]).amount
    begun(works)
    with pytest.raises(UserError, match="nearest that works"):
        begun(works / 1.3)
    with pytest.raises(UserError, match="nearest that works"):
        begun(works, after_s=3.0 + works / 4)  # it took longer to begin
    begun(works / 1.3, chats=ChatsConfig())  # conversations are tokenised by then
