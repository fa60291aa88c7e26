"""Receipts: sums over attempts, what was predicted beside what was, ancestors' shares, failed runs in the whole; CodeCarbon's columns."""

import csv
import json

import pytest

from sparing.account.codecarbon import COLUMNS, write_csv
from sparing.account.history import entries_of, inherit
from sparing.account.ledger import Entry, Ledger
from sparing.account.receipt import receipt, workspace
from sparing.account.wording import amount, digits, receipt_text, scaled, workspace_text
from sparing.base.config import UserError
from sparing.base.origin import Origin, inherit_origin, write_origin
from sparing.base.run import RunFolder

RATES = {
    "usd_per_hour": 1.0,
    "usd_per_kwh": 0.2,
    "gco2e_per_kwh": 400.0,
    "pue": 1.5,
    "sources": {"gco2e_per_kwh": "DEU: a table"},
}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def entry(attempt, stage, verb="train", **more) -> Entry:
    values = {"status": "done", "wall_s": 10.0, "device_s": 10.0, "kwh": 0.003, "kwh_cpu": 0.002, "co2e_g": 1.2, "usd": 0.5, "started": 1.0,
              "memory_bytes": 10**9, "machine": "2 cores of Some CPU", "rates": json.dumps(RATES)}  # fmt: skip
    return Entry(f"{attempt}-{stage}", "", "", verb, stage, **(values | more))


def a_run(path, rows, *, also=None) -> RunFolder:
    run = RunFolder.create(path)
    run.config_file.write_text("")
    ledgers = [Ledger(run.ledger_file), *([Ledger(also / "ledger.sqlite")] if also else [])]
    for row in rows:
        row.run_id, row.run = ledgers[0].run_id, str(run.path)
        for ledger in ledgers:
            ledger.put(row)
    for ledger in ledgers:
        ledger.close()
    return run


ROWS = [
    entry("a1", "setup", wall_s=2.0, started=1.0, status="killed"),
    entry("a1", "train", tokens=1000, flops=5e9, started=2.0),
    entry("b2", "setup", verb="resume", wall_s=3.0, started=50.0),
    entry("b2", "train", verb="resume", tokens=3000, flops=15e9, memory_bytes=2 * 10**9, started=51.0, cpu_s=15.0, core_s=20.0),
    entry("c3", "generate", verb="generate", started=99.0, tokens=20),
]


def copies():
    return [Entry(**vars(row)) for row in ROWS]


def test_attempts_add_up_and_later_verbs_stand_apart(tmp_path):
    run = a_run(tmp_path / "run", copies())
    run.metrics_file.write_text(
        '{"step": 1, "tokens": 500, "loss": 3}\n{"step": 7, "tokens": 3500, "loss": 2}\n{"step": 7, "tokens": 3500, "eval_bpb": 1.5}\n'
    )
    found = receipt(run)
    actual = {name: figure.get("value") for name, figure in found["actual"].items()}
    assert actual["time_s"] == 25.0 and actual["cost_usd"] == pytest.approx(2.0) and actual["energy_kwh"] == pytest.approx(0.012)
    assert actual["device_hours"] == pytest.approx(40 / 3600) and actual["flops"] == 20e9
    assert actual["tokens"] == 3500 and actual["tokens_per_s"] == 200 and actual["bpb"] == 1.5
    assert found["actual"]["memory_bytes"]["total"]["value"] == 2 * 10**9
    assert found["actual"]["idle"]["value"] == 0.25  # of what is known of: rows of the first format have no cores
    assert {figure["how"] for figure in found["actual"].values() if "how" in figure} == {"measured", "estimated"}
    assert [(row["stage"], row["attempts"], row["time_s"]) for row in found["stages"]] == [("setup", 2, 5.0), ("train", 2, 20.0)]
    assert [row["stage"] for row in found["later"]] == ["generate"]
    assert found["status"] == "done" and found["predicted"] is None and found["difference"] == {} and "no prediction" in found["missing"][0]
    assert found["quality"]["bits_saved_per_byte"] == 6.5 and found["quality"]["per_usd"] == pytest.approx(3.25)
    text = receipt_text(found)
    assert "train" in text and "since then" in text and "25.0s measured" in text


def test_predicted_against_actual(tmp_path):
    run = a_run(tmp_path / "run", copies())
    predicted = {
        "time_s": {"value": 20.0, "low": 18.0, "high": 22.0, "source": "calibration"},
        "cost_usd": {"value": 2.0, "low": 1.9, "high": 2.1, "source": "prices"},
        "memory_bytes": {"total": {"value": 1.6e9, "low": None, "high": None, "source": "parts"}},
        "stages": {"train": {"value": 16.0, "low": 15.0, "high": 17.0, "source": "calibration"}},
    }
    (run.state / "prediction.json").write_text(json.dumps(predicted))
    found = receipt(run)
    assert found["predicted"] == predicted and found["missing"] == []
    assert found["difference"]["time_s"] == {"relative": pytest.approx(0.25), "inside": False}
    assert found["difference"]["cost_usd"] == {"relative": pytest.approx(0.0), "inside": True}
    assert found["difference"]["memory_bytes.total"]["relative"] == pytest.approx(0.25)
    assert found["stages"][1]["predicted"]["value"] == 16.0
    text = receipt_text(found)
    assert "20.0s (18.0s – 22.0s)" in text and "+25.0 % (outside)" in text and "16.0s" in text


def test_a_damaged_prediction_is_as_none(tmp_path):
    run = a_run(tmp_path / "run", copies())
    (run.state / "prediction.json").write_text("[1, 2")
    assert receipt(run)["predicted"] is None


def test_a_students_receipt_shows_its_teachers_share(tmp_path):
    teacher = a_run(tmp_path / "teacher", [entry("t", "train", usd=6.0)])
    student = a_run(tmp_path / "student", [entry("s", "train", usd=2.0)])
    inherit(student, teacher, "teacher")
    found = receipt(student)
    assert [(row["name"], row["relation"], row["share"]) for row in found["ancestors"]] == [("teacher", "teacher", pytest.approx(0.75))]
    assert found["actual"]["cost_usd"]["value"] == 2.0  # its own, without the teacher's
    assert "teacher" in receipt_text(found) and "75 %" in receipt_text(found)


def test_what_is_published_of_an_open_model_is_shown_and_in_no_sum(tmp_path):
    base, run = RunFolder.create(tmp_path / "base"), a_run(tmp_path / "run", [entry("s", "train", usd=2.0)])
    write_origin(base, Origin("Big-1", "big.gguf", "", "Apache-2.0", "Them", parameters=1000, tokens=2e12, hardware="64 H100"))
    inherit_origin(run, base)
    found = receipt(run)
    assert found["published"]["flops"] == {"value": 1.2e16, "how": "estimated", "source": "6 x parameters x tokens, as published"}
    assert found["actual"]["cost_usd"]["value"] == 2.0 and found["actual"]["flops"]["value"] < 1e16
    text = receipt_text(found)
    assert "Begun by others as Big-1 by Them, licence Apache-2.0; published: 2.00 Ttokens, 64 H100; estimated" in text
    assert "12.0 PFLOP" in text and "none of it is in the figures above" in text
    assert receipt(a_run(tmp_path / "own", [entry("o", "train")]))["published"] is None


def test_a_gain_is_measured_between_the_first_and_the_last_score(tmp_path):
    run = a_run(tmp_path / "run", [entry("s", "train")])
    lines = [{"step": 0, "eval_bpb": 1.25}, {"step": 1, "loss": 2.0, "tokens": 8}, {"step": 9, "eval_bpb": 1.2}]
    run.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.state / "prediction.json").write_text(json.dumps({"gain": {"value": 0.05, "low": 0.03, "high": 0.08, "source": "law"}}))
    found = receipt(run)
    assert found["actual"]["gain"]["value"] == pytest.approx(0.04) and found["difference"]["gain"]["inside"] is True
    assert "5.00 % (3.00 – 8.00 %)" in receipt_text(found)
    run.metrics_file.write_text(json.dumps(lines[2]) + "\n")
    assert "gain" not in receipt(run)["actual"]  # of a run from noise


def test_a_run_without_rows_is_one_clear_line(tmp_path):
    run = RunFolder.create(tmp_path / "run")
    run.config_file.write_text("")
    with pytest.raises(UserError, match="nothing was metered"):
        receipt(run)
    with pytest.raises(UserError, match="nothing was metered"):
        workspace()


def test_the_workspace_counts_what_failed_and_benchmarks(tmp_path, home):
    a_run(tmp_path / "good", [entry("g", "train", usd=1.0)], also=home)
    a_run(tmp_path / "bad", [entry("f", "setup", status="failed", usd=0.25), entry("f", "train", usd=0.25, started=2.0)], also=home)
    ledger = Ledger(home / "ledger.sqlite")
    ledger.put(entry("n", "train throughput", verb="bench", usd=3.0))
    ledger.close()
    found = workspace()
    assert found["total"]["cost_usd"] == pytest.approx(4.5) and found["total"]["attempts"] == 3
    assert {name: row["cost_usd"] for name, row in found["by_verb"].items()} == {"train": 1.5, "bench": 3.0}
    assert {name: row["attempts"] for name, row in found["by_status"].items()} == {"done": 2, "failed": 1}
    assert [(row["status"], row["exists"]) for row in found["runs"]] == [("done", True), ("failed", True)]
    assert "bench" in workspace_text(found) and "failed" in workspace_text(found)


def test_codecarbons_columns(tmp_path):
    run = a_run(tmp_path / "run", copies())
    write_csv(tmp_path / "emissions.csv", entries_of(run))
    lines = list(csv.DictReader(open(tmp_path / "emissions.csv", newline="")))
    assert list(lines[0]) == COLUMNS and len(COLUMNS) == len(set(COLUMNS)) == 38
    assert [line["run_id"] for line in lines] == ["a1", "b2", "c3"] and {line["project_name"] for line in lines} == {"run"}
    first = lines[0]
    assert float(first["duration"]) == 12 and float(first["emissions"]) == pytest.approx(0.0024)
    assert float(first["emissions_rate"]) == pytest.approx(0.0024 / 12)
    assert float(first["energy_consumed"]) == pytest.approx(0.006) and float(first["pue"]) == 1.5  # CodeCarbon's energies have PUE in them
    assert float(first["cpu_power"]) == pytest.approx(0.006 * 3.6e6 / 12)
    assert (first["country_iso_code"], first["cpu_count"], first["cpu_model"]) == ("DEU", "2", "Some CPU")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("time_s", 3725, "1h02m"), ("time_s", 59.94, "59.9s"), ("energy_kwh", 3.5e-5, "35.0 mWh"), ("energy_kwh", 1.5, "1.50 kWh"),
        ("co2e_g", 2.5e6, "2.50 t"), ("co2e_g", 0.0166, "16.6 mg"), ("co2e_g", 0, "0 g"),
        ("cost_usd", 1.04e-5, "$0.000010"), ("cost_usd", 5576000, "$5,576,000.00"), ("cost_usd", 0, "$0"),
        ("cost_usd", 8e-8, "<$0.000001"), ("cost_usd", 0.00123, "$0.0012"),
        ("memory_bytes.total", 999.9e6, "1.00 GB"), ("flops", 3.3e24, "3.30 YFLOP"), ("bpb", 1.43, "1.430"), ("tokens", None, "–"),
    ],
)  # fmt: skip
def test_figures_for_people(name, value, text):
    assert amount(name, value) == text


def test_digits():
    assert [digits(value) for value in (34310.4, 999.4, 0.5, 0.000175, 0)] == ["34,310", "999", "0.500", "0.000175", "0"]
    assert scaled(0.05, "") == "50.0 m"


def test_an_interrupted_run_is_not_held_against_its_prediction(tmp_path):
    run = a_run(tmp_path / "run", [entry("a", "setup", status="interrupted"), entry("a", "train", started=2.0)])
    (run.state / "prediction.json").write_text(json.dumps({"time_s": {"value": 99.0, "low": 98.0, "high": 100.0}}))
    found = receipt(run)
    assert found["status"] == "interrupted" and found["difference"] == {} and "interrupted" in found["missing"][0]
