"""`sparing launch`: real ranks by torchrun's agent on gloo, which train as one process does, also after one of them was killed."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tests.base.test_notices import imitation  # noqa: F401, a fixture

from sparing.account.history import entries_of
from sparing.base.files import read_lines
from sparing.base.run import RunFolder
from sparing.interop import launch

STEPS, ROWS, LENGTH = 20, 4, 32
RECIPE = f"""
[train]
seq_len = {LENGTH}
batch_size = {ROWS}
micro_batch_size = 1
dtype = "float32"
kernels = "plain"
threads = 1
replicas = 1
compile = false
evals = 1
checkpoint_interval_s = 0.2
sequence_balance = 0.01
[model]
vocab_size = 512
hidden_size = 32
num_layers = 2
num_dense_layers = 1
intermediate_size = 64
num_heads = 2
q_lora_rank = 16
kv_lora_rank = 16
qk_nope_head_dim = 16
qk_rope_head_dim = 16
v_head_dim = 16
n_routed_experts = 4
moe_intermediate_size = 32
mtp_depth = 1
"""
BIASES = "model.layers.1.mlp.gate.e_score_correction_bias"
EXPERTS = "--parallel.experts", 2
COMPARED = ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Text and a recipe of a mixture with a module that looks two tokens ahead; and, as `alone`, what one process makes of it."""
    folder = tmp_path_factory.mktemp("launch")
    dice = random.Random(0)
    words = ["".join(dice.choices("abcdefghij", k=dice.randint(2, 6))) for _ in range(200)]
    for name in range(12):
        (folder / f"{name}.txt").write_text(" ".join(dice.choices(words, k=1500)))
    (folder / "recipe.toml").write_text(RECIPE)
    assert sparing(folder, *training(folder, "alone")).wait(120) == 0
    return folder


def sparing(folder, *words, **options):
    environment = os.environ | {"SPARING_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "sparing", *map(str, words)], env=environment, **options)


def training(folder, out):
    tokens = STEPS * ROWS * LENGTH
    return "train", folder / "recipe.toml", "--data", folder, "--budget", f"{tokens}tok", "--samples", 0, "--out", folder / out, "--json"


def steps_of(run):
    return [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]


def rank_of(run, number):
    """Process id of a rank that trains `run`."""
    for process in os.listdir("/proc"):
        try:
            words = open(f"/proc/{process}/cmdline").read().split("\0")
            environment = open(f"/proc/{process}/environ").read().split("\0")
        except (OSError, ValueError):
            continue
        if str(run) in words and f"RANK={number}" in environment:
            return int(process)
    raise AssertionError(f"no rank {number}")


def world_of(run) -> int:
    """How many ranks the newest rank 0 that trains `run` has; 0: there is none."""
    try:
        environment = open(f"/proc/{rank_of(run, 0)}/environ").read().split("\0")
    except (OSError, AssertionError):
        return 0
    return int(next(word.partition("=")[2] for word in environment if word.startswith("WORLD_SIZE=")))


def parent_of(process: int) -> int:
    return psutil.Process(process).ppid()


def until(holds) -> None:
    began = time.monotonic()
    while not holds():
        assert time.monotonic() - began < 240
        time.sleep(0.1)


def alike(run, alone):
    """Compare two runs of the same steps."""
    mine, others = steps_of(run), steps_of(alone)
    assert [line["step"] for line in mine] == [line["step"] for line in others] == list(range(1, STEPS + 1))
    for one, other in zip(mine, others, strict=True):
        assert one["tokens"] == other["tokens"]
        for name in COMPARED:
            assert one[name] == pytest.approx(other[name], rel=1e-5), (name, one["step"])
    scores = [[line["eval_loss"] for line in read_lines(one / "metrics.jsonl") if "eval_loss" in line] for one in (run, alone)]
    assert scores[0] and scores[0] == pytest.approx(scores[1], rel=1e-5)


def test_ranks_train_as_one_process_does_and_their_receipt_has_all_of_them(folder):
    process = sparing(folder, "launch", "-n", 2, *training(folder, "two"), *EXPERTS, stdout=subprocess.PIPE)
    summary = json.loads(process.communicate(timeout=240)[0])
    assert process.returncode == 0 and summary["steps"] == STEPS
    alike(folder / "two", folder / "alone")
    rows = entries_of(RunFolder(folder / "two"))
    assert {row.status for row in rows} == {"done"} and {row.verb for row in rows} == {"train"}
    trained = [row for row in rows if row.stage == "train"]
    assert len(trained) == 2 and len({row.pid for row in trained}) == 2
    assert sum(row.tokens for row in trained) == summary["tokens"] and sum(row.wall_s > 0 for row in trained) == 1
    assert all(row.device_s > 0 and row.cpu_s > 0 and row.kwh > 0 and row.usd > 0 for row in trained)
    assert len({row.run_id for row in rows}) == 1 and all(json.loads(row.rates)["usd_per_hour"] > 0 for row in rows)


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds a rank by /proc")
def test_a_killed_rank_is_started_anew_and_the_run_goes_on_bit_for_bit(folder):
    run = folder / "killed"
    words = *training(folder, run.name), *EXPERTS
    process = sparing(folder, "launch", "-n", 2, *words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until_step(process, run, 3)
    os.kill(rank_of(run, 0), signal.SIGKILL)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0 and "all are started anew (1 of at most 100 times)" in said and "Traceback" not in said, said
    undisturbed, again = ([{name: line[name] for name in ("step", *COMPARED)} for line in steps_of(one)] for one in (folder / "two", run))
    assert again == undisturbed


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds a rank by /proc")
def test_a_stopped_rank_is_ended(monkeypatch, capsys):
    monkeypatch.setattr(launch, "LOOK_S", 0.05)
    monkeypatch.setattr(launch, "STOPPED_S", 0.2)
    stopped, works = (subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) for _ in range(2))
    with launch.ending_stopped():
        os.kill(stopped.pid, signal.SIGSTOP)
        assert stopped.wait(60) == -signal.SIGKILL
    works.communicate(b"\n")
    assert works.returncode == 0 and f"process {stopped.pid} is stopped" in capsys.readouterr().err


def test_a_signal_to_all_processes_saves_once_and_another_machine_with_other_ranks_goes_on_from_the_mirror(folder):
    run, kept = folder / "stopped", folder / "kept"
    words = "--mirror", kept, *training(folder, run.name), *EXPERTS, "--parallel.shard", "weights"
    process = sparing(folder, "launch", "-n", 2, *words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until_step(process, run, 3)
    for number in (rank_of(run, 0), rank_of(run, 1), process.pid):  # as Slurm does; the launcher passes its own on
        os.kill(number, signal.SIGINT)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 130 and said.count(f"go on with: sparing resume {run}") == 1 and "Traceback" not in said, said
    newest = sorted((run / "state").glob("step-*"))[-1]
    assert int(newest.name[5:]) == steps_of(run)[-1]["step"] < STEPS  # all that was done is saved
    assert sorted(file.name for file in newest.glob("optimizer*")) == [f"optimizer-0000{part}-of-00002.safetensors" for part in (1, 2)]
    shutil.rmtree(run)
    process = sparing(folder, "launch", "-n", 3, *words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = process.communicate(timeout=240)[1]
    assert process.returncode == 0 and f"brought back from {kept}" in said, said
    alike(run, folder / "alone")  # of four rows one rank has two; no matrix has three equal pieces; four experts have not, and are whole


def until_step(process, run, step):
    while process.poll() is None and len(steps_of(run)) < step:
        time.sleep(0.02)


def test_what_cannot_be_is_told_once_and_no_rank_is_started_anew(folder):
    for words, message in (
        (
            ("launch", "-n", 2, "eval", "RUN"),
            "launch: eval is not divided among ranks; verbs that are: train, sft, distill, dpo, grpo, grow, resume",
        ),
        (("launch", "-n", 2, "train", "--bugdet", "1s"), "train: unknown option --bugdet; nearest: --budget"),
        (("launch", "-n", 0, *training(folder, "no")), "launch: -n 0"),
        (("launch", "--nodes", 2, *training(folder, "no")), "launch: 2 machines need --meet HOST:PORT"),
        (
            ("launch", "-n", 2, *training(folder, "no"), "--train.batch-size", 1),
            "batch_size 1: 2 ranks need a row each; nearest: 2",
        ),
    ):
        process = sparing(folder, *words, stderr=subprocess.PIPE, text=True)
        said = process.communicate(timeout=120)[1]
        assert process.returncode == 2, said
        assert said.count("sparing: ") == 1 and message in said, said
    assert not (folder / "no").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds a rank by /proc")
def test_machines_go_and_come(folder):
    """Two launchers on this machine stand for two machines: one is killed with its rank, the other goes on alone, and a third one joins."""
    run, words = folder / "elastic", [str(word) for word in training(folder, "elastic")]
    words[words.index(f"{STEPS * ROWS * LENGTH}tok")] = f"{40 * STEPS * ROWS * LENGTH}tok"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"localhost:{free.getsockname()[1]}"
    begin = partial(sparing, folder, "launch", "-n", 1, "--nodes", "1:2", "--meet", meet, *words, stdout=subprocess.DEVNULL)
    first = begin()
    until(lambda: socket.socket().connect_ex(("localhost", int(meet.partition(":")[2]))) == 0)  # where all meet
    second = begin()
    until(lambda: run.exists() and world_of(run) == 2)
    until_step(first, run, 3)
    os.kill(rank_of(run, 1 if parent_of(rank_of(run, 1)) == second.pid else 0), signal.SIGKILL)
    second.kill()
    until(lambda: world_of(run) == 1)
    before = len(steps_of(run))
    until_step(first, run, before + 3)
    third = begin()
    until(lambda: world_of(run) == 2)
    assert first.wait(300) == third.wait(300) == 0
    steps = [line["step"] for line in steps_of(run)]
    assert steps == list(range(1, 40 * STEPS + 1))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds a rank by /proc")
def test_a_machine_with_a_notice_leaves_alone(folder, imitation, monkeypatch):  # noqa: F811
    """Two launchers stand for two machines; the cloud takes one of them away. All save after the same step, and the other goes on."""
    run, words = folder / "noticed", [str(word) for word in training(folder, "noticed")]
    words[words.index(f"{STEPS * ROWS * LENGTH}tok")] = f"{40 * STEPS * ROWS * LENGTH}tok"
    words += ["--train.checkpoint-interval-s", "600"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = f"localhost:{free.getsockname()[1]}"
    begin = partial(sparing, folder, "launch", "-n", 1, "--nodes", "1:2", "--meet", meet, *words, stdout=subprocess.DEVNULL)
    first = begin(stderr=subprocess.PIPE, text=True)
    until(lambda: socket.socket().connect_ex(("localhost", int(meet.partition(":")[2]))) == 0)  # where all meet
    cloud = imitation("gcp")
    monkeypatch.setenv("SPARING_CLOUD", "gcp")
    monkeypatch.setenv("SPARING_METADATA", cloud.address)
    second = begin(stderr=subprocess.PIPE, text=True)
    until(lambda: run.exists() and world_of(run) == 2)
    until_step(first, run, 3)
    cloud.notice = {"preempted": "TRUE"}
    said = second.communicate(timeout=60)[1]
    assert second.returncode == 130 and "takes this machine away" in said and "Traceback" not in said, said
    until(lambda: world_of(run) == 1)
    saved = sorted(folder.name for folder in RunFolder(run).state.glob("step-*"))
    said = first.communicate(timeout=300)[1]
    assert first.returncode == 0 and "Traceback" not in said, said
    assert int(saved[-1].removeprefix("step-")) >= 3 and "goes on with those that stay" in said
    assert [line["step"] for line in steps_of(run)] == list(range(1, 40 * STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("divide", "experts"), [("nothing", 1), ("optimizer", 1), ("weights", 1), ("optimizer", 2), ("weights", 2)])
def test_every_layout_gives_the_same_losses(folder, ranks, divide, experts):
    run = folder / f"{divide}-{experts}-{ranks}"
    layout = "--parallel.shard", divide, "--parallel.experts", experts
    assert sparing(folder, "launch", "-n", ranks, *training(folder, run.name), *layout, stdout=subprocess.DEVNULL).wait(300) == 0
    alike(run, folder / "alone")
    assert torch.equal(*(load_file(one / "weights/model.safetensors")[BIASES] for one in (run, folder / "alone")))


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="finds a rank by /proc")
def test_a_pipeline_goes_on_bit_for_bit_without_a_rank_and_then_on_one_process(folder):
    stages, runs = ("--parallel.stages", 2), [folder / name for name in ("stages", "stages-killed", "stages-stopped")]
    assert sparing(folder, "launch", "-n", 2, *training(folder, "stages"), *stages, stdout=subprocess.DEVNULL).wait(300) == 0
    words = *training(folder, "stages-killed"), *stages
    process = sparing(folder, "launch", "-n", 2, *words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until_step(process, runs[1], 3)
    os.kill(rank_of(runs[1], 1), signal.SIGKILL)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 0 and "all are started anew (1 of at most 100 times)" in said and "Traceback" not in said, said
    undisturbed, again = ([{name: line[name] for name in ("step", *COMPARED)} for line in steps_of(run)] for run in runs[:2])
    assert again == undisturbed
    words = *training(folder, "stages-stopped"), *stages
    process = sparing(folder, "launch", "-n", 2, *words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    until_step(process, runs[2], 3)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 130 and "Traceback" not in said and len(steps_of(runs[2])) < STEPS, said
    assert sparing(folder, "resume", runs[2], stdout=subprocess.DEVNULL).wait(300) == 0
    alike(runs[2], folder / "alone")


DEEP = "--model.num-layers", 7, "--train.batch-size", 2 * ROWS, "--budget", f"{STEPS * 2 * ROWS * LENGTH}tok"
"""Eight chunks of layers, the last one with the head alone, and rows for them."""


@pytest.fixture(scope="module")
def deep(folder):
    """`folder`, and in it, as `deep`, what one process makes of more layers and rows."""
    assert sparing(folder, *training(folder, "deep"), *DEEP).wait(300) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "stages", "experts", "schedule"),
    [
        (2, 2, 1, "1f1b"), (2, 2, 1, "interleaved"), (2, 2, 1, "zbv"), (2, 2, 1, "dualpipev"),
        (4, 4, 1, "1f1b"), (4, 4, 1, "interleaved"), (4, 4, 1, "zbv"), (4, 4, 1, "dualpipev"),
        (4, 2, 1, "1f1b"), (4, 2, 2, "interleaved"), (4, 2, 2, "zbv"), (4, 2, 2, "dualpipev"),
    ],
)  # fmt: skip
def test_every_pipeline_gives_the_same_losses(deep, ranks, stages, experts, schedule):
    run = deep / f"{schedule}-{stages}-{experts}-{ranks}"
    layout = "--parallel.stages", stages, "--parallel.schedule", schedule, "--parallel.experts", experts
    assert sparing(deep, "launch", "-n", ranks, *training(deep, run.name), *DEEP, *layout, stdout=subprocess.DEVNULL).wait(300) == 0
    alike(run, deep / "deep")
    both = run, deep / "deep"
    weights = [load_file(one / "weights/model.safetensors") for one in both]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items() if name.endswith("e_score_correction_bias"))


@pytest.mark.slow
def test_experts_of_each_rank_alone(folder):
    """As many parts as ranks."""
    run = folder / "each-alone"
    layout = "--parallel.experts", 4, "--parallel.shard", "weights"
    assert sparing(folder, "launch", "-n", 4, *training(folder, run.name), *layout, stdout=subprocess.DEVNULL).wait(300) == 0
    alike(run, folder / "alone")
