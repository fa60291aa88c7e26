"""The verb itself, killed with -9 and stopped with SIGTERM at any instant from its first import to its last file, then resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from sparing.base.files import read_lines
from sparing.base.hardware import cpu_flags
from sparing.kernels import native

DTYPE = "bfloat16" if "avx512_bf16" in cpu_flags() else "float32"
KERNELS = next(path for path in ("vectors", "compiled", "plain") if native.can(path, getattr(torch, DTYPE)))
"""Set, because a busy machine may measure otherwise in one workspace than in another, and the last bits would differ."""
TIMING = ("seconds", "tokens_per_s", "mfu", "took_s", "watts", "memory_bytes", "idle", "input_wait")
OPTIONS = (
    "--budget 40ktok --samples 1 --seed 5 --model.hidden-size 64 --model.num-layers 2 --model.num-heads 2 --model.vocab-size 384"
    " --train.seq-len 64 --train.batch-size 8 --train.micro-batch-size 4 --train.threads 1 --train.compile false"
    f" --train.replicas 1 --train.dtype {DTYPE} --train.kernels {KERNELS} --data.workers 1 --train.checkpoint-interval-s 0.3 --json"
).split()

EIGHT_BITS = (
    "--precision.linear int8 --precision.weights bfloat16 --precision.moments int8 --precision.activations int8"
    " --precision.measure-every 16"
).split()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(1, 9))) for _ in range(500)]
    for i in range(80):
        (folder / f"{i}.txt").write_text(" ".join(rng.choices(words, k=3000)))
    return folder


def start(home, *arguments) -> subprocess.Popen:
    environment = os.environ | {"SPARING_HOME": str(home), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "sparing", *map(str, arguments)], env=environment, stdout=-1, stderr=-1, text=True)


def go_on(home, out, corpus, *more) -> subprocess.Popen:
    """What a user would type: the command again while there is no run yet, `resume` afterwards."""
    if (out / "config.toml").exists():
        return start(home, "resume", out)
    return start(home, "train", "--data", corpus, "--out", out, *OPTIONS, *more)


def losses(out) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in TIMING} for line in read_lines(out / "metrics.jsonl")]


def straight_through(root, corpus, *more) -> tuple:
    """(its run folder, seconds it took from start to end)."""
    before = time.monotonic()
    process = go_on(root / "home", root / "run", corpus, *more)
    out, said = process.communicate()
    assert process.returncode == 0, said
    assert json.loads(out)["bpb"] > 0 and out.count("\n") == 1  # one JSON object, and nothing else
    assert len(losses(root / "run")) > 40_000 // 512
    return root / "run", time.monotonic() - before


def measured(undisturbed, home) -> None:
    """Let `home` know what was measured of this machine, so that no run does it again."""
    shutil.copytree(undisturbed[0].parent / "home/calibration", home / "calibration", dirs_exist_ok=True)


@pytest.fixture(scope="module")
def undisturbed(corpus, tmp_path_factory):
    return straight_through(tmp_path_factory.mktemp("undisturbed"), corpus)


def steps(out) -> int:
    return sum("loss" in line for line in losses(out)) if (out / "metrics.jsonl").exists() else 0


EVENTS = {
    "starting": lambda out: out.exists(),
    "tokenising": lambda out: (out / "config.toml").exists(),
    "training": lambda out: steps(out) > 20,
    "finishing": lambda out: steps(out) >= 40_000 // 512,
}


def until(event: str, process, out) -> None:
    """Wait for this to have happened, however long it takes, or for the process to have ended."""
    while not EVENTS[event](out) and process.poll() is None:
        time.sleep(0.002)


def kill_and_finish(instant: float | str, root, corpus, undisturbed, *more) -> str:
    """Kill at this event, or share of the run's time; -> the stage that was under way."""
    out, home = root / "run", root / "home"
    if instant != "starting":
        measured(undisturbed, home)
    process = go_on(home, out, corpus, *more)
    if isinstance(instant, str):
        until(instant, process, out)
    else:
        time.sleep(instant * undisturbed[1])
    process.kill()
    process.communicate()
    stage = "training" if steps(out) else "tokenising" if (out / "config.toml").exists() else "starting"
    while not (out / "state/summary.json").exists():
        process = go_on(home, out, corpus, *more)
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert losses(out) == losses(undisturbed[0])
    for name in ("weights/model.safetensors", "tokenizer.json"):
        assert (out / name).read_bytes() == (undisturbed[0] / name).read_bytes()
    return stage


@pytest.mark.parametrize("instant", EVENTS)
def test_killed_anywhere_the_losses_are_those_of_the_undisturbed_run(instant, tmp_path, corpus, undisturbed):
    kill_and_finish(instant, tmp_path, corpus, undisturbed)


@pytest.mark.slow
def test_killed_in_eight_bits(tmp_path, corpus):
    (tmp_path / "undisturbed").mkdir()
    undisturbed = straight_through(tmp_path / "undisturbed", corpus, *EIGHT_BITS)
    assert any("eight_bit_forward" in line for line in losses(undisturbed[0]))
    kill_and_finish("training", tmp_path, corpus, undisturbed, *EIGHT_BITS)


@pytest.mark.slow
def test_killed_at_twenty_random_instants(tmp_path, corpus, undisturbed):
    rng = random.Random(0)
    stages = []
    for i in range(20):
        (tmp_path / str(i)).mkdir()
        stages.append(kill_and_finish(rng.uniform(0.05, 1.0), tmp_path / str(i), corpus, undisturbed))
    assert {"training", "tokenising"} <= set(stages), stages


@pytest.mark.parametrize("event", ["tokenising", "training"])
def test_sigterm_ends_it_and_it_says_how_to_go_on(event, tmp_path, corpus, undisturbed):
    measured(undisturbed, tmp_path / "home")
    process = go_on(tmp_path / "home", tmp_path / "run", corpus)
    until(event, process, tmp_path / "run")
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode in (130, 0)
    if process.returncode == 130:
        assert "sparing resume" in said or "sparing train" in said
    while not (tmp_path / "run/state/summary.json").exists():
        process = go_on(tmp_path / "home", tmp_path / "run", corpus)
        _, said = process.communicate()
        assert process.returncode == 0, said
    assert losses(tmp_path / "run") == losses(undisturbed[0])
