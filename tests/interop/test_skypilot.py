"""The SkyPilot task: read back by a YAML reader, its script run by bash, and, where SkyPilot is installed, checked by its own schemas."""

import json
import os
import subprocess
import sys

import pytest
import yaml

from sparing import __version__
from sparing.base.config import UserError
from sparing.interop.skypilot import Moved, bucket_name, task, text

WORDS = [
    "train",
    "--data",
    '/tmp/sparing/given/0/it\'s a "book"',
    "$HOME",
    "two\nlines\n\n  indented",
    "# no: remark",
    "--out",
    "/tmp/sparing/r",
]


def one(**more):
    options = {"name": "books", "accelerators": "H100:8", "bucket": "sparing-books", "mounts": {"/tmp/sparing/given/0/a b": "/home/me/a b"}}
    return task(WORDS, 8, **(options | more))


def many(**more):
    return one(nodes=2, bucket=None, volume="shared", **more)


@pytest.mark.parametrize("made", [one(), many(), one(accelerators=None, cpus=16, infra="aws/us-east-1", bucket="s3://mine", mounts={})])
def test_the_file_says_what_was_meant(made):
    assert yaml.safe_load(text(made)) == made


def test_a_job_that_recovers():
    made = one(infra="gcp")
    assert made["resources"] == {
        "use_spot": True, "accelerators": "H100:8", "infra": "gcp",
        "job_recovery": {"strategy": "EAGER_NEXT_REGION", "recover_on_exit_codes": [130, 143]},
    }  # fmt: skip
    assert made["file_mounts"] == {
        "/tmp/sparing/given/0/a b": "/home/me/a b",
        "/sparing-kept": {"name": "sparing-books", "mode": "MOUNT"},
    }
    assert one(bucket="gs://mine/there")["file_mounts"]["/sparing-kept"]["source"] == "gs://mine/there"
    assert f"sparing=={__version__}" in made["setup"] and made["num_nodes"] == 1 and "volumes" not in made
    assert many()["volumes"] == {"/sparing-shared": "shared"} and "/sparing-kept" not in many()["file_mounts"]


@pytest.mark.parametrize("made", [one(), many()])
def test_each_machine_runs_the_command_word_for_word(tmp_path, made):
    program = tmp_path / "sparing-venv" / "bin" / "sparing"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([os.environ['SPARING_LAUNCH_ID'], *sys.argv[1:]]))\nsys.exit(130)\n"
    )
    program.chmod(0o755)
    sky = {"SKYPILOT_TASK_ID": "sky-7", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}
    for part in ("setup", "run"):
        assert subprocess.run(["bash", "-n", "-c", made[part]]).returncode == 0
    ran = subprocess.run(["bash", "-c", made["run"]], env=os.environ | sky | {"HOME": str(tmp_path)}, stdout=subprocess.PIPE, text=True)
    assert ran.returncode == 130
    where = ["--mirror", "/sparing-kept/books"] if made["num_nodes"] == 1 else ["--nodes", "2", "--meet", "10.0.0.1:29500"]
    assert json.loads(ran.stdout) == ["sky-7", "launch", "-n", "8", "--restarts", "100", *where, *WORDS]


def test_what_cannot_work_is_refused_before_it_costs_anything():
    with pytest.raises(UserError, match="2 machines needs --volume NAME"):
        one(nodes=2)
    with pytest.raises(UserError, match="--cloud 'aws us'"):
        one(infra="aws us")
    with pytest.raises(UserError, match="characters that a YAML file cannot have"):
        task(["train", "a\x07b"], 1, name="x", accelerators=None, bucket="b")


def test_paths_of_this_machine_are_taken_along_once(tmp_path, monkeypatch):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a")
    (tmp_path / "link").symlink_to(tmp_path / "books")
    monkeypatch.chdir(tmp_path)
    moved = Moved()
    assert moved("books") == moved("link") == moved(str(tmp_path / "books")) == "/tmp/sparing/given/0/books"
    assert moved("books/*.txt") == "/tmp/sparing/given/0/books/*.txt"
    assert moved("hf:OWNER/NAME") == "hf:OWNER/NAME" and moved("none/*.txt") == "none/*.txt"
    assert moved("books/a.txt") == "/tmp/sparing/given/1/a.txt"
    assert moved.mounts == {
        "/tmp/sparing/given/0/books": str(tmp_path / "books"),
        "/tmp/sparing/given/1/a.txt": str(tmp_path / "books/a.txt"),
    }


def test_a_bucket_has_a_name_that_all_clouds_allow():
    name = bucket_name("runs/My Books_1", "me@here:/runs/My Books_1")
    assert name.startswith("sparing-my-books-1-") and len(name) <= 63
    assert name == bucket_name("runs/My Books_1", "me@here:/runs/My Books_1") != bucket_name("runs/My Books_1", "you@here:/runs/My Books_1")


@pytest.mark.parametrize("made", [one(), many(), one(accelerators=None, cpus=16, infra="aws/us-east-1", bucket="s3://mine", mounts={})])
def test_skypilot_accepts_it(made):
    pytest.importorskip("sky", reason="SkyPilot, whose schemas say what a task is, is not installed")
    from sky.utils import common_utils, schemas

    made = yaml.safe_load(text(made))
    common_utils.validate_schema(made, schemas.get_task_schema())
    common_utils.validate_schema(made["resources"], schemas.get_resources_schema())
    for mount in made["file_mounts"].values():
        if isinstance(mount, dict):
            common_utils.validate_schema(mount, schemas.get_storage_schema())
