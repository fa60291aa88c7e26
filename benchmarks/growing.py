"""Growing an open model by domains, beside full fine-tuning in equal minutes. What is in --out is not done again.

python -m benchmarks.growing --base RUN --books BOOKS --medicine MEDQUAD --maths GSM8K --budget 20m --out FOLDER

MEDQUAD and GSM8K are JSON lines with "question" and "answer"; the third domain is Python's own standard library. BOOKS has train and val.
Of each domain's documents every twentieth is scored, by `sparing eval`, and never learnt from.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import median

import tyro

import sparing
from sparing.base.config_file import read_config
from sparing.base.files import file_sha256, write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.bench.results import stored_result
from sparing.data.sources import documents
from sparing.evals.select import select

HELD_OUT = 20
PROMPTS, WRITTEN, ROUNDS = 8, 48, 3
"""Beginnings of held-out documents that a slice and the whole go on with, tokens each, and how often."""
LEAST = ("0.01", "0.001")
"""Of slices by text: those of the others' experts go that fewer of its tokens wake."""


@dataclass
class Growing:
    """Grow three domains apart from each other, join them, slice them, retire them; and train all weights on each beside that."""

    base: str
    """The run folder of the open model."""
    books: str
    """Old text: BOOKS/train is shown to `grow`, BOOKS/val scored."""
    medicine: str
    maths: str
    out: str
    """Folder for runs and results."""
    budget: str = "20m"
    val_bytes: int = 200_000
    """Of each text that is scored."""
    width: int | None = None
    """Of a domain's expert; None: what `grow` takes."""
    domains: tuple[str, ...] = ("medicine", "maths", "python")

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        folder = Path(self.out)
        (folder / "text").mkdir(parents=True, exist_ok=True)
        self._selected("books", (one.text for one in documents([f"{self.books}/val"])))
        for domain in self.domains:
            self._split(domain)  # before any is grown, since each is told apart from the others' text
        width = () if self.width is None else ("--growth.width", str(self.width))
        rows = {"base": self._scores("base", self.base, ("books", *self.domains))}
        for domain in self.domains:
            others = [str(folder / "text" / f"{other}.jsonl") for other in self.domains if other != domain]
            for arm, command in {
                "grown": ("grow", self.base, "--domain", domain, "--keep", f"{self.books}/train", "--apart", *others, *width),
                "full": ("train", "--from", self.base),
            }.items():
                name = f"{domain}-{arm}"
                run = folder / name
                if not (run / "state" / "summary.json").exists():
                    shutil.rmtree(run, ignore_errors=True)
                texts = ("--data", str(folder / "text" / f"{domain}.jsonl"), "--budget", self.budget, "--samples", "0")
                summary = self._kept(name, *command, *texts, "--out", str(run))
                told = {key: summary.get(key) for key in ("tokens", "seconds", "trainable_parameters", "before", "after")}
                rows[name] = self._scores(name, str(run), ("books", domain)) | told
            self._kept(
                f"{domain}-pack", "pack", str(folder / f"{domain}-grown"), "--domain", domain, "--out", str(folder / f"{domain}.pack")
            )
            old = self._fresh("retire", str(folder / f"{domain}-grown"), domain, "retire")
            rows[f"{domain}-grown"]["restored"] = file_sha256(old.weights_file) == file_sha256(RunFolder(self.base).weights_file)
        whole = folder / "merged"
        packs = [str(folder / f"{domain}.pack") for domain in self.domains]
        self._kept("merged", "merge", self.base, *packs, "--out", str(whole))
        rows["merged"] = self._scores("merged", str(whole), ("books", *self.domains))
        for domain in self.domains:
            by_text = ("--data", str(folder / "text" / f"{domain}.jsonl"))
            for kind, words in {"slice": (), **{f"slice-{least}": ("--least", least, *by_text) for least in LEAST}}.items():
                part = self._fresh("slice", str(whole), domain, kind, *words)
                sizes = [run.weights_file.stat().st_size for run in (part, RunFolder(self.base))]
                name = f"{domain}-{kind}"
                row = stored_result(folder / f"{name}.json", lambda part=part, domain=domain: self._side_by_side(part, domain))
                rows[name] = row | {"bytes": sizes[0] / sizes[1], "experts": read_config(part.config_file).model.n_routed_experts}
        write_atomic(folder / "result.json", json.dumps(rows, indent=1))
        return rows

    def _split(self, domain: str) -> None:
        """OUT/text/DOMAIN.jsonl to learn from, and what is scored."""
        file = Path(self.out) / "text" / f"{domain}.jsonl"
        if domain == "python":
            paths = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
            texts = [path.read_text(encoding="utf-8") for path in paths]
        else:
            with open(getattr(self, domain), encoding="utf-8") as lines:
                texts = [f"{row['question']}\n{row['answer']}" for row in map(json.loads, lines)]
        learnt = [text for number, text in enumerate(texts) if number % HELD_OUT]
        write_atomic(file, "".join(json.dumps({"text": text}) + "\n" for text in learnt))
        self._selected(domain, texts[::HELD_OUT])

    def _selected(self, name: str, texts) -> None:
        """OUT/text/NAME-val.jsonl: equal beginnings of its documents."""
        rows = select(texts, self.val_bytes)
        write_atomic(Path(self.out) / "text" / f"{name}-val.jsonl", "".join(json.dumps({"text": text}) + "\n" for text in rows))

    def _scores(self, name: str, run: str, texts: tuple[str, ...]) -> dict:
        """Text -> loss and bits per byte of a run on it."""
        found = {}
        for text in texts:
            score = self._kept(f"{name}-on-{text}", "eval", run, "--data", str(Path(self.out) / "text" / f"{text}-val.jsonl"))
            found[text] = {key: score[key] for key in ("loss", "bpb", "dtype")}
        return found

    def _fresh(self, verb: str, run: str, domain: str, kind: str, *words: str) -> RunFolder:
        """The run OUT/DOMAIN-KIND of a verb that takes a domain out or leaves it alone."""
        made = Path(self.out) / f"{domain}-{kind}"
        if not (made / "config.toml").exists():
            shutil.rmtree(made, ignore_errors=True)
            self._asked(verb, run, "--domain", domain, "--out", str(made), *words)
        return RunFolder(made)

    def _side_by_side(self, part: RunFolder, domain: str) -> dict:
        """Greedy continuations of the domain's beginnings by the slice and by the whole: are they the same, and how long do they take?"""
        from sparing.infer.engine import Engine
        from sparing.infer.generate import generate_texts

        with open(Path(self.out) / "text" / f"{domain}-val.jsonl", encoding="utf-8") as lines:
            prompts = [json.loads(line)["text"][:400] for line in islice(lines, PROMPTS)]
        times: dict[str, list[float]] = {"slice": [], "whole": []}
        texts: dict[str, list[str]] = {}
        options = {"speculate": False, "weights": "float32"}  # as the routers were fitted; in int8 they wake others more often
        with Engine(str(part), **options) as one, Engine(str(Path(self.out) / "merged"), **options) as all_of_it:
            for _ in range(ROUNDS):
                for name, engine in (("slice", one), ("whole", all_of_it)):
                    asked = [(engine.tokenizer.encode_prompt(prompt), {"max_tokens": WRITTEN, "temperature": 0.0}) for prompt in prompts]
                    began = time.process_time()
                    texts[name] = list(generate_texts(engine, asked))
                    times[name].append(time.process_time() - began)
        same = sum(one == other for one, other in zip(texts["slice"], texts["whole"], strict=True))
        return {"same_texts": f"{same} of {len(prompts)}", "time_by_whole": median(times["slice"]) / median(times["whole"])}

    def _kept(self, name: str, *command: str) -> dict:
        """What a verb says, kept as OUT/NAME.json."""
        return stored_result(Path(self.out) / f"{name}.json", lambda: self._asked(*command))

    def _asked(self, *command: str) -> dict:
        """What `sparing COMMAND --json` says, in a process of its own with a home of its own."""
        say(f"sparing {' '.join(command)}")
        source = str(Path(sparing.__file__).parent.parent)
        environment = os.environ | {"SPARING_HOME": str(Path(self.out) / "home"), "PYTHONPATH": source}
        words = [sys.executable, "-m", "sparing", *command, "--json"]
        return json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, env=environment).stdout)


def table(rows: dict) -> str:
    """The figure as lines of text: what each arm did to the domain's bits per byte and to the old text's loss."""
    lines, base = [], rows["base"]
    for name, row in rows.items():
        if same := row.get("same_texts"):
            lines.append(f"{name:>22}  {row['bytes']:.3f} times the bytes, {row['time_by_whole']:.2f} times the time, texts {same}")
        if name == "base" or "books" not in row:
            continue
        old = row["books"]["loss"] / base["books"]["loss"] - 1
        new = ", ".join(f"{text} {base[text]['bpb']:.4f} -> {row[text]['bpb']:.4f}" for text in row if text in base and text != "books")
        lines.append(f"{name:>22}  {new}  old loss {old:+.3%}")
    return "\n".join(lines)


if __name__ == "__main__":
    say(table(tyro.cli(Growing)()))
