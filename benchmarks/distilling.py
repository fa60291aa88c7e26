"""Distillation beside no teacher, and drafting by a module that was trained beside a frozen model.

Each figure is one resumable command:

    python -m benchmarks.distilling students --data BOOKS --teacher 20m --budget 5m --out FOLDER
    python -m benchmarks.distilling drafts --run RUN --data BOOKS CODE --val BOOKS_VAL CODE_VAL --budget 30m --out FOLDER

Every arm is a process of its own and leaves ARM.json in the folder; an arm that is there is not run again.

`students`: a teacher is trained on --data for --teacher, then students of a smaller shape from noise, on the same text with the same
tokenizer: by its draws, with several shares of the text's own word; without a teacher for as many tokens; and without a teacher for as
much time as asking and learning took together. --run names a teacher that is there instead.
`drafts`: a module for --run is trained for --budget on --data. Then the engine continues beginnings of each of --val with drafts and
without, greedily and at temperature 0.8.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

TRUTHS = (0.0, 0.2, 0.5)
"""Shares of the loss that are of the text's own word."""
STUDENT = {"hidden_size": 128, "num_layers": 4, "num_heads": 2, "num_dense_layers": 4}
TEACHER = {"hidden_size": 320, "num_layers": 6, "num_heads": 5, "num_dense_layers": 6, "vocab_size": 4096}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.distilling")
    parser.add_argument("figure", choices=("students", "drafts"))
    parser.add_argument("--run", help="students: a teacher that is there; drafts: the model that gets a module")
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--val", nargs="+", default=[], help="drafts: texts whose beginnings are continued")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher", default="20m", help="budget of the teacher")
    parser.add_argument("--budget", default="5m", help="of a student and of asking its teacher; of the module")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--weights", default="int8", help="drafts: number format of the weights")
    parser.add_argument("--prompts", type=int, default=40, help="drafts: beginnings of each text")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    {"students": students, "drafts": drafts}[options.figure](options)


def stored(options: argparse.Namespace, arm: str, run: Callable[[], dict]) -> dict:
    """The result of an arm: what its file holds, or what `run()` gives, which is kept."""
    file = options.out / f"{arm}.json"
    if file.exists():
        return json.loads(file.read_text())
    print(f"--- {arm}", flush=True)
    result = run()
    beside = file.with_suffix(".tmp")
    beside.write_text(json.dumps(result, indent=1))
    beside.replace(file)
    return result


def made_by(options: argparse.Namespace, arm: str, *arguments: object) -> dict:
    """The result of the arm that a verb makes, as the run ARM; where an earlier process was interrupted, it goes on."""
    run = options.out / "runs" / arm
    words = ["resume", run] if (run / "config.toml").exists() else [*arguments, "--out", run, "--samples", "0"]
    return stored(options, arm, lambda: sparing(*words))


def sparing(*arguments: object) -> dict:
    """The JSON of a verb, in a process of its own."""
    command = [sys.executable, "-m", "sparing", *map(str, arguments), "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def shape(model: dict) -> list[str]:
    return [word for name, value in model.items() for word in (f"--model.{name.replace('_', '-')}", str(value))]


def students(options: argparse.Namespace) -> None:
    """Held-out bits per byte, and perplexity (of a token) beside that of the student that had no teacher."""
    data, teacher = ["--data", *options.data], options.run
    if teacher is None:
        words = ["train", *data, "--budget", options.teacher, *shape(TEACHER)]
        made = made_by(options, "teacher", *words)
        teacher = options.out / "runs" / "teacher"
        print(f"teacher: {made['bpb']:.4f} bits per byte, {made['parameters'] / 1e6:.1f} M parameters, {made['tokens'] / 1e6:.2f} M tokens")
    recipe = options.out / "student.toml"
    recipe.write_text("[model]\n" + "".join(f"{name} = {value}\n" for name, value in STUDENT.items()))
    tokenizer = ["--data.tokenizer", Path(teacher) / "tokenizer.json"]
    for seed in range(options.seeds):
        words = [*data, "--seed", seed]
        taught = {}
        for truth in TRUTHS:
            arm = f"taught-{truth:g}-{seed}"
            more = ["--teacher", teacher, "--budget", options.budget, "--distill.truth", truth]
            taught[truth] = made_by(options, arm, "distill", recipe, *words, *more)
        tokens = max(row["tokens"] for row in taught.values())
        alone = {}
        for name, budget in (("tokens", f"{tokens}tok"), ("time", options.budget)):
            arm, more = f"alone-{name}-{seed}", [*tokenizer, "--budget", budget]
            alone[name] = made_by(options, arm, "train", recipe, *words, *more)
        print(f"seed {seed}: student of {alone['time']['parameters'] / 1e6:.2f} M parameters")
        rows = {f"taught, truth {truth:g}": row for truth, row in taught.items()}
        for name, row in (rows | {f"alone, equal {name}": row for name, row in alone.items()}).items():
            ratio, cost = math.exp(row["eval_loss"] - alone["tokens"]["eval_loss"]), ""
            if asked := row.get("teacher"):
                size, top = asked["cache_bytes"] / 1e6, asked["cache_bytes"] / asked["top_128_bytes"]
                cost = f"; teacher {asked['seconds']:,.0f} s, {size:.1f} MB ({top:.3f} of top-128)"
            beside = f"perplexity × {ratio:.4f}  {row['tokens'] / 1e6:.2f} M tokens  {row['seconds']:,.0f} s{cost}"
            print(f"{name:>22}  {row['bpb']:.4f} bpb  {beside}")


def drafts(options: argparse.Namespace) -> None:
    """Decoding speed with drafts and without, acceptance, of texts behind beginnings of held-out text; all texts must be the same."""
    more = ["--mtp", "--data", *options.data, "--budget", options.budget]
    trained = made_by(options, "module", "distill", options.run, *more)
    agreement = trained["after"]["drafts"]["agreement"]
    size = f"{trained['trainable_parameters'] / 1e6:.2f} M parameters, {trained['tokens'] / 1e6:.2f} M tokens"
    print(f"module: {size}, agreement {agreement:.3f}")
    for path in options.val:
        for temperature in (0, 0.8):
            words = ["--run", options.out / "runs/module", "--data", path, "--weights", options.weights, "--temperature", temperature]
            words += ["--prompts", options.prompts]
            arm = f"{Path(path).stem}-{options.weights}-{temperature}"
            rows = stored(options, arm, lambda words=words: sparing("bench", "infer", "drafts", *words))["rows"]
            speed, accepted = rows[0], rows[1]
            print(f"{arm}: {speed['ours'] / speed['peer']:.3f} times as fast, {accepted['ours']:.1%} of drafts accepted")


if __name__ == "__main__":
    main(sys.argv[1:])
