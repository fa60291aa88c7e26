"""The verb `data`: what goes in comes out, is rejected or quarantined, and is written down."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import zstandard

from sparing.account.history import entries
from sparing.base.config import UserError
from sparing.cli.main import main
from sparing.curate import entry, parts, pipeline
from sparing.curate.select import Selection
from sparing.data.sources import documents

WORDS = """the of and that have with to be in river house morning letter garden winter story window table paper light road hill bridge
market coat bread stone engine captain harbour voice kitchen uncle forest bell wagon promise neighbour field candle""".split()


def prose(number: int) -> str:
    """Text that the rules keep, and like no other number's."""
    rng = random.Random(number)
    lines = (" ".join(["the", "of", *rng.choices(WORDS, k=9)]) for _ in range(12))
    return "\n".join(f"{line.capitalize()} {rng.choice(WORDS)}." for line in lines)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """40 documents that stay, two that are copies, one with a few other words, ten that are too short, two that cannot be read."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"text": prose(number), "id": f"doc-{number}"} for number in range(40)]
    rows += [{"text": prose(3)}, {"text": prose(4)}, {"text": prose(5) + " And a few other words."}]
    rows += [{"text": f"Too short {number}."} for number in range(10)]
    lines = [json.dumps(row) for row in rows] + ["{broken", json.dumps({"body": "no text"})]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def texts(folder) -> list[dict]:
    rows = []
    for file in sorted(folder.glob("*.jsonl.zst")):
        raw = zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read()
        rows += map(json.loads, raw.decode().splitlines())
    return rows


@pytest.fixture(scope="module")
def curated(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "made"
    return entry.data("curate", [str(corpus)], str(out), workers=1), out


def test_every_document_is_accounted_for(curated, corpus):
    summary, out = curated
    assert summary["documents"] == {"in": 55, "out": 40, "rejected": 13, "quarantined": 2}
    kept, rejected, scores = (texts(out / name) for name in ("documents", "rejected", "attributes"))
    longer = prose(5) + " And a few other words."
    assert [row["text"] for row in kept] == [*(prose(number) for number in range(40) if number != 5), longer]
    assert len(kept) == 40 and len(rejected) == 13 and len(scores) == 53
    reasons = [row["rejected"] for row in rejected]
    assert sum(reason.startswith("duplicate_exact of") for reason in reasons) == 2
    assert sum(reason.startswith("duplicate_near of") for reason in reasons) == 1
    assert summary["rejected"]["duplicate_exact"] == 2 and sum(summary["rejected"].values()) == 13
    assert kept[7]["id"] == "doc-8" and kept[7]["line"] == 9 and kept[7]["source"] == str(corpus / "a.jsonl")
    quarantined = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [row["line"] for row in quarantined] == [54, 55]
    assert not (out / ".work").exists()


def test_the_result_is_a_corpus(curated):
    """Named as a folder, it stands for what stays, and for nothing else in it."""
    _, out = curated
    assert len(list(documents([str(out)]))) == 40


def test_the_card_and_the_ledger(curated):
    summary, out = curated
    page = (out / "card.html").read_text()
    assert "Rejected, by rule" in page and "duplicate_exact" in page and "Too short" in page and "http://" not in page.split("<script>")[0]
    assert [stage["name"] for stage in summary["stages"]] == ["setup", "judge", "duplicates", "write"]
    assert {row.verb for row in entries(out / "ledger.sqlite")} == {"data"}


def written(out) -> dict[str, bytes]:
    """The files of texts and scores."""
    return {str(file.relative_to(out)): file.read_bytes() for name in pipeline.FOLDERS for file in sorted((out / name).iterdir())}


def test_workers_and_batches_change_nothing(curated, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 16)  # four parts
    entry.data("curate", [str(corpus)], str(tmp_path / "two"), workers=2)
    assert written(tmp_path / "two") == written(curated[1])


def test_one_part_starts_no_process(corpus, tmp_path, monkeypatch, curated):
    monkeypatch.setattr(parts, "ProcessPoolExecutor", None)
    entry.data("curate", [str(corpus)], str(tmp_path / "out"), workers=4)
    assert written(tmp_path / "out") == written(curated[1])


def test_rules_of_a_file(corpus, tmp_path):
    rules = tmp_path / "rules.toml"
    rules.write_text('duplicates = "none"\n[gopher_quality]\nmin_words = 1\nmin_stop_words = 0\n')
    summary = entry.data("stats", [str(corpus)], str(tmp_path / "out"), rules=str(rules), workers=1)
    assert "duplicate_exact" not in summary["rejected"] and not (tmp_path / "out" / "documents").exists()
    assert (tmp_path / "out" / "card.html").exists()
    rules.write_text("[duplicates]\njacard = 0.5\n")
    with pytest.raises(UserError, match="jacard: unknown key; nearest: jaccard"):
        entry.data("curate", [str(corpus)], str(tmp_path / "no"), rules=str(rules))
    assert not (tmp_path / "no").exists()


def test_dedup_alone(corpus, tmp_path, capsys):
    assert main(["data", "dedup", str(corpus), "--out", str(tmp_path / "out"), "--workers", "1", "--json"]) == 0
    printed = capsys.readouterr()
    summary = json.loads(printed.out)
    assert summary["documents"] == {"in": 55, "out": 50, "rejected": 3, "quarantined": 2}
    for reason, count in summary["quarantined"].items():
        assert f"{reason} ({count})" in printed.err, "why, without opening a file"
    assert f"each with its place in {tmp_path / 'out' / 'quarantine.jsonl'}" in printed.err


def test_repeated_lines_are_taken_out(tmp_path):
    line = "Subscribe to our newsletter and never miss a story again."
    rows = [{"text": f"{line}\n{prose(number)}" if number % 2 else prose(number)} for number in range(20)] + [{"text": line}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rules.toml").write_text("[duplicates]\nlines = 5\n")
    summary = entry.data("dedup", [str(tmp_path / "a.jsonl")], str(tmp_path / "out"), rules=str(tmp_path / "rules.toml"), workers=1)
    assert summary["documents"]["out"] == 20 and summary["edited"] == 10
    assert summary["rejected"] == {pipeline.EMPTIED: 1}
    assert all(line not in row["text"] for row in texts(tmp_path / "out" / "documents"))


def test_killed_and_begun_again(corpus, tmp_path, curated):
    """The same command goes on, with the same bytes at the end."""
    out = tmp_path / "out"
    command = [sys.executable, "-m", "sparing", "data", "curate", str(corpus), "--out", str(out), "--workers", "1"]
    with subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stderr=subprocess.DEVNULL) as process:
        while not (out / ".work").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    assert not (out / "curated.json").exists()
    entry.data("curate", [str(corpus)], str(out), workers=1)
    assert written(out) == written(curated[1])


def test_refused_in_one_line(corpus, tmp_path, curated, capsys):
    for command, line in {
        ("data", "curate", str(corpus)): "data curate needs --out",
        ("data", "curate", str(tmp_path / "none"), "--out", str(tmp_path / "x")): "no such file or folder",
        ("data", "curate", str(corpus), "--out", str(curated[1])): "holds a curated corpus already",
        ("data", "curate", str(corpus), "--out", str(corpus)): "is not empty (it has a.jsonl)",
        ("data", "stats", str(corpus), "--out", str(tmp_path / "x"), "--engine", "spark"): "--engine spark: not known; choose local or ray",
        ("data", "stats", str(corpus), "--out", str(tmp_path / "x"), "--extract", "lynx"): "choose resiliparse or trafilatura",
    }.items():
        assert main(list(command)) == 2
        said = capsys.readouterr().err.strip().splitlines()
        assert len(said) == 1 and line in said[0] and not (tmp_path / "x").exists()


def test_refused_while_it_reads_nothing_stays(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": prose(1)}) + "\n")
    (tmp_path / "sample.jsonl").write_text(json.dumps({"body": "no text"}) + "\n")
    with pytest.raises(UserError, match="no text in it"):
        entry.data(
            "select",
            [str(tmp_path / "a.jsonl")],
            str(tmp_path / "out"),
            workers=1,
            selection=Selection("50%", (str(tmp_path / "sample.jsonl"),)),
        )
    assert not (tmp_path / "out").exists()


def test_without_plotly_there_is_no_card(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    entry.data("dedup", [str(corpus)], str(tmp_path / "out"), workers=1)
    assert "without a data card: reports need plotly" in capsys.readouterr().err
    assert (tmp_path / "out" / "curated.json").exists() and not (tmp_path / "out" / "card.html").exists()


def test_the_text_of_web_pages_is_taken_as_asked(tmp_path, capsys):
    for package in ("fastwarc", "resiliparse", "trafilatura"):
        pytest.importorskip(package, reason="needs the extra web")
    from tests.data.test_web import article, http, record

    page = article(1).replace(b"<h1>", b"<ul><li>A list of three words</li></ul><h1>")
    (tmp_path / "a.warc").write_bytes(record(http(page)))
    found = {}
    for extract in ("resiliparse", "trafilatura"):
        out = tmp_path / extract
        assert main(["data", "dedup", str(tmp_path / "a.warc"), "--out", str(out), "--extract", extract, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["documents"]["out"] == 1
        found[extract] = [row["text"] for row in texts(out / "documents")]
        assert found[extract] == [document.text for document in documents([str(tmp_path / "a.warc")], extract=extract)]
    assert found["resiliparse"] != found["trafilatura"]
