"""Outputs whose path a user named: devices, pipes and links stay what they are, what cannot be written is refused before the work."""

import os
import stat
import threading

import pytest

from sparing.account.ledger import Entry, Ledger
from sparing.account.paper import compare, receipt, report
from sparing.base.config import CannotGoOn, Config, UserError
from sparing.base.config_file import write_config
from sparing.base.files import open_log, output_file, output_folder, write_atomic
from sparing.base.run import RunFolder
from sparing.bench.results import results_folder


@pytest.fixture
def run(tmp_path, monkeypatch) -> str:
    """A run with a line in its ledger."""
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    folder = RunFolder.create("run")
    folder.config_file.write_text(write_config(Config()))
    ledger = Ledger(folder.ledger_file)
    ledger.put(Entry("a-train", ledger.run_id, str(folder.path.resolve()), "train", "train", "done", wall_s=1.0))
    ledger.close()
    return "run"


def device(path) -> None:
    try:
        os.mknod(path, 0o640 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only the superuser can make a device")


def test_a_device_is_written_to_and_stays_one(tmp_path, run):
    device(tmp_path / "null")
    receipt(run, str(tmp_path / "null"))
    assert stat.S_ISCHR(os.stat(tmp_path / "null").st_mode) and sorted(os.listdir(tmp_path)) == ["null", "run"]


def test_a_pipe_is_written_to_and_stays_one(tmp_path, run):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    receipt(run, str(tmp_path / "pipe"))
    reader.join(30)
    assert read[0].startswith("timestamp,") and stat.S_ISFIFO(os.stat(tmp_path / "pipe").st_mode)


def test_a_link_is_written_through(tmp_path, run):
    (tmp_path / "there.csv").write_text("old")
    for name in ("there", "not-yet"):
        (tmp_path / f"to-{name}").symlink_to(f"{name}.csv")
        receipt(run, str(tmp_path / f"to-{name}"))
        assert (tmp_path / f"to-{name}").is_symlink() and (tmp_path / f"{name}.csv").read_text().startswith("timestamp,")


def test_a_file_keeps_its_permissions(tmp_path):
    (tmp_path / "page").write_text("old")
    (tmp_path / "page").chmod(0o600)
    write_atomic(output_file(tmp_path / "page", "--out"), "new")
    assert stat.S_IMODE(os.stat(tmp_path / "page").st_mode) == 0o600 and (tmp_path / "page").read_text() == "new"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("folder", "is a folder; name a file in it"),
        ("", "needs a name"),
        ("n" * 300, "File name too long"),
        ("nowhere/file", "there is no folder nowhere"),
        ("file/under", "Not a directory"),
        ("circle", "symbolic links"),
        ("lost", "there is no folder .*gone"),
    ],
)
def test_what_cannot_be_a_file_is_one_line_before_the_work(tmp_path, run, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("keep")
    (tmp_path / "circle").symlink_to("circle")
    (tmp_path / "lost").symlink_to("gone/file")
    before = sorted(os.listdir(tmp_path))
    for option, verb in {"--csv": receipt, "--out": report}.items():
        with pytest.raises(UserError, match=f"{option} .*{says}") as error:
            verb(run, name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300
    with pytest.raises(UserError, match=says):
        compare([run], name)
    assert sorted(os.listdir(tmp_path)) == before and (tmp_path / "file").read_text() == "keep"


@pytest.mark.parametrize(
    ("name", "says"), [("", "needs a name"), ("n" * 300, "too long"), ("file", "is a file"), ("file/under", "Not a directory")]
)
def test_what_cannot_be_a_folder_is_one_line(tmp_path, monkeypatch, name, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("keep")
    with pytest.raises(UserError, match=f"--out .*{says}"):
        RunFolder.create(name)
    with pytest.raises(UserError, match=f"--out .*{says}"), results_folder(name):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_may_be_a_link(tmp_path):
    (tmp_path / "link").symlink_to("disk/run")
    assert output_folder(tmp_path / "link", "--out") == tmp_path.resolve() / "disk/run"
    assert RunFolder.create(tmp_path / "link").weights.is_dir() and (tmp_path / "disk/run/weights").is_dir()


def test_names_as_long_as_file_systems_have_them(tmp_path):
    name = "é" * 127
    write_atomic(output_file(tmp_path / name, "--out"), "text")
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_vanished_is_one_line(tmp_path):
    with pytest.raises(CannotGoOn, match=r"the folder .*gone is gone"):
        write_atomic(tmp_path / "gone" / "file", "text")


def test_a_log_is_private_when_new_and_otherwise_left_as_it_is(tmp_path):
    device(tmp_path / "null")
    (tmp_path / "shared").write_text("before\n")
    for name, mode in {"null": 0o640, "shared": 0o664}.items():
        (tmp_path / name).chmod(mode)
        with open_log(tmp_path / name, "--audit-log") as log:
            log.write(b"line\n")
        assert stat.S_IMODE(os.stat(tmp_path / name).st_mode) == mode
    assert (tmp_path / "shared").read_text() == "before\nline\n" and stat.S_ISCHR(os.stat(tmp_path / "null").st_mode)
    open_log(tmp_path / "made/new", "--audit-log").close()
    assert stat.S_IMODE(os.stat(tmp_path / "made/new").st_mode) == 0o600
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match=r"--audit-log .*a pipe that nobody reads"):
        open_log(tmp_path / "pipe", "--audit-log")
