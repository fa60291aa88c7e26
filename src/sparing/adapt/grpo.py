"""Learning from rewards: a run answers a task's problems, and what was worth more than the rest of its group becomes likelier.

The start is the run itself, or low-rank updates beside it; the feed, rollouts by our engine (`adapt/rollouts.py`); the objective, a policy
gradient (`adapt/policy.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sparing.adapt import sft
from sparing.adapt.policy import Policy
from sparing.adapt.rewards import Task, load_task, told
from sparing.adapt.rollouts import Asker, Rollouts, facts
from sparing.base.config import Budget, Config, GrpoConfig, UserError
from sparing.base.config_file import Wishes
from sparing.base.files import read_lines, write_atomic
from sparing.base.layers import mixtures
from sparing.base.messages import say
from sparing.base.run import RunFolder
from sparing.budget.flops import forward_flops, train_flops
from sparing.data.chat import template_text
from sparing.data.files import absolute
from sparing.data.split import mix
from sparing.data.tokenizer import Tokenizer
from sparing.evals.bpb import NllFn, bpb
from sparing.job import learn as job_learn
from sparing.job.begin import Job, derive, keep, look_at, try_out
from sparing.job.corpus import EVAL_TOKENS, Prompt, TrainingData
from sparing.job.texts import same_texts
from sparing.model.transformer import Transformer
from sparing.planning.places import Place
from sparing.planning.start import with_start
from sparing.train.log import TrainResult

RANK = 8
"""Of low-rank updates: a reward says little, and ranks from 1 on hold it ("LoRA without regret", thinkingmachines.ai 2025)."""
LR = {"lora": 3e-4, "full": 3e-5}
STEPS, PROBLEMS = 60, (4, 16)
"""A rollout has as many problems as leave about this many steps, within PROBLEMS."""
SCORED, FEWEST = 0.03, (16, 512)
"""One evaluation samples this share of all answers; it asks so many held-out problems at least and at most."""
OLD_BYTES = 16_000
"""Of text that the run could write before, an eighth of it in tokens where it writes that itself."""
READ_SPEED = 2.0
"""About how many times as fast as it learns a token the engine writes one."""
SEEDS = 1 << 40
"""What evaluations sample with, beside what rollouts do."""


@dataclass(frozen=True)
class TaskFacts:
    """What is bound to a run."""

    documents: int
    bytes: int
    content: str
    counts: dict[str, int] | None = None


def task_of(settings: GrpoConfig) -> Task:
    """The task that a configuration names. Raises UserError."""
    return load_task(settings.task, settings.data)


def facts_of(task: Task) -> TaskFacts:
    texts = [repr(problem).encode() for problem in (*task.problems, *task.held_out)]
    return TaskFacts(len(texts), sum(map(len, texts)), hashlib.blake2b(b"\n".join(texts), digest_size=16).hexdigest(), task.counts)


def unchanged(run: RunFolder, config: Config) -> TaskFacts:
    """The task of a run, loaded again. Raises UserError where it is gone or has changed."""
    found = facts_of(task_of(config.grpo))
    same_texts(run, found, "begin anew")
    return found


def resolved(job: Job, wishes: Wishes, budget: Budget) -> Config:
    """The configuration of a new run that learns from rewards, written into its folder. Raises UserError, before anything is written."""
    named, data = wishes.value("grpo.task"), tuple(map(absolute, wishes.value("grpo.data", ())))
    task = load_task(named, data)
    named = absolute(named) if Path(named).exists() else named
    own = Wishes.of(wishes, {"start": {"run": str(Path(wishes.value("start.run")).resolve())}})
    own = Wishes.of(own, {"grpo": {"task": named, "data": data}, "data": {"paths": (named, *data)}})
    if kept := own.value("chats.keep"):
        own = Wishes.of(own, {"chats": {"keep": tuple(map(absolute, kept))}})
    wishes = with_start(own)
    base, settings = RunFolder(wishes.value("start.run")), wishes.config().grpo
    tokenizer = Tokenizer.load(base.tokenizer_file, wishes.config().tokens)
    ask = Asker(tokenizer, template_text(base))
    longest = max(len(ask(problem)) for problem in task.problems)
    room, most = wishes.config().model.max_position_embeddings, settings.max_tokens
    length = min(room, -(-(longest + most) // 16) * 16)
    if longest + most > room:
        raise UserError(f"--grpo.max-tokens {most}: the longest problem has {longest} tokens, and the model's context is {room}")
    if settings.replay and mixtures(wishes.config().model) and wishes.value("train.recompute"):
        raise UserError("train.recompute: a mixture's routes are replayed in one forward pass: leave it out, or set grpo.replay = false")
    if not 1 <= settings.pass_at <= settings.samples:
        raise UserError(f"grpo.pass_at {settings.pass_at}: 1 to grpo.samples, {settings.samples}")
    if settings.problems % settings.updates or settings.updates > settings.problems:
        raise UserError(f"grpo.updates {settings.updates} must divide grpo.problems {settings.problems}")
    if own.sets("grpo.problems") and settings.problems % (least := settings.updates * job.size):
        nearest = max(1, round(settings.problems / least)) * least
        raise UserError(f"grpo.problems {settings.problems}: {job.size} ranks need a multiple of {least}; nearest: {nearest}")
    layout = wishes.config().parallel
    if job.size > 1 and (layout.shard == "weights" or layout.experts > 1):
        raise UserError('grpo: each rank samples with all weights: [parallel] shard = "optimizer" and experts = 1 are the nearest')
    answers = settings.problems * settings.samples // settings.updates
    if own.value("train.batch_size", answers) != answers:
        what = f"an update learns from {answers} answers (grpo.problems * grpo.samples / grpo.updates): change those"
        raise UserError(f"train.batch_size {own.value('train.batch_size')}: {what}")
    if own.value("train.seq_len", length) < length:
        raise UserError(f"train.seq_len {own.value('train.seq_len')}: the longest problem and its answer have up to {length} tokens")
    wishes = Wishes.of(wishes, {"train": {"seq_len": length, "short_seq_len": None, "eval_context": None, "batch_size": answers}}, own)
    try_out(job, wishes, budget)
    place = look_at(job, wishes, budget)
    more, reasons = _derived(job, own, wishes, budget, place, len(task.held_out))
    config, why = derive(job, Wishes.of(wishes, more, own), budget, sft.ANY, place)
    reasons = {"train.seq_len": f"the longest problem has {longest} tokens, an answer at most {most}"} | reasons
    reasons |= why | {"train.batch_size": "answers that an update learns from"}
    reasons = {name: reason for name, reason in reasons.items() if not own.sets(name)}
    read = f"task {task.name}: {len(task.problems):,} problems, {len(task.held_out):,} held out"
    keep(job, config, reasons, facts_of(task), None, place, read)
    if task.lost:
        say(f"{len(task.lost):,} rows cannot be used: {told(task.lost)}")
    sft.keep_quarantine(job.run, task.lost)
    write_atomic(job.run.tokenizer_file, base.tokenizer_file.read_text(encoding="utf-8"))
    return config


def _derived(job: Job, own: Wishes, wishes: Wishes, budget: Budget, place: Place, held_out: int) -> tuple[dict, dict[str, str]]:
    """(settings that the user's own wishes leave open, the reason for each)."""
    method = "full" if wishes.get("adapter") is None else "lora"
    config = derive(job, wishes, budget, sft.ANY, place).config
    s, lasts, width = config.grpo, job.lasts(budget), config.train.seq_len
    if lasts is not None:
        speed = place.tokens_per_second(config)
        answers = max(0.1, lasts - job.clock.seconds()) / (width / 2 * (1 + 1 / READ_SPEED) / speed)
    else:
        flops = train_flops(config.model, width, adapter=config.adapter) + forward_flops(config.model, width, mtp=False)
        answers = budget.amount / (1 if budget.unit == "tok" else flops) / width
    problems = s.problems if own.sets("grpo.problems") else int(min(max(answers / s.samples / STEPS, PROBLEMS[0]), PROBLEMS[1]))
    problems = max(1, problems // (s.updates * job.size)) * s.updates * job.size
    scored = int(min(max(SCORED * answers / s.samples, FEWEST[0]), FEWEST[1], held_out))
    settings = {
        "grpo": {"problems": problems, "scored": scored},
        "train": {
            "batch_size": problems * s.samples // s.updates, "evals": 2, "eval_bytes": OLD_BYTES,
            "mtp_weight": 0.0, "sequence_balance": 0.0, "bias_update_rate": 0.0,
        },
    }  # fmt: skip
    reasons = {
        "grpo.problems": f"about {answers / s.samples / problems:,.0f} rollouts",
        "grpo.scored": f"an evaluation samples about {SCORED:.0%} of the answers",
    }
    if method == "lora":
        settings |= {"adapter": {"rank": RANK}, "optim": {"lr": LR["lora"]}}
        reasons["adapter.rank"] = "a reward says little"
    else:
        settings["optim"] = sft.FULL_OPTIM | dict.fromkeys(("lr", "lr_embed", "lr_head", "lr_router", "lr_norm"), LR["full"])
    return settings, reasons | {"optim.lr": "a third of what answers are learnt with: each step's direction is an estimate (LAB.md)"}


@dataclass(frozen=True)
class TaskData(TrainingData):
    """Rollouts to learn from, held-out problems to score, and old text to watch."""

    old: list[str]

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """evaluate(nll) -> pass_at_1 and pass_at_k of held-out problems (at temperature 1), their mean length; loss: the share of wrong
        answers; as old_loss and old_bpb those of the old text."""
        feed, s, context = self.feed, config.grpo, config.train.seq_len
        assert isinstance(feed, Rollouts)

        def evaluate(nll: NllFn) -> dict:
            assert feed.sampler is not None
            feed.sampler.refresh()
            problems = feed.task.held_out[: s.scored]
            groups = feed.answered(problems, [mix(SEEDS + place) for place in range(len(problems))], s.samples)
            reward, passed, any_passed, length, *_ = facts(groups)
            result = {"loss": 1 - passed, "bpb": None, "pass_at_1": passed, "pass_at_k": any_passed, "k": s.samples, "reward": reward}
            result |= {"length": length, "problems": len(problems), "bytes": None, "tokens": None}
            if self.old:
                old = bpb(nll, self.tokenizer, self.old, context, batch=max(1, EVAL_TOKENS // context), should_stop=should_stop)
                result |= {f"old_{key}": old[key] for key in ("loss", "bpb", "bytes", "tokens")}
            return result

        return evaluate

    def prompts(self, count: int) -> list[Prompt]:
        """Held-out problems."""
        assert isinstance(self.feed, Rollouts)
        asked = map(self.feed.ask, self.feed.task.held_out[:count])
        return [Prompt(self.tokenizer.decode(ids), ids) for ids in asked]

    def score(self, evaluation: dict) -> dict:
        names = ("loss", "bpb", "pass_at_1", "pass_at_k", "k", "reward", "length", "problems")
        old = {"old": {key: evaluation.get(f"old_{key}") for key in ("loss", "bpb", "bytes")}} if self.old else {}
        return {"new": {name: evaluation.get(name) for name in names}} | old

    def trained_tokens(self, result: TrainResult) -> int:
        assert isinstance(self.feed, Rollouts)
        return int(sum(line.get("trained", 0) for line in read_lines(self.feed.job.run.metrics_file)))


def data(job: Job, config: Config) -> TaskData:
    """What the run learns from."""
    run = job.run
    if not run.tokenizer_file.exists():
        write_atomic(run.tokenizer_file, Path(config.data.tokenizer).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(run.tokenizer_file, config.tokens)
    feed = Rollouts(job, config, task_of(config.grpo), tokenizer, template_text(run))
    return TaskData(feed, tokenizer, [], sft.old_text(job, config, tokenizer))


def learn(job: Job, config: Config, samples: int) -> dict:
    """Train (or go on training) the job's run; -> the summary."""
    made: list[TaskData] = []

    def open_data(job: Job, config: Config) -> TaskData:
        made.append(data(job, config))
        return made[0]

    def bind(job: Job, config: Config, model: Transformer, material: TrainingData) -> Config:
        assert isinstance(material.feed, Rollouts)
        material.feed.bind(model)
        return config

    try:
        return job_learn.learn(job, config, samples, data=open_data, objective=Policy(config.grpo), limit=bind)
    finally:
        for material in made:
            material.feed.close()
