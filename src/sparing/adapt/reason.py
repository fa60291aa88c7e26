"""Reasoning, as DeepSeek-R1 was taught it (arXiv 2501.12948 §2.3 and 2.4), on one task and inside one budget.

    1-cold     the run learns some worked answers (`sft`), so that what rewards begin with is now and then right
    2-rl       rewards (`grpo`)
    3-sampled  answers of 2-rl to the problems that are learnt from; right ones are kept, as conversations
    4-sft      the run *as it was* learns those (§2.3.3)
    5-student  a smaller model learns the same ones (§2.4: distillation is fine-tuning on samples)

Each stage is an ordinary run in the folder of the whole one, made by the verb that makes such runs, and goes on by that verb's own
`resume`. The whole run gets the model of 4-sft. Its own work, which is scoring and sampling, is metered in its own ledger; what it has
spent is what its ledger and those of its stages say.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparing.account.history import STAGES, TRAINING, ancestors_of, bill, inherit, whole
from sparing.account.ledger import Entry
from sparing.account.receipt import read_state
from sparing.account.wording import duration, table
from sparing.adapt.grpo import SEEDS, facts_of
from sparing.adapt.policy import FACTS
from sparing.adapt.rewards import Task, load_task, verify
from sparing.adapt.rollouts import AT_A_TIME, OPTIONS, Answer, Asker, Group, Judge, Writer, facts, judged, repeats, tokens_of
from sparing.base.config import Budget, CannotGoOn, Config, GrpoConfig, ReasonConfig, UserError
from sparing.base.config_file import Wishes, read_config, write_config
from sparing.base.files import append_durably, link_or_copy, read_lines, to_json, write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder, weights_sha256
from sparing.budget.flops import forward_flops
from sparing.budget.predict import TooShort
from sparing.budget.units import format_budget
from sparing.data.accounts import balanced, in_words
from sparing.data.chat import taught, template_text
from sparing.data.chats import SAMPLE, chats
from sparing.data.files import absolute, find_files
from sparing.data.rows import permutation
from sparing.data.split import mix
from sparing.data.tokenizer import Tokenizer
from sparing.evals.verifiers import Problem
from sparing.infer.engine import Engine
from sparing.job.begin import Job, begin, try_out
from sparing.job.start import keep_origin
from sparing.job.texts import bind, same_texts
from sparing.planning.start import reasons_of, with_start

COLD, RL, SAMPLED, SFT, STUDENT = "1-cold", "2-rl", "3-sampled", "4-sft", "5-student"
SHARES = {
    COLD: (0.10, "the form of an answer is learnt from a few hundred; more would be learning by heart what rewards are to find"),
    RL: (0.50, "all later stages learn what is found here"),
    SAMPLED: (0.10, "an answer is written about twice as fast as it is learnt, and some are wrong"),
    SFT: (0.15, "right answers that a model could almost give are learnt in few epochs"),
    STUDENT: (0.15, "the same answers; the student is smaller, but knows less"),
}
"""Of what is left for stages: each one's part, and why. Where one is left out, the others have more, in proportion; so have those that
follow one that did not need all of its part. None of it was swept."""
SCORED, PROBLEMS = 0.02, (16, 64, 512)
"""Share of a budget in time that one scoring may take; how many held-out problems it asks at least, where nothing says more, at most."""
LEAST_S = 30.0
"""A shorter budget would be starting programs."""
LONGER = 1.25
"""An answer may become so many times as long as nearly all worked ones are."""
PROGRAMS = 256
"""Worked answers that have to be run, at most: each is a process of its own."""
PASSES = 4
"""Problems that were not solved are asked again, so many times in all."""
FEWEST = 8
"""Problems with a right answer, to learn from."""
LONGEST = 64
"""Problems whose tokens are counted."""
SPENT = {"s": "wall_s", "usd": "usd", "kwh": "kwh"}
"""Where the ledger has what a budget is of. One in tokens or operations is divided before anything begins."""


Answered = Callable[[Sequence[int], Sequence[Problem], int], list[Group]]
"""(seeds, problems, answers to each) -> judged answers."""


class Verbs(NamedTuple):
    """What makes the stages' runs (functions of `api`)."""

    sft: Callable[..., dict]
    grpo: Callable[..., dict]
    resume: Callable[..., dict]


def as_chat(question: str, answer: str, **more: Any) -> dict:
    """A row of conversations, of one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **more}


# a new run


def resolved(job: Job, wishes: Wishes, budget: Budget) -> None:
    """Write the configuration of a new run into its folder, with the worked answers and what is wished for all stages. Raises UserError,
    before anything is written, for what some stage would refuse."""
    named = Wishes.of({"reason": {}}, wishes).config().reason
    task = load_task(named.task, named.data)
    reason = replace(
        named, task=absolute(named.task) if Path(named.task).exists() else named.task, data=tuple(map(absolute, named.data)),
        cold=tuple(map(absolute, named.cold)), student=str(Path(named.student).resolve()) if named.student else "",
    )  # fmt: skip
    lasts = job.lasts(budget)
    if lasts is not None and lasts < LEAST_S:
        raise UserError(f"--budget {format_budget(budget)}: lasts {lasts:.0f} s, and several stages need {LEAST_S:.0f} s at least")
    own = Wishes.of({name: section for name, section in wishes.items() if name not in ("reason", "start")})
    start = {"start": {"run": str(Path(wishes.value("start.run")).resolve())}, "data": {"paths": (reason.task,)}}
    begun = with_start(Wishes.of({"adapter": {}} if reason.method == "lora" else {}, own, start))
    base = begun.config()
    parent = RunFolder(base.start.run)
    tokenizer = Tokenizer.load(parent.tokenizer_file, base.tokens)
    worked = [] if reason.cold else _worked_right(task)
    answers = [text for _, text in worked[:SAMPLE]] or _answers(reason.cold)
    room = base.model.max_position_embeddings - _longest(task, tokenizer, parent)
    if not own.sets("grpo.max_tokens"):
        lengths = [len(tokenizer.encode(text)) for text in answers]
        most = GrpoConfig().max_tokens if not answers else -(-int(LONGER * np.quantile(lengths, 0.95) + 1) // 16) * 16
        own = Wishes.of(own, {"grpo": {"max_tokens": max(1, min(most, room))}})
    most = own.value("grpo.max_tokens")
    if most > room:
        raise UserError(f"--grpo.max-tokens {most}: behind its longest problem the model's context has room for {room}")
    if reason.student:
        room = _room_of_student(reason.student, task)
        if most > room:
            raise UserError(f"--student {named.student}: behind the longest problem its context has room for {room} tokens, not {most}")
    for name in _stages(bool(answers), reason):
        if name != SAMPLED:
            _try_out(job, begun, budget, name, bool(answers), reason)
    rows = read_config(parent.config_file).train.seq_len
    config = replace(
        Config(), model=base.model, tokens=base.tokens, start=base.start, budget=budget, reason=reason,
        train=replace(Config().train, seed=base.train.seed, seq_len=rows), data=replace(Config().data, paths=(reason.task, *reason.data)),
    )  # fmt: skip
    state = job.run.state
    write_atomic(state / "wishes.json", json.dumps(own, indent=1))
    if worked:
        write_atomic(_worked(job.run), "".join(json.dumps(as_chat(problem.prompt, text)) + "\n" for problem, text in worked))
    write_atomic(job.run.tokenizer_file, parent.tokenizer_file.read_text(encoding="utf-8"))
    bind(job.run, config.data, facts_of(task), earlier=[])
    job.write(config, {})
    keep_origin(job.run, config)
    say(f"task {task.name}: {len(task.problems):,} problems, {len(task.held_out):,} held out; an answer has {most} tokens at most")


def _stages(cold: bool, reason: ReasonConfig) -> list[str]:
    left_out = {COLD: not cold, STUDENT: not reason.student}
    return [name for name in SHARES if not left_out.get(name)]


def _divided(amount: float, left: Sequence[str], among: Sequence[str]) -> dict[str, float]:
    """What of an amount each of the stages `left` may spend, if all of it is for those of `among`."""
    return {name: amount * SHARES[name][0] / sum(SHARES[one][0] for one in among) for name in left}


def _try_out(job: Job, wishes: Wishes, budget: Budget, name: str, cold: bool, reason: ReasonConfig) -> None:
    """Resolve a stage's configuration for the checks alone. Raises UserError, which names the stage."""
    stages = _stages(cold, reason)
    share = replace(budget, amount=float(f"{_divided(budget.amount, stages, stages)[name]:.5g}"))
    try:
        try_out(job, wishes, share)
    except UserError as error:
        raise UserError(f"{name} has {share.amount / budget.amount:.0%} of --budget {format_budget(budget)}: {error}") from None


def _of_stage(wishes: Wishes, name: str) -> Wishes:
    """What is wished for one stage: grpo.* is for rewards, where it settles rows and batches, and all else for every stage."""
    apart = {"train.seq_len", "train.batch_size"} if name == RL else {"grpo"}
    kept = {section: {key: value for key, value in fields.items() if f"{section}.{key}" not in apart} for section, fields in wishes.items()}
    return Wishes.of({section: fields for section, fields in kept.items() if section not in apart})


def _worked_right(task: Task) -> list[tuple[Problem, str]]:
    """The task's own worked answers that its verifier finds right."""
    worked = [problem for problem in task.problems if problem.worked and problem.verifier != "code"]
    worked += [problem for problem in task.problems if problem.worked and problem.verifier == "code"][:PROGRAMS]
    right = [(problem, problem.worked) for problem in worked if verify(problem, problem.worked).reward >= 1]
    if wrong := len(worked) - len(right):
        say(f"{task.name}: {wrong:,} of {len(worked):,} worked answers are not right as its verifier has it, and left out")
    return right


def _worked(run: RunFolder) -> Path:
    return run.state / "worked.jsonl"


def _answers(cold: Sequence[str]) -> list[str]:
    """The last answers of the first conversations. Raises UserError for paths that name nothing, and where no row is a conversation."""
    if not cold:
        return []
    found = [chat.messages[-1]["content"] for chat, _ in zip(chats(find_files(cold)), range(SAMPLE), strict=False)]
    if not found:
        raise UserError(f"--cold {', '.join(cold[:3])}: no conversation in it")
    return found


def _longest(task: Task, tokenizer: Tokenizer, run: RunFolder) -> int:
    """Tokens of the longest problem, as the run is asked, or, where it has no chat template, what `sft` makes of it. Of thousands, those
    with the most characters are looked at."""
    ask = Asker(tokenizer, template_text(run) or taught(tokenizer))
    longest = sorted((*task.problems, *task.held_out), key=lambda problem: len(problem.prompt))[-LONGEST:]
    return max(len(ask(problem)) for problem in longest)


def _room_of_student(student: str, task: Task) -> int:
    """Tokens that an answer may have in the student's context. Raises UserError where it is no run that can learn."""
    begun = with_start(Wishes.of({"start": {"run": student}, "data": {"paths": (task.name,)}})).config()
    run = RunFolder(begun.start.run)
    return begun.model.max_position_embeddings - _longest(task, Tokenizer.load(run.tokenizer_file, begun.tokens), run)


# stage after stage


def go(run: RunFolder, verbs: Verbs, mark: float, samples: int) -> dict:
    """Make whatever of the run's stages is not there yet; -> the summary.

    mark: `time.monotonic()` until which time was metered. samples: problems that the final model answers at the end. Raises Interrupted on
    a signal, UserError where task or base have changed, CannotGoOn where too little was answered rightly, the budget is used up or too
    little of it is left for a stage."""
    return _Recipe(run, verbs, mark, samples).go()


class _Recipe:
    """A run by stages."""

    def __init__(self, run: RunFolder, verbs: Verbs, mark: float, samples: int):
        self.run, self.verbs, self.mark, self.samples = run, verbs, mark, samples
        config = self.config = read_config(run.config_file)
        self.reason: ReasonConfig = config.reason
        self.budget, self.base = config.budget, RunFolder(config.start.run)
        self.task = load_task(self.reason.task, self.reason.data)
        same_texts(run, facts_of(self.task), "begin anew")
        if not self.base.learned_file.exists() or weights_sha256(self.base) != config.start.weights_sha256:
            raise UserError(f"{self.base} is gone or has other weights by now: if it has moved, say --base RUN")
        self.wishes = Wishes.of(json.loads((run.state / "wishes.json").read_text()))
        self.grpo = self.wishes.config().grpo
        self.cold = self.reason.cold or ((str(_worked(run)),) if _worked(run).exists() else ())
        self.stages = _stages(bool(self.cold), self.reason)
        self.notes, self.score_file = run.state / STAGES, run.state / "scores.jsonl"

    def go(self) -> dict:
        self._tell()
        self._score("base", self.base)
        begun = self._stage(COLD, self.verbs.sft, self.base, self.cold) if self.cold else self.base
        rewarded = self._stage(RL, self.verbs.grpo, begun, self.reason.task, data=self.reason.data)
        kept = self._sampled(rewarded)
        self._learnt(SFT, self.base, kept, samples=self.samples)
        if self.reason.student:
            student = RunFolder(self.reason.student)
            self._score("student", student)
            self._learnt(STUDENT, student, kept)
        return self._finish()

    # budgets

    def _spent(self) -> float:
        """What the run and its stages have used of the budget, by their ledgers."""
        return used([row for row in whole(self.run) if row.verb in TRAINING], self.budget.unit)

    def _amount(self, name: str) -> Budget:
        """What a stage may spend; settled when it begins, and kept. Raises CannotGoOn where nothing is left."""
        noted = self._noted()
        if name not in noted:
            amount = self._shares(name)[name]
            if amount < (1 if self.budget.unit in ("s", "tok") else 1e-9):
                raise CannotGoOn(f"{self.run}: the budget of {format_budget(self.budget)} is used up before {name}")
            noted[name] = int(amount) if self.budget.unit == "tok" else float(f"{amount:.5g}")
            append_durably(self.notes, json.dumps({"stage": name, "amount": noted[name]}))
        return Budget(noted[name], self.budget.unit)

    def _noted(self) -> dict[str, float]:
        """What the stages that have begun may spend."""
        return {line["stage"]: line["amount"] for line in read_lines(self.notes)}

    def _shares(self, first: str) -> dict[str, float]:
        """What each stage from `first` on may spend as things are now."""
        left = self.stages[self.stages.index(first) :]
        if self.budget.unit in SPENT:
            scores = self._scores()
            reserve = max((line["cost"] for line in scores.values()), default=SCORED * self.budget.amount)
            to_score = [name for name in ("base", *self.stages, *(["student"] * bool(self.reason.student))) if name != SAMPLED]
            free = self.budget.amount - self._spent() - reserve * len([name for name in to_score if name not in scores])
            among = left
        else:
            free, among = self.budget.amount, self.stages
        return _divided(free, left, among)

    def _tell(self) -> None:
        """Say what remains to be done and how the budget is divided, and what is left out."""
        done = {name for name in self.stages if self._done(name)}
        left = [name for name in self.stages if name not in done]
        say(f"reason, {format_budget(self.budget)} in all" + (f"; done before: {', '.join(sorted(done))}" if done else ""))
        begun, shares = self._noted(), self._shares(left[0]) if left else {}
        for name in left:
            amount = begun.get(name, shares[name])
            about = format_budget(Budget(round(amount) if amount >= 10 else float(f"{amount:.2g}"), self.budget.unit))
            say(f"  {name:<9} about {about}  # {SHARES[name][1]}")
        if not self.cold:
            say(f"  {COLD} is left out: the task has no worked answers, and no --cold names any")
        if not self.reason.student:
            say(f"  {STUDENT} is left out: no --student")

    def _done(self, name: str) -> bool:
        return (self.run.path / name / ("answers.jsonl" if name == SAMPLED else "state/summary.json")).exists()

    # stages

    def _stage(self, name: str, verb: Callable[..., dict], start: RunFolder, learns: Any, samples: int = 0, **more: Any) -> RunFolder:
        """A stage's run, made of `start` by a verb, gone on with, or found; scored."""
        run = RunFolder(self.run.path / name)
        if not self._done(name):
            budget = format_budget(self._amount(name))
            say(f"\n{name}, {budget}")
            if run.config_file.exists():
                self.verbs.resume(str(run), started=self.mark, samples=samples)
            else:
                more |= {"wishes": _of_stage(self.wishes, name), "started": self.mark, "samples": samples}
                try:
                    verb(str(start), learns, budget, str(run), self.reason.method, **more)
                except TooShort as error:
                    raise CannotGoOn(f"{self.run}: {format_budget(self.budget)} in all leave too little for {name}: {error}") from None
            gc.collect()  # a model, its moments and replicas, before the next ones
            self.mark = time.monotonic()
        self._score(name, run)
        return run

    def _learnt(self, name: str, start: RunFolder, kept: Path, samples: int = 0) -> None:
        """A stage that learns the kept answers; what they have cost is its ancestors'."""
        run = self._stage(name, self.verbs.sft, start, [str(kept)], samples)
        inherit(run, RunFolder(self.run.path / RL), "wrote its answers")
        inherit(run, self.run, "chose its answers")

    @contextmanager
    def _writing(self, run: RunFolder, stage: str) -> Iterator[tuple[Job, Answered]]:
        """-> (job, what gets answers of `run`), metered as a stage of the whole run."""
        with begin("reason", self.run, self.mark) as job, job.meter.stage(stage), job.signals.interruptible():
            judge = Judge(self.run)
            with Writer(Engine(run.path, weights=self.grpo.weights or "auto", **OPTIONS)) as writer:
                ask = Asker(writer.engine.tokenizer, template_text(run))

                def answered(seeds: Sequence[int], problems: Sequence[Problem], samples: int) -> list[Group]:
                    groups = judged(writer, ask, judge, problems, seeds, samples, self.grpo.max_tokens)
                    tokens = tokens_of(groups)
                    job.meter.add(tokens, tokens * forward_flops(writer.engine.config, self.grpo.max_tokens, mtp=False))
                    return groups

                yield job, answered
        self.mark = time.monotonic()

    # scores

    def _scores(self) -> dict[str, dict]:
        return {line["of"]: line for line in read_lines(self.score_file)}

    def _score(self, name: str, run: RunFolder) -> None:
        """pass@1 and pass@k of a run on the first held-out problems, the same for all; at temperature 1, with the seeds of `grpo`'s own
        evaluations. The first score decides how many there are: as many as SCORED of a budget in time pays for."""
        scores = self._scores()
        if name in scores:
            return
        counts = [line["new"]["problems"] for line in scores.values()]
        samples, groups, began = self.grpo.samples, [], time.monotonic()
        with self._writing(run, "score") as (job, answered):
            lasts = None if counts else job.lasts(self.budget)
            most = min(counts[0] if counts else PROBLEMS[1] if lasts is None else PROBLEMS[2], len(self.task.held_out))
            step = max(1, AT_A_TIME // samples)
            while len(groups) < most:
                places = range(len(groups), min(len(groups) + step, most))
                seeds = [mix(SEEDS + place) for place in places]
                groups += answered(seeds, [self.task.held_out[place] for place in places], samples)
                if lasts is not None and len(groups) >= PROBLEMS[0]:
                    length = dict(zip(FACTS, facts(groups), strict=True))["length"]
                    longer = max(1.0, self.grpo.max_tokens / 2 / max(1.0, length))  # what is taught may write more than what begins
                    if (time.monotonic() - began) * longer * (1 + step / len(groups)) > SCORED * lasts:
                        break
            new = dict(zip(FACTS, facts(groups), strict=True))
            cost = used(job.meter.rows(), self.budget.unit)
        passed = {"loss": 1 - new["pass_at_1"], "bpb": None, "pass_at_1": new["pass_at_1"], "pass_at_k": new["pass_at_k"], "k": samples}
        passed |= {"reward": new["reward"], "length": new["length"], "problems": len(groups)}
        append_durably(self.score_file, json.dumps({"of": name, "new": passed, "cost": cost}))
        said = f"pass@1 {passed['pass_at_1']:.3f}, pass@{samples} {passed['pass_at_k']:.3f} on {len(groups)} held-out problems"
        say(f"{name}: {said}, {passed['length']:.0f} tokens an answer")

    # right answers of its own

    def _sampled(self, run: RunFolder) -> Path:
        """The file of right answers that `run` gave to problems that are learnt from. A chunk of answers is written down as it comes, so
        that none is asked for twice. Raises CannotGoOn where there are too few."""
        folder = self.run.path / SAMPLED
        answers, drawn = folder / "answers.jsonl", folder / "drawn.jsonl"
        if answers.exists():
            return answers
        budget = self._amount(SAMPLED)
        say(f"\n{SAMPLED}, {format_budget(budget)}")
        folder.mkdir(exist_ok=True)
        lines, size = read_lines(drawn), max(1, AT_A_TIME // self.reason.samples)
        before = sum(line["cost"] for line in lines)
        with self._writing(run, "sample") as (job, answered):
            most = self._chunks(budget, run, size)
            origin = {"run": RL, "weights_sha256": weights_sha256(run), "task": self.task.name}
            while (most is None or len(lines) < most) and (found := self._next(lines, size)):
                spent = sum(line["cost"] for line in lines)
                if most is None and lines and spent + lines[-1]["cost"] > budget.amount:
                    break
                line = self._drawn(*found, answered, origin)
                lines.append(line | {"cost": before + used(job.meter.rows(), budget.unit) - spent})
                append_durably(drawn, json.dumps(lines[-1], ensure_ascii=False))
        rows, counts = self._kept(lines)
        say("{problems:,} problems, {answers:,} answers: {right:,} right, {kept:,} kept, to {solved:,} problems".format(**counts))
        if counts["solved"] < FEWEST:
            solved = f"{counts['solved']} of {counts['problems']} problems have a right answer"
            raise CannotGoOn(
                f"{self.run}: {solved}, and fewer than {FEWEST} teach nothing: the task is too hard for this model in this budget; a "
                "longer one, or --cold with worked answers, may help"
            )
        write_atomic(folder / "counts.json", json.dumps(counts, indent=1))
        write_atomic(answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return answers

    def _drawn(self, epoch: int, places: list[int], answered: Answered, origin: dict) -> dict:
        """A chunk: answers to the problems at `places` in pass `epoch`, counted, and the rows that are kept of them."""
        seed, problems, samples = self.config.train.seed % (1 << 64), self.task.problems, self.reason.samples
        seeds = [mix(mix(mix(seed) ^ (epoch * len(problems) + place)) + 3) for place in places]
        groups, rows, right = answered(seeds, [problems[place] for place in places], samples), [], 0
        for place, one, group in zip(places, seeds, groups, strict=True):
            good = _right(group)
            right += len(good)
            source = origin | {"problem": place, "seed": one, "answers": samples, "right": len(good)}
            rows += [as_chat(problems[place].prompt, text, source=source) for text in _shortest(good, self.reason.kept)]
        cut = sum(answer.cut for group in groups for answer in group.answers)
        return {"epoch": epoch, "problems": places, "answers": len(places) * samples, "right": right, "cut": cut, "kept": rows}

    def _kept(self, lines: list[dict]) -> tuple[list[dict], dict[str, int]]:
        """(rows of all chunks, none twice, none of a held-out problem; how many there were of what)."""
        held_out = {problem.prompt for problem in self.task.held_out}
        every = {tuple(message["content"] for message in row["messages"]): row for line in lines for row in line["kept"]}
        rows = [row for (asked, _), row in every.items() if asked not in held_out]
        counts = {"problems": len({place for line in lines for place in line["problems"]})}
        counts |= {"solved": len({row["messages"][0]["content"] for row in rows})}
        return rows, counts | {name: sum(line[name] for line in lines) for name in ("answers", "right", "cut")} | {"kept": len(rows)}

    def _chunks(self, budget: Budget, run: RunFolder, size: int) -> int | None:
        """How many chunks of problems a budget in tokens or operations pays for, an answer counted at its greatest length; None: the meter
        says when it is used up."""
        if budget.unit in SPENT:
            return None
        width, model = read_config(run.config_file).train.seq_len, self.config.model
        each = width * (1.0 if budget.unit == "tok" else forward_flops(model, width, mtp=False))
        return max(1, int(budget.amount / (size * self.reason.samples * each)))

    def _next(self, lines: list[dict], size: int) -> tuple[int, list[int]] | None:
        """(pass, problems to ask next): all in an order of the seed's, then those without a right answer again; None: all is done."""
        count = len(self.task.problems)
        for epoch in range(max((line["epoch"] for line in lines), default=0), PASSES):
            asked = {place for line in lines if line["epoch"] == epoch for place in line["problems"]}
            asked |= {row["source"]["problem"] for line in lines if line["epoch"] < epoch for row in line["kept"]}
            order = permutation(count, self.config.train.seed, epoch, 4).tolist()
            if left := [place for place in order if place not in asked]:
                return epoch, left[:size]
        return None

    # the end

    def _finish(self) -> dict:
        """The whole run gets the model of 4-sft, and a summary; -> the summary."""
        last, scores = RunFolder(self.run.path / SFT), self._scores()
        drafts = self.config.model.mtp_depth > 0
        for file in filter(Path.exists, (last.tokenizer_file, last.model_card_file, last.learned_file, *last.beside(drafts))):
            target = self.run.path / file.relative_to(last.path)
            target.parent.mkdir(exist_ok=True)
            link_or_copy(file, target)
        config = replace(read_config(last.config_file), budget=self.budget, reason=self.reason)
        write_atomic(self.run.config_file, write_config(config, reasons_of(last)))
        rows = [row for row in whole(self.run) if row.verb in TRAINING]
        stages = [self._told("base", str(self.base), [], scores)]
        for name in self.stages:
            mine = [row for row in rows if row.stage.startswith(f"{name}: ") or (name == SAMPLED and row.stage == "sample")]
            if name == STUDENT:
                stages.append(self._told("student", self.reason.student, [], scores))
            stages.append(self._told(name, str(self.run.path / name), mine, scores))
        made = [read_state(RunFolder(self.run.path / name), "summary", dict) or {} for name in self.stages if name != SAMPLED]
        final = read_state(last, "summary", dict) or {}
        student = {when: {"new": scores[name]["new"]} for when, name in (("before", "student"), ("after", STUDENT)) if name in scores}
        summary = {
            "run": str(self.run.path), "task": self.task.name, "budget": format_budget(self.budget),
            "seconds": sum(row.wall_s for row in rows),
            **{name: final.get(name) for name in ("bpb", "loss", "eval_loss", "parameters", "active_parameters", "trainable_parameters")},
            **{name: sum(one.get(name) or 0 for one in made) for name in ("steps", "tokens", "trained_tokens")},
            "stages": stages,
            "left_out": [name for name in SHARES if name not in self.stages],
            "before": {"new": scores["base"]["new"]}, "after": {"new": scores[SFT]["new"]},
            "student": {"run": str(self.run.path / STUDENT), "base": self.reason.student, **student} if student else None,
            "answers": json.loads((self.run.path / SAMPLED / "counts.json").read_text()),
            "base": self.config.start.weights_sha256,
            "ancestors": [{"name": row.name, "relation": row.relation, "generation": row.generation} for row in ancestors_of(self.run)],
            "samples": final.get("samples", []),
        } | bill(rows)  # fmt: skip
        if counts := self._documents():
            summary["documents"] = counts
            say(in_words(counts))
        write_atomic(self.run.state / "summary.json", json.dumps(to_json(summary), indent=1))
        say("\n" + table(("", "time", "pass@1", f"pass@{self.grpo.samples}"), list(map(_row, stages))))
        say(f"spent: {duration(summary['seconds'])} of {format_budget(self.budget)}; {self.run} has the model of {SFT}, beside all stages")
        return summary

    def _documents(self) -> dict[str, int] | None:
        """`data.accounts`' of the task's file and of --cold; None: the task is a built-in one that makes its problems."""
        cold = (read_state(RunFolder(self.run.path / COLD), "summary", dict) or {}).get("documents") if self.reason.cold else None
        read = [counts for counts in (self.task.counts, cold) if counts]
        return balanced({name: sum(counts[name] for counts in read) for name in read[0]}) if read else None

    def _told(self, name: str, run: str, rows: list[Entry], scores: dict[str, dict]) -> dict:
        """What the summary says of a stage."""
        told: dict[str, Any] = {"stage": name, "run": run}
        if rows:
            told |= {"budget": format_budget(self._amount(name)), "seconds": sum(row.wall_s for row in rows)}
            told |= {"tokens": sum(row.tokens for row in rows)}
        return told | (scores[name]["new"] if name in scores else {})


def _row(told: dict) -> tuple[str, ...]:
    passed = (f"{told[name]:.3f}" if name in told else "" for name in ("pass_at_1", "pass_at_k"))
    return (told["stage"], duration(told["seconds"]) if "seconds" in told else "", *passed)


def used(rows: Sequence[Entry], unit: str) -> float:
    """What ledger rows say was used of a budget in seconds, money or energy; 0 of any other."""
    return float(sum(getattr(row, SPENT[unit]) for row in rows)) if unit in SPENT else 0.0


def _right(group: Group) -> list[Answer]:
    """The answers that are worth learning: right, ended by the model itself, without repetition."""
    return [answer for answer in group.answers if answer.reward >= 1 and not answer.cut and not repeats(answer.text)]


def _shortest(answers: Sequence[Answer], most: int) -> list[str]:
    """Different texts, the shortest first."""
    ordered = sorted(answers, key=lambda answer: (len(answer.tokens), answer.text))
    return list(dict.fromkeys(answer.text.strip() for answer in ordered))[:most]
