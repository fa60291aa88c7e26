"""The ledger under faults: damage, a full disk, another writer, a kill; and what a derived run inherits."""

import os
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from sparing.account.history import ancestors_of, books, entries, entries_of, inherit, run_id_of
from sparing.account.ledger import Entry, Ledger
from sparing.base.config import UserError
from sparing.base.run import RunFolder


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home"


def entry(uid="a", run_id="r", stage="train", run="", **more) -> Entry:
    return Entry(uid, run_id, run, "train", stage, **({"status": "done", "wall_s": 2.0, "usd": 0.5, "kwh": 0.01, "started": 1.0} | more))


def new_run(path) -> RunFolder:
    run = RunFolder.create(path)
    run.config_file.write_text("")
    return run


def filled(path, *rows) -> RunFolder:
    run = new_run(path)
    ledger = Ledger(run.ledger_file)
    for row in rows:
        row.run_id, row.run = ledger.run_id, str(run.path)
        ledger.put(row)
    ledger.close()
    return run


def test_rows_are_replaced_by_their_newer_selves(tmp_path):
    ledger = Ledger(tmp_path / "l.sqlite")
    for wall in (1.0, 2.0, 3.0):
        ledger.put(entry(wall_s=wall))
    ledger.put(entry("b"))
    ledger.close()
    assert [row.wall_s for row in entries(tmp_path / "l.sqlite")] == [3.0, 2.0]
    assert sorted(os.listdir(tmp_path)) == ["home", "l.sqlite"]  # no -wal left behind


def test_a_damaged_ledger_is_moved_aside_and_work_goes_on(tmp_path):
    path, said = tmp_path / "ledger.sqlite", []
    path.write_bytes(b"not a database at all" * 100)
    ledger = Ledger(path, said.append)
    ledger.put(entry())
    ledger.close()
    assert len(said) == 1 and "damaged" in said[0] and "\n" not in said[0]
    (aside,) = tmp_path.glob("ledger.damaged-*.sqlite")
    assert aside.read_bytes().startswith(b"not a database") and aside.name in said[0]
    assert [row.uid for row in entries(path)] == ["a"]


def test_damage_while_it_is_open_loses_none_of_our_rows(tmp_path):
    path, said = tmp_path / "ledger.sqlite", []
    ledger = Ledger(path, said.append)
    ledger.put(entry("a"))
    ledger._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    path.write_bytes(b"\xff" * path.stat().st_size)
    ledger.put(entry("b"))
    ledger.close()
    assert {row.uid for row in entries(path)} == {"a", "b"}
    assert any("damaged" in text for text in said)


def test_reading_a_damaged_ledger_is_one_clear_line(tmp_path):
    (tmp_path / "l.sqlite").write_bytes(b"no database" * 500)
    with pytest.raises(UserError, match="damaged"):
        entries(tmp_path / "l.sqlite")


def test_another_writer_is_waited_for_and_then_nothing_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr("sparing.account.ledger.WAIT_S", 0.05)
    path, said = tmp_path / "l.sqlite", []
    ledger = Ledger(path, said.append)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    for wall in (1.0, 2.0):
        ledger.put(entry("a", wall_s=wall))
    assert len(said) == 1 and "locked" in said[0]
    other.execute("COMMIT")
    ledger.put(entry("b"))
    ledger.close()
    assert {row.uid: row.wall_s for row in entries(path)} == {"a": 2.0, "b": 2.0}


WRITER = """
import sys
from sparing.account.ledger import Entry, Ledger
ledger = Ledger(sys.argv[1])
for i in range(100):
    ledger.put(Entry(f"{sys.argv[2]}-{i}", "r", "", "train", "train", wall_s=1.0))
ledger.close()
"""


def test_two_processes_write_one_ledger(tmp_path):
    path = tmp_path / "l.sqlite"
    both = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), name], stderr=-1, text=True) for name in "ab"]
    for process in both:
        said = process.communicate()[1]
        assert process.returncode == 0 and said == ""
    assert len(entries(path)) == 200


def full_disk() -> None:
    """A limit on file sizes is the full disk that needs no file system of its own: writes beyond it fail in the same way."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))


def test_no_room_is_said_in_a_line_and_what_was_there_stays(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.put(entry())
    ledger.close()
    again = "open(sys.argv[1] + '.end', 'w').write('reached')"
    script = WRITER.replace("range(100)", "range(200)") + again
    process = subprocess.run([sys.executable, "-c", script, str(path), "x"], preexec_fn=full_disk, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "l.sqlite.end").exists()
    lines = process.stderr.splitlines()
    assert 1 <= len(lines) <= 3 and all(line.startswith("sparing: ") for line in lines)
    assert "could not be written" in lines[-1] and "intact" in lines[-1]
    assert entries(path)[0].uid == "a"


def test_a_newer_format_is_refused(tmp_path):
    path = tmp_path / "l.sqlite"
    sqlite3.connect(path).execute("PRAGMA user_version=99")
    with pytest.raises(UserError, match="newer Sparing"):
        Ledger(path)


def test_rows_of_the_first_format_are_read_and_new_ones_join_them(tmp_path):
    path = tmp_path / "l.sqlite"
    ledger = Ledger(path)
    ledger.put(entry("old", cpu_s=3.0))
    ledger.close()
    with sqlite3.connect(path) as db:
        db.execute("ALTER TABLE stages DROP COLUMN core_s")
        db.execute("PRAGMA user_version=1")
    assert [row.core_s for row in entries(path)] == [0.0]  # a reader changes nothing
    ledger = Ledger(path)
    ledger.put(entry("new", core_s=5.0))
    ledger.close()
    assert {row.uid: (row.cpu_s, row.core_s) for row in entries(path)} == {"old": (3.0, 0.0), "new": (0.0, 5.0)}


def test_a_running_row_of_a_dead_process_was_killed(tmp_path):
    import socket

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path, now = tmp_path / "l.sqlite", time.time()
    ledger = Ledger(path)
    here = {"status": "running", "host": socket.gethostname(), "updated": now}
    ledger.put(entry("a", pid=dead.pid, **here))
    ledger.put(entry("b", pid=os.getpid(), **here))
    ledger.put(entry("c", status="running", host="elsewhere", updated=now - 999))
    ledger.close()
    assert {row.uid: row.status for row in entries(path)} == {"a": "killed", "b": "running", "c": "killed"}


def test_a_run_is_known_by_its_ledger_and_rows_elsewhere_are_found(tmp_path, home):
    run = filled(tmp_path / "run", entry("a"))
    workspace = Ledger(home / "ledger.sqlite")
    mine = {"run_id": run_id_of(run), "run": str(run.path)}
    for uid, more in (("a", mine), ("b", mine), ("c", mine | {"run": str(tmp_path)}), ("d", {"run_id": "another"})):
        row = entry(uid, **{"started": 5.0})
        row.__dict__.update(more)
        workspace.put(row)
    workspace.close()
    assert [row.uid for row in entries_of(run)] == ["a", "b"]  # a once, though in both; c belongs to a copy, d to another run


def test_a_derived_run_carries_its_ancestors_each_once(tmp_path):
    base = filled(tmp_path / "base", entry("x", wall_s=10.0, usd=1.0))
    teacher = filled(tmp_path / "teacher", entry("y", wall_s=20.0, usd=2.0))
    inherit(teacher, base, "fine-tuned")
    student = filled(tmp_path / "student", entry("z"))
    inherit(student, teacher, "teacher")
    inherit(student, base, "initialised")
    found = ancestors_of(student)
    assert [(row.name, row.relation, row.generation, row.usd) for row in found] == [
        ("teacher", "teacher", 1, 2.0),
        ("base", "initialised", 1, 1.0),
    ]


def test_after_damage_the_workspace_still_knows_the_run(tmp_path, home, capsys):
    run = new_run(tmp_path / "run")
    parent = filled(tmp_path / "parent", entry("p", usd=7.0))
    inherit(run, parent, "teacher")
    ledgers, name = books(run, print)
    for ledger in ledgers:
        ledger.put(entry("a", run_id=name, run=str(run.path)))
        ledger.close()
    run.ledger_file.write_bytes(b"gone" * 1000)
    assert [row.uid for row in entries_of(run)] == ["a"] and [row.name for row in ancestors_of(run)] == ["parent"]
    assert "damaged" in capsys.readouterr().err
    (again, _), same = books(run, print)  # the next verb begins a new ledger, under the old name
    assert same == name
    again.put(entry("b", run_id=same, run=str(run.path), started=9.0))
    again.close()
    assert [row.uid for row in entries_of(run)] == ["a", "b"] and [row.usd for row in ancestors_of(run)] == [7.0]


def test_another_run_at_the_same_path_inherits_nothing(tmp_path):
    for name in "ab":
        run = new_run(tmp_path / "run")
        ledgers, run_id = books(run, print)
        for ledger in ledgers:
            ledger.put(entry(name, run_id=run_id, run=str(run.path)))
            ledger.close()
        assert [row.uid for row in entries_of(run)] == [name]
        shutil.rmtree(run.path)


def test_a_newer_format_of_the_workspaces_ledger_stops_no_run(tmp_path, home):
    home.mkdir(exist_ok=True)
    with sqlite3.connect(home / "ledger.sqlite") as db:
        db.execute("PRAGMA user_version=99")
    said = []
    run = new_run(tmp_path / "run")
    ledgers, name = books(run, said.append)
    assert [ledger.path for ledger in ledgers] == [run.ledger_file] and name == ledgers[0].run_id
    assert len(said) == 1 and "newer Sparing" in said[0] and "not in the workspace's ledger" in said[0]
