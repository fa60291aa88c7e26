"""The verbs with closed, full or forsaken standard streams, in other encodings, without a home, with names that are no text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import sparing
from sparing.account.ledger import Entry, Ledger
from sparing.base.config import Config, UserError
from sparing.base.config_file import write_config
from sparing.base.hardware import home
from sparing.base.run import RunFolder

SOURCE = str(Path(sparing.__file__).parent.parent)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a line in its ledger; no ASCII in the name of its machine."""
    folder = RunFolder.create(tmp_path / "run")
    folder.config_file.write_text(write_config(Config()))
    ledger = Ledger(folder.ledger_file)
    ledger.put(Entry("a-train", ledger.run_id, str(folder.path), "train", "train", "done", wall_s=1.0, machine="café → 2 cores"))
    ledger.close()
    return folder.path


def shell(line: str, run: Path, **environment) -> subprocess.CompletedProcess:
    """`line`, with $SPARING for the command and $RUN for the run."""
    variables = {"SPARING": f"{sys.executable} -m sparing", "RUN": str(run), "PYTHONPATH": SOURCE, "SPARING_HOME": str(run.parent / "home")}
    environment = {name: value for name, value in (os.environ | variables | environment).items() if value is not None}
    return subprocess.run(["bash", "-c", line], capture_output=True, env=environment, timeout=120)


@pytest.mark.parametrize("closed", [">&-", "<&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize(("verb", "status"), [("receipt $RUN --json", 0), ("receipt nowhere", 2), ("--help", 0), ("receipt --help", 0)])
def test_a_closed_stream_changes_nothing_else(run, closed, verb, status):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    done = shell(f"$SPARING {verb} {closed}", run)
    assert done.returncode == status and b"Traceback" not in done.stderr
    if ">&-" not in closed.replace("2>&-", "") and status == 0:
        assert done.stdout
    if "2>&-" not in closed and status == 2:
        assert done.stderr == b"sparing: nowhere: no such run folder\n"
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


PROGRAM = """
import os, sys
from sparing.base.messages import say
from sparing.cli.main import VERBS, main

def work(self, call):
    file = open(sys.argv[1] + "/log", "w")
    for number in range(int(sys.argv[2])):
        say(f"line {number}")
    os.write(2, b"from a library\\n")
    file.write("a line")
    file.close()
    print("a result")

VERBS["receipt"].__call__ = work
sys.exit(main())
"""


def program(run: Path, lines: int, end: str) -> subprocess.CompletedProcess:
    """A verb that writes a log in the run's folder while it says so many lines. end: redirections."""
    text = PROGRAM.replace("sys.argv[1]", repr(str(run))).replace("sys.argv[2]", repr(lines))
    (run / "program.py").write_text(text)
    return shell(f"{sys.executable} $RUN/program.py receipt x {end}; exit ${{PIPESTATUS[0]}}", run)


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_messages_do_not_go_into_files_when_a_stream_is_closed(run, closed):
    done = program(run, 3, closed)
    assert (done.returncode, (run / "log").read_text()) == (0, "a line"), done.stderr


@pytest.mark.parametrize("verb", ["receipt $RUN", "receipt $RUN --json"])
def test_a_full_output_is_one_line(run, verb):
    done = shell(f"$SPARING {verb} >/dev/full", run)
    assert (done.returncode, done.stderr) == (2, b"sparing: standard output: No space left on device\n")


def test_a_reader_who_leaves_ends_nothing(run):
    assert shell("$SPARING receipt $RUN --json | true; exit ${PIPESTATUS[0]}", run).returncode == 0
    done = program(run, 20_000, "2>&1 | head -n 2")
    assert (done.returncode, done.stdout) == (0, b"line 0\nline 1\n") and (run / "log").read_text() == "a line"


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_every_encoding_shows_all_that_it_has(run, encoding):
    text = shell("$SPARING receipt $RUN", run, PYTHONIOENCODING=encoding)
    assert text.returncode == 0, text.stderr
    assert {"ascii": r"caf\xe9 \u2192 2", "cp1252": r"café \u2192 2", "utf-8": "café → 2"}[encoding] in text.stdout.decode(encoding)
    answer = json.loads(shell("$SPARING receipt $RUN --json", run, PYTHONIOENCODING=encoding).stdout.decode(encoding))
    assert answer["machine"] == "café → 2 cores"
    refused = shell("$SPARING receipt café", run, PYTHONIOENCODING=encoding)
    assert refused.returncode == 2 and refused.stderr.decode(encoding).count("\n") == 1


@pytest.mark.parametrize(
    "line", ["receipt $NAME", "train --data $NAME --budget 1m --out $RUN/new", "train --data $RUN --budget 1m --out $NAME"]
)
def test_a_name_that_is_no_text_is_refused_before_the_work(run, line):
    name = os.fsdecode(b"caf\xe9")
    done = shell(f"$SPARING {line}", run, NAME=name)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and rb"caf\xe9 is not UTF-8 text" in done.stderr
    assert not (run / "new").exists()


@pytest.mark.parametrize("open_", [RunFolder.open, RunFolder.create])
def test_a_run_in_a_folder_whose_name_is_no_text(run, monkeypatch, open_):
    folder = run / os.fsdecode(b"caf\xe9")
    (folder / "run").mkdir(parents=True)
    (folder / "run/config.toml").write_text("")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"caf\\xe9/run is not UTF-8 text: a run folder's path must be"):
        open_("run")


def test_a_user_without_a_home(monkeypatch):
    import pwd

    def unknown(*_):
        raise KeyError

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("SPARING_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    with pytest.raises(UserError, match=r"no home folder ~ .*set SPARING_HOME"):
        home()
    monkeypatch.setenv("SPARING_HOME", "~nobody-of-this-name/x")
    with pytest.raises(UserError, match="no home folder ~nobody-of-this-name"):
        home()
    monkeypatch.setenv("HOME", "/elsewhere")
    monkeypatch.setenv("SPARING_HOME", "~/x")
    assert home() == Path("/elsewhere/x")
