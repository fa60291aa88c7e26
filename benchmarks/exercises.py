"""Generated word problems beside GSM8K's training set, in equal time. One resumable command; what is in --out is not done again.

    python -m benchmarks.exercises --base RUN --gsm8k TRAIN --svamp SVAMP --mawps MAWPS --budget 10m --out FOLDER

RUN is an instruction-tuned model, such as SmolLM2. It learns (`sparing sft`, each arm for --budget)

    gsm8k     TRAIN: its questions and worked answers
    words     --count exercises of `sparing data synth words`, of all difficulties
    easy      as many of its two lowest difficulties, which have one and two operations, as SVAMP and MAWPS do
    both      gsm8k and words, as many of each

and answers problems of SVAMP and MAWPS greedily; so does RUN itself, as it is (base) and behind --shots of TRAIN's problems (shots).

All arms are asked in the same words and taught to answer in the same form, GSM8K's: steps, a line each, and `#### N`. No exercise has a
run of 13 words from the problems that are scored, nor has a question of TRAIN that is learnt (numbers told apart).
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import tyro

from benchmarks.arms import kept, made
from sparing.adapt.reason import as_chat
from sparing.adapt.rewards import CALCULATED, Problem, verify
from sparing.base.files import write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.bench.results import stored_result
from sparing.curate.contamination import Contamination
from sparing.curate.document import Document
from sparing.data.chat import ChatTemplate, template_text
from sparing.data.split import content_hash
from sparing.infer.engine import Engine
from sparing.infer.generate import finished_requests
from sparing.infer.request import Sampling

FORM = "End with #### and the number."
MARK = "####"
ARMS = {"gsm8k": ("gsm8k",), "words": ("words",), "easy": ("easy",), "both": ("gsm8k", "words")}
"""What each learns."""
KINDS = {"words": ("words",), "easy": ("words:1", "words:2")}
DECIMALS = 4
"""Problems whose answer has more are left out: thirds and sixths are written in many ways."""


@dataclass
class Exercises:
    """Fine-tune on generated exercises and on GSM8K, and score both on SVAMP and MAWPS."""

    base: str
    """The run, or imported model, that learns; it needs a chat template."""
    gsm8k: str
    """GSM8K's train.jsonl."""
    svamp: str
    """Test problems: JSON lines with Body, Question and Answer."""
    mawps: str
    """Test problems: JSON lines with input and target."""
    out: str
    """Folder for runs and results."""
    budget: str = "10m"
    """Of each arm that learns."""
    count: int = 8000
    """Exercises that are made; so many that none is learnt twice."""
    problems: int = 600
    """That are scored, of each set; drawn by hash."""
    shots: int = 4
    max_tokens: int = 200
    """Of an answer."""
    method: str = "lora"
    weights: str = "auto"
    """Number format in which answers are written; auto: the fastest here."""
    seed: int = 0
    arms: tuple[str, ...] = ("base", "shots", *ARMS)

    def __call__(self) -> dict:
        """The figure's numbers, also in OUT/result.json."""
        folder = self.folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        sets = {"svamp": self._chosen("svamp"), "mawps": self._chosen("mawps")}
        texts = folder / "scored.jsonl"
        write_atomic(texts, "".join(json.dumps({"question": one.prompt}) + "\n" for some in sets.values() for one in some))
        learnt = {"gsm8k": self._gsm8k(texts)} | {name: self._made_up(name, texts) for name in KINDS}
        rows = {}
        for arm in self.arms:
            run, told, shown = Path(self.base), {}, []
            if arm in ARMS:
                data = [str(learnt[name][0]) for name in ARMS[arm]]
                words = ("sft", self.base, "--data", *data, "--budget", self.budget, "--method", self.method, "--seed", str(self.seed))
                run, summary = made(folder, f"run-{arm}", *words)
                told = {key: summary.get(key) for key in ("tokens", "trained_tokens", "steps", "seconds")}
            elif arm == "shots":
                shown = random.Random(0).sample(_rows(learnt["gsm8k"][0]), self.shots)
            rows[arm] = told | {name: self._scored(arm, run, name, some, shown) for name, some in sets.items()}
        data = {name: count for name, (_, count) in learnt.items()}
        result = {"budget": self.budget, "data": data, "arms": rows}
        write_atomic(folder / "result.json", json.dumps(result, indent=1))
        return result

    def _chosen(self, name: str) -> list[Problem]:
        """Test problems of one set, in a random order that is the same every time."""
        found = {}
        for row in _rows(Path(getattr(self, name))):
            question, answer = (f"{row['Body']} {row['Question']}", row["Answer"]) if name == "svamp" else (row["input"], row["target"])
            if round(answer, DECIMALS) == answer:
                found[" ".join(question.split())] = f"{answer:g}"
        some = sorted(found, key=lambda question: content_hash(question.encode()))[: self.problems]
        return [Problem(question, found[question]) for question in some]

    def _gsm8k(self, texts: Path) -> tuple[Path, dict]:
        """TRAIN as conversations, without what is scored; what was left out."""
        file, rule = self.folder / "gsm8k.jsonl", Contamination(evaluations=(str(texts),), numbers=True)
        rows = _rows(Path(self.gsm8k))
        clean = [row for row in rows if rule.verdict(rule.scores(Document(row["question"]))) is None]
        chats = [as_chat(_asked(row["question"]), CALCULATED.sub("", row["answer"]).strip()) for row in clean]
        write_atomic(file, "".join(json.dumps(chat) + "\n" for chat in chats))
        return file, {"in": len(rows), "out": len(clean)}

    def _made_up(self, name: str, texts: Path) -> tuple[Path, dict]:
        """Generated exercises as conversations in GSM8K's form."""
        file, made_up = self.folder / f"{name}.jsonl", self.folder / f"{name}-task.jsonl"
        words = ("data", "synth", *KINDS[name], "--count", str(self.count), "--seed", str(self.seed), "--against", str(texts))
        documents = kept(self.folder, f"{name}-synth", *words, "--out", str(made_up))["documents"]
        chats = [as_chat(_asked(row["prompt"]), in_lines(row["worked"], row["answer"])) for row in _rows(made_up)]
        write_atomic(file, "".join(json.dumps(chat) + "\n" for chat in chats))
        return file, documents

    def _scored(self, arm: str, run: Path, name: str, problems: Sequence[Problem], shown: list[dict]) -> dict:
        """Which problems the likeliest answers solve, how long answers are, how many were cut, and some of them to read."""

        def score() -> dict:
            say(f"{arm}: {len(problems)} problems of {name}")
            before = [message for row in shown for message in row["messages"]]
            with Engine(str(run), weights=self.weights, max_batch=64, speculate=False) as engine:
                template = ChatTemplate(template_text(RunFolder.open(run)))
                turns = ([*before, {"role": "user", "content": _asked(one.prompt)}] for one in problems)
                asked = ((template.encode(engine.tokenizer, some), Sampling(self.max_tokens, 0)) for some in turns)
                answers = [(text, request.usage["completion_tokens"]) for request, text in finished_requests(engine, asked)]
            right = [int(verify(one, text).reward) for one, (text, _) in zip(problems, answers, strict=True)]
            lengths = [length for _, length in answers]
            said = [{"question": one.prompt, "answer": one.answer, "said": text} for one, (text, _) in zip(problems, answers, strict=True)]
            cut = sum(length >= self.max_tokens for length in lengths)
            return {"accuracy": fmean(right), "length": fmean(lengths), "cut": cut, "right": right, "some": said[:10]}

        return stored_result(self.folder / f"score-{arm}-{name}.json", score)


def _asked(question: str) -> str:
    return f"{question.strip()}\n{FORM}"


def in_lines(worked: str, answer: str) -> str:
    """A worked answer of `data synth` (<think>a step. another.</think>answer) in GSM8K's form."""
    steps = worked.removeprefix("<think>").partition("</think>")[0].removesuffix(".").split(". ")
    return "\n".join([*steps, f"{MARK} {answer}"])


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def beside(ours: list[int], theirs: list[int]) -> tuple[float, float]:
    """(points that the first answers are better by, the standard error of that), of the same problems."""
    points = [100 * (a - b) for a, b in zip(ours, theirs, strict=True)]
    return fmean(points), stdev(points) / len(points) ** 0.5


def table(result: dict) -> str:
    """The figure as lines of text."""
    lines = [f"{name:>8}: {data}" for name, data in result["data"].items()]
    for arm, row in result["arms"].items():
        told = f"{arm:>8}" + (f"  {row['tokens'] / 1e3:,.0f} k tokens in {row['seconds']:,.0f} s" if "tokens" in row else "")
        for name in ("svamp", "mawps"):
            score = row[name]
            told += f"  {name} {score['accuracy']:.1%} of {len(score['right'])}, {score['length']:.0f} tokens an answer, {score['cut']} cut"
            if "gsm8k" in result["arms"] and arm not in ("gsm8k", "base", "shots"):
                points, error = beside(score["right"], result["arms"]["gsm8k"][name]["right"])
                told += f" ({points:+.1f} ± {error:.1f} points beside gsm8k)"
        lines.append(told)
    return "\n".join(lines)


if __name__ == "__main__":
    say(table(tyro.cli(Exercises)()))
