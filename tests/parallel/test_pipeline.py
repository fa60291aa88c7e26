"""Pipelines of two ranks (gloo processes) compute what one process does, by each of torch's schedules."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from sparing.base.config import Budget, Config, ModelConfig, ParallelConfig, TrainConfig
from sparing.base.rank import Rank
from sparing.data.loader import Batch
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import Ranks
from sparing.train.objective import NextToken
from sparing.train.trainer import Trainer
from sparing.train.world import ALONE

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=4, num_dense_layers=1, intermediate_size=64, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, moe_intermediate_size=32, mtp_depth=1,
    max_position_embeddings=16,
)  # fmt: skip
TRAIN = TrainConfig(
    seq_len=16, batch_size=4, micro_batch_size=1, dtype="float32", threads=1, replicas=1, compile=False, sequence_balance=0.01,
    kernels="plain", bias_update_rate=0.01,
)  # fmt: skip
LAYOUTS = {
    "1f1b": {},
    "interleaved": {"kernels": "compiled"},
    "zbv": {"tie_word_embeddings": True},
    "dualpipev": {"kernels": "compiled", "recompute": True},
}
"""By schedule: what else is not as usual there."""
STEPS = 3


def config_of(schedule: str) -> Config:
    changes = dict(LAYOUTS[schedule])
    model = replace(MODEL, tie_word_embeddings=changes.pop("tie_word_embeddings", False))
    parallel = ParallelConfig("optimizer", stages=2, schedule=schedule)
    return Config(model=model, train=replace(TRAIN, **changes), parallel=parallel, budget=Budget(1e6, "tok"))


class Words:
    """Batches of random words in two documents a row."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        text = torch.randint(MODEL.vocab_size, (TRAIN.batch_size, TRAIN.seq_len + 2), generator=torch.Generator().manual_seed(step))
        documents = torch.arange(TRAIN.seq_len).div(TRAIN.seq_len // 2, rounding_mode="floor").expand(TRAIN.batch_size, -1).int()
        targets = torch.stack([text[:, 1:-1], text[:, 2:]], -1)
        return Batch(*(tensor[rank::world] for tensor in (text[:, :-2], targets, documents)))


def trained(schedule: str, world) -> dict:
    """A few steps; what was seen of them."""
    config = config_of(schedule)
    model = Transformer(config.model)
    init_weights(model, 1)
    trainer = Trainer(model, Words(), NextToken.of(config), world, config=config)
    seen = []
    for step in range(STEPS):
        losses = trainer.gradients(trainer.feed.batch(step, *trainer.rows[:2]), step)
        violations = trainer.update(losses["grad_norm"], 1.0, 0.9)
        seen.append(losses | {f"violation {layer}": value for layer, value in enumerate(violations)})
    trainer.replicas.train(False)
    batch = Words().batch(99)
    nll = trainer.replicas.nll(batch.tokens[:3], batch.targets[:3, :, 0])
    state = model.state_dict()
    wholes = {name: tensor.clone() for name, tensor in trainer.owners.wholes(state) if tensor is not None}
    sums = {name: float(tensor.double().sum()) for name, tensor in wholes.items()}
    bias = {name: tensor.tolist() for name, tensor in wholes.items() if name.endswith("e_score_correction_bias")}
    return {"seen": seen, "nll": nll.flatten().tolist(), "sums": sums, "bias": bias, "held": len(state)}


def work(folder: str, rank: int) -> None:
    world = Ranks(Rank(rank, 2, rank, 2), dist.FileStore(f"{folder}/ranks", 2))
    Path(folder, f"report-{rank}.json").write_text(json.dumps({schedule: trained(schedule, world) for schedule in LAYOUTS}))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"import test_pipeline; test_pipeline.work({str(folder)!r}, {rank})"],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors[-3000:]
    finally:
        for process in ranks:
            process.kill()
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("schedule", LAYOUTS)
def test_a_pipeline_computes_what_one_process_does(reports, schedule):
    alone = trained(schedule, ALONE)
    first, second = (report[schedule] for report in reports)
    for seen in (first["seen"], second["seen"]):
        for mine, others in zip(seen, alone["seen"], strict=True):
            assert mine == pytest.approx(others, rel=1e-5)
    assert first["nll"] == second["nll"] == pytest.approx(alone["nll"], rel=1e-5)
    assert list(first["sums"]) == list(alone["sums"])
    assert first["sums"] == pytest.approx(alone["sums"], rel=1e-4, abs=1e-4) and first["bias"] == alone["bias"]
    assert max(first["held"], second["held"]) < alone["held"]
