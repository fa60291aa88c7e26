"""The accounting verbs on the command line, and runs whose folder may only be read."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from sparing.account.history import entries
from sparing.cli.main import main

OPTIONS = (
    "--budget 12ktok --samples 1 --model.hidden-size 32 --model.num-layers 2 --model.num-heads 2 --model.vocab-size 320 --train.seq-len 32"
    " --train.batch-size 8 --train.micro-batch-size 8 --train.threads 1 --train.compile false --train.replicas 1 --data.workers 1"
).split()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("work")
    (root / "text").mkdir()
    for i in range(20):
        (root / "text" / f"{i}.txt").write_text("\n".join(f"Line {j} of text {i} says what lines say." for j in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        assert main(["train", "--data", str(root / "text"), "--out", str(root / "run"), *OPTIONS]) == 0
        yield root


def answer(capsys, *argv: object) -> dict:
    assert main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_training_leaves_a_receipt(workplace, capsys):
    found = answer(capsys, "receipt", workplace / "run")
    stages = {row["stage"]: row for row in found["stages"]}
    assert {"setup", "scan", "tokenise", "train", "evaluate", "save", "sample"} <= stages.keys() and found["status"] == "done"
    assert stages["train"]["tokens"] == found["actual"]["tokens"]["value"] == 12_000 // 256 * 256
    summary = json.loads((workplace / "run/state/summary.json").read_text())
    assert sum(row["time_s"] for row in found["stages"]) == pytest.approx(summary["seconds"], abs=1.0)
    assert found["actual"]["cost_usd"]["value"] == pytest.approx(summary["cost_usd"], rel=0.1)
    for name in ("time_s", "device_hours", "energy_kwh", "co2e_g", "cost_usd", "flops", "bpb"):
        assert found["actual"][name]["value"] > 0 and found["actual"][name]["how"] in ("measured", "estimated"), name
    assert main(["receipt", str(workplace / "run")]) == 0
    text = capsys.readouterr().out
    assert "tokenise" in text and "bits saved per byte" in text


def test_eval_and_generate_are_metered_and_do_not_change_what_training_cost(workplace, capsys):
    before = answer(capsys, "receipt", workplace / "run")
    answer(capsys, "eval", workplace / "run", "--data", workplace / "text/1.txt")
    answer(capsys, "generate", workplace / "run", "--prompt", "Line", "--max-tokens", 5)
    after = answer(capsys, "receipt", workplace / "run", "--csv", workplace / "emissions.csv")
    assert {row["stage"] for row in after["later"]} >= {"evaluate", "generate"}
    assert after["actual"]["time_s"] == before["actual"]["time_s"]
    assert len((workplace / "emissions.csv").read_text().splitlines()) == 1 + 1 + len(after["later"])


def test_a_failed_run_is_in_the_workspaces_receipt(workplace, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    assert main(["train", "--data", str(tmp_path / "empty"), "--out", str(tmp_path / "failed"), *OPTIONS]) == 2
    assert "sparing: " in capsys.readouterr().err
    found = answer(capsys, "receipt", "--all")
    assert {row["status"] for row in found["runs"]} == {"done", "failed"}
    assert found["by_status"]["failed"]["attempts"] == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["receipt"], "receipt needs RUN"),
        (["receipt", "nowhere"], "no such run folder"),
        (["receipt", "x", "--all"], "either x or --all"),
        (["report", "nowhere"], "no such run folder"),
        (["compare"], "compare needs RUN"),
    ],
)
def test_slips_are_one_clear_line(workplace, capsys, argv, said):
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_receipts_and_reports_do_not_wait_for_torch(workplace):
    script = "import sys; from sparing.cli.main import main; print(main(sys.argv[1:]), 'torch' in sys.modules)"
    for verb in ("receipt", "report"):
        done = subprocess.run([sys.executable, "-c", script, verb, str(workplace / "run"), "--json"], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "0 False", done.stderr


def test_how_the_machine_is_paid_for(workplace, capsys, monkeypatch):
    monkeypatch.setenv("SPARING_RENT", "sopt")
    assert main(["generate", str(workplace / "run"), "--prompt", "Line"]) == 2
    assert "rent 'sopt': choose own, on_demand, spot" in capsys.readouterr().err


def test_compare_takes_several_runs(workplace, capsys):
    found = answer(capsys, "compare", workplace / "run", workplace / "run", "--out", workplace / "both.html")
    assert found["bytes"] == (workplace / "both.html").stat().st_size > 1e6


READ_ONLY = """
import json, os, sys
from sparing import api
run, text, warm = sys.argv[1:]
home = os.environ["SPARING_HOME"]
os.environ["SPARING_HOME"] = warm  # all that is imported late comes now: Python itself may lie where only root may read
api.evaluate(warm + "/run", [text]), api.generate(warm + "/run", "Line", 5, seed=1), api.receipt(warm + "/run")
os.environ["SPARING_HOME"] = home
os.setgid(65534); os.setuid(65534)
before = sorted((str(f), os.stat(f).st_mtime_ns) for f in [run, *(os.path.join(d, n) for d, _, ns in os.walk(run) for n in ns)])
score = api.evaluate(run, [text])
made = api.generate(run, "Line", 5, seed=1)
after = sorted((str(f), os.stat(f).st_mtime_ns) for f in [run, *(os.path.join(d, n) for d, _, ns in os.walk(run) for n in ns)])
found = api.receipt(run)
print(json.dumps([before == after, score["bpb"], sorted(row["stage"] for row in found["later"])]))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root to become somebody who may not write")
def test_a_read_only_run_is_evaluated_and_generated_from_without_writing_to_it(workplace, tmp_path):
    public = tempfile.mkdtemp()  # pytest's own folders are closed to others
    try:
        for copy in (f"{public}/run", tmp_path / "run"):
            shutil.copytree(workplace / "run", copy)
        shutil.copyfile(workplace / "text/1.txt", f"{public}/1.txt")
        os.makedirs(f"{public}/home")
        os.chmod(public, 0o755)
        os.chmod(f"{public}/home", 0o777)
        for folder, _, files in os.walk(f"{public}/run"):
            os.chmod(folder, 0o555)
            for name in files:
                os.chmod(f"{folder}/{name}", 0o444)
        environment = os.environ | {"SPARING_HOME": f"{public}/home", "HOME": f"{public}/home"}
        command = [sys.executable, "-c", READ_ONLY, f"{public}/run", f"{public}/1.txt"]
        done = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        untouched, bits, later = json.loads(done.stdout.splitlines()[-1])
        assert untouched and bits > 0 and {"evaluate", "generate"} <= set(later)
        stages = {row.stage for row in entries(Path(f"{public}/home/ledger.sqlite"))}
        assert stages == {"evaluate", "generate"}
    finally:
        shutil.rmtree(public)
