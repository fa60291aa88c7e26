"""`reason`: all stages of R1's recipe by one command, each a run; killed in a stage and resumed, it is the same bit for bit."""

import json
import shutil

import pytest
from tests.adapt.test_grpo import BASE
from tests.adapt.test_sft import TRAIN, kill_at, write

from sparing import api
from sparing.adapt.reason import SHARES, _Recipe, _shortest
from sparing.adapt.rewards import load_task, verify
from sparing.adapt.rollouts import Answer
from sparing.base.config import Budget, CannotGoOn, UserError
from sparing.base.config_file import read_config
from sparing.base.files import file_sha256, read_lines
from sparing.base.run import RunFolder
from sparing.cli.main import main
from sparing.infer.engine import Engine
from sparing.infer.request import Sampling

BUDGET = "40ktok"
OPTIONS = (
    f"--budget {BUDGET} --samples 1 --seed 1 --train.micro-batch-size 64 --train.threads 1 --train.replicas 1 --train.compile false"
    " --train.kernels plain --train.dtype float32 --train.evals 1 --train.checkpoint-interval-s 0.2 --optim.lr 0.01"
    " --grpo.problems 8 --grpo.samples 8 --grpo.max-tokens 8 --grpo.scored 16 --grpo.weights float32"
).split()
WISHES = {
    "train": TRAIN | {"evals": 1, "micro_batch_size": 64, "checkpoint_interval_s": 0.2},
    "optim": {"lr": 0.01},
    "grpo": {"problems": 8, "samples": 8, "max_tokens": 8, "scored": 16, "weights": "float32"},
}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Two bases that have read about the colours of animals, the second one narrower and with fewer words; a task that likes one colour;
    answers that show how to answer, mostly with others."""
    root = tmp_path_factory.mktemp("reason")
    (root / "text").mkdir()
    animals, words = ("cat", "dog", "cow", "hen"), ("red", "blue", "green", "black")
    for i in range(300):
        (root / "text" / f"{i:03d}.txt").write_text(f"{i % 50}: The {animals[i % 4]} is {words[i // 4 % 4]}")
    with open(root / "task.jsonl", "w") as file:
        for n in range(160):
            file.write(json.dumps({"prompt": f"{n}: {animals[n % 4]}", "verifier": "format", "answer": "red"}) + "\n")
    write(root / "cold.jsonl", ({"prompt": f"{n}: {animals[n % 4]}", "completion": words[n // 4 % 4]} for n in range(200, 400)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        for name, more in (("base", {}), ("small", {"hidden_size": 32, "num_heads": 1, "vocab_size": 280})):
            api.train([str(root / "text")], "30ktok", str(root / name), BASE | {"model": BASE["model"] | more}, seed=3, samples=0)
        yield root


@pytest.fixture(scope="module")
def taught(workplace):
    """(summary, run folder)."""
    out, task, cold = workplace / "taught", str(workplace / "task.jsonl"), [str(workplace / "cold.jsonl")]
    more = {"student": str(workplace / "small"), "wishes": WISHES, "seed": 1, "samples": 1}
    return api.reason(str(workplace / "base"), task, BUDGET, str(out), cold, **more), RunFolder(out)


def test_every_stage_is_a_run_and_does_its_part(taught, workplace):
    summary, run = taught
    rows = {row["stage"]: row for row in summary["stages"]}
    print(json.dumps(summary, indent=1))
    assert list(rows) == ["base", "1-cold", "2-rl", "3-sampled", "4-sft", "student", "5-student"] and summary["left_out"] == []
    assert all(row["problems"] == 16 and 0 <= row["pass_at_1"] <= row["pass_at_k"] <= 1 for row in rows.values() if "k" in row)
    assert rows["base"]["pass_at_1"] < 0.1 < rows["1-cold"]["pass_at_1"] + 0.1 < rows["2-rl"]["pass_at_1"]
