"""`sparing launch --slurm` and `--spot`: what is written and told, and what is refused before anything is written."""

import json
import shlex

import pytest
import yaml

from sparing.cli.main import main

TRAIN = ["train", "--data", "books", "--budget", "2h", "--out", "runs/one"]


@pytest.fixture
def said(tmp_path, monkeypatch, capsys):
    """Run a command line in a folder with books: -> (exit status, what it said)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPARING_HOME", str(tmp_path / "home"))
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("a")
    (tmp_path / "eval set.txt").write_text("b")

    def said(*words):
        status = main(list(map(str, words)))
        out = capsys.readouterr()
        assert "Traceback" not in out.err
        return status, out.out + out.err

    return said


def test_a_batch_file(said, tmp_path):
    status, told = said("launch", "--slurm", "job.sh", "--gpu", "H100:8", "--nodes", 2, "--partition", "long", *TRAIN)
    assert (
        status == 0 and told == "job.sh: 2 x 8 ranks, 8 GPUs each, for 2.37 h, then saved and queued again; submit it with: sbatch job.sh\n"
    )
    text = (tmp_path / "job.sh").read_text()
    for line in ("#SBATCH --time=0-02:22:00", "#SBATCH --gpus-per-node=H100:8", "#SBATCH --nodes=2", f"cd {shlex.quote(str(tmp_path))} ||"):
        assert line in text
    assert shlex.join(TRAIN) in text


def test_a_batch_file_of_other_budgets_and_times(said, tmp_path):
    tokens = [*TRAIN[:4], "5Mtok", *TRAIN[5:]]
    assert "for the partition's time (--time sets it)" in said("launch", "--slurm", "job.sh", *tokens)[1]
    assert "#SBATCH --time" not in (tmp_path / "job.sh").read_text()
    said("launch", "--slurm", "job.sh", "--time", "1d", "--cpus", 16, "-n", 2, *tokens)
    text = (tmp_path / "job.sh").read_text()
    assert "#SBATCH --time=1-00:00:00" in text and "launch -n 2" in text and "#SBATCH --cpus-per-task=16" in text


def test_a_spot_job(said, tmp_path):
    status, told = said(
        "launch", "--spot", "job.yaml", "--gpu", "H100:8", "--failures-per-hour", 0.1, *TRAIN, "--val", "x", "--for=eval set.txt"
    )
    assert status == 2 and "unknown option --val" in told
    status, told = said("launch", "--spot", "job.yaml", "--gpu", "H100:8", "--failures-per-hour", 0.1, *TRAIN, "--for=eval set.txt")
    assert status == 0
    assert f"taken along: {tmp_path}/books (there /tmp/sparing/given/0/books)\n" in told and f"taken along: {tmp_path}/eval set.txt" in told
    assert "on demand: $36.64 for 2h: 2 h at $18.32\n" in told and "on spot: $13.1" in told and "best checkpoint interval: 600 s" in told
    assert told.endswith("job.yaml: 1 x 8 ranks; start it with: sky jobs launch job.yaml\n")
    task = yaml.safe_load((tmp_path / "job.yaml").read_text())
    assert task["resources"]["accelerators"] == "H100:8" and task["resources"]["use_spot"] and task["envs"] == {"SPARING_RENT": "spot"}
    where = [
        "--data",
        "/tmp/sparing/given/0/books",
        "--budget",
        "2h",
        "--out",
        "/tmp/sparing/one",
        "--for=/tmp/sparing/given/1/eval set.txt",
    ]
    words = shlex.split(task["run"].splitlines()[-1])
    assert words == ["train", *where]
    assert task["file_mounts"]["/tmp/sparing/given/0/books"] == str(tmp_path / "books")
    bucket = task["file_mounts"]["/sparing-kept"]["name"]
    assert f"kept in: the bucket {bucket}" in told and bucket.startswith("sparing-one-")
    said("launch", "--spot", "job.yaml", "--gpu", "H100:8", *TRAIN)
    assert yaml.safe_load((tmp_path / "job.yaml").read_text())["file_mounts"]["/sparing-kept"]["name"] == bucket  # the same command goes on


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--slurm", "f", "--spot", "g", *TRAIN), "choose one"),
        (("--gpu", "8", *TRAIN), "--gpu goes with --slurm FILE or --spot FILE"),
        (("--slurm", "f", "--cloud", "aws", *TRAIN), "--cloud does not go with --slurm"),
        (("--slurm", "f", "--meet", "a:1", *TRAIN), "--meet does not go with --slurm"),
        (("--slurm", "f", "--gpu", "8x", *TRAIN), "--gpu '8x': write KIND:COUNT"),
        (("--slurm", "f", "--gpu", "8", "-n", "4", *TRAIN), "-n 4 with 8 GPUs: each rank has a GPU; nearest: -n 8"),
        (("--slurm", "f", "--time", "5Mtok", *TRAIN), "--time 5Mtok: is no time"),
        (("--slurm", "f", "--nodes", "0", *TRAIN), "at least 1"),
        (("--slurm", "f", "-n", "0", *TRAIN), "at least 1"),
        (("--slurm", "f", "--partition", "a b", *TRAIN), "--partition 'a b': not a name that Slurm knows"),
        (("--slurm", "f", *TRAIN[:3], *TRAIN[5:]), "train needs --budget"),
        (("--slurm", "f", *TRAIN[:5]), "train needs --out"),
        (("--slurm", "none/f", *TRAIN), "--slurm none/f: there is no folder none"),
        (("--spot", "f", *TRAIN), "--spot needs --gpu KIND:COUNT"),
        (("--spot", "f", "--gpu", "H100:8", "--nodes", "2", *TRAIN), "needs --volume NAME"),
        (("--spot", "f", "--gpu", "8", *TRAIN), "which kind?"),
        (("--spot", "f", "--gpu", "none", "train", "--data", "nothing", *TRAIN[3:]), "nothing: no such file or folder here"),
        (("--spot", "f", "--gpu", "none", "resume", "runs/one"), "--spot begins a run"),
        (("--spot", "f", "--gpu", "H100:8", "--failures-per-hour", "-1", *TRAIN), "--failures-per-hour"),
        (("--mirror", "kept", "--nodes", "2", "--meet", "a:1", *TRAIN), "--mirror is for one machine"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(said, tmp_path, words, message):
    status, told = said("launch", *words)
    assert status == 2 and message in told and told.count("\n") == 1, told
    assert not (tmp_path / "f").exists()


def test_a_price_that_is_not_known_keeps_no_job_from_being_written(said, tmp_path):
    status, told = said("launch", "--spot", "f", "--gpu", "T4", "--volume", "shared", "--nodes", 2, *TRAIN)
    assert status == 0 and "price: T4 is in no table" in told and "kept in: the volume shared" in told
    text = (tmp_path / "f").read_text()
    assert json.dumps("shared") in text and "SPARING_RENT" not in text
    status, told = said("launch", "--spot", "f", "--gpu", "none", "--cpus", 16, *TRAIN)
    assert status == 0 and "1 x 1 ranks" in told and "on spot: $" in told
