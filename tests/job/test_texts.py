"""A run and its texts: bound by content, found from anywhere, exchanged only where the user means it, always with the same tokenizer."""

import json
import os
import shutil

import pytest

from sparing import api
from sparing.base.config import UserError
from sparing.base.config_file import Wishes, read_config, write_config
from sparing.base.files import read_lines
from sparing.base.run import RunFolder
from sparing.budget.units import parse_budget
from sparing.job.begin import begin, resolved
from sparing.job.texts import corpora

TRAIN = {"seq_len": 64, "batch_size": 8, "threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8, "evals": 0}
SMALL = {
    "model": {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 2},
    "train": TRAIN,
}


def write_texts(folder, words, books=range(40)):
    folder.mkdir(exist_ok=True)
    for i in books:
        lines = [f"The {word} number {j} of book {i} went to the sea and came back." for j, word in enumerate(words * 20)]
        (folder / f"{i:02d}.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    write_texts(root / "text", ["cat", "dog", "ship"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "40ktok", str(root / "base"), SMALL, seed=3, samples=0)
        yield root


@pytest.fixture
def place(workplace, tmp_path):
    """A finished run `base` and its texts, which a test may change."""
    for name in ("text", "base"):
        shutil.copytree(workplace / name, tmp_path / name)
    config = tmp_path / "base/config.toml"
    config.write_text(config.read_text().replace(str(workplace), str(tmp_path)))
    return tmp_path


def interrupted(folder, data):
    """A run that was interrupted before its first step."""
    run = RunFolder.create(folder)
    with begin("train", run) as job:
        resolved(job, Wishes.of(SMALL, {"data": {"paths": [str(path) for path in data]}}), parse_budget("20ktok"))
    return run


def losses(run):
    return [line["loss"] for line in read_lines(RunFolder(run).metrics_file) if "grad_norm" in line]


def contents(run):
    return {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file() and path.name != ".lock"}


def test_a_run_notes_its_texts_and_where_they_are(place):
    (entry,) = corpora(RunFolder(place / "base"))
    assert entry["documents"] == 40 and entry["bytes"] == sum(path.stat().st_size for path in (place / "text").iterdir())
    assert len(entry["fingerprint"]) == 32


def test_an_extension_on_the_same_texts_needs_nothing_but_the_run(place, monkeypatch):
    """In an empty workspace too: the tokenizer is the run's own, and the fingerprint is of the texts, not of files and times."""
    for path in (place / "text").iterdir():
        os.utime(path, ns=(5, 5))
    monkeypatch.setenv("SPARING_HOME", str(place / "another home"))
    before = (place / "base/tokenizer.json").read_bytes()
    first = json.loads((place / "base/state/summary.json").read_text())
    longer = api.resume(str(place / "base"), "+10ktok", samples=0)
    assert (place / "base/tokenizer.json").read_bytes() == before
    assert longer["bpb"] < first["bpb"] + 0.1
    assert not list((place / "another home/data/tokenizers").glob("*")), "none was trained"


@pytest.mark.parametrize("change", ["added", "edited", "removed"])
def test_changed_texts_are_refused_before_anything_is_touched(place, change):
    if change == "removed":
        (place / "text/07.txt").unlink()
    else:
        (place / "text" / ("more.txt" if change == "added" else "07.txt")).write_text("Something else, and quite a lot of it.\n" * 50)
    before = contents(place / "base")
    with pytest.raises(UserError, match="have changed") as error:
        api.resume(str(place / "base"), "+10ktok")
    assert str(error.value).endswith(f"sparing resume {place / 'base'} --budget +10ktok --data {place / 'text'}")
    assert contents(place / "base") == before

    run = interrupted(place / "other", [place / "text"])
    (place / "text/late.txt").write_text("It came after the run had begun.\n" * 50)
    with pytest.raises(UserError, match="have changed") as error:
        api.resume(str(run))
    assert str(error.value).endswith(f"sparing resume {run} --data {place / 'text'}")
    api.resume(str(run), samples=0, data=[str(place / "text")])
    assert corpora(run)[-1]["documents"] == len(list((place / "text").iterdir()))


def test_an_edit_that_keeps_the_size_is_a_change_too(place):
    path = place / "text/07.txt"
    path.write_text(path.read_text().replace("cat", "rat"))
    with pytest.raises(UserError, match="still 40 documents"):
        api.resume(str(place / "base"), "+10ktok")


def test_an_extension_that_means_other_texts(place, monkeypatch):
    write_texts(place / "others", ["cat", "fox", "boat"], range(50, 90))
    base, before = place / "base", (place / "base/tokenizer.json").read_bytes()
    noise = losses(base)[0]
    monkeypatch.chdir(place)
    done = api.resume("base", "+20ktok", samples=0, data=["others"])
    assert (base / "tokenizer.json").read_bytes() == before, "other texts, the same tokenizer"
    assert done["bpb"] < 1 and max(losses(base)[-20:]) < noise - 1
    assert [entry["paths"] for entry in corpora(RunFolder(base))] == [corpora(RunFolder(base))[0]["paths"], [str(place / "others")]]
    config = read_config(base / "config.toml")
    assert config.data.paths == (str(place / "others"),) and config.budget.amount == 60_000
    assert f"then {place / 'others'};" in (base / "MODEL_CARD.md").read_text()
    assert api.resume("base", "+10ktok", samples=0)["tokens"] > 60_000  # from here on these are the run's texts


def test_other_texts_may_have_another_field(place):
    lines = [json.dumps({"body": f"The fox number {i} of the other book went to the sea and came back."}) for i in range(2000)]
    (place / "others.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="no key 'text'"):
        api.resume(str(place / "base"), "+10ktok", data=[str(place / "others.jsonl")])
    with pytest.raises(UserError, match="--text-key goes with --data"):
        api.resume(str(place / "base"), "+10ktok", text_key="body")
    api.resume(str(place / "base"), "+10ktok", samples=0, data=[str(place / "others.jsonl")], text_key="body")
    assert read_config(place / "base/config.toml").data.text_key == "body"


def test_of_a_large_corpus_only_what_the_extension_can_read_is_tokenised(place):
    write_texts(place / "others", ["cat", "fox", "boat"] * 10, range(100))
    api.resume(str(place / "base"), "+10ktok", samples=0, data=[str(place / "others")])
    assert read_config(place / "base/config.toml").data.max_tokens == pytest.approx(1.2 * 50_000, rel=0.05)


def test_texts_that_were_moved_are_the_same(place):
    (place / "text").rename(place / "moved")
    with pytest.raises(UserError, match=r"no such file or folder.*; to go on with other texts: sparing resume .* --data "):
        api.resume(str(place / "base"), "+10ktok")
    api.resume(str(place / "base"), "+10ktok", samples=0, data=[str(place / "moved")])
    (entry,) = corpora(RunFolder(place / "base"))
    assert entry["paths"] == [str(place / "moved")]


def test_paths_and_globs_hold_in_any_folder(place, monkeypatch):
    write_texts(place / "text [1]", ["cat"], range(3))
    (place / "mine.json").write_bytes((place / "base/tokenizer.json").read_bytes())
    monkeypatch.chdir(place / "text [1]")
    wishes = Wishes.of(SMALL, {"data": {"paths": ["../text", "*.txt"], "tokenizer": "../mine.json"}})
    run = RunFolder.create(place / "run")
    with begin("train", run) as job:
        resolved(job, wishes, parse_budget("20ktok"))
    monkeypatch.chdir("/")
    data = read_config(run.config_file).data
    assert data.paths[0] == str(place / "text") and data.tokenizer == str(place / "mine.json")
    assert corpora(run)[0]["documents"] == 43
    api.resume(str(run), samples=0)


def test_runs_in_the_folder_of_the_texts_are_not_texts(place, monkeypatch):
    shutil.copytree(place / "base", place / "text/runs/older")
    monkeypatch.chdir(place / "text")
    monkeypatch.setenv("SPARING_HOME", str(place / "text/home"))
    api.train(["."], "20ktok", "mine", SMALL, samples=0)
    assert corpora(RunFolder("mine"))[0]["documents"] == 40
    api.resume("mine", "+10ktok", samples=0)
    (place / "text/loop").mkdir()
    api.train(["**/*"], "20ktok", "loop/second", SMALL, samples=0)
    assert corpora(RunFolder("loop/second"))[0]["documents"] == 40


def test_a_run_older_than_its_note_is_bound_when_it_goes_on(place, monkeypatch):
    run = RunFolder(place / "base")
    (run.state / "corpus.json").unlink()
    config = read_config(run.config_file)
    relative = Wishes.of({"data": {"paths": ["text"]}}).config().data.paths
    run.config_file.write_text(write_config(config).replace(f'["{place / "text"}"]', f'["{relative[0]}"]'))
    monkeypatch.chdir(place)
    before = run.tokenizer_file.read_bytes()
    api.resume("base", "+10ktok", samples=0)
    assert corpora(run)[0]["documents"] == 40 and run.tokenizer_file.read_bytes() == before
    assert read_config(run.config_file).data.paths == (str(place / "text"),)


def test_a_run_that_starts_from_another_goes_on_with_its_texts(place):
    base = str(place / "base")
    api.train([], "10ktok", str(place / "next"), {"train": TRAIN}, samples=0, start=base)
    assert corpora(RunFolder(place / "next")) == [{**corpora(RunFolder(base))[0], "paths": [str(place / "text")]}]
    assert (place / "next/tokenizer.json").read_bytes() == (place / "base/tokenizer.json").read_bytes()
    (place / "text/more.txt").write_text("It came later.\n" * 50)
    with pytest.raises(UserError, match=r"the texts of .*base have changed .*name the texts to go on with"):
        api.train([], "10ktok", str(place / "third"), {"train": TRAIN}, samples=0, start=base)
    assert not (place / "third/config.toml").exists()
    api.train([str(place / "text")], "10ktok", str(place / "third"), {"train": TRAIN}, samples=0, start=base)
    api.export(base, "hf", str(place / "hf"))
    api.import_(str(place / "hf"), str(place / "imported"))
    with pytest.raises(UserError, match="does not say what it was trained on"):
        api.train([], "10ktok", str(place / "fourth"), {"train": TRAIN}, start=str(place / "imported"))
    before = contents(place / "imported")
    with pytest.raises(UserError, match="was imported: there is no training"):
        api.resume(str(place / "imported"))
    assert contents(place / "imported") == before


def test_another_tokenizer_that_lies_in_the_new_folder_is_not_the_runs(place):
    run = RunFolder.create(place / "new")
    with run.lock():
        shutil.copy(place / "base/tokenizer.json", run.tokenizer_file)  # of an import that died there
    wishes = Wishes.of(SMALL, {"model": {"vocab_size": 300}})
    api.train([str(place / "text")], "10ktok", str(run), wishes, samples=0)
    assert len(json.loads(run.tokenizer_file.read_text())["model"]["vocab"]) == 300
