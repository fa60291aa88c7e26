"""Pipelines of two ranks (gloo processes) compute what one process does, by each of torch's schedules. In every layout a rank makes what it
keeps and no more, with the values that one process begins with."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from weakref import finalize

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparing.base.config import AdapterConfig, Budget, Config, ModelConfig, ParallelConfig, StartConfig, TrainConfig
from sparing.base.rank import Rank
from sparing.base.run import RunFolder
from sparing.data.loader import Batch
from sparing.model.init import init_weights, initial, unfilled
from sparing.model.low_rank import adapted, add_low_rank, learned, unfilled_adapted
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import Ranks
from sparing.train.checkpoint import Checkpoints, TrainState
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
    "zbv": {"tied": True},
    "dualpipev": {"kernels": "compiled", "recompute": True},
    "lora": {"schedule": "zbv", "mtp_weight": 0.0},
}
"""By name, by default the schedule's: what else is not as usual there."""
STEPS = 3


def config_of(layout: str) -> Config:
    changes = dict(LAYOUTS[layout])
    model = replace(MODEL, tie_word_embeddings=changes.pop("tied", False))
    parallel = ParallelConfig("optimizer", stages=2, schedule=changes.pop("schedule", layout))
    adapter = {"adapter": AdapterConfig(rank=4), "start": StartConfig("another")} if layout == "lora" else {}
    return Config(model=model, train=replace(TRAIN, **changes), parallel=parallel, budget=Budget(1e6, "tok"), **adapter)


class Words:
    """Batches of random words in two documents a row."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        text = torch.randint(MODEL.vocab_size, (TRAIN.batch_size, TRAIN.seq_len + 2), generator=torch.Generator().manual_seed(step))
        documents = torch.arange(TRAIN.seq_len).div(TRAIN.seq_len // 2, rounding_mode="floor").expand(TRAIN.batch_size, -1).int()
        targets = torch.stack([text[:, 1:-1], text[:, 2:]], -1)
        return Batch(*(tensor[rank::world] for tensor in (text[:, :-2], targets, documents)))


def trainer_of(config: Config, world) -> Trainer:
    """One process makes the whole model, ranks make their parts."""
    if world.size > 1:
        return Trainer(**parts_of(config), world=world)
    model = Transformer(config.model)
    init_weights(model, 1)
    if config.adapter is not None:
        add_low_rank(model, config.adapter, 2)
    return Trainer(model, Words(), NextToken.of(config), world, config=config)


def parts_of(config: Config) -> dict:
    """What a rank's trainer is made of."""
    model, tensors = unfilled(config.model), initial(config.model, 1)
    if config.adapter is not None:
        model, tensors = unfilled_adapted(config.model, config.adapter), adapted(config.model, config.adapter, 2, tensors)
    given = {"model": model, "feed": Words(), "objective": NextToken.of(config), "config": config}
    return given | {"device": torch.device("cpu"), "tensors": tensors}


def checkpoints_of(trainer: Trainer, run: Path) -> Checkpoints:
    return Checkpoints(RunFolder(run), trainer.model, trainer.optimizer, trainer.config, print, "plain", trainer.owners)


def save(trainer: Trainer, run: Path, state: TrainState) -> None:
    checkpoints = checkpoints_of(trainer, run)
    checkpoints.save(state)
    checkpoints.settle()


def copied(trainer: Trainer, source: Path, target: Path) -> None:
    """Load a run's checkpoint, and save what was loaded as another one's."""
    state = checkpoints_of(trainer, source).load_newest()
    save(trainer, target, state)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    """All that a checkpoint holds, of whichever files."""
    (folder,) = (run / "state").glob("step-*")
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(one: Path, other: Path) -> bool:
    first, second = tensors_of(one), tensors_of(other)
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def trained(layout: str, world, run: Path) -> dict:
    """A few steps, and a checkpoint after them; what was seen of them."""
    trainer = trainer_of(config_of(layout), world)
    model, seen = trainer.model, []
    for step in range(STEPS):
        batch = trainer.feed.batch(step, *trainer.rows[:2])
        losses = trainer.gradients(batch if step else batch.cut(TRAIN.seq_len // 2), step)
        violations = trainer.update(losses["grad_norm"], 1.0, 0.9)
        seen.append(losses | {f"violation {layer}": value for layer, value in enumerate(violations)})
    trainer.replicas.train(False)
    batch = Words().batch(99)
    nll = trainer.replicas.nll(batch.tokens[:3], batch.targets[:3, :, 0])
    save(trainer, run, TrainState(STEPS))
    state = model.state_dict() if trainer.config.adapter is None else learned(model)
    wholes = {name: tensor.clone() for name, tensor in trainer.owners.wholes(state) if tensor is not None}
    sums = {name: float(tensor.double().sum()) for name, tensor in wholes.items()}
    bias = {name: tensor.tolist() for name, tensor in wholes.items() if name.endswith("e_score_correction_bias")}
    return {"seen": seen, "nll": nll.flatten().tolist(), "sums": sums, "bias": bias, "held": len(state)}


class Memory(TorchDispatchMode):
    """Counts the bytes of what is made inside, as long as it is there."""

    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with the tensor inside comes here again
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.bytes += storage.nbytes()
                    self.peak = max(self.peak, self.bytes)
                    finalize(storage, self.gone, storage._cdata)
        return made

    def gone(self, key: int) -> None:
        self.bytes -= self.sizes.pop(key)

    def until_filled(self, tensors, peaks: list[int]) -> Iterator[tuple[str, torch.Tensor]]:
        yield from tensors
        peaks.append(self.peak)


MADE = {
    "stages": ParallelConfig("optimizer", stages=2, schedule="interleaved"),
    "experts": ParallelConfig("optimizer", experts=2),
    "weights": ParallelConfig("weights"),
    "weights and experts": ParallelConfig("weights", experts=2),
}


def made(parallel: ParallelConfig, world) -> dict:
    """Bytes while a rank's part of a model is made, and whether it has the initial values of one process."""
    config, memory, peaks = replace(config_of("1f1b"), parallel=parallel), Memory(), []
    given = parts_of(config)
    with memory:
        trainer = Trainer(**given | {"tensors": memory.until_filled(given["tensors"], peaks)}, world=world)
    whole, state, owners = dict(initial(MODEL, 1)), trainer.model.state_dict(), trainer.owners
    wholes = {name: tensor for name, tensor in owners.wholes(state) if world.rank == 0}
    pieces = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in (*state.values(), *trainer.model.buffers()))
    kept = {tensor.data_ptr(): tensor.nbytes for tensor in (*pieces, *(one.detach() for one in owners.mine.values()))}
    same = wholes.keys() == (whole.keys() if world.rank == 0 else set()) and all(
        torch.equal(it, whole[name]) for name, it in wholes.items()
    )
    same &= all(torch.equal(one, whole[name]) for name, one in owners.mine.items() if one.shape == whole[name].shape)
    sizes = [tensor.nbytes for tensor in whole.values()]
    return {"peak": peaks[0], "kept": sum(kept.values()), "same": same, "largest": max(sizes), "whole": sum(sizes)}


def work(folder: str) -> None:
    """Two ranks, of which one is forked off before anything is computed: what is imported, which takes longest, is imported once."""
    import torch.distributed.pipelining  # noqa: F401

    other = os.fork()
    rank = int(other == 0)
    world, runs = Ranks(Rank(rank, 2, rank, 2), dist.FileStore(f"{folder}/ranks", 2)), Path(folder)
    report = {layout: trained(layout, world, runs / f"{layout}-two") for layout in LAYOUTS}
    report |= {layout: made(parallel, world) for layout, parallel in MADE.items()}
    (runs / f"report-{rank}.json").write_text(json.dumps(report))
    copied(trainer_of(config_of("interleaved"), world), runs / "interleaved-alone", runs / "alone-to-two")
    rows = replace(config_of("interleaved"), parallel=ParallelConfig("optimizer"))
    copied(trainer_of(rows, world), runs / "interleaved-two", runs / "two-to-rows")
    copied(trainer_of(config_of("interleaved"), world), runs / "two-to-rows", runs / "rows-to-two")
    dist.destroy_process_group()
    if other:
        assert os.waitpid(other, 0)[1] == 0


COPIES = "alone-to-two", "two-to-rows", "rows-to-two"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of runs: LAYOUT-alone of one process, LAYOUT-two of two ranks, and COPIES."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in (*(f"{layout}-{ranks}" for layout in LAYOUTS for ranks in ("alone", "two")), *COPIES):
        RunFolder.create(folder / name)
    alone = {layout: trained(layout, ALONE, folder / f"{layout}-alone") for layout in LAYOUTS}
    (folder / "report-alone.json").write_text(json.dumps(alone))
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    subprocess.run(
        [sys.executable, "-c", f"import test_stages; test_stages.work({str(folder)!r})"],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}, check=True, timeout=240,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_pipeline_computes_what_one_process_does(runs, layout):
    alone, first, second = (json.loads((runs / f"report-{name}.json").read_text())[layout] for name in ("alone", "0", "1"))
    for seen in (first["seen"], second["seen"]):
        for mine, others in zip(seen, alone["seen"], strict=True):
            assert mine == pytest.approx(others, rel=1e-5)
    assert first["nll"] == second["nll"] == pytest.approx(alone["nll"], rel=1e-5)
    assert list(first["sums"]) == list(alone["sums"])
    assert first["sums"] == pytest.approx(alone["sums"], rel=1e-4, abs=1e-4) and first["bias"] == alone["bias"]
    assert max(first["held"], second["held"]) < alone["held"]


def test_checkpoints_are_read_by_any_layout_to_the_same_bits(runs, tmp_path):
    assert same(runs / "interleaved-alone", runs / "alone-to-two")
    assert same(runs / "interleaved-two", runs / "two-to-rows") and same(runs / "two-to-rows", runs / "rows-to-two")
    RunFolder.create(tmp_path / "again")
    copied(trainer_of(config_of("interleaved"), ALONE), runs / "interleaved-two", tmp_path / "again")
    assert same(runs / "interleaved-two", tmp_path / "again") and not same(runs / "interleaved-two", runs / "interleaved-alone")


@pytest.mark.parametrize("layout", MADE)
def test_a_rank_makes_its_part_alone_with_the_values_of_one_process(runs, layout):
    for rank in ("0", "1"):
        made = json.loads((runs / f"report-{rank}.json").read_text())[layout]
        assert made["same"]
        # A tensor that is drawn, beside the one before it.
        assert made["kept"] <= made["peak"] <= made["kept"] + 2 * made["largest"] + 4096 < made["kept"] + made["whole"]
        if layout in ("stages", "experts"):
            assert made["peak"] < made["whole"]
