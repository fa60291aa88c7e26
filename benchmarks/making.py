"""Memory of two ranks until they have made a mixture's weights: each makes the whole model and keeps its part, or makes its part alone, as
`launch` does. What is in --out is not done again.

    python -m benchmarks.making --out FOLDER

A row is the fullest rank's peak of resident memory (Linux, VmHWM) over what its process had before it made anything.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.fsdp
import torch.distributed.pipelining
import tyro
from torch.distributed.tensor import DTensor

from sparing.base.config import Config, ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from sparing.base.rank import Rank
from sparing.bench.results import stored_result
from sparing.model.init import init_weights, initial, unfilled
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import Ranks
from sparing.train.objective import NextToken
from sparing.train.trainer import Trainer

RANKS = 2
MODEL = ModelConfig(
    vocab_size=4096, hidden_size=384, num_layers=5, num_dense_layers=1, intermediate_size=1024, num_heads=6, q_lora_rank=128,
    kv_lora_rank=64, n_routed_experts=32, moe_intermediate_size=384,
)  # fmt: skip
TRAIN = TrainConfig(seq_len=32, batch_size=4, micro_batch_size=1, dtype="float32", kernels="plain", threads=1, replicas=1, compile=False)
LAYOUTS = {
    "stages": ParallelConfig("optimizer", stages=2),
    "experts": ParallelConfig("optimizer", experts=2),
    "weights": ParallelConfig("weights"),
    "weights, experts": ParallelConfig("weights", experts=2),
}


@dataclass
class Making:
    """Measure the memory that it takes to begin."""

    out: str
    """Folder for the result."""

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json: peaks in bytes, by layout and by what a rank makes."""
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        result: dict = {layout: {} for layout in LAYOUTS}
        for layout, found in result.items():
            for what in ("part", "whole"):
                file = folder / f"{what}-{layout.replace(', ', '-')}.json"
                found[what] = stored_result(file, lambda layout=layout, what=what: peaks(layout, what))
        result["weights_bytes"] = sum(4 * tensor.numel() for tensor in unfilled(MODEL).state_dict().values())
        (folder / "result.json").write_text(json.dumps(result, indent=1))
        return result


def peaks(layout: str, what: str) -> dict[str, int]:
    """Of the fullest rank."""
    forks = multiprocessing.get_context("fork")  # nothing was computed here, and what is imported is imported once
    with tempfile.TemporaryDirectory() as folder:
        ranks = [forks.Process(target=rank, args=(number, layout, what, folder)) for number in range(RANKS)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        every = [json.loads(Path(folder, f"{number}.json").read_text()) for number in range(RANKS)]
    return {name: max(one[name] for one in every) for name in every[0]}


def rank(number: int, layout: str, what: str, folder: str) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    world = Ranks(Rank(number, RANKS), torch.distributed.FileStore(f"{folder}/store", RANKS))
    config = Config(model=MODEL, train=TRAIN, optim=OptimConfig(matrix="adamw"), parallel=LAYOUTS[layout])
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (man 5 proc)
    before, objective = resident(), NextToken.of(config)
    if what == "whole":
        model = Transformer(MODEL)
        init_weights(model, 0)
        trainer = Trainer(model, None, objective, world, config=config)
    else:
        parts = {"device": torch.device("cpu"), "tensors": initial(MODEL, 0)}
        trainer = Trainer(unfilled(MODEL), None, objective, world, config=config, **parts)
    peak = resident() - before
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in weights_of(trainer)}
    Path(folder, f"{number}.json").write_text(json.dumps({"peak": peak, "kept": sum(held.values())}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def weights_of(trainer: Trainer) -> Iterator[torch.Tensor]:
    """What a rank has of the weights, those that it updates for others too."""
    for tensor in (*trainer.model.state_dict().values(), *trainer.owners.mine.values()):
        yield tensor.to_local() if isinstance(tensor, DTensor) else tensor


def resident() -> int:
    """Peak of this process's resident memory, bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) << 10


def lines(result: dict) -> Iterator[str]:
    """The figure as text."""
    yield f"{result['weights_bytes'] / 1e6:,.0f} MB of weights; of the fuller rank, in MB"
    for layout in LAYOUTS:
        whole, part = (result[layout][what] for what in ("whole", "part"))
        told = ", ".join(f"{name} {one['peak'] / 1e6:,.0f}" for name, one in (("whole first", whole), ("its part alone", part)))
        yield f"{layout:>18}: keeps {part['kept'] / 1e6:,.0f}, peak {told}"


if __name__ == "__main__":
    for line in lines(tyro.cli(Making)()):
        print(line)
