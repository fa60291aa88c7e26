"""The batch file: read by bash, and its body run with small programs in place of Slurm's, two nodes on this machine."""

import json
import os
import shlex
import subprocess
import sys

import pytest

from sparing.base.config import UserError
from sparing.interop.slurm import sbatch, time_for

WORDS = ["train", "--data", 'a folder/it\'s "here"', "$HOME", "*", "--out", "run; rm -rf x"]
SCONTROL = """#!/bin/bash
if [ "$1 $2 $3" = "show hostnames first,second" ]; then printf 'first\\nsecond\\n'; else echo "$@" >> "$LOG.scontrol"; fi
"""
SRUN = """#!/bin/bash
while [[ "$1" == --* ]]; do echo "$1" >> "$LOG.srun"; shift; done
"$@" & "$@"; status=$?
wait $!
exit $status
"""  # two nodes on one machine
PROGRAM = """
import json, os, sys
with open(os.environ["LOG"], "a") as log:
    log.write(json.dumps([os.getcwd(), os.environ["SPARING_LAUNCH_ID"], *sys.argv[1:]]) + "\\n")
sys.exit(int(os.environ["STATUS"]))
"""


def options_of(text):
    return [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.fixture
def run(tmp_path):
    """Run a batch file as Slurm would: -> (exit status, what each launcher was told, what scontrol was told)."""
    folder = tmp_path / "work here"
    folder.mkdir()
    for name, body in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(body)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(status, **restarted):
        text = sbatch(WORDS, 8, 2, folder=str(folder), gpus="8", program=(sys.executable, str(tmp_path / "program.py")))
        (tmp_path / "job.sh").write_text(text)
        log = tmp_path / "log"
        slurm = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "first,second", "SLURM_JOB_NUM_NODES": "2", **restarted}
        environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "LOG": str(log), "STATUS": str(status)}
        assert subprocess.run(["bash", "-n", tmp_path / "job.sh"]).returncode == 0
        ended = subprocess.run(["bash", tmp_path / "job.sh"], env=environment, cwd=tmp_path).returncode
        asked = tmp_path / "log.scontrol"
        told = [json.loads(line) for line in log.read_text().splitlines()]
        assert "--kill-on-bad-exit=0" in (tmp_path / "log.srun").read_text()
        return ended, told, asked.read_text() if asked.exists() else ""

    run.folder = str(folder)
    return run


def test_each_node_gets_the_same_command_word_for_word(run):
    status, told, asked = run(0)
    assert status == 0 and asked == "" and len(told) == 2 and told[0] == told[1]
    meet = f"first:{10000 + 123456 % 20000}"
    launch = ["launch", "-n", "8", "--nodes", "2", "--meet", meet, "--restarts", "100"]
    assert told[0] == [run.folder, "slurm-123456-0", *launch, *WORDS]


def test_a_job_that_was_told_to_stop_is_requeued_and_another_is_not(run):
    assert run(130)[::2] == (130, "requeue 123456\n")
    for status in (1, 2, 3):
        (ended, _, asked) = run(status)
        assert ended == status and asked == "requeue 123456\n"  # that of before


def test_ranks_that_meet_again_do_not_meet_those_of_before(run):
    assert run(0, SLURM_RESTART_COUNT="2")[1][0][1] == "slurm-123456-2"


def test_options():
    text = sbatch(["train"], 8, 2, folder="/w", gpus="h100:8", time_s=time_for(7200), partition="long", name="my run/1")
    assert options_of(text) == [
        "job-name=my-run-1", "nodes=2", "ntasks-per-node=1", "gpus-per-node=h100:8", "cpus-per-task=32", "time=0-02:22:00",
        "partition=long", "requeue", "open-mode=append", "signal=INT@120",
    ]  # fmt: skip
    assert {"exclusive", "mem=0"} < set(options_of(sbatch(["train"], 4, folder="/w")))  # whole nodes, where nothing is said
    few = options_of(sbatch(["train"], 4, folder="/w", cpus=16, time_s=90000.1))
    assert "cpus-per-task=16" in few and "exclusive" not in few and "time=1-01:01:00" in few
    assert not any(option.startswith("time") for option in options_of(sbatch(["train"], 4, folder="/w")))


def test_a_word_that_slurm_would_read_otherwise_is_refused():
    for option in ({"partition": "a b"}, {"partition": "x\n#SBATCH --time=0"}, {"gpus": "8 --exclusive"}):
        with pytest.raises(UserError, match="not a name that Slurm knows"):
            sbatch(["train"], 1, folder="/w", **option)
    assert shlex.quote("a\nb") in sbatch(["train", "a\nb"], 1, folder="/w")
