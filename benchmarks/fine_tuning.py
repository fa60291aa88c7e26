"""Fine-tuning beside its peers, LoRA beside full fine-tuning, and what a frozen base is held in.

Each figure is one resumable command:

    python -m benchmarks.fine_tuning speed --run RUN --hf FOLDER --data CHATS... --out FOLDER
    python -m benchmarks.fine_tuning methods --run RUN --data MEDQUAD --budget 10m --out FOLDER
    python -m benchmarks.fine_tuning bases --run RUN --data MEDQUAD --out FOLDER

Every arm is a process of its own and leaves ARM.json in the folder; an arm that is there is not run again. RUN and FOLDER are the same
model, imported and as transformers loads it. MEDQUAD has rows with "focus", "question" and "answer".
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

ROWS, LENGTH = 8, 512
STEPS = {"ours": 8, "peers": 2}
"""Timed steps; the first step of each side is not among them."""
ARM_S = 1200
"""Seconds after which an arm of `speed` is given up."""
RANK, ALPHA = 16, 32
PRECISIONS = ("autocast", "bfloat16", "float32")
OURS = (
    *((method, micro, again, "") for method in ("lora", "full") for micro in (2, 8) for again in (False, True)),
    *(("lora", 2, False, base) for base in ("float32", "int8", "int4")),
    *(("full", 2, again, "float32") for again in (False, True)),
)
"""Arms of `speed`: method, micro-batch, recomputation, what the base (full: weights and averages) is held in where not as by default."""
PEERS = (
    *(("loop", "lora", precision, micro, False) for precision in PRECISIONS for micro in (2, 8)),
    *(("loop", "lora", "autocast", micro, True) for micro in (2, 8)),
    *(("trl", "lora", "autocast", micro, again) for micro in (8, 2) for again in (False, True)),
    *(("loop", "full", "autocast", micro, False) for micro in (2, 8)),
    *(("trl", "full", "autocast", micro, again) for micro in (8, 2) for again in (False, True)),
)
"""Trainer, method, precision, micro-batch, gradient checkpointing."""
RATES = {"lora": ("3e-4", "1e-3", "3e-3"), "full": ("3e-5", "1e-4", "3e-4"), "esft": ("1e-4", "3e-4", "1e-3")}
"""Learning rates of each method; esft is for mixtures alone."""
HELD_OUT = 0.05
BASES = ("float32", "bfloat16", "int8", "int4")
BATCH, SCORED = 2, 8
"""Of the comparison of bases: rows of a step, rows that are scored and not learnt."""
ROUNDS = 4
"""How often each base has its turn where they are timed beside each other."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.fine_tuning")
    parser.add_argument("figure", choices=("speed", "methods", "bases", "peer", "base", "turns"))
    parser.add_argument("--run", help="the imported model")
    parser.add_argument("--hf", help="the same model as transformers loads it")
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--budget", default="10m")
    parser.add_argument("--only", nargs="*", help="arms whose names begin so; default: all")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--trainer", default="loop")
    parser.add_argument("--precision", default="autocast")
    parser.add_argument("--micro", type=int, default=ROWS)
    parser.add_argument("--rows", type=int, default=ROWS, help=f"of a batch; default: {ROWS}")
    parser.add_argument("--length", type=int, default=LENGTH, help=f"tokens of a row; default: {LENGTH}")
    parser.add_argument("--timed", type=int, help="timed steps of an arm of `speed`; default: 8 of ours, 2 of theirs")
    parser.add_argument("--recompute", action="store_true")
    parser.add_argument("--base", choices=BASES)
    parser.add_argument("--steps", type=int, default=30, help="updates beside each base; default: 30")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    figures = {"speed": speed, "methods": methods, "bases": bases, "peer": peer, "base": base, "turns": turns}
    figures[options.figure](options)


def stored(options: argparse.Namespace, arm: str, run) -> dict | None:
    """The result of an arm: what its file holds, or what `run()` gives, which is kept. None: not asked for."""
    file = options.out / f"{arm}.json"
    if file.exists():
        return json.loads(file.read_text())
    if options.only and not any(arm.startswith(name) for name in options.only):
        return None
    print(f"--- {arm}", flush=True)
    result = run()
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1))
    beside.replace(file)
    return result


def sparing(*arguments: object) -> dict:
    """The JSON of a verb in a process of its own."""
    done = subprocess.run([sys.executable, "-m", "sparing", *map(str, arguments), "--json"], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


# speed and memory


def speed(options: argparse.Namespace) -> None:
    """Tokens per second of training steps, and the peak of resident memory, of --rows rows of --length tokens in a batch: ours and theirs
    by method, micro-batch and recomputation (gradient checkpointing)."""
    rows, peers = [], []
    for setting in OURS:
        method, micro, again, base = setting
        arm = f"ours-{method}-{micro}" + ("-again" if again else "") + (f"-{base}" if base else "")
        rows.append((arm, setting[:3], stored(options, arm, lambda setting=setting: ours(options, *setting))))
    for setting in PEERS if options.hf else ():
        trainer, method, precision, micro, again = setting
        arm = f"{trainer}-{method}-{precision}-{micro}" + ("-again" if again else "")
        peers.append((arm, (method, micro, again), stored(options, arm, lambda setting=setting: theirs(options, *setting))))
    done = [(kind, row) for _, kind, row in peers if row and "failed" not in row]
    for arm, kind, row in [*rows, *peers]:
        if row and "failed" in row:
            print(f"{arm:>28}  failed: {row['failed']}")
        elif row:
            told = f"{arm:>28}  {row['tokens_per_s']:6.0f} tokens/s  {row['memory_bytes'] / 2**20:6.0f} MiB  loss {row['loss']:.3f}"
            if arm.startswith("ours") and (speeds := [peer["tokens_per_s"] for other, peer in done if other[0] == kind[0]]):
                told += f"  {row['tokens_per_s'] / max(speeds):.1f} x the speed of their fastest"
            if arm.startswith("ours") and (memory := [peer["memory_bytes"] for other, peer in done if other == kind]):
                told += f", {row['memory_bytes'] / min(memory):.2f} of the memory of their smallest at this micro-batch"
            print(told)


def ours(options: argparse.Namespace, method: str, micro: int, again: bool, base: str) -> dict:
    """A run of `sparing sft`, without its first step: memory of its training, and of the whole process; the update of its loss."""
    out = options.out / f"run-{time.time_ns()}"
    settings = {
        "seq-len": options.length, "batch-size": options.rows, "micro-batch-size": min(micro, options.rows), "recompute": again, "evals": 0,
        "eval-bytes": 2000,
    }  # fmt: skip
    own = [part for name, value in settings.items() for part in (f"--train.{name}", str(value).lower())]
    if method == "full" and base:
        own += ["--precision.weights", base, "--precision.moments", base]
    elif base:
        own += ["--adapter.base", base]
    budget = f"{((options.timed or STEPS['ours']) + 1) * options.rows * options.length}tok"
    call = ("sft", options.run, "--data", *options.data, "--method", method, "--budget", budget, "--out", out, "--samples", 0)
    result = sparing(*call, *own)
    stages = {stage["stage"]: stage["memory_bytes"] or 0 for stage in sparing("receipt", out)["stages"]}
    memory = {"memory_bytes": stages["train"], "whole_bytes": max(stages.values()), "stages": stages}
    steps = [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if "lr" in line]
    seconds = steps[-1]["seconds"] - steps[0]["seconds"]
    return {"tokens_per_s": (steps[-1]["tokens"] - steps[0]["tokens"]) / seconds, "loss": result["loss"], **memory}


def theirs(options: argparse.Namespace, trainer: str, method: str, precision: str, micro: int, again: bool) -> dict:
    """A process of `peer`; what came of it, or why nothing did."""
    call = [sys.executable, "-m", "benchmarks.fine_tuning", "peer", "--hf", options.hf, "--run", options.run, "--data", *options.data]
    call += ["--method", method, "--trainer", trainer, "--precision", precision, "--micro", str(min(micro, options.rows))]
    call += ["--rows", str(options.rows), "--length", str(options.length), "--out", str(options.out)]
    call += [*(["--recompute"] if again else []), *(["--timed", str(options.timed)] if options.timed else [])]
    try:
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, timeout=ARM_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"not ready after {ARM_S} s"}
    last = done.stdout.strip().splitlines()[-1:] if done.returncode == 0 else []
    return json.loads(last[0]) if last else {"failed": f"exit status {done.returncode}"}


def packed(options: argparse.Namespace, count: int, batch: int):
    """The feed of `count` rows of --length tokens or more, `batch` a step: four conversations a row fill it."""
    from sparing.base.config_file import read_config
    from sparing.base.run import RunFolder
    from sparing.data.answers import Cutting
    from sparing.data.chat import ChatTemplate, template_text
    from sparing.data.chats import chats
    from sparing.data.packed import Packed
    from sparing.data.tokenizer import Tokenizer

    run = RunFolder.open(options.run)
    tokenizer = Tokenizer.load(run.tokenizer_file, read_config(run.config_file).tokens)
    some = (chat for _, chat in zip(range(4 * count), chats(options.data), strict=False))
    pieces = Cutting(ChatTemplate(template_text(run)), tokenizer, options.length).pieces(some)
    return Packed(pieces, options.length, batch, pad_id=tokenizer.eot_id)


def rows_of(options: argparse.Namespace, count: int):
    """(count, length) token ids and labels: the rows that ours trains on."""
    import torch

    batch = packed(options, 10 * count, count).batch(0)
    labels = torch.full_like(batch.tokens, -100)
    labels[:, 1:] = batch.targets[:, :-1, 0]  # transformers shifts them itself
    return batch.tokens, labels


def peer(options: argparse.Namespace) -> None:
    """One setting of transformers with PEFT: a plain loop, or TRL's SFTTrainer; prints one line of JSON."""
    import torch
    from transformers import AutoModelForCausalLM

    tokens, labels = rows_of(options, options.rows)
    kind = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.hf, dtype=kind, attn_implementation="sdpa")
    if options.method == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM"))
    rate = 1e-3 if options.method == "lora" else 1e-4
    if options.recompute:
        model.gradient_checkpointing_enable()
    model.train()
    steps, times, losses = options.timed or STEPS["peers"], [], []
    if options.trainer == "trl":
        times, losses = _trl(model, options, tokens, labels, rate)
    else:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, fused=True)
        counted = int((labels != -100).sum())
        for _ in range(1 + steps):
            before, total = time.perf_counter(), 0.0
            for start in range(0, options.rows, options.micro):
                part = slice(start, start + options.micro)
                with torch.autocast("cpu", torch.bfloat16) if options.precision == "autocast" else nullcontext():
                    loss = model(input_ids=tokens[part], labels=labels[part], use_cache=False, num_items_in_batch=counted).loss
                loss.backward()
                total += float(loss)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            times.append(time.perf_counter() - before)
            losses.append(total)
    peak = resident_peak()
    best = sorted(times[1:])[len(times[1:]) // 2]
    print(json.dumps({"tokens_per_s": tokens.numel() / best, "memory_bytes": peak, "loss": losses[-1], "seconds": times}))


def resident_peak() -> int:
    """Bytes, of this process so far."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


def _trl(model, options: argparse.Namespace, tokens, labels, rate: float) -> tuple[list[float], list[float]]:
    """Times and losses of the steps of TRL's SFTTrainer on the same rows."""
    import torch
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Watch(TrainerCallback):
        def __init__(self):
            self.times, self.losses = [], []

        def on_step_begin(self, *_args, **_kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, *_args, **_kwargs):
            self.times.append(time.perf_counter() - self.begun)

        def on_log(self, _args, _state, _control, logs=None, **_kwargs):
            if "loss" in (logs or {}):
                self.losses.append(logs["loss"])

    watch = Watch()
    columns = {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
    data = Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
    config = SFTConfig(
        output_dir=str(options.out / "trl"), per_device_train_batch_size=options.micro, max_length=options.length,
        gradient_accumulation_steps=options.rows // options.micro, max_steps=1 + (options.timed or STEPS["peers"]),
        learning_rate=rate, use_cpu=True, bf16=options.precision == "autocast", optim="adamw_torch_fused",
        gradient_checkpointing=options.recompute, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True,
        dataset_kwargs={"skip_prepare_dataset": True}, remove_unused_columns=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(options.hf)
    from transformers import default_data_collator

    trainer = SFTTrainer(
        model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[watch], data_collator=default_data_collator
    )
    trainer.train()
    return watch.times, watch.losses


# what a frozen base is held in


def bases(options: argparse.Namespace) -> None:
    """Memory and held-out loss of --steps updates beside each kind of base, each in a process of its own, and CPU
    seconds of a pass over BATCH rows, all in one process by turns. One thread."""

    def worker(*arguments: str) -> dict:
        call = [sys.executable, "-m", "benchmarks.fine_tuning", *arguments, "--run", options.run]
        call += ["--data", *options.data, "--out", str(options.out), "--steps", str(options.steps)]
        done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])

    rows = {kind: stored(options, f"base-{kind}", lambda kind=kind: worker("base", "--base", kind)) for kind in BASES}
    times = stored(options, "turns", lambda: worker("turns"))
    for kind, row in rows.items():
        if row:
            speed = f"{BATCH * options.length / times[kind]:6.0f} tokens per CPU second" if times else ""
            memory = f"{row['memory_bytes'] / 2**20:6.0f} MiB at the peak, {row['held_bytes'] / 2**20:5.1f} held"
            print(f"{kind:>9}  {memory}  answers {row['before']:.4f} -> {row['after']:.4f} nats  {speed}")


def _adapted(options: argparse.Namespace, kind: str):
    """The run's model held in `kind` with updates beside it, in training."""
    import torch

    from sparing.base.config import AdapterConfig
    from sparing.base.config_file import read_config
    from sparing.base.run import RunFolder, run_tensors
    from sparing.kernels import native
    from sparing.model.low_rank import add_low_rank, fill_frozen
    from sparing.model.transformer import Transformer

    torch.set_num_threads(1)
    native.open_pool()  # as a run that goes on from another one does
    run = RunFolder.open(options.run)
    model = Transformer(read_config(run.config_file).model)
    fill_frozen(model, run_tensors(run), None if kind == "float32" else kind, run)
    add_low_rank(model, AdapterConfig(RANK, ALPHA), 0)
    model.compute_dtype = torch.bfloat16
    return model.train()


def _kernels() -> str:
    """The same on a busy machine, where measuring which are fastest would not be."""
    from sparing.kernels import native

    return next(path for path in ("tiles", "vectors", "compiled", "plain") if native.can(path))


def base(options: argparse.Namespace) -> None:
    """One kind of base; prints one line of JSON."""
    from sparing.base.config import OptimConfig
    from sparing.kernels import native
    from sparing.resolve import ADAPTER_OPTIM
    from sparing.train.objective import NextToken
    from sparing.train.optim import Optimizer
    from sparing.train.replicas import Replicas

    feed, model = packed(options, SCORED + options.steps * BATCH, BATCH), _adapted(options, options.base)
    held = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    replicas = Replicas(model, NextToken(model.config), kernels=_kernels())
    optimizer = Optimizer(model, OptimConfig(**ADAPTER_OPTIM))
    scored = feed.rows(range(SCORED))

    def score() -> float:
        replicas.train(False)
        rows = [scored[start : start + BATCH] for start in range(0, SCORED, BATCH)]
        with native.path(replicas.kernels):
            nll = sum(float(model.nll(row.tokens, row.targets[..., 0], row.documents).sum()) for row in rows)
        replicas.train(True)
        return nll / int((scored.targets != -100).sum())

    before, losses = score(), []
    for step in range(options.steps):
        losses.append(float(replicas.gradients(feed.batch(SCORED // BATCH + step))[0]))
        optimizer.step(1 - step / options.steps, 0.95)
    peak = resident_peak()
    print(json.dumps({"held_bytes": held, "memory_bytes": peak, "before": before, "after": score(), "losses": losses}))


def turns(options: argparse.Namespace) -> None:
    """CPU seconds of a forward and backward pass over BATCH rows beside each kind of base, medians of ROUNDS, as JSON."""
    from statistics import median

    from sparing.train.objective import NextToken
    from sparing.train.replicas import Replicas

    batch = packed(options, SCORED + BATCH, BATCH).batch(SCORED // BATCH)
    models = {kind: _adapted(options, kind) for kind in ([options.base] if options.base else BASES)}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(1 + ROUNDS):
        for kind, model in models.items():
            began = time.process_time()
            Replicas(model, NextToken(model.config), kernels=_kernels()).gradients(batch)
            times[kind].append(time.process_time() - began)
    medians = {kind: median(seconds[1:]) for kind, seconds in times.items()}
    print(json.dumps(medians | {"kernels": _kernels(), "all": times}))


# LoRA and full fine-tuning


def methods(options: argparse.Namespace) -> None:
    """What each method gains on held-out questions in equal minutes, at three learning rates each."""
    from sparing.base.config_file import read_config
    from sparing.base.layers import mixtures

    mixture = bool(mixtures(read_config(Path(options.run) / "config.toml").model))
    train, val = options.out / "train.jsonl", options.out / "val.jsonl"
    if not val.exists():
        split(options.data[0], train, val)
    best: dict[str, float] = {}
    for method, rates in RATES.items():
        for rate in rates if mixture or method != "esft" else ():
            out = options.out / f"{method}-{rate}"

            def tune(method=method, rate=rate, out=out) -> dict:
                if (out / "config.toml").exists():
                    return sparing("resume", out)
                own = ["--optim.lr", rate]
                for name in ("embed", "head", "norm", "router") if method == "full" else ():
                    own += [f"--optim.lr-{name}", rate]
                call = ("--data", train, "--val", val, "--method", method, "--budget", options.budget, "--samples", 0, *own)
                return sparing("sft", options.run, *call, "--out", out)

            result = stored(options, f"{method}-{rate}", tune)
            if result:
                before, after = result["before"]["new"]["loss"], result["after"]["new"]["loss"]
                best[method] = max(best.get(method, -1.0), before - after)
                old = result["before"].get("old", {}).get("loss"), result["after"].get("old", {}).get("loss")
                told = f"{result['trainable_parameters']:,} parameters, {result['tokens']:,} tokens, {result['trained_tokens']:,} trained"
                print(f"{method:>6} {rate:>6}  answers {before:.4f} -> {after:.4f} nats, old text {old[0]:.3f} -> {old[1]:.3f}; {told}")
    for method in best.keys() - {"full"} if "full" in best else ():
        print(f"{method} reaches {best[method] / best['full']:.1%} of full fine-tuning's gain")


def split(file: str, train: Path, val: Path) -> None:
    """Questions about 5 % of the subjects, by a hash of their names, are held out."""
    parts: dict[bool, list[str]] = {True: [], False: []}
    with open(file, encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            digest = hashlib.blake2b(str(row["focus"]).encode(), digest_size=8).digest()
            pair = {"prompt": row["question"], "completion": row["answer"]}
            parts[int.from_bytes(digest, "little") < HELD_OUT * 2**64].append(json.dumps(pair) + "\n")
    train.write_text("".join(parts[False]))
    val.write_text("".join(parts[True]))


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main(sys.argv[1:])
