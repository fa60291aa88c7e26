"""in = out + rejected + quarantined, for whatever is read."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from sparing.base.config import DataConfig
from sparing.data.accounts import Accounts, balanced, in_words
from sparing.data.chats import scan_chats
from sparing.data.document import PART, WHOLE_BYTES
from sparing.data.scan import scan
from sparing.data.sources import documents


def count(*paths):
    accounts = Accounts()
    found = [accounts.use(document) for document in accounts.reading(documents([str(path) for path in paths], reject=accounts))]
    return accounts.balance(), found


def test_what_is_lost_is_an_error_of_ours():
    accounts = Accounts()
    assert list(accounts.reading(["a", "b", "c"])) == ["a", "b", "c"]
    accounts.use("a")
    accounts.refuse("b")
    with pytest.raises(AssertionError, match="1 documents are neither"):
        accounts.balance()
    accounts.use("c")
    assert accounts.balance() == {"in": 3, "out": 2, "rejected": 1, "quarantined": 0}
    assert in_words(balanced({"in": 1204, "out": 1200, "rejected": 0, "quarantined": 4})) == (
        "documents: 1,204 in, 1,200 out, 0 rejected, 4 quarantined"
    )


def test_a_long_text_counts_once(tmp_path):
    long = "a line of text\n" * (WHOLE_BYTES // 5)
    (tmp_path / "long.txt").write_text(long)
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": long}) + "\n" + json.dumps({"text": "short"}) + "\n{\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": [long, None, "short"], "id": ["x", "y", "z"]}), tmp_path / "long.parquet")
    counts, found = count(tmp_path)
    assert counts == {"in": 7, "out": 5, "rejected": 0, "quarantined": 2}
    assert sum(PART not in document.meta for document in found) == 5 < len(found)
    of_one = [document for document in found if document.source.endswith(".parquet") and document.meta["id"] == "x"]
    assert [document.meta.get(PART) for document in of_one] == [None, *map(str, range(2, len(of_one) + 1))]
    assert "".join(document.text for document in of_one) == long


def test_a_bad_piece_of_a_long_text_counts_beside_it(tmp_path):
    raw = bytearray(b"a line of text\n" * (WHOLE_BYTES // 5))
    raw[len(raw) // 2] = 0xFF
    (tmp_path / "long.txt").write_bytes(raw)
    assert count(tmp_path)[0] == {"in": 2, "out": 1, "rejected": 0, "quarantined": 1}
    raw[0] = 0xFF  # the first piece cannot be used, others can
    (tmp_path / "long.txt").write_bytes(raw)
    assert count(tmp_path)[0] == {"in": 3, "out": 1, "rejected": 0, "quarantined": 2}


def test_a_scan_keeps_the_counts(tmp_path):
    lines = [json.dumps({"text": f"document number {number} about the sea"}) for number in range(50)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join([*lines, "{", '{"x": 1}']).encode()))
    config = DataConfig(paths=(str(tmp_path / "a.jsonl.gz"),))
    first, again = scan(config, tmp_path / "home"), scan(config, tmp_path / "home")
    assert first.counts == again.counts == {"in": 52, "out": 50, "rejected": 0, "quarantined": 2}


def test_conversations_count_too(tmp_path):
    rows = [{"question": f"What is {number}?", "answer": f"The number {number}."} for number in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"question": "?", "answer": ""}, 5])) + "\n{\n")
    (tmp_path / "val.jsonl").write_text("\n".join(map(json.dumps, [*rows[:3], {"x": 1}])))
    assert scan_chats([str(tmp_path / "a.jsonl")], 0.1).counts == {"in": 43, "out": 40, "rejected": 0, "quarantined": 3}
    counts = scan_chats([str(tmp_path / "a.jsonl")], 0.1, [str(tmp_path / "val.jsonl")]).counts
    assert counts == {"in": 47, "out": 43, "rejected": 0, "quarantined": 4}
