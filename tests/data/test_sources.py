import gzip
import json
import os

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from sparing.data import sources
from sparing.data.sources import documents


def read(*paths, key="text"):
    """(texts with their lines, rejected as (line, reason))"""
    rejected = []
    found = [(document.text, document.line) for document in documents([str(path) for path in paths], key, rejected.append)]
    return found, [(item.line, item.reason) for item in rejected]


def json_lines(*values) -> bytes:
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def test_text_files_are_documents_byte_for_byte(tmp_path):
    raw = "first\r\nsecond\tαβγ 🎉\n\n".encode()
    (tmp_path / "a.md").write_bytes(raw)
    (tmp_path / "b.py").write_bytes(b"\xef\xbb\xbfx = 1\n")  # byte order mark
    found, rejected = read(tmp_path)
    assert found == [(raw.decode(), 1), ("x = 1\n", 1)] and rejected == []


@pytest.mark.parametrize(
    ("raw", "line", "reason"),
    [
        (b"good\nbad \xff\n", 2, "not UTF-8 (byte 0xff)"),
        ("naïve".encode("latin-1"), 1, "not UTF-8"),
        (b"", 1, "empty"),
        (b" \n\t\n", 1, "empty"),
        (b"MZ\0\0 program", 1, "binary"),
        ("text".encode("utf-16"), 1, "NUL bytes"),
    ],
)
def test_unusable_text_is_quarantined_with_line_and_reason(tmp_path, raw, line, reason):
    (tmp_path / "bad.txt").write_bytes(raw)
    (tmp_path / "good.txt").write_bytes(b"fine")
    found, rejected = read(tmp_path)
    assert found == [("fine", 1)]
    assert len(rejected) == 1 and rejected[0][0] == line and reason in rejected[0][1]


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        json_lines({"text": "one"}, {"other": 1}, {"text": 5}, ["text"], {"text": "  "})
        + b"not json\n\n"
        + b'{"text": "caf\xe9"}\n'
        + b'{"text": "half \\ud83d pair"}\n'
        + b'{"text": "deep", "x": ' + b"[" * 100_000 + b"\n"
        + b'{"text": "last, without newline"}'
    )  # fmt: skip
    found, rejected = read(path)
    assert found == [("one", 1), ("last, without newline", 11)]
    reasons = dict(rejected)
    assert list(reasons) == [2, 3, 4, 5, 6, 8, 9, 10]
    expected = [
        "no key 'text' (keys: other)",
        "is not text but int",
        "not a JSON object",
        "empty",
        "not JSON",
        "not UTF-8",
        "surrogate",
        "nested deeper",
    ]
    assert all(part in reason for part, reason in zip(expected, reasons.values(), strict=True)), reasons


def test_another_key(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines({"answer": "42", "text": "no"}))
    assert read(tmp_path, key="answer")[0] == [("42", 1)]


def test_json_files_may_be_lines_or_one_array_or_one_object(tmp_path):
    (tmp_path / "1.json").write_bytes(json_lines({"text": "a"}, {"text": "b"}))
    (tmp_path / "2.json").write_text(json.dumps([{"text": "c"}, {"no": 1}, {"text": "d"}], indent=2))
    (tmp_path / "3.json").write_text(json.dumps([{"text": "e"}]))
    (tmp_path / "4.json").write_text("\n" + json.dumps({"text": "f"}, indent=2))
    (tmp_path / "5.json").write_text("{\n broken")
    found, rejected = read(tmp_path)
    assert [text for text, _ in found] == list("abcdef")
    assert rejected[0] == (2, "no key 'text' (keys: no)") and "not JSON" in rejected[1][1] and len(rejected) == 2


def test_compressed_json_lines_in_several_members(tmp_path):
    one, two = json_lines({"text": "one"}), json_lines({"text": "two"})
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(one) + gzip.compress(two) + b"\0" * 100)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(one) + zstandard.compress(two))
    (tmp_path / "c.md.gz").write_bytes(gzip.compress(b"# text"))
    found, rejected = read(tmp_path)
    assert [text for text, _ in found] == ["one", "two", "one", "two", "# text"] and rejected == []


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstandard.compress)])
def test_a_truncated_archive_gives_the_lines_before_the_truncation(tmp_path, suffix, compress):
    import random

    rng = random.Random(0)
    values = [{"text": f"{index} {rng.getrandbits(256)}"} for index in range(20_000)]
    whole = compress(json_lines(*values))
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(whole[: len(whole) // 2])
    found, rejected = read(tmp_path)
    assert 5_000 < len(found) < 15_000
    assert [text for text, _ in found] == [value["text"] for value in values[: len(found)]]
    assert rejected == [(len(found) + 1, rejected[0][1])] and "truncated" in rejected[0][1]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_damaged_and_empty_archives(tmp_path, suffix):
    (tmp_path / f"a.jsonl.{suffix}").write_bytes(b"this is not compressed at all")
    (tmp_path / f"b.txt.{suffix}").write_bytes(b"")
    found, rejected = read(tmp_path)
    assert found == [] and "damaged" in rejected[0][1] and "truncated" in rejected[1][1]


def test_truncated_text_keeps_whole_lines(tmp_path):
    text = "".join(f"line {index} {index * 7919 % 10007}\n" for index in range(5000))
    whole = gzip.compress(text.encode())
    (tmp_path / "a.txt.gz").write_bytes(whole[:-2000])
    found, rejected = read(tmp_path)
    assert len(found) == 1 and text.startswith(found[0][0]) and found[0][0].endswith("\n") and "truncated" in rejected[0][1]


def test_a_huge_line_is_skipped_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LINE_BYTES", 1000)
    long = json_lines({"text": "x" * 3_000_000})
    (tmp_path / "a.jsonl").write_bytes(json_lines({"text": "a"}) + long + json_lines({"text": "b"}) + long.rstrip())
    found, rejected = read(tmp_path)
    assert found == [("a", 1), ("b", 3)] and [line for line, _ in rejected] == [2, 4] and "line longer than" in rejected[0][1]


@pytest.mark.parametrize("separator", ["\n", " ", ""])
def test_long_texts_become_consecutive_pieces(tmp_path, separator):
    text = separator.join(f"{index}é🎉" for index in range(400_000))
    (tmp_path / "long.txt").write_bytes(text.encode())
    (tmp_path / "long.jsonl").write_bytes(json_lines({"text": text}))
    for name in ("long.txt", "long.jsonl"):
        found, rejected = read(tmp_path / name)
        assert "".join(piece for piece, _ in found) == text and rejected == []
        assert len(found) > 2 and max(len(piece.encode()) for piece, _ in found) <= sources.WHOLE_BYTES
    lines = [line for _, line in read(tmp_path / "long.txt")[0]]
    assert lines[-1] > 1 if separator == "\n" else lines[-1] == 1


def test_a_bad_byte_in_a_long_text_costs_one_piece(tmp_path):
    raw = b"good line of text\n" * 300_000
    (tmp_path / "long.txt").write_bytes(raw[:3_000_000] + b"\xff" + raw[3_000_000:])
    found, rejected = read(tmp_path)
    assert len(rejected) == 1 and rejected[0] == (3_000_000 // 18 + 1, "not UTF-8 (byte 0xff)")
    assert sum(len(text) for text, _ in found) > len(raw) - sources.WHOLE_BYTES
    (tmp_path / "long.txt").write_bytes(b"\x80" * 5_000_000)
    assert read(tmp_path)[0] == []


def test_parquet_by_row_groups(tmp_path):
    values = [f"row {index}" for index in range(1000)]
    values[3], values[5] = None, ""
    pyarrow.parquet.write_table(pyarrow.table({"text": values, "n": range(1000)}), tmp_path / "a.parquet", row_group_size=100)
    found, rejected = read(tmp_path)
    assert [text for text, _ in found] == [value for value in values if value]
    assert rejected == [(3, "'text' is not text but NoneType"), (5, "empty")]
    assert read(tmp_path, key="body") == ([], [(None, "no column 'body' (columns: text, n)")])


def test_parquet_of_other_types_and_damaged(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(["x", "y", "x"]).dictionary_encode()})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [b"ok", b"\xff"]}), tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    (tmp_path / "d.parquet").write_bytes(b"")
    bad = pyarrow.array([b"ok2", b"\xff"]).view(pyarrow.string())  # claims to be text
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "e.parquet")
    found, rejected = read(tmp_path)
    assert [text for text, _ in found] == ["x", "y", "x", "ok", "ok2"]
    assert [reason.split(" (")[0] for _, reason in rejected] == ["not UTF-8", "damaged Parquet", "damaged Parquet", "not UTF-8"]


def test_files_that_cannot_be_opened_are_quarantined(tmp_path):
    from sparing.data.files import SourceFile

    (tmp_path / "a.txt").write_text("fine")
    files = [SourceFile(str(tmp_path / "gone.txt"), 1, 1), SourceFile(str(tmp_path / "a.txt"), 4, 1)]
    rejected = []
    assert [document.text for document in documents(files, reject=rejected.append)] == ["fine"]
    assert rejected[0].reason == "cannot be read: No such file or directory"


def test_ticks_tell_the_bytes_and_may_end_it(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * 100)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"garbage\n" * 1000))
    ticks = []
    list(documents([str(tmp_path)], tick=ticks.append))
    assert sum(ticks) == sum(path.stat().st_size for path in tmp_path.iterdir())

    def stop(size):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(documents([str(tmp_path)], tick=stop))


def test_a_file_whose_name_is_no_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["in a table"]}), tmp_path / "x.parquet")
    os.rename(tmp_path / "x.parquet", os.fsencode(tmp_path) + b"/caf\xe9.parquet")
    for name, text in {b"b\xe9.txt": b"a text", b"c\xe9.jsonl": b'{"text": "a line"}', b"d\xe9.txt": b"\xff"}.items():
        with open(os.fsencode(tmp_path) + b"/" + name, "wb") as file:
            file.write(text)
    rejected = []
    found = {document.text for document in documents([str(tmp_path)], reject=rejected.append)}
    assert found == {"in a table", "a text", "a line"}
    assert r"d\udce9.txt" in rejected[0].as_json() and len(rejected) == 1
