"""train, eval and sft read web archives and dumps directly, and say what became of every document."""

import bz2
import gzip
import json

import pytest
from tests.data.test_web import article, http, record
from tests.data.test_wiki import dump, page

from sparing.base.run import RunFolder
from sparing.cli.main import main

pytest.importorskip("fastwarc", reason="needs the extra web")

SMALL = (
    "--model.hidden-size 64 --model.num-layers 2 --model.num-heads 2 --model.vocab-size 512 --model.n-routed-experts 4 --model.mtp-depth 0 "
    "--train.seq-len 64 --train.batch-size 4 --train.threads 1 --train.replicas 1 --train.compile false --train.micro-batch-size 4"
).split()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    return tmp_path


def test_train_on_a_web_archive_and_eval_on_a_dump(home, capsys):
    members = [
        record(http(article(number, f"Ship number {number} went to the sea and came back. ")), number=number) for number in range(40)
    ]
    members += [record(http(b"gone", status="404 Not Found")), record(http(article(99)), number=99)[:-200]]
    (home / "pages.warc.gz").write_bytes(b"".join(map(gzip.compress, members)))
    run = home / "run"
    status = main(["train", "--data", str(home / "pages.warc.gz"), "--budget", "2ktok", "--out", str(run), "--json", *SMALL])
    said = capsys.readouterr()
    assert status == 0, said.err
    counts = {"in": 42, "out": 40, "rejected": 0, "quarantined": 2}
    assert json.loads(said.out)["documents"] == counts
    assert "documents: 42 in, 40 out, 0 rejected, 2 quarantined" in said.err
    quarantined = [json.loads(line) for line in (run / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["line"] for entry in quarantined] == [sum(map(len, map(gzip.compress, members[:at]))) for at in (40, 41)]
    assert json.loads((RunFolder(run).state / "corpus.json").read_text())[0]["counts"] == counts

    pages = dump(
        *(page(f"A{number}", f"The sea of '''ship''' {number}.") for number in range(3)), page("B", "", more='<redirect title="A" />')
    )
    (home / "dump.xml.bz2").write_bytes(bz2.compress(pages.encode()))
    assert main(["eval", str(run), "--data", str(home / "dump.xml.bz2"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["documents"] == {"in": 4, "out": 3, "rejected": 0, "quarantined": 1}
    assert "documents: 4 in, 3 out, 0 rejected, 1 quarantined" in said.err

    assert main(["sft", str(run), "--data", str(home / "dump.xml.bz2"), "--budget", "20ktok", "--out", str(home / "chats")]) == 2
    assert "rows are read from JSON lines, JSON and Parquet and not from .xml files" in capsys.readouterr().err
