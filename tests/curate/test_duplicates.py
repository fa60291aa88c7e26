import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tracemalloc
import unicodedata
from itertools import count, pairwise

import numpy as np
import pyarrow as pa
import pytest

from sparing.base.config import UserError
from sparing.curate import duplicates, minhash, parts
from sparing.curate.duplicates import find_duplicates
from sparing.curate.lines import remove_lines, repeated_lines
from sparing.curate.minhash import DuplicateSettings, band_keys, minima, signatures
from sparing.data.progress import Stopped

SETTINGS = DuplicateSettings()


def text_of(rng: random.Random, words: int) -> list[str]:
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(words)]


def similarity(one: str, other: str, n: int = 5) -> float:
    """Of sets of plain words, without the code under test."""
    a, b = ({tuple(words[i : i + n]) for i in range(len(words) - n + 1)} for words in (one.split(), other.split()))
    return len(a & b) / len(a | b)


def changed(rng: random.Random, words: list[str], edits: int) -> list[str]:
    words = list(words)
    for at in rng.sample(range(len(words)), edits):
        words[at] = "".join(rng.choices("0123456789", k=1)) + words[at] + "q"
    return words


def corpus(documents: int = 240, seed: int = 1) -> list[str]:
    """Originals, exact copies, close and distant variations of them, chains of variations, short and empty texts; shuffled."""
    rng = random.Random(seed)
    texts = []
    for index in range(documents // 6):
        words = text_of(rng, rng.randint(40, 200))
        texts += [" ".join(words), " ".join(changed(rng, words, 1)), " ".join(changed(rng, words, len(words) // 8))]
        if index % 4 == 0:
            texts += [texts[-3], texts[-2]]
        if index % 5 == 0:
            for _ in range(4):
                words = changed(rng, words, 2)
                texts.append(" ".join(words))
    texts += ["", "", " \n", "yes", "yes", "Yes!", "one two three four", "one two three four", "one two three five", "?", "!"]
    rng.shuffle(texts)
    return texts


def batches(texts: list[str], size: int = 1000, sources: str = "a.jsonl"):
    def read():
        for low in range(0, len(texts), size):
            part = texts[low : low + size]
            numbers = list(range(low + 1, low + 1 + len(part)))
            rows = {"text": part, "source": [sources] * len(part), "line": pa.array(numbers, pa.int64()), "meta": ["{}"] * len(part)}
            yield pa.RecordBatch.from_pydict(rows)

    return read


def decisions(texts, work, settings=SETTINGS, size=1000, workers=1, should_stop=None):
    return list(find_duplicates(batches(texts, size), work, settings, workers, should_stop))


def contents(folder) -> dict:
    """Of every file a hash, those aside that a kill left half written."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(parts, "PART_DOCUMENTS", 17)
    monkeypatch.setattr(parts, "PART_BYTES", 20_000)


# what is found


def test_exact_and_near_duplicates_are_found_and_the_longest_stays(tmp_path):
    rng = random.Random(3)
    words, other = text_of(rng, 120), text_of(rng, 120)
    near = changed(rng, words, 2)
    texts = [" ".join(words), " ".join(other), " ".join(near), " ".join(other) + "\n", " ".join(near)]
    found = decisions(texts, tmp_path)
    assert [one.line for one in found] == [1, 2, 3, 4, 5]
    expected = f"duplicate_near of a.jsonl:3 (J={similarity(texts[0], texts[2]):.2f})"
    assert [one.reason for one in found] == [expected, "", "", "duplicate_exact of a.jsonl:2", "duplicate_exact of a.jsonl:3"]
    assert [one.kept for one in found] == [False, True, True, False, False]


def test_a_copy_of_a_document_that_goes_names_the_one_that_stays(tmp_path):
    rng = random.Random(4)
    words = text_of(rng, 100)
    shorter = " ".join(words[:-1])
    found = decisions([shorter, shorter, " ".join(words)], tmp_path)
    assert [one.reason for one in found] == ["duplicate_near of a.jsonl:3 (J=0.99)"] * 2 + [""]


def test_every_removed_document_is_similar_to_one_that_stays_and_none_is_lost(tmp_path):
    """With one row a band nearly everything meets everything: only the verification tells duplicates from the rest."""
    texts = corpus()
    for settings in (SETTINGS, DuplicateSettings(bands=20, rows=1)):
        found = decisions(texts, tmp_path / str(settings.rows), settings)
        assert len(found) == len(texts)
        kept = {one.line for one in found if one.kept}
        kinds = {"exact": 0, "near": 0, "": 0}
        for one, text in zip(found, texts, strict=True):
            kinds[one.kind] += 1
            if one.kind == "exact":
                assert one.of_line in kept and texts[one.of_line - 1].strip() == text.strip()
            elif one.kind == "near":
                assert one.of_line in kept and one.jaccard >= settings.jaccard
                assert one.jaccard == pytest.approx(similarity(text, texts[one.of_line - 1]), abs=1e-9)
        assert min(kinds.values()) > 10
    stayed = [text for text, one in zip(texts, found, strict=True) if one.kept and len(text.split()) >= 5]
    missed = sum(similarity(a, b) >= 0.95 for index, a in enumerate(stayed) for b in stayed[:index])
    assert missed == 0


def test_a_chain_of_small_changes_does_not_remove_what_has_little_in_common(tmp_path):
    rng = random.Random(5)
    chain = [text_of(rng, 100)]
    for _ in range(12):
        chain.append(changed(rng, chain[-1], 2))
    texts = [" ".join(words) for words in chain]
    assert all(similarity(a, b) > 0.7 for a, b in pairwise(texts)) and similarity(texts[0], texts[-1]) < 0.5
    found = decisions(texts, tmp_path)
    assert 2 <= sum(one.kept for one in found) < len(texts) - 3
    assert all(similarity(text, texts[one.of_line - 1]) >= 0.7 for text, one in zip(texts, found, strict=True) if not one.kept)


def test_a_cluster_of_many_unlike_documents_loses_what_it_can(tmp_path, monkeypatch):
    """Beyond the documents that all of a long chain are compared with, verified pairs decide."""
    monkeypatch.setattr(duplicates, "REPRESENTATIVES", 2)
    rng = random.Random(12)
    chain = [text_of(rng, 100)]
    for _ in range(20):
        chain.append(changed(rng, chain[-1], 2))
    texts = [" ".join(words) for words in chain]
    found = decisions(texts, tmp_path)
    kept = {one.line for one in found if one.kept}
    assert 5 < len(kept) < 16
    for text, one in zip(texts, found, strict=True):
        assert one.kept or (one.of_line in kept and 0.7 <= one.jaccard == pytest.approx(similarity(text, texts[one.of_line - 1])))


def test_short_and_empty_documents_have_exact_copies_only(tmp_path):
    texts = [
        "",
        " ",
        "ok",
        "ok\n",
        "OK",
        "one two three four",
        "one two three four.",
        "7 + 8",
        "7 - 8",
        "...",
        "!!!",
        "a b c d e",
        "A, b, c, d, e!",
    ]
    found = decisions(texts, tmp_path)
    exact = {one.line: one.of_line for one in found if one.kind == "exact"}
    assert exact == {2: 1, 4: 3}
    assert [one.line for one in found if one.kind == "near"] == [12]  # the shorter of the last two


def test_documents_whose_texts_share_no_more_than_a_prefix_stay(tmp_path):
    rng = random.Random(6)
    prefix = text_of(rng, 60)
    texts = [" ".join(prefix + text_of(rng, 60)) for _ in range(40)]
    assert all(one.kept for one in decisions(texts, tmp_path))


def test_no_documents(tmp_path):
    assert decisions([], tmp_path) == []


# the same for any order, batches, workers, kills


def test_batches_and_workers_change_nothing(tmp_path, small_parts, monkeypatch):
    texts = corpus(120)
    expected, files = decisions(texts, tmp_path / "whole"), contents(tmp_path / "whole")
    assert sum(name.startswith("signatures") for name in files) > 5
    for size in (1, 7):
        assert decisions(texts, tmp_path / str(size), size=size) == expected
        assert contents(tmp_path / str(size)) == files
    assert decisions(texts, tmp_path / "two", size=50, workers=2) == expected
    assert contents(tmp_path / "two") == files
    monkeypatch.setattr(duplicates, "RECORD_BYTES", 1 << 15)
    assert decisions(texts, tmp_path / "ranges", DuplicateSettings(memory_mb=1)) == expected


def test_the_order_of_the_input_changes_nothing(tmp_path):
    texts = list({text.strip(): text for text in corpus()}.values())  # of equal texts the first by line stays
    order = list(range(len(texts)))
    random.Random(9).shuffle(order)
    first = decisions(texts, tmp_path / "a")
    second = decisions([texts[at] for at in order], tmp_path / "b")
    by_text = {texts[one.line - 1]: one for one in first}
    for one in second:
        before = by_text[texts[order[one.line - 1]]]
        assert (one.kind, one.jaccard) == (before.kind, before.jaccard)
        assert one.kept or texts[order[one.of_line - 1]] == texts[before.of_line - 1]


def test_stopped_anywhere_it_goes_on_to_the_same_bytes(tmp_path, small_parts):
    texts = corpus(120)
    calls = count()
    expected = decisions(texts, tmp_path / "whole", size=10, should_stop=lambda: next(calls) < 0)
    files, total = contents(tmp_path / "whole"), next(calls)
    work = tmp_path / "stopped"
    for limit in range(1, total, 4):
        calls = count()
        try:
            decisions(texts, work, size=10, should_stop=lambda calls=calls, limit=limit: next(calls) >= limit)
        except Stopped:
            assert set(contents(work).items()) <= set(files.items())
    assert decisions(texts, work, size=10) == expected
    assert contents(work) == files


def test_what_is_done_is_not_done_again(tmp_path, small_parts, monkeypatch):
    texts = corpus(60)
    expected = decisions(texts, tmp_path)
    for name in ("signatures", "ngram_sets", "jaccard"):
        monkeypatch.setattr(duplicates, name, None)
    monkeypatch.setattr(
        duplicates._Candidates, "similarity", lambda self, one, other, grams, least: minhash.jaccard(grams, self.set(other))
    )
    assert decisions(texts, tmp_path) == expected


KILLED = """
import json, os, signal, sys, time
from pathlib import Path
import pyarrow as pa
from sparing.curate import parts
from sparing.curate.duplicates import find_duplicates

parts.PART_BYTES = 50_000

def read():
    for number, line in enumerate(open(sys.argv[1], encoding="utf-8")):
        yield pa.RecordBatch.from_pydict({"text": [json.loads(line)], "source": ["a.jsonl"], "line": pa.array([number + 1])})

def should_stop():
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    if any(Path(sys.argv[2]).glob("signatures-*")):
        print(" ".join(children), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    find_duplicates(read, Path(sys.argv[2]), workers=2, should_stop=should_stop)
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="reads the list of child processes in /proc")
def test_killed_with_workers_it_goes_on_and_the_workers_end(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 50_000)
    words = text_of(random.Random(7), 2000)
    texts = [" ".join(words[start : start + 200]) for start in range(0, 1800, 6)]  # 0.4 MB, 8 parts
    (tmp_path / "texts").write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    (tmp_path / "killed.py").write_text(KILLED, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "killed.py"), str(tmp_path / "texts"), str(tmp_path / "work")]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    children = killed.stdout.split()
    assert len(children) >= 2 and 0 < len(contents(tmp_path / "work")) < 9
    subprocess.run(["timeout", "20", "sh", "-c", f"while kill -0 {' '.join(children)} 2>/dev/null; do sleep 0.1; done"], check=True)
    expected = decisions(texts, tmp_path / "whole")
    assert decisions(texts, tmp_path / "work", size=100) == expected
    assert contents(tmp_path / "work") == contents(tmp_path / "whole")


# bounded


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "PART_BYTES", 70_000)
    monkeypatch.setattr(duplicates, "RECORD_BYTES", 1 << 14)  # at one megabyte, a range of keys for each 64 documents
    rng = random.Random(8)
    vocabulary = text_of(rng, 3000)

    def read(documents):
        def batches():
            each = random.Random(0)
            for number in range(documents):
                words = each.choices(vocabulary, k=200)
                for part in (words, words[:-1]):  # half are duplicates
                    yield pa.RecordBatch.from_pydict({"text": [" ".join(part)], "source": ["a"], "line": pa.array([number])})

        return batches

    peaks = []
    decisions(["a first one fills the caches of the module"], tmp_path / "warm")
    for documents in (100, 500):
        tracemalloc.start()
        kept = sum(one.kept for one in find_duplicates(read(documents), tmp_path / str(documents), DuplicateSettings(memory_mb=1)))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert kept == documents
    assert peaks[1] < 1.3 * peaks[0]


def test_a_bucket_of_many_does_not_cost_their_square(tmp_path, monkeypatch):
    rng = random.Random(10)
    prefix = text_of(rng, 150)
    texts = [" ".join(prefix + text_of(rng, 60)) for _ in range(150)]  # all of them are alike by 0.55
    compared = count()
    real = minhash.jaccard
    monkeypatch.setattr(duplicates, "jaccard", lambda a, b: (next(compared), real(a, b))[1])
    settings = DuplicateSettings(bands=2, rows=1)
    assert all(one.kept for one in decisions(texts, tmp_path, settings))
    compared = next(compared)
    assert 500 < compared <= 150 * duplicates.REPRESENTATIVES * settings.bands
    assert compared < 150 * 149 / 4


# signatures


def test_recall_is_what_the_theory_says():
    """Sets of 180 with 160 in common: J = 0.8."""
    settings = DuplicateSettings()
    rng = np.random.default_rng(1)
    sets = rng.integers(0, 2**64 - 1, (3000, 200), np.uint64, endpoint=True)
    offsets = np.arange(3001) * 180
    one, other = (
        band_keys(minima(np.ascontiguousarray(part).ravel(), offsets, settings), settings) for part in (sets[:, :180], sets[:, 20:])
    )
    theory = 1 - (1 - 0.8**8) ** 14
    assert abs((one == other).any(axis=0).mean() - theory) < 3.5 * (theory * (1 - theory) / 3000) ** 0.5


def test_a_signature_depends_on_its_document_alone(monkeypatch):
    batch = next(batches(corpus())())
    whole = signatures(batch, SETTINGS)
    monkeypatch.setattr(minhash, "BLOCK", 700)
    monkeypatch.setattr(minhash, "MINIMA_BLOCK", 90)
    assert signatures(batch, SETTINGS).equals(whole)
    one_by_one = [signatures(batch.slice(at, 1), SETTINGS) for at in range(batch.num_rows)]
    assert pa.concat_batches(one_by_one).equals(whole)
    assert not signatures(batch, DuplicateSettings(seed=2)).column("band_0").equals(whole.column("band_0"))
    assert whole.schema.names[:5] == ["source", "line", "bytes", "exact", "ngrams"] and len(whole.schema.names) == 5 + 14
    short = [text for text in batch.column("text").to_pylist() if len(text.split()) < 5]
    assert whole.column("band_0").null_count == len(short) > 0


def words(text: str, **settings) -> list[int]:
    return minhash.words([text], DuplicateSettings(**settings))[0].tolist()


def test_words_are_compared_without_case_punctuation_diacritics_and_numbers():
    assert words("Hello, WORLD!  Café\n") == words("hello world cafe") == words("“hello”—world (Cafe\u0301)")
    assert words("ΟΔΟΣ") == words("οδος") and words("ＡＢＣ") == words("ａｂｃ")
    assert words("soft\u00adhyphen") == words("softhyphen")
    assert words("it costs 3") == words("it costs 4,000.5") == words("it costs ٣") != words("it costs x")
    assert words("in 3 or 4. Five") == words("in 0 or 0 five")
    assert words("it costs 3", numbers=True) != words("it costs 4", numbers=True)
    assert words("it costs ٣", numbers=True) == words("it costs 3", numbers=True)
    assert words("") == words(" \n") == words("...!?") == []
    assert words("ab ba") == words("ba ab")[::-1] and len(set(words("a b ab ba aa"))) == 5


def test_words_of_scripts_without_spaces_are_their_characters():
    assert len(words("東京都に行く。")) == 6
    assert words("東京 tower") == words("東") + words("京") + words("tower")
    assert len(words("한국 사람")) == 2
    assert words(unicodedata.normalize("NFD", "한국 사람 が")) == words("한국 사람 が")


def test_near_duplicates_in_other_scripts(tmp_path):
    text = "국제 연합은 평화와 안전을 유지하기 위하여 창설된 기구이다 " * 1
    long = " ".join(f"{text}{'가나다라마바사아자차카타파하'[i]}단락" for i in range(14))
    chinese = "".join(chr(0x4E00 + (i * 7919) % 20000) for i in range(300))
    found = decisions([long, long + " 끝", chinese, chinese[:-2], unicodedata.normalize("NFD", long)], tmp_path)
    assert [one.of_line for one in found if not one.kept] == [5, 5, 3]


# mistakes


def test_mistakes_are_named(tmp_path):
    texts = corpus(60)
    decisions(texts, tmp_path / "work")
    with pytest.raises(UserError, match="other settings"):
        decisions(texts, tmp_path / "work", DuplicateSettings(jaccard=0.8))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="something else"):
        decisions(texts, tmp_path / "full")
    with pytest.raises(UserError, match="no column 'line'"):
        find_duplicates(lambda: iter([pa.RecordBatch.from_pydict({"text": ["a"], "source": ["b"]})]), tmp_path / "none")
    for wrong in ({"jaccard": 1.5}, {"bands": 0}, {"jaccard": 0.0}, {"lines": 1}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            DuplicateSettings(**wrong)


def test_another_input_is_not_answered_with_the_old_result(tmp_path, small_parts):
    texts = corpus(60)
    decisions(texts, tmp_path / "work")
    fewer = texts[: len(texts) // 2]
    assert decisions(fewer, tmp_path / "work") == decisions(fewer, tmp_path / "new")
    reads = count()
    with pytest.raises(UserError, match="input changed"):
        find_duplicates(lambda: batches(texts if next(reads) == 0 else fewer)(), tmp_path / "changing")


# lines


def test_lines_that_many_documents_have_are_removed_and_counted(tmp_path, small_parts):
    rng = random.Random(11)
    boilerplate, short = "Subscribe to our newsletter to read more stories like this one", "Read more"
    texts = []
    for index in range(40):
        lines = [" ".join(text_of(rng, 12)) for _ in range(5)] + [short]
        if index % 2:
            lines.insert(3, boilerplate + " " * (index % 3))
        texts.append("\n".join(lines))
    twice = " ".join(text_of(rng, 12))
    texts[0] += f"\n{twice}\n{twice}\n{twice}"  # three times, in one document
    settings = DuplicateSettings(lines=3)
    repeated = repeated_lines(batches(texts), tmp_path / "one", settings)
    assert len(repeated) == 1
    assert repeated_lines(batches(texts, 7), tmp_path / "two", settings, workers=2).tolist() == repeated.tolist()
    batch = next(batches(texts)())
    cleaned, lost = remove_lines(batch, repeated, settings)
    assert lost.tolist() == [index % 2 for index in range(40)]
    for before, after in zip(texts, cleaned.column("text").to_pylist(), strict=True):
        assert after == "\n".join(line for line in before.split("\n") if line.strip() != boilerplate)
    assert cleaned.schema == batch.schema and cleaned.drop_columns(["text"]).equals(batch.drop_columns(["text"]))
    assert len(repeated_lines(batches(texts), tmp_path / "off", SETTINGS)) == 0 and not (tmp_path / "off").exists()


# the benchmark


def test_planted_pairs_are_as_similar_as_they_should_be(tmp_path):
    from benchmarks.duplicates import Planted

    rng = random.Random(13)
    vocabulary = text_of(rng, 2000)
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(" ".join(rng.choices(vocabulary, k=20_000)), encoding="utf-8")
    out = tmp_path / "out.json"
    result = Planted(str(tmp_path / "text"), str(out), pairs=40)()
    assert json.loads(out.read_text()) == result
    assert 0.79 <= result["jaccard"]["least"] <= result["jaccard"]["most"] <= 0.81
    assert result["theory"] == pytest.approx(0.923, abs=0.01) and result["pairs"] == 40
    assert 30 <= result["removed"] == result["found"] == round(40 * result["recall"])
    assert result["false_merges"] == result["other_merges"] == 0
    with pytest.raises(UserError, match="too little text"):
        Planted(str(tmp_path / "text"), str(tmp_path / "more.json"), pairs=400)()
