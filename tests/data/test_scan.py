import json

import pytest

from sparing.base.config import DataConfig, UserError
from sparing.data import scan as module
from sparing.data.progress import Stopped
from sparing.data.scan import data_home, load_sample, quarantine_path, scan
from sparing.data.split import content_hash


def test_facts(corpus, texts, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.md").write_text("markdown text")
    (tmp_path / "in" / "bad.py").write_bytes(b"\xff")
    (tmp_path / "in" / "lines.jsonl").write_text('{"text": "json text"}\n{"no": 1}\n{"no": 2}\n')
    facts = scan(DataConfig(paths=(corpus, str(tmp_path / "in"))), tmp_path)
    size = sum(len(text.encode()) for text in texts)
    assert facts.documents == 122 and facts.bytes == size + 13 + 9 and facts.files == 123
    assert facts.kinds == {"jsonl": 9, "md": 13, "txt": size}
    assert facts.quarantined == 3 and facts.reasons == {"no key 'text'": 2, "not UTF-8": 1}
    held = [text for text in [*texts, "markdown text", "json text"] if facts.split.holds_out(content_hash(text.encode()))]
    assert len(held) == facts.held_out_documents > 0 and sum(len(text.encode()) for text in held) == facts.held_out_bytes
    lines = [json.loads(line) for line in quarantine_path(facts.fingerprint, tmp_path).read_text().splitlines()]
    assert [(line["source"].rsplit("/", 1)[1], line["line"]) for line in lines] == [("bad.py", 1), ("lines.jsonl", 2), ("lines.jsonl", 3)]
    assert lines[1]["reason"] == "no key 'text' (keys: no)"


def test_the_default_corpus_is_the_standard_library(tmp_path):
    facts = scan(DataConfig(), tmp_path)
    assert facts.documents > 300 and facts.bytes > 5_000_000 and set(facts.kinds) == {"py"}
    assert 0.01 < facts.held_out_bytes / facts.bytes < 0.04 and set(facts.reasons) <= {"empty", "not UTF-8"}


def test_kept_and_made_again_when_damaged(corpus, tmp_path, monkeypatch):
    config = DataConfig(paths=(corpus,))
    first = scan(config, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "documents", None)  # reading again would fail
        again = scan(config, tmp_path)
    assert again == first and all((a == b).all() for a, b in zip(again.section_sizes, first.section_sizes, strict=True))
    (tmp_path / "scans" / first.fingerprint / "facts.json").write_text("{")
    assert scan(config, tmp_path) == first
    assert scan(DataConfig(paths=(corpus,), holdout_fraction=0.3), tmp_path).held_out_bytes > first.held_out_bytes


def test_the_sample_is_training_text_and_does_not_depend_on_order(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SAMPLE_BYTES", 20_000)
    samples = []
    for name, order in (("a", texts), ("b", texts[::-1])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in order))
        facts = scan(DataConfig(paths=(str(tmp_path / name),)), tmp_path)
        samples.append(load_sample(facts.fingerprint, tmp_path))
    assert samples[0] == samples[1] and set(samples[0]) < set(texts)
    assert 18_000 < sum(len(text.encode()) for text in samples[0]) < 30_000
    assert not any(facts.split.holds_out(content_hash(text.encode())) for text in samples[0])


def test_a_single_document(tmp_path):
    text = "one line of the only document there is\n" * 5000
    (tmp_path / "only.txt").write_text(text)
    facts = scan(DataConfig(paths=(str(tmp_path / "only.txt"),)), tmp_path)
    assert facts.documents == 1 and facts.held_out_documents == 1 and "end of the largest document" in facts.split.reason
    assert facts.held_out_bytes == pytest.approx(0.02 * len(text), rel=0.1)
    assert sum(map(len, load_sample(facts.fingerprint, tmp_path))) == facts.split.cut(text.encode())


def test_nothing_usable_is_one_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(
        UserError, match=r"no usable text in .*a\.jsonl: 1 × no key 'text' \(keys: .*\), in .*a\.jsonl:1 \(--data.text-key"
    ) as error:
        scan(DataConfig(paths=(str(tmp_path / "a.jsonl"),)), tmp_path)
    assert "\n" not in str(error.value)
    assert list((tmp_path / "scans").iterdir()) == []
    with pytest.raises(UserError, match="holdout_fraction"):
        scan(DataConfig(paths=(str(tmp_path),), holdout_fraction=1.0), tmp_path)


def test_stops_when_asked_and_reports_progress(corpus, tmp_path):
    seen = []
    with pytest.raises(Stopped):
        scan(DataConfig(paths=(corpus,)), tmp_path, should_stop=lambda: len(seen) > 10, progress=lambda *call: seen.append(call))
    assert 10 < len(seen) < 20 and seen[-1][0] == "scan" and 0 < seen[-1][1] < seen[-1][2]
    assert list((tmp_path / "scans").iterdir()) == []


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path))
    assert data_home() == tmp_path / "data"
    monkeypatch.delenv("SPARING_HOME")
    assert str(data_home()).endswith(".local/share/sparing/data")
