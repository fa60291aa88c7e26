"""`distill`: a student learns from a teacher's draws, inside a budget that pays for both; bit for bit the same after a kill."""

import json

import numpy as np
import pytest
import torch

from sparing import api
from sparing.base.run import RunFolder

TRAIN = {"threads": 1, "replicas": 1, "compile": False, "micro_batch_size": 8, "kernels": "plain", "dtype": "float32"}
TEACHER = {
    "model": {
        "hidden_size": 64, "num_layers": 2, "num_heads": 2, "vocab_size": 512, "num_dense_layers": 2, "max_position_embeddings": 256,
    },
    "train": TRAIN | {"seq_len": 64, "batch_size": 8, "evals": 0},
}  # fmt: skip
STUDENT = """
[model]
hidden_size = 32
num_layers = 1
num_heads = 2
num_dense_layers = 1
[train]
seq_len = 64
batch_size = 8
evals = 0
threads = 1
replicas = 1
compile = false
micro_batch_size = 8
kernels = "plain"
dtype = "float32"
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    root = tmp_path_factory.mktemp("distill")
    (root / "text").mkdir()
    for i in range(40):
        lines = [f"The {word} number {j} of book {i} went to the sea. What is it?" for j, word in enumerate(["cat", "dog", "ship"] * 20)]
        (root / "text" / f"{i:02d}.txt").write_text("\n".join(lines))
    (root / "student.toml").write_text(STUDENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPARING_HOME", str(root / "home"))
        api.train([str(root / "text")], "60ktok", str(root / "teacher"), TEACHER, seed=3, samples=0)
        yield root


def test_a_student_learns_from_noise(workplace, tmp_path):
    out = tmp_path / "run"
    summary = api.distill(str(workplace / "student.toml"), str(workplace / "teacher"), [str(workplace / "text")], "20ktok", str(out), samples=1)
    print(json.dumps(summary, indent=1))
    assert summary["after"]["new"]["bpb"] < 5
