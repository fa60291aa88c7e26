"""Two ranks beside two threads of one process, and the bytes that ranks send. One resumable command; what is in --out is not done again.

    python -m benchmarks.scaling --data BOOKS --out FOLDER

Speed: a dense model and a mixture of a few million parameters, for --budget, as one process with two threads and as two ranks of one thread
in each layout, in turn, --rounds times. Each chooses its own micro-batch, threads and kernels, as `train` does (calibration is not timed).
Tokens a second are the median of a run's steps; a ratio is of runs of one round, and its median is over rounds.

Bytes: a step of two real ranks (gloo) in each layout, counted at the collectives, all ranks together, beside `budget/ranks.py`.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from benchmarks.arms import kept, made
from benchmarks.collectives import Counter
from sparing.base.config import Config, ModelConfig, ParallelConfig, TrainConfig
from sparing.base.files import read_lines
from sparing.base.messages import say
from sparing.base.rank import Rank
from sparing.base.run import RunFolder
from sparing.bench.results import stored_result
from sparing.budget.ranks import sent_by_all
from sparing.data.loader import Batch
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import Ranks
from sparing.train.objective import NextToken
from sparing.train.trainer import Trainer

SHAPE = {"vocab_size": 4096, "hidden_size": 192, "num_layers": 4, "num_heads": 3, "kv_lora_rank": 64, "q_lora_rank": 96}
MODELS = {
    "dense": SHAPE | {"num_dense_layers": 4, "intermediate_size": 768},
    "mixture": SHAPE | {"num_dense_layers": 1, "intermediate_size": 512, "n_routed_experts": 16, "moe_intermediate_size": 128},
}
LAYOUTS = {
    "nothing": ParallelConfig("nothing"),
    "optimizer": ParallelConfig("optimizer"),
    "weights": ParallelConfig("weights"),
    "experts": ParallelConfig("optimizer", 2),
    "stages": ParallelConfig("optimizer", stages=2),
}
RANKS = 2
SKIPPED = 3
"""Steps at the start of a run that are not timed."""


@dataclass
class Scaling:
    """Compare ranks with threads, and bytes with their formula."""

    out: str
    """Folder for runs and results."""
    data: str | None = None
    """Text to learn; none: bytes alone."""
    budget: str = "300ktok"
    """Of each run."""
    rounds: int = 5

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        result = {"bytes": self._bytes(folder), "speed": self._speed(folder) if self.data else {}}
        (folder / "result.json").write_text(json.dumps(result, indent=1))
        return result

    def _bytes(self, folder: Path) -> dict:
        found = {}
        for name, shape in MODELS.items():
            train = TrainConfig(seq_len=128, batch_size=8, micro_batch_size=2, kernels="plain", threads=1, replicas=1, compile=False)
            layouts = layouts_of(name)
            configs = [Config(model=ModelConfig(**shape), train=train, parallel=parallel) for parallel in layouts.values()]
            every = stored_result(folder / f"bytes-{name}.json", lambda configs=configs: {"layouts": count(configs)})["layouts"]
            for layout, config, one in zip(layouts, configs, every, strict=True):
                found[f"{name}, {layout}"] = {kind: [one.get(kind, 0), want] for kind, want in sent_by_all(config, RANKS).items()}
        return found

    def _speed(self, folder: Path) -> dict:
        rows: dict[str, dict] = {}
        for name, shape in MODELS.items():
            recipe = folder / f"{name}.toml"
            recipe.write_text("[model]\n" + "".join(f"{key} = {value}\n" for key, value in shape.items()))
            arms = {"threads": (), **{layout: _words(parallel) for layout, parallel in layouts_of(name).items()}}
            speeds: dict[str, list[float]] = {arm: [] for arm in arms}
            for number in range(self.rounds):
                for arm in list(arms) if number % 2 == 0 else list(reversed(arms)):
                    run = f"{name}-{arm}-{number}"
                    command = ("train", str(recipe), "--data", self.data, "--budget", self.budget, *arms[arm])
                    if arm == "threads":
                        made(folder, run, *command)
                    else:  # a run that was interrupted goes on by the same command
                        launched = ("launch", "-n", str(RANKS), *command, "--out", str(folder / run), "--samples", "0")
                        kept(folder, f"{run}-made", *launched)
                    speeds[arm].append(speed_of(folder / run))
                    say(f"{name}, {arm}, round {number}: {speeds[arm][-1]:,.0f} tokens/s")
            for arm, each in speeds.items():
                ratios = [ours / threads for ours, threads in zip(each, speeds["threads"], strict=True)]
                rows[f"{name}, {arm}"] = {"tokens_per_s": each, "ratios": ratios, "ratio": median(ratios)}
        return rows


def layouts_of(name: str) -> dict[str, ParallelConfig]:
    """Those that a model can have."""
    return {layout: parallel for layout, parallel in LAYOUTS.items() if name != "dense" or parallel.experts == 1}


def _words(parallel: ParallelConfig) -> tuple[str, ...]:
    return tuple(word for name, value in vars(parallel).items() for word in (f"--parallel.{name}", str(value)))


def speed_of(run: Path) -> float:
    """Tokens a second of a run: the median of its steps."""
    steps = [line for line in read_lines(RunFolder(run).path / "metrics.jsonl") if "loss" in line and "tokens_per_s" in line]
    return median(line["tokens_per_s"] for line in steps[SKIPPED:])


def count(configs: Sequence[Config]) -> list[dict[str, int]]:
    """Bytes by kind of collective of one step of each configuration, all of RANKS real ranks together."""
    import torch.multiprocessing as processes

    with tempfile.TemporaryDirectory() as folder:
        processes.spawn(_rank, (list(configs), folder), nprocs=RANKS)
        every = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(RANKS)]
    return [{kind: sum(one.get(kind, 0) for one in each) for kind in set().union(*each)} for each in zip(*every, strict=True)]


def _rank(number: int, configs: list[Config], folder: str) -> None:
    """One of the processes."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    world = Ranks(Rank(number, RANKS), torch.distributed.FileStore(f"{folder}/store", RANKS))
    Path(folder, f"{number}.json").write_text(json.dumps([counted(config, world) for config in configs]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def counted(config: Config, world: Ranks) -> dict[str, int]:
    """Bytes by kind of collective of one step of this rank, on drawn tokens."""
    c, t = config.model, config.train
    model = Transformer(c)
    init_weights(model, 0)
    trainer = Trainer(model, None, NextToken.of(config), world, config=config)
    part, parts, _ = trainer.rows
    draw = torch.Generator().manual_seed(part)
    words = torch.randint(c.vocab_size, (t.batch_size // parts, t.seq_len, 2 + c.mtp_depth), generator=draw)
    with Counter().counting() as counter:
        norm = trainer.gradients(Batch(words[..., 0].contiguous(), words[..., 1:].contiguous()))["grad_norm"]
        trainer.update(norm, 1.0, 0.9)
    return counter.by_name()


def lines(result: dict) -> Iterator[str]:
    """The figure as text."""
    for name, kinds in result["bytes"].items():
        told = "; ".join(f"{kind} {count:,} ({count / want - 1:+.2%})" for kind, (count, want) in kinds.items())
        yield f"{name}: bytes of a step, both ranks (beside the formula): {told}"
    for name, row in result["speed"].items():
        each = ", ".join(f"{speed:,.0f}" for speed in row["tokens_per_s"])
        yield f"{name}: {each} tokens/s; {row['ratio']:.2f} times the threads'"


if __name__ == "__main__":
    for line in lines(tyro.cli(Scaling)()):
        print(line)
