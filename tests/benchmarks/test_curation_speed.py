"""The corpus of `speed`, and that datatrove's whole pipeline goes through it."""

import json
import sys
from itertools import islice

import pytest
from tests.curate.prose import prose

from benchmarks import curation_speed
from benchmarks.curation_speed import CPU, TENTH, WHOLE, datatrove, make_corpus, run_on, varied
from sparing.curate.duplicates import find_duplicates
from sparing.curate.pipeline import batches
from sparing.data.sources import documents


@pytest.fixture
def source(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("\n".join(prose(30, start=1000 * number + at) for at in range(0, 400, 40)))
    return tuple(str(tmp_path / f"{number}.txt") for number in range(3))


def test_the_same_text_again_has_other_words(source):
    some = list(islice(varied(source), 60))
    assert some == list(islice(varied(source), 60)) and len(set(some)) == 60


def test_a_tenth_and_the_rest_in_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr(curation_speed, "FILE_BYTES", 20_000)
    counts = make_corpus(source, tmp_path / "corpus", 150_000)
    assert counts[TENTH]["bytes"] + counts[WHOLE]["bytes"] >= 150_000
    assert 0.03 < counts[TENTH]["documents"] / counts[WHOLE]["documents"] < 0.25
    assert len(list((tmp_path / "corpus" / WHOLE).iterdir())) > 3
    for part, counted in counts.items():
        found = list(documents([str(tmp_path / "corpus" / part)]))
        assert len(found) == counted["documents"] and sum(len(one.text.encode()) for one in found) == counted["bytes"]


def test_no_two_documents_are_duplicates(source, tmp_path):
    """Most of them: what is left are short ones and repetitions that a mangling made."""
    make_corpus(source, tmp_path / "corpus", 300_000)
    found = list(documents([str(tmp_path / "corpus" / WHOLE)]))
    decisions = list(find_duplicates(lambda: batches(found), tmp_path / "work"))
    assert sum(one.kept for one in decisions) > 0.95 * len(decisions)


@pytest.mark.skipif(sys.platform != "linux", reason="taskset is Linux's")
def test_what_a_command_took(tmp_path):
    program = "import os; held = bytearray(100_000_000); print(len(os.sched_getaffinity(0)))"
    row = run_on(CPU, [sys.executable, "-c", program], tmp_path / "log")
    assert row["said"] == "1\n" and row["cpu_s"] > 0 and row["peak_mb"] > 95
    with pytest.raises(SystemExit, match="status 3"):
        run_on(CPU, [sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


def test_datatroves_pipeline(source, tmp_path):
    for module in ("datatrove", "spacy", "regex", "xxhash"):
        pytest.importorskip(module, reason="datatrove or what it needs is not installed: pip install 'sparing[bench]'")
    counts = make_corpus(source, tmp_path / "corpus", 100_000)
    said = datatrove(str(tmp_path / "corpus" / TENTH), str(tmp_path / "made"))
    assert said["in"] == counts[TENTH]["documents"] and len(said["seconds"]) == 5
    read, kept = curation_speed._counts(json.loads(json.dumps(said)), tmp_path / "made")
    assert read == said["in"] and 0 < kept <= read
