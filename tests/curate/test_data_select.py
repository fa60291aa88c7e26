"""`data select`: the documents most like a sample, up to a budget."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.curate.prose import words
from tests.curate.test_pipeline import texts

from sparing.base.config import UserError
from sparing.cli.main import main
from sparing.curate import entry, pipeline, select
from sparing.curate.select import Selection, best, cut, draw, parse_amount, told_apart
from sparing.data.tokenizer import Tokenizer, train_tokenizer

REAL = Path(__file__).parents[3] / "shared" / "data"
KINDS = {"tides": words(300), "looms": words(300, 200)}
"""Two kinds of text that share a third of their words."""


def text_of(kind: str, number: int, length: int = 80) -> str:
    dice = random.Random(f"{kind} {number}")
    lines = (" ".join([kind, *dice.choices(KINDS[kind], k=9)]) + "." for _ in range(max(1, length // 10)))
    return "\n".join(lines)


def write(path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    """60 documents of one kind, 20 of the other, one of them as long as ten; one that cannot be read."""
    rows = [{"text": text_of("looms", number), "id": f"looms-{number}"} for number in range(60)]
    rows += [{"text": text_of("tides", number, 1000 if number == 7 else 80), "id": f"tides-{number}"} for number in range(20)]
    random.Random(1).shuffle(rows)
    return write(tmp_path_factory.mktemp("pool") / "pool.jsonl", [*rows, {"body": "no text"}])


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write(tmp_path_factory.mktemp("sample") / "sample.jsonl", [{"text": text_of("tides", number)} for number in range(100, 140)])


@pytest.fixture(scope="module")
def whole(pool):
    """Bytes of the pool by kind."""
    rows = [json.loads(line) for line in open(pool)][:-1]
    return {kind: sum(len(row["text"]) for row in rows if row["id"].startswith(kind)) for kind in KINDS}


def chosen_by(by, pool, sample, budget, out, **more):
    selection = Selection(budget, (sample,), by, more.pop("tokenizer", None))
    return entry.data("select", [pool], str(out), selection=selection, workers=more.get("workers", 1))


def ids(out) -> list[str]:
    return [row["id"] for row in texts(out / "documents")]


@pytest.fixture(scope="module")
def selected(pool, sample, whole, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "made"
    return chosen_by("quality", pool, sample, f"{whole['tides']}B", out), out


def test_quality_takes_the_kind_of_the_sample(selected, whole):
    summary, out = selected
    assert sorted(ids(out)) == sorted(f"tides-{number}" for number in range(20))  # the long one too
    assert summary["documents"] == {"in": 81, "out": 20, "rejected": 60, "quarantined": 1}
    assert summary["rejected"] == {select.REASON: 60} and {row["rejected"] for row in texts(out / "rejected")} == {select.REASON}
    assert summary["size"] == {"unit": "bytes", "limit": whole["tides"], "in": sum(whole.values()), "out": whole["tides"]}
    assert summary["told_apart"] > 0.6  # the pool's draw has the sample's kind in it
    scores = {row["id"]: row["attributes"]["select"]["score"] for row in texts(out / "attributes")}
    assert len(scores) == 80
    assert min(scores[name] for name in ids(out)) == pytest.approx(summary["threshold"], abs=1e-6)
    assert max(value for name, value in scores.items() if name.startswith("looms")) < summary["threshold"]
    assert [stage["name"] for stage in summary["stages"]] == ["setup", "read", "score", "write"] and summary["seconds"] > 0
    assert json.loads((out / "curated.json").read_text())["by"] == "quality" and (out / "card.html").exists()
    assert not (out / ".work").exists() and len((out / "quarantine.jsonl").read_text().splitlines()) == 1


def test_overlap_takes_the_kind_of_the_sample(pool, sample, whole, tmp_path):
    summary = chosen_by("overlap", pool, sample, f"{whole['tides']}B", tmp_path / "out")
    assert sorted(ids(tmp_path / "out")) == sorted(f"tides-{number}" for number in range(20))
    assert summary["told_apart"] > 0.6


def test_random_takes_both_kinds(pool, tmp_path):
    for name, order in (("one", 1), ("two", -1)):  # whatever the order of the input
        rows = open(pool).read().splitlines()[::order]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        selection = Selection("50%", (), "random")
        summary = entry.data("select", [str(tmp_path / f"{name}.jsonl")], str(tmp_path / name), selection=selection, workers=1)
        assert summary["told_apart"] is None
    assert sorted(ids(tmp_path / "one")) == sorted(ids(tmp_path / "two"))
    kinds = [name.split("-")[0] for name in ids(tmp_path / "one")]
    assert kinds.count("looms") > 5 and kinds.count("tides") > 1


def test_the_budget_is_kept_to_the_document(pool, sample, whole, selected, tmp_path):
    """A byte less, and one document fewer stays."""
    for less, count in ((0, 20), (1, 19)):
        summary = chosen_by("quality", pool, sample, f"{whole['tides'] - less}B", tmp_path / str(less))
        assert summary["documents"]["out"] == count and summary["bytes"]["out"] <= whole["tides"] - less
    assert set(ids(tmp_path / "1")) < set(ids(tmp_path / "0"))


def test_a_budget_in_tokens(pool, sample, tmp_path):
    estimated = chosen_by("quality", pool, sample, "1ktok", tmp_path / "estimated")
    assert estimated["size"]["unit"] == "bytes" and estimated["size"]["limit"] == 4000
    assert 3000 < estimated["bytes"]["out"] <= 4000
    train_tokenizer([text_of("tides", 1)], 300).save(tmp_path / "tokenizer.json")
    exact = chosen_by("quality", pool, sample, "1ktok", tmp_path / "exact", tokenizer=str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    count = sum(len(tokenizer.encode(row["text"])) + 1 for row in texts(tmp_path / "exact" / "documents"))
    assert exact["size"]["unit"] == "tokens" and exact["size"]["out"] == count and 500 < count <= 1000


def test_a_budget_that_the_pool_does_not_fill(pool, sample, tmp_path, capsys):
    summary = chosen_by("overlap", pool, sample, "1GB", tmp_path / "out")
    assert summary["documents"]["out"] == 80 and summary["rejected"] == {}
    assert "--budget 1GB is as much as the pool has" in capsys.readouterr().err


def test_workers_and_batches_change_nothing(pool, sample, whole, selected, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_DOCUMENTS", 7)
    chosen_by("quality", pool, sample, f"{whole['tides']}B", tmp_path / "two", workers=2)
    assert same(tmp_path / "two", selected[1])


def same(one, other) -> bool:
    return all(
        [file.read_bytes() for file in sorted((one / name).iterdir())] == [file.read_bytes() for file in sorted((other / name).iterdir())]
        for name in pipeline.FOLDERS
    )


def test_killed_and_begun_again(pool, sample, whole, selected, tmp_path):
    out, budget = tmp_path / "out", f"{whole['tides']}B"
    command = [sys.executable, "-m", "sparing", "data", "select", pool, "--for", sample, "--budget", budget, "--out", str(out)]
    with subprocess.Popen([*command, "--workers", "1"], env=os.environ, stderr=subprocess.DEVNULL) as process:
        while not (out / ".work").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (out / "curated.json").exists()
    chosen_by("quality", pool, sample, budget, out)
    assert same(out, selected[1])


def test_what_is_scored_is_not_scored_again(pool, sample, tmp_path, monkeypatch):
    class Full(Exception):
        pass

    def full(*_):
        raise Full

    with monkeypatch.context() as patch:
        patch.setattr(select, "write_rows", full)
        with pytest.raises(Full):
            chosen_by("quality", pool, sample, "10%", tmp_path / "out")
    monkeypatch.setattr(select, "score", full)
    assert chosen_by("quality", pool, sample, "10%", tmp_path / "out")["documents"]["out"] > 0


def test_the_verb(pool, sample, tmp_path, capsys):
    command = ["data", "select", pool, "--for", sample, "--by", "overlap", "--budget", "10%", "--workers", "1", "--json"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["by"] == "overlap" and summary["bytes"]["out"] <= 0.1 * summary["bytes"]["in"]
    assert all(name.startswith("tides") for name in ids(tmp_path / "out"))


def test_refused_in_one_line(pool, sample, tmp_path, capsys):
    (tmp_path / "blank.txt").write_text(" \n")
    for words_, line in {
        ("select", pool, "--for", sample): "data select needs --budget",
        ("select", pool, "--budget", "10%"): "--by quality needs --for SAMPLE",
        ("select", pool, "--for", sample, "--budget", "20m"): "write one of 2Mtok, 20MB, 10%",
        ("select", pool, "--for", sample, "--budget", "0%"): "must be more than 0 %",
        ("select", pool, "--for", sample, "--budget", "$5"): "write one of 2Mtok, 20MB, 10%",
        ("select", pool, "--for", sample, "--budget", "10%", "--by", "hope"): "choose quality, overlap, loss, random, mixture",
        ("select", pool, "--budget", "10%", "--by", "loss", "--model", "x"): "--by loss needs --reference RUN",
        ("select", pool, "--for", sample, "--budget", "10%", "--model", "x"): "--model goes with --by loss",
        ("select", pool, "--budget", "10%", "--by", "loss", "--model", "x", "--reference", "x"): "x",
        ("select", pool, "--for", str(tmp_path / "none"), "--budget", "10%"): "no such file or folder",
        ("select", pool, "--for", sample, "--budget", "10%", "--tokenizer", "x"): "is not in tokens",
        ("select", pool, "--for", sample, "--budget", "1ktok", "--tokenizer", str(tmp_path / "x")): "does not exist",
        ("select", pool, "--for", sample, "--budget", "10%", "--rules", "x"): "data select: unknown option --rules",
        ("curate", pool, "--for", sample): "data curate: unknown option --for",
    }.items():
        assert main(["data", *words_, "--out", str(tmp_path / "x")]) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and line in said[0] and not (tmp_path / "x").exists()


def test_nothing_to_learn_from_or_to_keep(pool, sample, tmp_path):
    (tmp_path / "blank.txt").write_text(" \n")
    blank = str(tmp_path / "blank.txt")
    with pytest.raises(UserError, match=r"--for .*blank.txt: no text in it: 1 × empty"):
        chosen_by("quality", pool, blank, "10%", tmp_path / "a")
    with pytest.raises(UserError, match=r"no text to select from in .*blank.txt: 1 × empty"):
        chosen_by("quality", blank, sample, "10%", tmp_path / "b")
    with pytest.raises(UserError, match=r"keeps nothing: the smallest document has \d+ bytes"):
        chosen_by("quality", pool, sample, "10B", tmp_path / "c")


def test_amounts():
    assert [parse_amount(text) for text in ("2Mtok", "2 M tokens", "20MB", "1GiB", "10%", "2.5 %")] == [
        (2e6, "tok"), (2e6, "tok"), (2e7, "bytes"), (2**30, "bytes"), (0.1, "share"), (0.025, "share"),
    ]  # fmt: skip


def test_the_best_until_one_does_not_fit():
    scores, sizes = np.array([0.5, 0.9, 0.5, 0.7]), np.array([3, 2, 3, 4])
    assert [best(scores, sizes, limit).tolist() for limit in (1, 6, 9, 12)] == [
        [False] * 4, [False, True, False, True], [True, True, False, True], [True] * 4,
    ]  # fmt: skip
    assert best(scores, sizes, 3).tolist() == [False, True, False, False]  # the second-best is larger than the budget


def test_told_apart():
    assert told_apart([3, 4], [1, 2]) == 1 and told_apart([1, 2], [3, 4]) == 0
    assert told_apart([1, 2], [1, 2]) == 0.5 and told_apart([2], [1, 2, 2, 3]) == 0.5


def test_a_draw_is_bounded_and_keeps_texts_together():
    long = [text_of("tides", number, 2000) for number in range(12)]
    everything = draw(long, 1 << 30)
    assert sorted(everything) == sorted(piece for text in long for piece in cut(text)) and draw(long[::-1], 1 << 30) == everything
    owners = [next(number for number, text in enumerate(long) if piece in text) for piece in everything]
    assert sum(before != after for before, after in pairwise(owners)) == 11
    some = draw(long, 50_000)
    assert 50_000 <= sum(map(len, some)) < 50_000 + select.PIECE_BYTES and set(some) < set(everything)
    assert len({next(number for number, text in enumerate(long) if piece in text) for piece in some}) > 6


SMALL = {
    "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 1, "num_dense_layers": 1, "vocab_size": 300},
    "train": {"seq_len": 64, "batch_size": 8, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8},
}


def test_loss_takes_what_the_reference_knows(pool, whole, tmp_path, monkeypatch):
    """The model has learnt one kind and the reference the other, which is what the model lacks."""
    from sparing import api

    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    for kind in KINDS:
        data = write(tmp_path / f"{kind}.jsonl", [{"text": text_of(kind, number)} for number in range(200, 300)])
        api.train([data], "60ktok", str(tmp_path / kind), SMALL, seed=1)
    command = ["data", "select", pool, "--by", "loss", "--model", str(tmp_path / "looms"), "--reference", str(tmp_path / "tides")]
    assert main([*command, "--budget", f"{whole['tides'] // 2}B", "--out", str(tmp_path / "out")]) == 0
    assert len(ids(tmp_path / "out")) > 3 and all(name.startswith("tides") for name in ids(tmp_path / "out"))


@pytest.mark.real_data
@pytest.mark.parametrize("by", ["quality", "overlap"])
def test_medicine_out_of_a_book(by):
    """60 kB of answers as the sample, as much again in ten times as much of books."""
    medquad, books = REAL / "medicine" / "medquad.jsonl", REAL / "books" / "val"
    if not (medquad.exists() and books.is_dir()):
        pytest.skip(f"no {medquad} and {books}")
    with open(medquad, encoding="utf-8") as file:
        answers = [json.loads(line)["answer"] for line in islice(file, 0, 8000, 100)]
    pages = [page for path in sorted(books.iterdir()) for page in cut(path.read_text()[20_000:80_000])]
    pool = [*answers[40:], *pages]
    scorer, told = select.fit(by, draw(answers[:40], 1 << 20), draw(pool, 1 << 20))
    assert told > 0.85
    values = [select.score(scorer, text) for text in pool]
    assert told_apart(values[:40], values[40:]) > 0.97
