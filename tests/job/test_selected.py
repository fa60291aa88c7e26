"""`train --for`: a run that chooses what it learns from, inside its budget, and keeps what it chose."""

import json
import random

import numpy as np
import pytest
from tests.curate.test_data_select import text_of
from tests.curate.test_pipeline import texts

from sparing import api
from sparing.base.config import UserError
from sparing.base.config_file import Wishes, read_config
from sparing.base.files import file_sha256, read_lines
from sparing.base.run import RunFolder
from sparing.budget.units import parse_budget
from sparing.cli.main import main
from sparing.curate import for_run, select
from sparing.curate.for_run import Chooser, enough
from sparing.job.begin import begin, resolved
from sparing.job.texts import corpora
from sparing.planning import plan as planning

SMALL = {
    "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "num_dense_layers": 1, "vocab_size": 300},
    "train": {"seq_len": 64, "batch_size": 8, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8, "kernels": "plain"},
}
BUDGET = "20ktok"
"""About 55 kB of text; the pool has 150 kB of the wanted kind and three times as much of another."""


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """pool.jsonl of two kinds of text and one line that cannot be read, sample.jsonl of one of the kinds."""
    root = tmp_path_factory.mktemp("selected")
    rows = [{"body": text_of(kind, number)} for kind, count in (("looms", 900), ("tides", 300)) for number in range(count)]
    random.Random(1).shuffle(rows)
    write(root / "pool.jsonl", [*rows, {"text": "under another key"}])
    write(root / "sample.jsonl", [{"body": text_of("tides", number)} for number in range(1000, 1040)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        yield root


def of(place, **more) -> dict:
    return SMALL | {"data": {"text_key": "body", "sample": (str(place / "sample.jsonl"),)} | more}


@pytest.fixture(scope="module")
def run(place):
    summary = api.train([str(place / "pool.jsonl")], BUDGET, str(place / "run"), of(place), seed=1, samples=0)
    return RunFolder(place / "run"), summary


def test_a_run_learns_from_what_is_like_the_sample(run, place):
    folder, summary = run
    found = texts(folder.state / "selected" / "documents")
    assert all(row["text"].startswith("tides") for row in found)
    size = sum(len(row["text"]) for row in found)
    config = read_config(folder.config_file)
    assert config.data.paths == (str(place / "pool.jsonl"),) and config.data.sample == (str(place / "sample.jsonl"),)
    assert 20_000 * 2 < size < 20_000 * 4, "about what twenty thousand tokens are"
    counts = {"in": 1201, "out": len(found), "rejected": 1200 - len(found), "quarantined": 1}
    assert summary["documents"] == summary["selected"]["documents"] == counts
    assert summary["selected"]["bytes"]["out"] == size and summary["selected"]["told_apart"] > 0.7
    assert corpora(folder)[-1] | {"fingerprint": ""} == {
        "paths": list(config.data.paths), "fingerprint": "", "documents": len(found), "bytes": size, "for": list(config.data.sample),
        "counts": counts,
    }  # fmt: skip
    assert [json.loads(line)["line"] for line in (folder.path / "quarantine.jsonl").read_text().splitlines()] == [1201]
    assert not (folder.state / "selected" / ".work").exists() and not (folder.state / "selected" / "rejected").exists()


def test_the_sample_is_scored_beside_the_held_out_text(run):
    folder, summary = run
    evaluations = [line for line in read_lines(folder.metrics_file) if "eval_bpb" in line]
    assert len(evaluations) > 1 and evaluations[-1]["eval_sample_bpb"] < evaluations[0]["eval_sample_bpb"]
    assert summary["sample"]["before"] is None, "noise is not scored"
    assert summary["sample"]["after"]["bpb"] == evaluations[-1]["eval_sample_bpb"]
    assert f"of what was chosen: {summary['bpb']:.4f} bits per byte" in folder.model_card_file.read_text()
    assert f"; {summary['sample']['after']['bpb']:.4f} on" in folder.model_card_file.read_text()


def test_choosing_is_a_stage_that_was_predicted(run):
    folder, _ = run
    predicted = json.loads((folder.state / "prediction.json").read_text())
    assert predicted["stages"]["select"]["time_s"]["value"] > 0
    row = next(row for row in api.receipt(str(folder))["stages"] if row["stage"] == "select")
    assert row["status"] == "done" and row["predicted"] == {"time_s": predicted["stages"]["select"]["time_s"]}


def test_a_killed_run_goes_on_with_what_it_chose(run, place, tmp_path, monkeypatch):
    """Elsewhere, without its pool and its sample, and to the same bits."""
    whole = RunFolder(place / "run")
    pool = write(tmp_path / "pool.jsonl", [json.loads(line) for line in open(place / "pool.jsonl")])
    sample = write(tmp_path / "sample.jsonl", [json.loads(line) for line in open(place / "sample.jsonl")])
    wishes = Wishes.of(SMALL, {"data": {"paths": (pool,), "sample": (sample,), "text_key": "body"}, "train": {"seed": 1}})
    with begin("train", RunFolder.create(tmp_path / "one")) as job:
        resolved(job, wishes, parse_budget(BUDGET), Chooser)
    (tmp_path / "one").rename(tmp_path / "two")
    for name in ("pool", "sample"):
        (tmp_path / f"{name}.jsonl").unlink()
    monkeypatch.setattr(Chooser, "choose", None)
    summary = api.resume(str(tmp_path / "two"), samples=0)
    assert file_sha256(tmp_path / "two/weights/model.safetensors") == file_sha256(whole.weights_file)
    assert summary["documents"] == run[1]["documents"] and summary["bpb"] == run[1]["bpb"]
    file = next((tmp_path / "two/state/selected/documents").iterdir())
    file.unlink()
    with pytest.raises(UserError, match=r"state/selected/documents"):
        api.resume(str(tmp_path / "two"), budget="+10ktok")


def test_what_is_scored_already_is_not_scored_again(place, tmp_path, monkeypatch):
    class Killed(Exception):
        pass

    def killed(*_):
        raise Killed

    data = read_config_of(place)
    chooser, others = Chooser(data), [text_of("looms", number) for number in range(50)]
    with monkeypatch.context() as patch:
        patch.setattr(for_run, "write_rows", killed)
        with pytest.raises(Killed):
            chooser.choose(tmp_path / "chosen", others, 30_000)
    monkeypatch.setattr(select, "score", killed)
    found = chooser.choose(tmp_path / "chosen", others, 30_000)
    assert 30_000 <= found["bytes"]["out"] < 31_000


def read_config_of(place):
    return Wishes.of(of(place, paths=(str(place / "pool.jsonl"),))).config().data


def test_of_a_pool_that_is_too_large_a_part_is_looked_at(place, tmp_path):
    found = Chooser(read_config_of(place)).choose(tmp_path, [text_of("looms", number) for number in range(50)], 1e9, 0.25)
    assert found["documents"]["in"] == 1201 and 200 < found["documents"]["out"] < 400
    assert found["bytes"]["in"] > 3 * found["bytes"]["out"]


def test_documents_of_the_sample_in_the_pool_are_told(place, tmp_path, capsys):
    pool = write(tmp_path / "pool.jsonl", [{"body": text_of("tides", number)} for number in range(1000, 1040)])
    data = Wishes.of(of(place, paths=(pool,))).config().data
    found = Chooser(data).choose(tmp_path / "chosen", [text_of("looms", number) for number in range(50)], 5_000)
    assert found["in_sample"] == found["documents"]["out"] > 0
    assert "bits per byte on it are not of unseen text" in capsys.readouterr().err


def test_a_pool_that_the_budget_reads_whole(place, tmp_path, capsys):
    pool = write(tmp_path / "small.jsonl", [{"body": text_of(kind, number)} for kind in ("looms", "tides") for number in range(30)])
    summary = api.train([pool], BUDGET, str(tmp_path / "run"), of(place), seed=1, samples=0)
    assert "all of it is used, and nothing is chosen" in capsys.readouterr().err
    assert summary["documents"] == {"in": 60, "out": 60, "rejected": 0, "quarantined": 0} and summary["selected"]["whole"]
    assert summary["sample"]["after"]["bpb"] > 0 and not (tmp_path / "run/state/selected/documents").exists()


def test_going_on_from_a_run(run, place, tmp_path):
    """With a sample, and then with the texts that it chose."""
    trained = {"train": SMALL["train"], "optim": {"lr": 0.003}}
    data = trained | {"data": of(place)["data"]}
    summary = api.train([str(place / "pool.jsonl")], "8ktok", str(tmp_path / "b"), data, seed=2, samples=0, start=str(run[0]))
    assert summary["sample"]["before"]["bpb"] > 0 and summary["before"]["sample"] == summary["sample"]["before"]
    assert summary["documents"]["out"] < run[1]["documents"]["out"]
    again = api.train([], "2ktok", str(tmp_path / "c"), trained, seed=2, samples=0, start=str(tmp_path / "b"))
    assert again["documents"] == dict.fromkeys(("in", "out"), summary["documents"]["out"]) | dict.fromkeys(("rejected", "quarantined"), 0)
    assert read_config(tmp_path / "c/config.toml").data.sample == ()


def test_other_texts_end_the_choice(run, place, tmp_path):
    wishes = Wishes.of(SMALL, {"data": {**of(place)["data"], "paths": (str(place / "pool.jsonl"),)}})
    with begin("train", RunFolder.create(tmp_path / "run")) as job:
        resolved(job, wishes, parse_budget(BUDGET), Chooser)
    pool = write(tmp_path / "small.jsonl", [{"body": text_of("looms", number)} for number in range(60)])
    summary = api.resume(str(tmp_path / "run"), data=[pool], samples=0)
    assert summary["documents"]["out"] == 60 and "sample" not in summary
    assert read_config(tmp_path / "run/config.toml").data.sample == ()


def test_refused_in_one_line(place, run, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text(" \n")
    pool, sample, out = str(place / "pool.jsonl"), str(place / "sample.jsonl"), str(tmp_path / "out")
    budget = ["--budget", "20ktok", "--out", out]
    for words, line in {
        ("train", "--data", pool, "--for", str(tmp_path / "none")): "no such file or folder",
        ("train", "--data", pool, "--for", str(tmp_path / "blank.txt")): "blank.txt: no text in it",
        ("train", "--data", pool, "--for", "hf:nobody"): "hf:",
        ("train", "--data", str(tmp_path / "none"), "--for", sample): "no such file or folder",
        ("distill", str(run[0]), "--teacher", str(run[0]), "--data", pool, "--data.sample", sample): "data.sample: distill learns from all",
        ("sft", str(run[0]), "--data", pool, "--data.sample", sample): "data.sample: sft learns from all",
        ("sft", str(run[0]), "--data", pool, "--for", sample): "--for",
    }.items():
        assert main([*words, *budget]) == 2, words
        said = capsys.readouterr().err.strip().splitlines()
        assert line in said[-1] and len(said) == 1 and not (tmp_path / "out").exists(), said


def test_a_plan_counts_it(place):
    """Where there is a sample, and the budget does not train on all of the pool."""
    pool, plain = {"data": of(place)["data"]}, {"data": {"text_key": "body"}}

    def stages(budget: str, more: dict) -> dict:
        return planning.plan(data=[str(place / "pool.jsonl")], budget=budget, machine="4090", wishes=SMALL | more)["stages"]

    assert stages("20ktok", pool)["select"]["time_s"]["value"] > 1
    assert "select" not in stages("20ktok", plain) and "select" not in stages("20Mtok", pool)


def test_a_plan_in_time_pays_for_it(tmp_path):
    """Of a pool that is too large, what a fifth of the budget looks at."""
    (tmp_path / "recipe.toml").write_text("[plan]\ndata_bytes = 1e11\n")
    plans = [
        planning.plan(str(tmp_path / "recipe.toml"), budget="20m", machine="4090", wishes=wishes)
        for wishes in ({}, {"data": {"sample": ["x"]}})
    ]
    assert plans[1]["stages"]["select"]["time_s"]["value"] == pytest.approx(0.2 * 1200, rel=0.05)
    assert 0.7 < plans[1]["tokens"]["value"] / plans[0]["tokens"]["value"] < 0.9
    assert plans[1]["time_s"] == plans[0]["time_s"]


def test_the_best_until_there_is_enough():
    scores, sizes = np.array([0.5, 0.9, 0.5, 0.7]), np.array([3, 2, 3, 4])
    assert [enough(scores, sizes, size).tolist() for size in (1, 2, 3, 7, 100)] == [
        [False, True, False, False], [False, True, False, False], [False, True, False, True], [True, True, False, True], [True] * 4,
    ]  # fmt: skip
