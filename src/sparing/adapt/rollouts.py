"""Rollouts: the model's own answers to a task's problems, judged, as batches to learn from.

A batch is a function of the weights of its step, the task, the seed and the step: the engine samples by (seed, position) alone, and a row's
result does not depend on what else is in its step. So a resumed run repeats the undisturbed one. What no function gives again is kept in
the run: verdicts (a program that is judged may be slower the next time), and, where several updates learn from one rollout, the rollout.
Of several ranks each answers a part of the problems; what is drawn again for want of a signal, each decides for its own.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from sparing.adapt.policy import FACTS, PolicyBatch, advantages, token_weights
from sparing.adapt.rewards import Task, verify
from sparing.base.config import CannotGoOn, Config
from sparing.base.files import append_durably, read_lines, write_atomic
from sparing.base.layers import mixtures
from sparing.base.messages import say
from sparing.base.run import RunFolder, read_tensors, verify_folder, write_folder
from sparing.budget.flops import forward_flops
from sparing.data.chat import ChatTemplate
from sparing.data.loader import IGNORED
from sparing.data.rows import permutation
from sparing.data.split import mix
from sparing.data.tokenizer import Tokenizer
from sparing.evals.verifiers import Problem
from sparing.infer.engine import Engine
from sparing.infer.live import LiveWeights
from sparing.infer.network import cannot_compile, fastest_format
from sparing.infer.request import Request, Sampling
from sparing.job.begin import Job
from sparing.model.transformer import Transformer
from sparing.train.replicas import sharing

AT_A_TIME = 64
"""Answers that are sampled together."""
DRAWS = 4
"""So many times a step draws problems at most, where all groups of a draw were worth the same."""
SHORT = 8
"""Words of an answer below which nothing counts as repetition."""
WINDOW = 8
"""Rollouts that are compared with the first ones."""
RISE, GREW = 0.1, 2.0
"""A reward that rose by so much while answers grew so many times as long may be a reward of length."""
LOOK = "read some in state/answers.jsonl"


class Answer(NamedTuple):
    """One sampled answer."""

    tokens: list[int]
    """Of the answer, with the token that ended it."""
    logprobs: list[float]
    """With which each was sampled."""
    text: str
    cut: bool
    """It ended with `max_tokens`."""
    routes: np.ndarray | None
    """(prompt and answer without its last token, layers, experts) int16; of mixtures."""
    reward: float = 0.0


@dataclass
class Group:
    """A problem, and the answers to it."""

    prompt: list[int]
    answers: list[Answer]
    pass_at: int = 1
    """As in `GrpoConfig`."""

    @property
    def rewards(self) -> list[float]:
        return [answer.reward for answer in self.answers]

    @property
    def signal(self) -> bool:
        """Whether some of its answers are to become likelier, or less likely."""
        return bool(self.worth("dr_grpo").any())

    def worth(self, kind: str) -> np.ndarray:
        """(answers,) float64: `policy.advantages`."""
        return advantages(np.array([self.rewards]), kind, self.pass_at)[0]


class Asker:
    """Turns problems into prompts: through the run's chat template, or, where it has none, as text to go on with."""

    def __init__(self, tokenizer: Tokenizer, template: str | None):
        self.tokenizer, self.template = tokenizer, None if template is None else ChatTemplate(template)

    def __call__(self, problem: Problem) -> list[int]:
        if self.template is None:
            return self.tokenizer.encode_prompt(problem.prompt)
        return self.template.encode(self.tokenizer, [{"role": "user", "content": problem.prompt}])


@dataclass
class Judge:
    """Verdicts, each asked for once; kept in a file of each rank."""

    run: RunFolder
    rank: int = 0

    def __post_init__(self) -> None:
        self._file = self.run.state / (f"verdicts-{self.rank}.jsonl" if self.rank else "verdicts.jsonl")
        lines = (line for file in sorted(self.run.state.glob("verdicts*.jsonl")) for line in read_lines(file))
        self._known = {line["of"]: line["reward"] for line in lines if line.keys() >= {"of", "reward"}}
        self._new: list[str] = []

    def __call__(self, problem: Problem, text: str) -> float:
        key = hashlib.blake2b(repr((problem, text)).encode(), digest_size=12).hexdigest()
        if key not in self._known:
            self._known[key] = float(verify(problem, text).reward)
            self._new.append(json.dumps({"of": key, "reward": self._known[key]}))
        return self._known[key]

    def keep(self) -> None:
        """Write down what was asked for since the last time."""
        if self._new:
            append_durably(self._file, "\n".join(self._new))
            self._new = []


class Writer:
    """Writes answers by an engine, and closes it."""

    def __init__(self, engine: Engine, routes: bool = False):
        """routes: answers tell which experts their tokens went through."""
        self.engine, self.routes = engine, routes

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_exc) -> None:
        self.close()

    def close(self) -> None:
        self.engine.close()

    def answers(self, prompts: Sequence[tuple[list[int], int]], max_tokens: int) -> list[Answer]:
        """An answer to each (prompt, seed), at temperature 1, in order."""
        requests: list[Request] = []
        try:
            for prompt, seed in prompts:
                sampling = Sampling(max_tokens, 1.0, seed=seed, logprobs=0, routes=self.routes)
                requests.append(self.engine.submit(prompt, sampling))
            return [self._answer(request) for request in requests]
        except BaseException:
            for request in requests:
                request.cancel()
            raise

    def _answer(self, request: Request) -> Answer:
        pieces = list(request)
        if request.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"the engine stopped: {request.error or request.finish_reason}")
        tokens = [token for piece in pieces for token in piece.tokens]
        logprobs = [entry.logprob for piece in pieces for entry in piece.logprobs or []]
        if request.end is not None:
            tokens.append(request.end.token)
            logprobs.append(request.end.logprob)
        assert len(tokens) == len(logprobs)
        routes = None
        if self.routes:
            routes = np.concatenate(request.routes).astype(np.int16)
            assert len(routes) == len(request.prompt) + len(tokens) - 1
        return Answer(tokens, logprobs, "".join(piece.text for piece in pieces), request.finish_reason == "length", routes)


OPTIONS = {"max_batch": AT_A_TIME, "max_queue": 1 << 20, "speculate": False}
"""Of an engine that samples answers."""


class Sampler(Writer):
    """Our engine over the weights of a model that learns."""

    def __init__(self, run: RunFolder, model: Transformer, config: Config):
        c, settings = config.model, config.grpo
        self.model = model
        self.live: LiveWeights | None = None
        if model.device.type == "cpu" and not cannot_compile(c):
            self.live = LiveWeights(model, settings.weights or fastest_format())
            engine = Engine(run.path, live=self.live, **OPTIONS)
        else:
            engine = Engine(run.path, network=sharing(model), **OPTIONS)
        super().__init__(engine, bool(mixtures(c)) and settings.replay)
        self._fresh = ""

    def refresh(self) -> str:
        """Take over the model's weights; -> their fingerprint."""
        found = fingerprint(self.model)
        if found != self._fresh:
            if self.live is not None:
                self.live.refresh()
            self.engine.renew()
            self._fresh = found
        return found


def judged(
    writer: Writer, ask: Asker, judge: Judge, problems: Sequence[Problem], seeds: Sequence[int], samples: int, max_tokens: int,
    pass_at: int = 1,
) -> list[Group]:  # fmt: skip
    """`samples` answers to each problem at temperature 1, and what they are worth. seeds: of each problem's."""
    prompts = [ask(problem) for problem in problems]
    asked = [(prompt, mix(seed + 2 * k) % (1 << 63)) for prompt, seed in zip(prompts, seeds, strict=True) for k in range(samples)]
    found = writer.answers(asked, max_tokens)
    groups = []
    for at, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        mine = found[at * samples : (at + 1) * samples]
        groups.append(Group(prompt, [answer._replace(reward=judge(problem, answer.text)) for answer in mine], pass_at))
    judge.keep()
    return groups


def tokens_of(groups: Sequence[Group]) -> int:
    """Tokens that sampling the groups has computed: each prompt once, each answer."""
    return sum(len(group.prompt) + sum(len(answer.tokens) for answer in group.answers) for group in groups)


@torch.no_grad()
def fingerprint(model: Transformer) -> str:
    """Changes when what learns does: of the sums of each tensor and of its squares."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            flat = parameter.detach().flatten()
            digest.update(f"{name} {float(flat.sum(dtype=torch.float64))!r} {float(torch.linalg.vector_norm(flat.float()))!r}".encode())
    return digest.hexdigest()


class Rollouts:
    """A feed of judged answers; `bind` it to the model that learns before the first batch."""

    def __init__(self, job: Job, config: Config, task: Task, tokenizer: Tokenizer, template: str | None):
        self.job, self.config, self.task, self.tokenizer = job, config, task, tokenizer
        self.ask, self.judge = Asker(tokenizer, template), Judge(job.run, job.ranks.rank if job.ranks else 0)
        self.sampler: Sampler | None = None
        self.watch = Watch(say)
        self._last: tuple[int, str, PolicyBatch] | None = None
        self._shown = False

    def bind(self, model: Transformer) -> None:
        self.sampler = Sampler(self.job.run, model, self.config)

    def close(self) -> None:
        if self.sampler is not None:
            self.sampler.close()

    def batch(self, step: int, rank: int = 0, world: int = 1) -> PolicyBatch:
        """What step `step` learns from, as the model is now."""
        assert self.sampler is not None
        s = self.config.grpo
        rollout, part = divmod(step, s.updates)
        if part == 0:
            weights = self.sampler.refresh()
            if self._last is not None and self._last[:2] == (step, weights):
                return self._last[2]
            groups = self._rollout(rollout, rank, world)
            self.watch.see(step, groups, weights)
            if rank == 0:
                self._show(step, groups)
            if s.updates > 1:
                self._keep(step, f"{rank}-of-{world}", groups)
        else:
            weights, groups = "", self._kept(step - part, f"{rank}-of-{world}")
        batch = self._packed(groups[part :: s.updates], groups, world)
        self._last = (step, weights, batch)
        return batch

    # sampling

    def _rollout(self, number: int, rank: int, world: int) -> list[Group]:
        """Answers to this rank's problems of a rollout, judged; of further draws where none of a draw has a signal."""
        s, seed, groups = self.config.grpo, self.config.train.seed, []
        with self.job.meter.stage("rollout"):
            for draw in range(DRAWS):
                places = range(rank, s.problems, world)
                first = (number * DRAWS + draw) * s.problems
                problems = [self._problem(first + place) for place in places]
                seeds = [mix(mix(mix(seed % (1 << 64)) ^ (first + place)) + 1) for place in places]
                groups = self.answered(problems, seeds, s.samples)
                if any(group.signal for group in groups):
                    break
        return groups

    def _problem(self, number: int) -> Problem:
        epoch, place = divmod(number, len(self.task.problems))
        return self.task.problems[permutation(len(self.task.problems), self.config.train.seed, epoch, 3)[place]]

    def answered(self, problems: Sequence[Problem], seeds: Sequence[int], samples: int) -> list[Group]:
        """`samples` answers to each problem, judged."""
        assert self.sampler is not None
        s = self.config.grpo
        groups = judged(self.sampler, self.ask, self.judge, problems, seeds, samples, s.max_tokens, s.pass_at)
        tokens = tokens_of(groups)
        self.job.meter.add(tokens, tokens * forward_flops(self.config.model, self.config.train.seq_len, mtp=False))
        return groups

    def _show(self, step: int, groups: list[Group]) -> None:
        """Keep an answer or two to look at: the first one, and the first that is right."""
        file = self.job.run.state / "answers.jsonl"
        if not self._shown and file.exists():  # what a resumed run does again
            kept = [line for line in read_lines(file) if line.get("step", 0) < step]
            write_atomic(file, "".join(json.dumps(line) + "\n" for line in kept))
        self._shown = True
        pairs = [(group, answer) for group in groups for answer in group.answers]
        shown = [pairs[0], next((pair for pair in pairs if pair[1].reward >= 1), pairs[0])]
        for group, answer in shown[: 1 + (shown[1] is not shown[0])]:
            line = {"step": step, "prompt": self.tokenizer.decode(group.prompt), "text": answer.text, "reward": answer.reward}
            with open(file, "a", encoding="utf-8") as out:
                out.write(json.dumps(line) + "\n")

    # batches

    def _packed(self, groups: list[Group], whole: list[Group], world: int) -> PolicyBatch:
        """Rows of the answers that have a signal. whole: the groups that are told of."""
        s, T = self.config.grpo, self.config.train.seq_len
        masked = s.kind == "dapo" if s.mask_cut is None else s.mask_cut
        every = [(group.prompt, answer) for group in groups for answer in group.answers]
        trained = np.array([0 if masked and answer.cut else len(answer.tokens) for _, answer in every])
        worth = np.concatenate([group.worth(s.kind) for group in groups])
        weights, divisor = token_weights(trained, s.kind, s.max_tokens)
        learnt = [n for n in range(len(every)) if trained[n] and worth[n]]
        rows = _fitted([len(every[n][0]) + len(every[n][1].tokens) - 1 for n in learnt], T)
        B = max(1, len(rows))
        tokens, targets = np.full((B, T), self.tokenizer.eot_id, np.int64), np.full((B, T, 1), IGNORED, np.int64)
        documents = np.zeros((B, T), np.int32)
        weighed, better, sampled = (np.zeros((B, T), np.float32) for _ in range(3))
        routes = None
        if self.sampler is not None and self.sampler.routes:
            c = self.config.model
            routes = np.empty((B, T, c.num_layers, c.num_experts_per_tok), np.int16)
            routes[:] = np.arange(c.num_experts_per_tok)
        for index, row in enumerate(rows):
            at = 0
            for document, place in enumerate(row):
                n = learnt[place]
                prompt, answer = every[n]
                ids = [*prompt, *answer.tokens]
                end, first = at + len(ids) - 1, at + len(prompt) - 1
                tokens[index, at:end], documents[index, at:end] = ids[:-1], document
                targets[index, first:end, 0], sampled[index, first:end] = answer.tokens, answer.logprobs
                weighed[index, first:end], better[index, first:end] = weights[n], worth[n]
                if routes is not None:
                    assert answer.routes is not None
                    routes[index, at:end] = answer.routes
                at = end
            documents[index, at:] = len(row)
        known = np.zeros((B, len(FACTS)), np.float32)
        known[0] = np.array(facts(whole)) / world
        shares, total = np.full(B, divisor / B, np.float32), np.full(B, float(trained[learnt].sum()) * world, np.float32)
        arrays = {
            "tokens": tokens, "targets": targets, "documents": documents, "weights": weighed, "divisor": shares, "advantages": better,
            "sampled": sampled, "known": known, "total": total, "routes": routes,
        }  # fmt: skip
        return PolicyBatch(**{name: torch.from_numpy(array) for name, array in arrays.items() if array is not None})

    # what must be kept

    def _keep(self, step: int, of: str, groups: list[Group]) -> None:
        folder = self.job.run.state / "rollouts"
        entry = [[group.prompt, [[a.tokens, a.logprobs, a.text, a.cut, a.reward] for a in group.answers]] for group in groups]
        answers = {f"{i}.{j}": answer for i, group in enumerate(groups) for j, answer in enumerate(group.answers)}
        routes = {name: torch.from_numpy(answer.routes) for name, answer in answers.items() if answer.routes is not None}
        write_folder(folder / f"{step:08d}.{of}", {"groups.json": json.dumps(entry), "routes.safetensors": routes})
        steps = sorted(int(path.name.partition("-")[2]) for path in self.job.run.state.glob("step-*"))
        for old in folder.iterdir():  # an older checkpoint than the oldest is not gone back to
            with suppress(ValueError, OSError):
                if steps and int(old.name.partition(".")[0]) + self.config.grpo.updates <= steps[0]:
                    for file in old.iterdir():
                        file.unlink()
                    old.rmdir()

    def _kept(self, step: int, of: str) -> list[Group]:
        folder = self.job.run.state / "rollouts" / f"{step:08d}.{of}"
        if not folder.exists():
            others = sorted({path.name.partition("-of-")[2] for path in folder.parent.glob(f"{step:08d}.*")})
            raise CannotGoOn(f"the answers of step {step} were sampled by {' or '.join(others) or 'no'} ranks: go on with as many")
        verify_folder(folder)
        routes = {name: tensor.numpy() for name, tensor in read_tensors(folder / "routes.safetensors")}
        return [
            Group(prompt, [Answer(a[0], a[1], a[2], a[3], routes.get(f"{i}.{j}"), a[4]) for j, a in enumerate(answers)])
            for i, (prompt, answers) in enumerate(json.loads((folder / "groups.json").read_text()))
        ]


def _fitted(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Places of the sizes in rows of `length`, the largest first, each in the first row with room for it."""
    rows: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: (-sizes[place], place)):
        row = next((row for row, free in enumerate(room) if free >= sizes[place]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(place)
        room[row] -= sizes[place]
    return rows


def repeats(text: str) -> bool:
    """Whether most of a text's runs of four words were there before."""
    words = text.split()
    runs = list(zip(*(words[shift:] for shift in range(4)), strict=False))
    return len(words) >= SHORT and len(set(runs)) < len(runs) / 2


def facts(groups: Sequence[Group]) -> list[float]:
    """The numbers of `policy.FACTS`."""
    answers = [answer for group in groups for answer in group.answers]
    right = [answer for answer in answers if answer.reward >= 1]
    return [
        float(np.mean([answer.reward for answer in answers])),
        len(right) / len(answers),
        float(np.mean([any(reward >= 1 for reward in group.rewards) for group in groups])),
        float(np.mean([len(answer.tokens) for answer in answers])),
        float(np.mean([not group.signal for group in groups])),
        float(np.mean([answer.cut for answer in answers])),
        float(np.mean([repeats(answer.text) for answer in right])) if right else 0.0,
    ]


@dataclass
class Watch:
    """Says once what a curve of rewards does not show: that nothing is learnt, or something else than the task."""

    tell: Callable[[str], None]
    history: list[dict[str, float]] = field(default_factory=list)
    told: set[str] = field(default_factory=set)
    before: tuple[str, bool] | None = None

    def see(self, step: int, groups: Sequence[Group], weights: str) -> None:
        """weights: the fingerprint of those that sampled."""
        now = dict(zip(FACTS, facts(groups), strict=True))
        if self.before is not None and self.before == (weights, True):
            self._say("still", f"step {step}: the weights did not move, although the last rollout had a signal (is the learning rate 0?)")
        self.before = weights, now["no_signal"] < 1
        right = Counter(answer.text.strip() for group in groups for answer in group.answers if answer.reward >= 1)
        now["same"] = right.most_common(1)[0][1] / right.total() if right.total() >= 16 and len(groups) >= 8 else 0.0
        self.history.append(now)
        if len(self.history) < 2 * WINDOW:
            if len(self.history) == WINDOW and self._mean("no_signal", slice(None)) == 1:
                self._silent(step)
            return
        first, last = slice(0, WINDOW), slice(-WINDOW, None)
        if self._mean("no_signal", last) == 1:
            self._silent(step)
        if self._mean("reward", last) < self._mean("reward", first) + RISE:
            return
        rose = f"while the reward rose from {self._mean('reward', first):.2f} to {self._mean('reward', last):.2f}"
        longer = self._mean("length", last) / max(1.0, self._mean("length", first))
        if longer > GREW:
            self._say("length", f"step {step}: answers became {longer:.1f} times as long {rose}: is length rewarded? {LOOK}")
        if self._mean("repeats", last) > max(0.2, 2 * self._mean("repeats", first)):
            share = self._mean("repeats", last)
            self._say("repeats", f"step {step}: {share:.0%} of the right answers repeat themselves {rose}: is the verifier gamed? {LOOK}")
        if self._mean("same", last) > max(0.5, 2 * self._mean("same", first)):
            share = self._mean("same", last)
            self._say("same", f"step {step}: {share:.0%} of the right answers are the same text {rose}: is the verifier gamed? {LOOK}")

    def _silent(self, step: int) -> None:
        passed = self._mean("pass_at_1", slice(-WINDOW, None))
        why = "too hard for this model" if passed < 0.5 else "no longer hard for it"
        found = f"step {step}: no group of {WINDOW} rollouts had a signal (pass@1 {passed:.3f})"
        self._say("silent", f"{found}: nothing is learnt, the task is {why}")

    def _mean(self, name: str, part: slice) -> float:
        return float(np.mean([line[name] for line in self.history[part]]))

    def _say(self, what: str, message: str) -> None:
        if what not in self.told:
            self.told.add(what)
            self.tell(message)
