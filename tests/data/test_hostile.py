"""Files that are broken, huge or hostile: each is counted, with a reason and a place, and what is beside them is read."""

import bz2
import gzip
import json
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from sparing.curate.pipeline import curate
from sparing.curate.recipe import Recipe
from sparing.data.accounts import Accounts
from sparing.data.chats import chats
from sparing.data.pipes import python_path
from sparing.data.sources import documents, rows

LINE = b'{"text": "a sound line"}\n'


def read(*paths):
    rejected = []
    accounts = Accounts(rejected.append)
    found = [accounts.use(document) for document in accounts.reading(documents([str(path) for path in paths], reject=accounts))]
    accounts.balance()
    return found, {os.path.basename(item.source): (item.line, item.reason) for item in rejected}


def test_a_folder_of_broken_files(tmp_path):
    text = b"a line of text that goes on for a while\n" * 50
    broken = bytearray(gzip.compress(LINE * 3) * 2)
    broken[-30:-20] = b"\0" * 10
    files = {
        "blank.jsonl": b"\n\n",
        "bytes.txt": b"good\n\xff\xfe bad\n",
        "cut.jsonl.bz2": bz2.compress(LINE * 1000)[:-10],
        "latin.jsonl": LINE + b'{"text": "caf\xe9"}\n' + LINE,
        "member.jsonl.gz": bytes(broken),
        "nul.txt": b"text\0with\0nuls",
        "nothing.txt": b"",
        "notbz2.txt.bz2": b"this is not compressed",
        "sound.txt": text,
        "utf16.txt": "text".encode("utf-16"),
    }
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    found, rejected = read(tmp_path)
    names = {os.path.basename(document.source) for document in found}
    assert names == {"cut.jsonl.bz2", "latin.jsonl", "member.jsonl.gz", "sound.txt"}
    assert sum(document.source.endswith("latin.jsonl") for document in found) == 2
    assert sum(document.source.endswith("member.jsonl.gz") for document in found) >= 3
    assert {name: reason.split(" (")[0] for name, (_, reason) in rejected.items()} == {
        "bytes.txt": "not UTF-8", "cut.jsonl.bz2": "truncated bzip2 file: it ends in the middle of its data", "latin.jsonl": "not UTF-8",
        "member.jsonl.gz": "damaged gzip data", "nul.txt": "binary or UTF-16: it holds NUL bytes", "nothing.txt": "empty",
        "notbz2.txt.bz2": "damaged bzip2 data", "utf16.txt": "binary or UTF-16: it holds NUL bytes",
        "self.txt": "cannot be read: Too many levels of symbolic links", "blank.jsonl": "empty",
    }  # fmt: skip
    assert rejected["latin.jsonl"][0] == 2 and rejected["bytes.txt"][0] == 2


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path / "a.txt").write_text("secret")
    (tmp_path / "a.txt").chmod(0)
    (tmp_path / "b.txt").write_text("open")
    found, rejected = read(tmp_path)
    assert [document.text for document in found] == ["open"] and "cannot be read" in rejected["a.txt"][1]


def test_a_folder_that_may_not_be_looked_into(tmp_path, monkeypatch):
    """The kernel lets root in, so the walk is refused by hand."""
    (tmp_path / "closed").mkdir()
    (tmp_path / "open.txt").write_text("open")
    scandir = os.scandir

    def refused(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    found, rejected = read(tmp_path)
    assert [document.text for document in found] == ["open"] and "cannot be read" in rejected["closed"][1]
    assert "cannot be read" in read(tmp_path / "**" / "*.txt")[1]["closed"][1]


@pytest.mark.parametrize("value", ['{"a":' * 900 + "1" + "}" * 900, "[" * 900 + "]" * 900])
def test_what_is_nested_deeply_is_no_row(tmp_path, value):
    """Python reads it, and has no room left on its stack for whatever looks at it afterwards."""
    message = '{"role": "assistant", "content": "a", "x": ' + value + "}"
    lines = ['{"text": "t", "x": ' + value + "}", '{"messages": [{"role": "user", "content": "q"}, ' + message + "]}"]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"text": "sound"}']))
    (tmp_path / "b.json").write_text("[" + lines[0] + ',\n{"text": "sound"}]')
    found, rejected = read(tmp_path)
    assert [document.text for document in found] == ["sound", "sound"]
    assert rejected == {"a.jsonl": (2, "nested deeper than 100 levels"), "b.json": (1, "nested deeper than 100 levels")}
    accounts = Accounts()
    assert not list(accounts.reading(chats([str(tmp_path / "a.jsonl")], accounts))) and accounts.balance()["quarantined"] == 3
    tools = {"question": "q", "answer": "a", "tools": '[{"x": ' + value + "}]"}
    (tmp_path / "tools.jsonl").write_text(json.dumps(tools))
    assert not list(chats([str(tmp_path / "tools.jsonl")]))


def test_times_that_python_has_none_for(tmp_path):
    kinds = {
        "day": pyarrow.date32(), "era": pyarrow.timestamp("us"), "fine": pyarrow.timestamp("ns"),
        "zone": pyarrow.timestamp("us", "Nowhere/None"),
    }  # fmt: skip
    for name, kind in kinds.items():
        number = (1 << 31) - 1 if name == "day" else 1 << 61
        table = {"id": ["x", "y"], "text": ["one", "two"], "question": ["q", "q"], "answer": ["a", "b"]}
        pyarrow.parquet.write_table(pyarrow.table(table | {"date": pyarrow.array([number, 1], kind)}), tmp_path / f"{name}.parquet")
    found, rejected = read(tmp_path)
    assert [document.text for document in found] == ["one", "two"] * 4 and rejected == {}
    assert len(list(chats([str(tmp_path)]))) == 8


def test_a_name_that_is_no_text(tmp_path):
    """It goes through Arrow and JSON as it is shown, and every verb of `data` writes it down."""
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "wb") as file:
        file.write(b"a text of some words")
    with open(os.fsencode(folder) + b"/caf\xe9.jsonl", "wb") as file:
        file.write(LINE + b"{")
    summary, _ = curate([str(folder)], out, Recipe(rules=None, duplicates=None))
    assert summary["documents"] == {"in": 3, "out": 2, "rejected": 0, "quarantined": 1}


def test_a_file_that_goes_away(tmp_path):
    from sparing.data.files import find_files

    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.txt").write_text("still here")
    files = find_files([str(tmp_path)])
    (tmp_path / "a.txt").unlink()
    rejected = []
    assert [document.text for document in documents(files, reject=rejected.append)] == ["still here"]
    assert "cannot be read" in rejected[0].reason


BOUNDED = """
import json, resource, sys
from sparing.data.sources import documents, rows
import pyarrow, numpy
used = int(open("/proc/self/statm").read().split()[0]) * 4096
resource.setrlimit(resource.RLIMIT_AS, (used + 150_000_000,) * 2)
rejected = []
found = sum(1 for document in documents(sys.argv[1:2], reject=rejected.append))
print(json.dumps([found, [[item.line, item.reason] for item in rejected]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is set as Linux has it")
@pytest.mark.parametrize("name", ["line.jsonl", "line.jsonl.gz", "line.jsonl.bz2", "line.txt"])
def test_a_line_of_200_megabytes_is_never_held(tmp_path, name):
    """In a process that may use 150 MB more than it has at its start. The line is made of one block, compressed once."""
    block, many = b"x" * (20 << 20), 10
    path = tmp_path / name
    compress = {"gz": lambda raw: gzip.compress(raw, 1), "bz2": lambda raw: bz2.compress(raw, 1)}.get(name.rsplit(".", 1)[1])
    with open(path, "wb") as file:
        if compress:
            file.write(compress(LINE + b'{"text": "') + compress(block) * many + compress(b'"}\n' + LINE))
        else:
            file.write(LINE + b'{"text": "')
            for _ in range(many):
                file.write(block)
            file.write(b'"}\n' + LINE)
    environment = dict(os.environ, PYTHONPATH=python_path(), OMP_NUM_THREADS="1", ARROW_DEFAULT_MEMORY_POOL="system")
    done = subprocess.run([sys.executable, "-c", BOUNDED, str(path)], env=environment, capture_output=True, text=True, timeout=300)
    path.unlink()
    assert done.returncode == 0, done.stderr[-2000:]
    found, rejected = json.loads(done.stdout)
    if name == "line.txt":  # one text, in pieces
        assert found > 100 and rejected == []
    else:
        assert found == 2 and rejected == [[2, "line longer than 16 MiB"]]


def test_rows_of_parquet_that_share_one_huge_value_are_decoded_one_by_one(tmp_path):
    """A few kilobytes on the disk: a dictionary of 20 MB that 300 rows point to, in a plain column of texts."""
    text = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300, pyarrow.int32()), pyarrow.array(["y" * 20_000_000]))
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet", store_schema=False, compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    before = pyarrow.total_allocated_bytes()
    row = next(found := rows([str(tmp_path / "a.parquet")]))
    taken = pyarrow.total_allocated_bytes() - before
    assert len(row.value["text"]) == 20_000_000 and taken < 400_000_000  # 64 rows would take 1.3 GB
    found.close()
