"""A tiny real run for the tests of train/: real model, real tokens, seconds long. Also a program that tests start and kill."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

STARTED = time.monotonic()  # a budget counts the time that importing takes

import torch  # noqa: E402

from sparing.base import preempt as preempt_module  # noqa: E402
from sparing.base.config import Budget, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, UserError  # noqa: E402
from sparing.base.preempt import SIGNALS, Interrupted, Preempt  # noqa: E402
from sparing.base.run import RunFolder  # noqa: E402
from sparing.data.loader import Batch, Loader  # noqa: E402
from sparing.data.prepare import prepare  # noqa: E402
from sparing.data.store import TokenStore  # noqa: E402
from sparing.evals.bpb import bpb  # noqa: E402
from sparing.model.init import init_weights  # noqa: E402
from sparing.model.transformer import Transformer  # noqa: E402
from sparing.train.objective import NextToken  # noqa: E402
from sparing.train.pace import Clock  # noqa: E402
from sparing.train.trainer import Session, Trainer  # noqa: E402

MODEL = ModelConfig(
    vocab_size=64, hidden_size=32, num_layers=2, num_dense_layers=1, intermediate_size=64, num_heads=2, q_lora_rank=16, kv_lora_rank=16,
    qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16, n_routed_experts=4, moe_intermediate_size=32, mtp_depth=1,
    max_position_embeddings=32,
)  # fmt: skip
TRAIN = TrainConfig(
    seq_len=32, batch_size=4, micro_batch_size=2, dtype="float32", threads=1, compile=False, evals=3, checkpoint_interval_s=0.2,
    kernels="compiled",  # left open, each process would measure which are fastest, and on a busy machine not find the same
)  # fmt: skip


class Counting:
    """Batches of a language that can be learnt: each document counts up from a random number. A pure function of the batch's number."""

    def __init__(self, config: Config):
        self.rows, self.length = config.train.batch_size, config.train.seq_len
        self.targets, self.words = 1 + config.model.mtp_depth, config.model.vocab_size

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        generator = torch.Generator().manual_seed(1000 + step)
        start = torch.randint(self.words, (self.rows, 1), generator=generator)
        noise = (torch.rand(self.rows, self.length + self.targets, generator=generator) < 0.1).long()
        text = (start + torch.arange(self.length + self.targets) + noise) % self.words
        targets = torch.stack([text[:, 1 + k : 1 + k + self.length] for k in range(self.targets)], -1)
        documents = torch.arange(self.length).div(self.length // 2, rounding_mode="floor").expand(self.rows, -1).int()
        return Batch(text[:, : self.length], targets, documents)


def held_out(config: Config):
    """evaluate: the loss on batches that training never sees, as bits per word."""
    loader = Counting(config)

    def evaluate(nll) -> dict:
        total = 0.0
        for number in range(10_000, 10_004):
            batch = loader.batch(number)
            total += float(nll(batch.tokens, batch.targets[..., 0]).mean())
        return {"bpb": total / 4 / 0.6931471805599453, "tokens": 4 * batch.tokens.numel()}

    return evaluate


def config(budget: Budget, *, optim: OptimConfig | None = None, model: ModelConfig = MODEL, **changes) -> Config:
    return Config(model=model, optim=optim or OptimConfig(), train=TrainConfig(**(vars(TRAIN) | changes)), budget=budget)


def steps(number: int) -> Budget:
    """The token budget of so many steps."""
    return Budget(number * TRAIN.batch_size * TRAIN.seq_len, "tok")


def new_run(path: Path) -> RunFolder:
    run = RunFolder.create(path)
    run.config_file.write_text("# a test's run\n")
    return run


def fit(
    run: RunFolder, chosen: Config, *, loader=None, evaluate="held out", model=None, objective=None, preempt=None, started=None, **session
):
    """Train a run with the tiny model from its seed (or go on, where the run has a checkpoint)."""
    if model is None:
        model = Transformer(chosen.model)
        init_weights(model, chosen.train.seed)
    evaluate = held_out(chosen) if evaluate == "held out" else evaluate
    with run.lock(), preempt or Preempt(f"sparing resume {run}") as signals:
        clock = Clock(run, time.monotonic() if started is None else started)
        trainer = Trainer(model, loader or Counting(chosen), objective or NextToken.of(chosen), config=chosen)
        return trainer.fit(Session(run, clock, signals, **{"peak_flops": 1e10} | session), evaluate)


def corpus(root: Path) -> TokenStore:
    """A small corpus of real text, prepared once under `root`: the source of a few modules of the standard library."""
    files = tuple(str(Path(json.__file__).parent / name) for name in ("*.py", "../textwrap.py", "../string.py", "../bisect.py"))
    return prepare(DataConfig(paths=files, holdout_fraction=0.1, workers=1), vocab_size=384, root=root)


def bits_per_byte(store: TokenStore, documents: list[str]):
    """evaluate: the real one."""
    return lambda nll: bpb(nll, store.tokenizer, documents, TRAIN.seq_len, max_bytes=3000)


def main(argv: list[str], started: float) -> int:
    """Begin or resume a run on real text, as the verbs do. Slow parts make room for a signal, and say when they begin."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--interval", type=float, default=TRAIN.checkpoint_interval_s)
    parser.add_argument("--slow-eval", type=float, default=0.0)
    parser.add_argument("--slow-step", type=float, default=0.0)
    parser.add_argument("--tick", type=float, default=0.0, help="what a step takes on a clock that nothing else moves")
    parser.add_argument("--grace", type=float, help="how long a signal waits for the end of anything")
    parser.add_argument("--stuck", action="store_true", help="batch 3 takes minutes, in C code that no handler can interrupt")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args(argv)
    ticks = [0.0]
    if arguments.tick:
        time.monotonic = lambda: ticks[0]
        started = 0.0
    if arguments.grace:
        preempt_module.GRACE_S = preempt_module.SAVING_S = arguments.grace
    store = corpus(arguments.data)
    budget = Budget(arguments.seconds, "s") if arguments.seconds else steps(arguments.steps)
    chosen = config(
        budget, model=replace(MODEL, vocab_size=store.vocab_size), checkpoint_interval_s=arguments.interval, compile=arguments.compile
    )
    run = RunFolder.open(arguments.run) if (arguments.run / "config.toml").exists() else new_run(arguments.run)
    loader = Loader(store, TRAIN.seq_len, TRAIN.batch_size, MODEL.mtp_depth)
    evaluate = bits_per_byte(store, list(store.held_out()))

    def slow_evaluate(nll) -> dict:
        print("evaluating", flush=True)
        nap(arguments.slow_eval)
        return evaluate(nll)

    class Slow:
        def batch(self, step: int, rank: int = 0, world: int = 1):
            print("batch", step, flush=True)
            if arguments.stuck and step == 3:
                torch.linalg.svd(torch.randn(6000, 6000))
            nap(arguments.slow_step)
            ticks[0] += arguments.tick
            return loader.batch(step)

    try:
        with Preempt(f"sparing resume {run}") as preempt:
            fit(run, chosen, loader=Slow(), evaluate=slow_evaluate, preempt=preempt, started=started)
    except Interrupted as stop:
        for number in SIGNALS:  # as the command line does: from here on there is nothing left to interrupt
            signal.signal(number, signal.SIG_IGN)
        print(stop, file=sys.stderr)
        return 130
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def nap(seconds: float) -> None:
    """Sleep, a little at a time: a signal that comes just before a sleep does not end it, and is seen only after it."""
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        time.sleep(min(left, 0.05))


def zygote() -> None:
    """Serve a test: fork a process per command line read from stdin, so that only this one process waits for torch to be imported.

    {"argv": [...], "out": FILE} -> pid; {"wait": pid} -> exit status (negative: killed by that signal).
    """
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            file = os.open(request["out"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.exit(main(request["argv"], time.monotonic()))
        print(child, flush=True)


if __name__ == "__main__":
    zygote() if sys.argv[1:] == ["--zygote"] else sys.exit(main(sys.argv[1:], STARTED))
