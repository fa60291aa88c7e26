"""Our stages inside datatrove's own pipelines, which its executor runs."""

import gzip
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from tests.curate.prose import prose, sentence
from tests.curate.test_pipeline import prose as unlike

from sparing.curate.datatrove_steps import mapped, signed
from sparing.curate.duplicates import find_duplicates
from sparing.curate.lines import remove_lines, repeated_lines
from sparing.curate.minhash import DuplicateSettings
from sparing.curate.pipeline import batches
from sparing.curate.rules import Rules, judge
from sparing.data.document import Document

MISSING = "datatrove is not installed: pip install 'sparing[bench]'"
RULES = replace(Rules.default(), language=None)
"""Made text is in no language."""
GOOD = prose(12)
TEXTS = [GOOD, GOOD.replace("\n", "\n\n"), "too short.", GOOD + "\n" + GOOD, "# " * 100, sentence() * 9, GOOD + " Mail ann@example.net."]


def row_of(number: int, text: str) -> dict:
    return {"text": text, "id": str(number), "metadata": {"url": f"https://a.example/{number}"}}


def judged(texts: list[str]) -> list[dict]:
    """What `judge` says, without datatrove."""
    found = [Document(text, "a", number, {}) for number, text in enumerate(texts)]
    return [row for batch in batches(found) for row in judge(batch, RULES).to_pylist()]


def run(pipeline, folder, tasks=1):
    executor = pytest.importorskip("datatrove.executor", reason=MISSING)
    executor.LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(folder)).run()


def written(folder) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl.gz")) for line in gzip.open(file, "rt", encoding="utf-8")]


def corpus(folder, rows: list[dict], files: int) -> str:
    folder.mkdir()
    for number in range(files):
        lines = [json.dumps({**row["metadata"], "text": row["text"], "id": row["id"]}) + "\n" for row in rows[number::files]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return str(folder)


@pytest.mark.parametrize("drop", [True, False])
def test_rules_judge_in_a_pipeline_as_they_do_alone(tmp_path, drop):
    readers, writers = (pytest.importorskip(f"datatrove.pipeline.{name}", reason=MISSING) for name in ("readers", "writers"))
    rows = [row_of(*row) for row in enumerate(TEXTS)]
    step = partial(mapped, stage=partial(judge, rules=RULES), drop=drop)
    pipeline = [readers.JsonlReader(corpus(tmp_path / "in", rows, 2)), step, writers.JsonlWriter(str(tmp_path / "out"))]
    run(pipeline, tmp_path / "logs", tasks=2)
    found = {int(row["id"]): row for row in written(tmp_path / "out")}
    expected = {number: row for number, row in enumerate(judged(TEXTS)) if row["rejected"] is None or not drop}
    assert (sorted(found) == sorted(expected) and len(expected) < len(TEXTS)) or not drop
    for number, row in expected.items():
        assert found[number].get("text", "") == row["text"]  # its writer leaves empty values out
        metadata = found[number]["metadata"]
        assert metadata["attributes"] == row["attributes"] and metadata.get("rejected") == row["rejected"]
        assert metadata["url"] == f"https://a.example/{number}" and "line" not in metadata
    assert "email@example.com" in found[6]["text"]


def test_a_step_needs_nothing_of_datatrove_but_the_shape_of_its_documents(monkeypatch):
    """And where it cuts batches changes nothing."""
    monkeypatch.setattr("sparing.curate.datatrove_steps.BATCH_DOCUMENTS", 3)
    made = [SimpleNamespace(**row_of(*row)) for row in enumerate(TEXTS)]
    found = list(mapped(made, 0, 1, stage=partial(judge, rules=RULES), drop=False))
    assert found == made  # the same objects
    assert [(one.text, one.metadata["rejected"]) for one in found] == [(row["text"], row["rejected"]) for row in judged(TEXTS)]


def test_repeated_lines_go_in_a_pipeline(tmp_path):
    menu = "Home, news, contact, imprint and all our other pages"
    texts = [f"{menu}\n{unlike(number)}" for number in range(4)]
    settings = DuplicateSettings(lines=4)
    found = [Document(text, "a", number, {}) for number, text in enumerate(texts)]
    repeated = repeated_lines(lambda: batches(found), tmp_path, settings)
    step = partial(mapped, stage=lambda batch: remove_lines(batch, repeated, settings)[0])
    documents = [SimpleNamespace(**row_of(*row)) for row in enumerate(texts)]
    assert [one.text for one in step(documents, 0, 1)] == [unlike(number) for number in range(4)]


def test_datatrove_goes_on_from_our_signatures(tmp_path):
    """Its buckets, clusters and filter leave one of each planted group, as `find_duplicates` does."""
    readers, writers, dedup = (
        pytest.importorskip(f"datatrove.pipeline.{name}", reason=MISSING) for name in ("readers", "writers", "dedup.minhash")
    )
    texts = [unlike(number) for number in range(30)]
    texts += [texts[number] + f" And {number} more words, which differ." for number in range(6)]  # J > 0.9
    texts += [texts[7], "four words are few", ""]
    rows = [row_of(*row) for row in enumerate(texts)]
    source, signatures = corpus(tmp_path / "in", rows, 2), tmp_path / "signatures"
    first = [readers.JsonlReader(source), partial(signed, folder=str(signatures)), writers.JsonlWriter(str(tmp_path / "first"))]
    run(first, tmp_path / "logs-1", tasks=2)
    assert len(written(tmp_path / "first")) == len([text for text in texts if text])  # its reader leaves empty ones out
    buckets, ids, out = (str(tmp_path / name) for name in ("buckets", "ids", "out"))
    run([dedup.MinhashDedupBuckets(str(signatures), buckets)], tmp_path / "logs-2", tasks=14)
    run([dedup.MinhashDedupCluster(buckets, ids)], tmp_path / "logs-3")
    last = [readers.JsonlReader(source), dedup.MinhashDedupFilter(ids), writers.JsonlWriter(out)]
    run(last, tmp_path / "logs-4", tasks=2)
    found = [Document(text, "a", number, {}) for number, text in enumerate(texts)]
    decisions = list(find_duplicates(lambda: batches(found), tmp_path / "alone"))
    groups = [{number, number + 30} for number in range(6)] + [{7, 36}]
    assert all(sum(decisions[number].kept for number in group) == 1 for group in groups)
    kept = {int(row["id"]) for row in written(tmp_path / "out")}
    assert all(len(kept & group) == 1 for group in groups)
    assert len(kept) == sum(decision.kept for decision in decisions) - 1  # the empty one


def test_signatures_are_sorted_records_and_do_not_depend_on_batches(tmp_path, monkeypatch):
    """Their form, read without datatrove: 8 minima of 64 bits and a number of 32."""
    pytest.importorskip("datatrove", reason=MISSING)
    texts = [*(unlike(number) for number in range(9)), "", unlike(3)]
    for name, size in (("one", 1024), ("many", 2)):
        monkeypatch.setattr("sparing.curate.datatrove_steps.BATCH_DOCUMENTS", size)
        documents = [SimpleNamespace(**row_of(*row)) for row in enumerate(texts)]
        assert list(signed(documents, 3, 4, folder=str(tmp_path / name))) == documents
    files = sorted((tmp_path / "one").glob("bucket_*/00003.minhash.sig"))
    assert len(files) == 14
    for file in files:
        assert file.read_bytes() == (tmp_path / "many" / file.relative_to(tmp_path / "one")).read_bytes()
        records = np.frombuffer(file.read_bytes(), "<u8,<u8,<u8,<u8,<u8,<u8,<u8,<u8,<u4")
        assert records.tolist() == sorted(records.tolist()) and sorted(records["f8"]) == [*range(9), 10]
        same = {record["f8"]: record.tolist()[:8] for record in records}
        assert same[3] == same[10] and same[3] != same[4]
