import errno
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from sparing.base.config import DataConfig, UserError
from sparing.data import prepare as module
from sparing.data import scan, store
from sparing.data.prepare import prepare
from sparing.data.progress import Stopped
from sparing.data.split import content_hash
from sparing.data.store import TokenStore
from sparing.data.workers import python_path


def digest(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def contents(made: TokenStore) -> list[str]:
    """The documents in a store, decoded."""
    spans = zip(made.starts.tolist(), made.lengths.tolist(), strict=True)
    return [made.tokenizer.decode(made.take(np.arange(start + 1, start + length))) for start, length in spans]


def hashes(made: TokenStore) -> list[int]:
    """Hash of the document that each entry comes from."""
    return [number for shard in made.manifest["shards"] for number in np.load(made.path / shard["index"])[:, 1].tolist()]


@pytest.fixture
def small_chunks(monkeypatch):
    """Many chunks and shards out of a small corpus."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(store, "SHARD_TOKENS", 4000)


def test_every_document_is_on_one_side_and_whole(corpus, texts, tmp_path, small_chunks):
    made = prepare(DataConfig(paths=(corpus,)), 400, tmp_path)
    held = list(made.held_out())
    assert held and sorted(contents(made) + held) == sorted(texts)
    assert made.manifest["corpus"]["held_out_documents"] == len(held)
    assert made.tokens == sum(len(made.tokenizer.encode(text)) + 1 for text in contents(made)) == int(made.lengths.sum())
    assert len(made.manifest["shards"]) > 3 and made.vocab_size == made.tokenizer.vocab_size == 400
    assert [content_hash(text.encode()) for text in contents(made)] == hashes(made)
    ends = made.starts + made.lengths  # the target of the last input
    assert (made.take(made.starts) == made.eot_id).all() and (made.take(ends) == made.eot_id).all()


def test_bits_do_not_depend_on_workers_or_the_order_of_arguments(corpus, tmp_path, small_chunks):
    results = []
    for workers in (1, 2, 3):
        paths = (corpus + "/0*", corpus + "/1*") if workers % 2 else (corpus + "/1*", corpus + "/0*")
        results.append(digest(prepare(DataConfig(paths=paths, workers=workers), 400, tmp_path / str(workers)).path))
    assert results[0] == results[1] == results[2] and "held_out.jsonl" in results[0]


def test_reused_when_nothing_changed_and_only_then(tmp_path, texts, monkeypatch):
    (tmp_path / "in").mkdir()
    for index, text in enumerate(texts[:20]):
        (tmp_path / "in" / f"{index}.txt").write_text(text)
    config = DataConfig(paths=(str(tmp_path / "in"),))
    first = prepare(config, 300, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(module, "documents", None)
        assert prepare(config, 300, tmp_path).path == first.path
    other = [prepare(config, 301, tmp_path), prepare(DataConfig(paths=config.paths, max_tokens=500), 300, tmp_path)]
    (tmp_path / "in" / "new.txt").write_text("one more")
    other.append(prepare(config, 300, tmp_path))
    assert len({first.path, *(made.path for made in other)}) == 4
    assert other[2].documents + len(list(other[2].held_out())) == 21


def test_max_tokens_samples_by_hash(corpus, tmp_path, texts):
    config = DataConfig(paths=(corpus,))
    everything = prepare(config, 400, tmp_path)
    sets = []
    for wanted in (5_000, 10_000, 20_000):
        made = prepare(DataConfig(paths=(corpus,), max_tokens=wanted), 400, tmp_path)
        assert 0.8 * wanted < made.tokens < 1.25 * wanted
        assert list(made.held_out()) == list(everything.held_out())
        assert made.tokenizer.to_json() == everything.tokenizer.to_json()
        sets.append(set(contents(made)))
    assert sets[0] < sets[1] < sets[2] < set(texts) - set(everything.held_out())
    assert prepare(DataConfig(paths=(corpus,), max_tokens=10**9), 400, tmp_path).tokens == everything.tokens
    assert prepare(DataConfig(paths=(corpus,), max_tokens=1), 400, tmp_path).tokens > 0


def test_long_documents_are_sampled_by_the_section(tmp_path):
    for index in range(6):
        (tmp_path / f"{index}.txt").write_text("".join(f"{index} {line} of a long book\n" for line in range(20_000)))
    made = prepare(DataConfig(paths=(str(tmp_path / "*.txt"),), max_tokens=300_000), 300, tmp_path)
    assert 240_000 < made.tokens < 380_000 and len(set(hashes(made))) >= 4
    assert all(len(text.encode()) <= 64 << 10 for text in contents(made))


def test_a_tokenizer_of_the_user_s_own(corpus, tmp_path, trained):
    trained.save(tmp_path / "mine.json")
    made = prepare(DataConfig(paths=(corpus,), tokenizer=str(tmp_path / "mine.json")), 9999, tmp_path)
    assert made.tokenizer.to_json() == trained.to_json() and made.vocab_size == 400


def test_the_store_is_found_again_with_the_tokenizer_that_was_trained_for_it(corpus, tmp_path):
    first = prepare(DataConfig(paths=(corpus,)), 300, tmp_path)
    again = prepare(DataConfig(paths=(corpus,), tokenizer=str(first.path / "tokenizer.json")), 300, tmp_path)
    assert again.path == first.path


def test_large_vocabularies_take_four_bytes(corpus, tmp_path, trained):
    content = json.loads(trained.to_json())
    content["model"]["vocab"]["unreachable"] = 70_000
    (tmp_path / "large.json").write_text(json.dumps(content))
    made = prepare(DataConfig(paths=(corpus,), tokenizer=str(tmp_path / "large.json"), workers=2), 400, tmp_path)
    assert made.manifest["dtype"] == "uint32" and made.vocab_size == 70_001 and contents(made)


def test_one_document(tmp_path):
    text = "The only document there is, line after line.\n" * 3000
    (tmp_path / "a.txt").write_text(text)
    made = prepare(DataConfig(paths=(str(tmp_path / "a.txt"),)), 300, tmp_path)
    (held,) = made.held_out()
    assert contents(made)[0] + held == text and 1000 < len(held) < 5000


def test_bad_input_is_listed_and_survived(corpus, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    made = prepare(DataConfig(paths=(corpus, str(tmp_path / "bad.txt"))), 300, tmp_path)
    (line,) = (made.path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"source": str(tmp_path / "bad.txt"), "line": 1, "reason": "not UTF-8 (byte 0xff)"}
    assert made.manifest["corpus"]["quarantined"] == 1


def test_damaged_stores_are_built_again(corpus, tmp_path):
    made = prepare(DataConfig(paths=(corpus,)), 300, tmp_path)
    before = digest(made.path)
    shard = made.path / "shard-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(UserError, match="instead of"):
        TokenStore(made.path)
    assert digest(prepare(DataConfig(paths=(corpus,)), 300, tmp_path).path) == before


def test_progress_reaches_its_totals(corpus, tmp_path, small_chunks):
    seen = []
    prepare(DataConfig(paths=(corpus,)), 400, tmp_path, progress=lambda *call: seen.append(call))
    for stage in ("scan", "tokenizer", "tokenise"):
        calls = [(done, total) for name, done, total in seen if name == stage]
        assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] > 0 and len({total for _, total in calls}) == 1


@pytest.mark.parametrize("workers", [1, 2])
def test_stopped_anywhere_it_goes_on_and_ends_the_same(corpus, tmp_path, small_chunks, workers):
    config = DataConfig(paths=(corpus,), workers=workers)
    wanted = digest(prepare(config, 400, tmp_path / "undisturbed").path)
    attempts = 0
    for limit in (0, 50, 200, 300, 330, 400, 500, 10**9):
        asked = itertools.count()
        attempts += 1
        try:
            made = prepare(config, 400, tmp_path / "disturbed", should_stop=lambda asked=asked, limit=limit: next(asked) >= limit)
            break
        except Stopped:
            assert not list((tmp_path / "disturbed").glob("*/manifest.json"))
    assert attempts > 2 and digest(made.path) == wanted
    assert sorted(path.name for path in (tmp_path / "disturbed").iterdir()) == sorted([made.path.name, "locks", "scans", "tokenizers"])


SCRIPT = """
import sys
from sparing.base.config import DataConfig
from sparing.data import prepare as module, store
from pathlib import Path
module.CHUNK_BYTES = 4000
store.SHARD_TOKENS = 4000
print("started", flush=True)
made = module.prepare(DataConfig(paths=(sys.argv[1],), workers=int(sys.argv[3])), 400, Path(sys.argv[2]))
print(made.path, flush=True)
"""


def run(corpus: str, root: Path, workers: int) -> subprocess.Popen:
    environment = dict(os.environ, PYTHONPATH=python_path())
    command = [sys.executable, "-c", SCRIPT, corpus, str(root), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_killed_at_random_it_ends_the_same(corpus, tmp_path, small_chunks):
    wanted = digest(prepare(DataConfig(paths=(corpus,)), 400, tmp_path / "undisturbed").path)
    rng = random.Random(0)
    for attempt in range(8):
        process = run(corpus, tmp_path / "killed", 1 + attempt % 2)
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
    made = prepare(DataConfig(paths=(corpus,)), 400, tmp_path / "killed")
    assert digest(made.path) == wanted


def test_two_at_once_share_the_work(corpus, tmp_path, small_chunks):
    processes = [run(corpus, tmp_path, 1) for _ in range(3)]
    paths = {process.communicate(timeout=60)[0].splitlines()[-1] for process in processes}
    assert len(paths) == 1
    assert digest(Path(paths.pop())) == digest(prepare(DataConfig(paths=(corpus,)), 400, tmp_path / "alone").path)


def test_waiting_for_another_can_be_stopped(corpus, tmp_path):
    made = prepare(DataConfig(paths=(corpus,)), 300, tmp_path)
    (made.path / "manifest.json").unlink()
    asked = threading.Event()
    threading.Timer(0.3, asked.set).start()
    with module._lock(tmp_path / "locks" / made.path.name, None), pytest.raises(Stopped):
        prepare(DataConfig(paths=(corpus,)), 300, tmp_path, should_stop=asked.is_set)


@pytest.mark.parametrize("place", ["store", "scan"])
def test_a_full_disk_is_one_line_and_leaves_nothing(corpus, tmp_path, monkeypatch, place):
    """A real limit on the size of files, in a process of its own: the system's own error from the system's own write."""
    limit = 3000 if place == "scan" else 60_000  # quarantine, tables and sample come first
    if place == "store":
        scan.scan(DataConfig(paths=(corpus,)), tmp_path)
    code = f"""
import resource
from pathlib import Path
from sparing.base.config import DataConfig, UserError
from sparing.data.prepare import prepare
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    prepare(DataConfig(paths=({corpus!r},), workers=1), 300, Path({str(tmp_path)!r}))
except UserError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], env=dict(os.environ, PYTHONPATH=python_path()), capture_output=True, text=True)
    assert result.stdout.count("\n") == 1 and "no space left" in result.stdout and "SPARING_HOME" in result.stdout, result.stderr
    assert not list(tmp_path.glob("**/*.partial"))
    assert prepare(DataConfig(paths=(corpus,), workers=1), 300, tmp_path).documents


def test_a_folder_that_cannot_be_written(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the prepared corpus"):
        prepare(DataConfig(paths=(corpus,)), 300, tmp_path / "file" / "below")
    with pytest.raises(OSError), scan.room_in(tmp_path):
        raise OSError(errno.EIO, "not the user's fault")


def test_bad_settings(corpus, tmp_path):
    for config, words in ((DataConfig(max_tokens=0), "max_tokens"), (DataConfig(paths=(corpus,), workers=0), "workers")):
        with pytest.raises(UserError, match=words):
            prepare(config, 300, tmp_path)


def test_a_handful_of_tokens_is_never_nothing(tmp_path):
    """With a budget of one token the sampled part may be a held-out one: the store has training text all the same, every time."""
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"the {i}th text, not long but long enough\n" * 20)
    for seed in range(12):
        (tmp_path / "more.txt").write_text(f"one more text {seed}\n" * 50)
        config = DataConfig(paths=(str(tmp_path / "*.txt"),), max_tokens=1, holdout_fraction=0.5)
        assert prepare(config, 300, tmp_path / "root").tokens > 0
