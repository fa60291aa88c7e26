"""Selection for medicine from a pool of books, source code and a tenth of medical answers. One resumable command:

    python -m benchmarks.selection --books BOOKS --medicine MEDQUAD --tokens 8 --out FOLDER [--base RUN --base-tokens 0.4]

BOOKS is a folder of texts, MEDQUAD JSON lines with "focus" (the disease), "question" and "answer"; the source code is Python's standard
library. No disease is in two of these: what is scored at the end, the sample, the pool. The pool has --pool megabytes, equal parts books
and code beside the medicine, all as plain text; books and code are cut into documents of about 16 kB, so that a random order mixes them.

Students of one shape and one tokenizer learn from what `sparing data select` takes out of the pool:

    random         --tokens million tokens in random order, as many learnt
    random-half    half as many
    overlap        half as many, by n-gram overlap
    quality        half as many, by the quality model
    loss           with --loss, because scoring takes hours: half as many, by excess loss, under the student random-half minus under one
                   that went on from it with the sample for --passes passes. What both cost to train counts as selecting.

and each is scored in bits per byte of the medicine that nothing has read. With --base, so do copies of an imported model, such as SmolLM2,
that goes on with --base-tokens million tokens or half as many; they are scored on --base-scored megabytes, and so is the model as it is.
What is in FOLDER already is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.curation_pays import cut
from benchmarks.distilling import STUDENT, made_by, sparing, stored
from sparing.base.files import write_atomic
from sparing.curate.select import ESTIMATED
from sparing.data.files import find_files
from sparing.data.sources import documents

MEDICINE = 0.1
"""Of the pool's bytes."""
HALVES = ("random-half", "overlap", "quality")
SHAPE = STUDENT | {"vocab_size": 4096}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.selection")
    parser.add_argument("--books", required=True)
    parser.add_argument("--medicine", required=True, help="MEDQUAD")
    parser.add_argument("--tokens", type=float, default=8, help="millions, of the random order")
    parser.add_argument("--pool", type=float, default=60, help="megabytes")
    parser.add_argument("--sample", type=float, default=0.3, help="megabytes of medicine that say what is wanted")
    parser.add_argument("--scored", type=float, default=1, help="megabytes of medicine that are scored")
    parser.add_argument("--loss", action="store_true", help="the arm by excess loss too")
    parser.add_argument("--passes", type=float, default=4, help="loss: over the sample")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--base", help="the run of an imported model that goes on too")
    parser.add_argument("--base-tokens", type=float, default=0.4, help="millions, of its random order")
    parser.add_argument("--base-scored", type=float, default=0.2, help="megabytes of the medicine, for it")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = stored(options, "pool", lambda: prepare(options))
    if 1e6 * options.tokens * ESTIMATED > sum(sizes["pool"].values()):
        raise SystemExit(f"the pool is too small for {options.tokens:g} million tokens: {sizes['pool']} bytes")
    recipe = options.out / "student.toml"
    write_atomic(recipe, "[model]\n" + "".join(f"{name} = {value}\n" for name, value in SHAPE.items()))
    arms = ("random", *HALVES, *["loss"] * options.loss)
    for seed in range(options.seeds):
        rows = {arm: student(options, arm, seed, recipe) for arm in arms}  # the first one makes the tokenizer
        for arm, row in rows.items():
            show(arm, row, rows["random"])
        if options.base:
            before = scored(options, "base", options.base, options.base_scored)
            print(f"{'base':>16}  {before:.4f} bpb")
            rows = {arm: student(options, arm, seed, None) for arm in ("random", *HALVES)}
            for arm, row in rows.items():
                show(f"base {arm}", row, rows["random"])


def prepare(options: argparse.Namespace) -> dict:
    """Write the pool, the sample and what is scored; -> their bytes."""
    medicine = by_focus(options.medicine)
    scored = write(options.out / "scored.jsonl", medicine, 1e6 * options.scored)
    sample = write(options.out / "sample.jsonl", medicine, 1e6 * options.sample)
    size, pool = 1e6 * options.pool, {}
    pool["medicine"] = write(options.out / "pool-medicine.jsonl", (text for group in medicine for text in group), MEDICINE * size)
    for name, paths in (("books", find_files([options.books])), ("code", find_files([]))):
        texts = sorted((part for document in documents(paths) for part in cut(document.text)), key=place)
        pool[name] = write(options.out / f"pool-{name}.jsonl", texts, (1 - MEDICINE) / 2 * size)
    for name, share in (("medicine", MEDICINE), ("books", (1 - MEDICINE) / 2), ("code", (1 - MEDICINE) / 2)):
        if pool[name] < share * size:
            raise SystemExit(
                f"--pool {options.pool:g}: there are {pool[name] / 1e6:.1f} MB of {name}; {pool[name] / share / 1e6:.0f} is the most"
            )
    return {"pool": pool, "sample": sample, "scored": scored}


def by_focus(path: str) -> Iterator[list[str]]:
    """The answers behind their questions, by disease, in a random order that is the same at every call; no answer twice."""
    groups: dict[str, dict[str, str]] = {}
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            if row["question"] and row["answer"]:
                groups.setdefault((row["focus"] or "").casefold(), {})[row["answer"].strip()] = row["question"].strip()
    seen: set[str] = set()
    for focus in sorted(groups, key=place):
        new = {answer: question for answer, question in groups[focus].items() if answer not in seen}
        seen |= new.keys()
        yield [f"{question}\n\n{answer}\n" for answer, question in new.items()]


def place(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def write(path: Path, found: Iterable[str | list[str]], size: float) -> int:
    """Write texts, or whole groups of them, until they come to `size` bytes; -> their bytes. Of an iterator the rest is left."""
    written, lines = 0, []
    for group in found:
        for text in [group] if isinstance(group, str) else group:
            written += len(text.encode())
            lines.append(json.dumps({"text": text}) + "\n")
        if written >= size:
            break
    write_atomic(path, "".join(lines))
    return written


def student(options: argparse.Namespace, arm: str, seed: int, recipe: Path | None) -> dict:
    """One arm: its selection, the student that learnt from it, and what that is worth. recipe: of a new student; None: the base goes on."""
    tokens = round(1e6 * (options.base_tokens if recipe is None else options.tokens) / (1 if arm == "random" else 2))
    shared = options.out / "runs/random-0/tokenizer.json"
    name = f"{arm}-{seed}" if recipe else f"base-{arm}-{seed}"
    chosen = selection(options, arm, tokens, "" if recipe else "base-", shared)
    if recipe is None:
        start = ["--from", options.base]
    else:
        start = [recipe, *([] if name == "random-0" else ["--data.tokenizer", shared])]
    learnt = made_by(options, name, "train", *start, "--data", chosen["out"], "--budget", f"{tokens}tok", "--seed", seed)
    bpb = scored(options, name, options.out / "runs" / name, options.scored if recipe else options.base_scored)
    return {"bpb": bpb, "tokens": learnt["tokens"], "seconds": learnt["seconds"], "selection": chosen}


def scored(options: argparse.Namespace, name: str, run: str | Path, size: float) -> float:
    """Bits per byte of a run on so many megabytes of the medicine that nothing has read."""
    data = options.out / "scored.jsonl"
    if size != options.scored:
        texts = (document.text for document in documents([str(data)]))
        data = options.out / f"scored-{size:g}.jsonl"
        if not data.exists():
            write(data, texts, 1e6 * size)
    return stored(options, f"{name}-scored", lambda: sparing("eval", run, "--data", data))["bpb"]


def selection(options: argparse.Namespace, arm: str, tokens: int, kind: str, tokenizer: Path) -> dict:
    """What `sparing data select` says, and `medicine`: its share of the bytes. kind: "", or "base-" where the base learns from it."""
    out = options.out / "selected" / f"{kind}{arm}"
    pool = [options.out / f"pool-{name}.jsonl" for name in ("books", "code", "medicine")]
    sample = options.out / "sample.jsonl"
    how, before = ["--by", arm.removesuffix("-half"), "--for", sample], 0.0
    if arm == "loss":
        model, reference = options.out / "runs/random-half-0", options.out / "runs/reference"
        passes = round(options.passes * sample.stat().st_size / ESTIMATED)
        learnt = made_by(options, "reference", "train", "--from", model, "--data", sample, "--budget", f"{passes}tok")
        before = learnt["seconds"] + json.loads((options.out / "random-half-0.json").read_text())["seconds"]
        how = ["--by", "loss", "--model", model, "--reference", reference]
    counted = ["--tokenizer", tokenizer] if tokenizer.exists() and (kind, arm) != ("", "random") else []

    def run() -> dict:
        if not (out / "curated.json").exists():
            sparing("data", "select", *pool, *how, "--budget", f"{tokens}tok", *counted, "--out", out)
        summary = json.loads((out / "curated.json").read_text())
        medicine = sum(len(found.text.encode()) for found in documents([str(out)]) if "pool-medicine" in found.meta["source"])
        seconds = summary["seconds"] + before
        return summary | {"out": str(out), "medicine": medicine / max(1, summary["bytes"]["out"]), "seconds": seconds}

    return stored(options, f"selected-{kind}{arm}", run)


def show(arm: str, row: dict, beside: dict) -> None:
    chosen = row["selection"]
    told = "" if chosen["told_apart"] is None else f", told apart {chosen['told_apart']:.3f}"
    print(
        f"{arm:>16}  {row['bpb']:.4f} bpb ({row['bpb'] / beside['bpb'] - 1:+.2%})  {row['tokens'] / 1e6:.2f} M tokens "
        f"({row['tokens'] / beside['tokens']:.0%})  {row['seconds']:,.0f} s and {chosen['seconds']:,.0f} s of selecting "
        f"({(row['seconds'] + chosen['seconds']) / (beside['seconds'] + beside['selection']['seconds']):.0%})  "
        f"medicine {chosen['medicine']:.1%}{told}"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
