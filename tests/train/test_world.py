"""Two ranks (gloo processes), each with half of every batch, train as one does; signals and files are agreed on."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny import MODEL, Counting, config, fit, held_out, new_run, steps

from sparing.base.config import ParallelConfig
from sparing.base.files import read_lines
from sparing.base.preempt import Interrupted, Preempt
from sparing.base.rank import Rank
from sparing.base.run import RunFolder
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import Ranks
from sparing.train.objective import NextToken
from sparing.train.pace import Clock
from sparing.train.trainer import Session, Trainer

STEPS, STOPPED_AFTER = 12, 5


class Halves(Counting):
    def __init__(self, chosen, stop_at=None):
        super().__init__(chosen)
        self.stop_at = stop_at

    def batch(self, step, rank=0, world=1):
        if step == self.stop_at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().batch(step)[rank::world]


def work(folder: str, rank: int, stop_at: int | None) -> None:
    """One rank, in a folder of its own but for the files that only rank 0 may write."""
    chosen, run, opened = config(steps(STEPS), sequence_balance=0.01), RunFolder.open(Path(folder, "run")), []
    chosen = replace(chosen, parallel=ParallelConfig("optimizer"))
    world = Ranks(Rank(rank, 2, rank, 2), dist.FileStore(f"{folder}/ranks", 2))
    model = Transformer(MODEL)
    init_weights(model, chosen.train.seed)
    sys.addaudithook(lambda name, found: name == "open" and set(str(found[1])) & set("wax+") and opened.append(str(found[0])))
    outcome = "finished"
    with Preempt("go on") as signals:
        trainer = Trainer(model, Halves(chosen, stop_at), NextToken.of(chosen), world, config=chosen)
        try:
            trainer.fit(Session(run, Clock(run, 0.0), signals, peak_flops=1e10), held_out(chosen))
        except Interrupted:
            outcome = "interrupted"
    written = sorted({Path(path).name for path in opened if str(run.path) in path})
    weight = float(model.model.layers[0].self_attn.o_proj.weight.double().sum())
    report = {"outcome": outcome, "step": trainer.state.step, "written": written, "weight": weight}
    Path(folder, f"report-{rank}.json").write_text(json.dumps(report))
    dist.destroy_process_group()


def two_ranks(folder: Path, stop_at: int | None = None) -> list[dict]:
    new_run(folder / "run")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *filter(None, sys.path)])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", f"import test_world; test_world.work({str(folder)!r}, {rank}, {stop_at})"],
            env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in ranks:
        try:
            _, errors = process.communicate(timeout=240)
        finally:
            process.kill()
        assert process.returncode == 0, errors[-3000:]
    return [json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(2)]


def only_its_part(written: list[str]) -> bool:
    """Whether the second rank wrote what it alone has, its part of the optimizer's state, and nothing else."""
    return bool(written) and all("optimizer-00002-of-00002" in name for name in written)


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_two_ranks_train_as_one_and_only_rank_0_writes(tmp_path):
    first, second = two_ranks(tmp_path)
    alone = new_run(tmp_path / "alone")
    fit(alone, config(steps(STEPS), sequence_balance=0.01))
    ours, theirs = ([line for line in read_lines(run) if "loss" in line] for run in (tmp_path / "run/metrics.jsonl", alone.metrics_file))
    assert [line["step"] for line in ours] == list(range(1, STEPS + 1)) and len(theirs) == STEPS
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["tokens"] == other["tokens"]
        for name in ("loss", "mtp_loss", "balance_loss", "grad_norm", "max_violation"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5), (name, mine["step"])
    assert first["outcome"] == second["outcome"] == "finished" and first["weight"] == second["weight"]
    assert "metrics.jsonl" in first["written"] and only_its_part(second["written"])


@pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")
def test_the_signal_of_one_rank_stops_both_at_one_step(tmp_path):
    first, second = two_ranks(tmp_path, STOPPED_AFTER)
    assert first["outcome"] == second["outcome"] == "interrupted"
    assert first["step"] == second["step"] == STOPPED_AFTER + 1
    assert sorted((tmp_path / "run/state").glob("step-*"))[-1].name == f"step-{STOPPED_AFTER + 1:08d}"
    assert only_its_part(second["written"])
