"""A run folder's copy: whenever copying ends, a run can be gone on with from it."""

import json
import sqlite3
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparing.base.config import UserError
from sparing.base.run import RunFolder, verify_folder, write_folder
from sparing.interop.mirror import Mirror, Place

ORIGINAL = Place.put


def save(run, step):
    """What training writes up to a checkpoint of `step`; the newest two stay."""
    write_folder(run.state / f"step-{step:08d}", {"state.json": json.dumps({"step": step}), "more.json": json.dumps("x" * step)})
    for old in sorted(run.state.glob("step-*"))[:-2]:
        for file in old.iterdir():
            file.unlink()
        old.rmdir()
    with open(run.metrics_file, "a") as file:
        file.write(json.dumps({"step": step}) + "\n")


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.weights.mkdir(parents=True)
    run.state.mkdir()
    run.config_file.write_text("[train]\n")
    run.weights_file.write_text("as in the newest checkpoint")
    (run.path / ".lock").write_text("somebody")
    with closing(sqlite3.connect(run.ledger_file)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("CREATE TABLE stages (usd)")
        db.execute("INSERT INTO stages VALUES (0.5)")
        db.commit()
        save(run, 1)
        yield run


def files(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def newest(folder):
    """The last step of a copy that can be gone on with: its log goes as far, and its checkpoint is whole."""
    for saved in sorted((folder / "state").glob("step-*"), reverse=True):
        try:
            verify_folder(saved)
        except Exception:
            continue
        steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        step = json.loads((saved / "state.json").read_text())["step"]
        assert step in steps
        return step
    return 0


def test_a_copy_is_brought_back_on_another_machine(run, tmp_path):
    kept, elsewhere = tmp_path / "kept", tmp_path / "elsewhere" / "run"
    with Mirror(run.path, str(kept)):
        save(run, 2)
        save(run, 3)
    assert files(kept) == files(run.path) - {".lock", "ledger.sqlite-wal", "ledger.sqlite-shm"}
    with Mirror(elsewhere, str(kept)):
        assert files(elsewhere) == files(kept) and newest(elsewhere) == 3
        assert (elsewhere / "metrics.jsonl").read_text() == run.metrics_file.read_text()
    with closing(sqlite3.connect(elsewhere / "ledger.sqlite")) as db:
        assert db.execute("SELECT usd FROM stages").fetchall() == [(0.5,)]


def test_a_run_that_is_here_stays_as_it_is(run, tmp_path):
    Mirror(run.path, str(tmp_path / "kept")).publish()
    save(run, 2)
    assert not Mirror(run.path, str(tmp_path / "kept")).fetch() and newest(run.path) == 2
    assert not Mirror(tmp_path / "new", str(tmp_path / "nothing")).fetch() and not (tmp_path / "new").exists()


def test_only_what_has_changed_is_copied_and_the_model_for_others_at_the_end(run, tmp_path, monkeypatch):
    copied = []
    monkeypatch.setattr(Place, "put", lambda place, file, name: (copied.append(name.name), ORIGINAL(place, file, name)))
    mirror = Mirror(run.path, str(tmp_path / "kept"))
    mirror.publish()
    assert "config.toml" in copied and "model.safetensors" not in copied
    copied.clear()
    save(run, 2)
    mirror.publish()
    assert sorted(copied) == ["checksums.json", "metrics.jsonl", "more.json", "state.json"] and copied[-1] == "checksums.json"
    mirror.publish(whole=True)
    assert copied[-1] == "model.safetensors"


def test_wherever_copying_is_cut_off_the_copy_can_be_gone_on_with(run, tmp_path, monkeypatch):
    kept, left = tmp_path / "kept", [0]

    def until_cut(place, file, name):
        if not left[0]:
            raise OSError("the machine is gone")
        left[0] -= 1
        ORIGINAL(place, file, name)

    monkeypatch.setattr(Place, "put", until_cut)
    left[0] = 99
    Mirror(run.path, str(kept)).publish()
    for step in range(2, 12):
        save(run, step)
        left[0] = step - 2  # of about eleven files
        before = newest(kept)
        try:
            Mirror(run.path, str(kept)).publish()
        except OSError:
            assert newest(kept) >= before > 0
        else:
            assert newest(kept) == step
    left[0] = 99
    Mirror(run.path, str(kept)).publish()
    assert newest(kept) == 11 and files(kept) == files(run.path) - {
        ".lock",
        "ledger.sqlite-wal",
        "ledger.sqlite-shm",
        "weights/model.safetensors",
    }


def test_a_folder_with_something_else_in_it_is_refused(run, tmp_path):
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        Mirror(run.path, str(tmp_path / "kept"))


def test_a_copy_in_another_file_system(run, tmp_path):
    with Mirror(run.path, "memory://bucket/run") as mirror:
        save(run, 2)
        save(run, 3)
    names = {str(name) for name in mirror.kept.names()}
    assert names == files(run.path) - {".lock", "ledger.sqlite-wal", "ledger.sqlite-shm"}
    with Mirror(tmp_path / "elsewhere", "memory://bucket/run"):
        assert files(tmp_path / "elsewhere") == names and newest(tmp_path / "elsewhere") == 3


def test_a_place_that_cannot_be_read_is_refused_in_one_line(run, capsys):
    with pytest.raises(UserError, match="--mirror sthree://bucket: Protocol not known"):
        Mirror(run.path, "sthree://me:secret@bucket")
    if find_spec("s3fs") is None:
        with pytest.raises(UserError, match="s3fs"):
            Mirror(run.path, "s3://bucket/run")
