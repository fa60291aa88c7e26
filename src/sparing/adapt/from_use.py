"""Learning from use: low-rank updates from answers that people accepted or corrected, kept only where `gate` says that they do good.

Training is `sft`'s, on what `feedback` leaves. Half of the trusted conversations choose among the weights on the way; the other half, which
nothing has seen, decides at the end, beside old text and what the base itself would answer. Updates that make old text less likely than
they may are made smaller: what is lost goes down with the square of their size, what is gained with the size. Where nothing is kept, the
run has no weights, and the one that it began with is as it was.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from sparing.adapt import feedback, gate, sft
from sparing.adapt.gate import Bounded, Measured, Sizes
from sparing.base.config import Budget, CannotGoOn, Config, UserError
from sparing.base.config_file import Wishes
from sparing.base.files import read_lines, to_json, write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder, write_tensors
from sparing.budget.units import format_budget
from sparing.data.accounts import Accounts, balanced, in_words
from sparing.data.answers import Cutting, Pieces, Sequenced
from sparing.data.chat import ChatTemplate, template_text
from sparing.data.chats import Chat, chats
from sparing.data.files import absolute
from sparing.data.sources import Rejected, texts
from sparing.data.tokenizer import Tokenizer
from sparing.evals.answers import piece_nats
from sparing.evals.bpb import NllFn
from sparing.evals.select import select
from sparing.infer.engine import Engine
from sparing.infer.generate import generate_texts
from sparing.job.begin import Job
from sparing.job.corpus import EVAL_TOKENS
from sparing.job.learn import learn
from sparing.model.low_rank import learned
from sparing.model.transformer import Transformer
from sparing.train.log import TrainResult

FEWEST, TRUSTED = 8, 20
"""Different conversations to learn from, and trusted ones."""
SCALES = (1.0, 0.5, 0.25, 0.125)
"""Sizes of the update that are tried, the largest first."""
BELONGS = 0.5
"""Of how closely trusted answers belong to their questions, least for the others."""
LOOSER = 0.2
"""Share of that which trusted answers may lose. A little goes in any case: answers that are badly known, such as those behind other
questions, gain more from the words and the form that they have in common."""
OLD_SHARE, CHECK_SHARE, FEEDBACK_SHARE = 0.5, 1.0, 0.4
"""Sizes of what decides, in parts of what an evaluation reads (`train.eval_bytes`): old text is read five times, trusted answers behind
their own and other questions twice, feedback once, which is as much work as DECISION_SHARE of the budget."""
WINDOWS_FROM = 8
"""With fewer old documents, windows of them stand for documents where chance is estimated."""
OWN, OWN_TOKENS, OWN_S = 16, 64, 20.0
"""Answers that the base writes, their longest, and seconds that they may take (of a time budget at most `sft.OLD_SHARE`)."""
DECISION_SHARE = 0.15
"""Of a time budget, for deciding."""


class TurnedDown(CannotGoOn):
    """What was learnt is not kept, or nothing was learnt."""

    def __init__(self, message: str):
        super().__init__(message)
        self.summary: dict = {}
        """What the verb has to say all the same."""


@dataclass(frozen=True)
class UseData(sft.ChatData):
    """What is learnt and scored as in `sft`, and what decides."""

    run: RunFolder
    check: list[Chat]
    """Trusted ones that chose nothing."""
    learnt: list[Chat]
    old_units: list[Pieces]
    """Old documents, each the windows of one."""
    own: Pieces
    """What the base answers to questions of `check`."""
    found: dict = field(default_factory=dict)
    """What was decided, and on which grounds."""

    def more(self, job: Job, config: Config) -> dict:
        return super().more(job, config) | {"committed": True} | self.found

    def reserve_s(self, job: Job, config: Config) -> float:
        return DECISION_SHARE * (job.lasts(config.budget) or 0.0)

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """As `sft`'s. At its first call, of the base, it also measures what the decision needs of that, and keeps it in the run.

        Raises TurnedDown, before the first step, where what is to be learnt does not belong to its questions."""
        evaluate, file = super().scorer(config, should_stop), _file(self.run.state / "use", "base", "json")

        def scored(nll: NllFn) -> dict:
            if not file.exists():
                judge = _Judge(self, config, nll, should_stop)
                base, learnt = judge.measured(), judge.feedback()
                belongs = {"feedback_belongs": learnt, "trusted_belongs": gate.belonging(base, judge.sizes)}
                kept = {name: values.tolist() for name, values in base._asdict().items()}
                write_atomic(file, json.dumps({"base": kept, "grounds": _as_json(belongs)}))
            if reason := _apart(_kept_grounds(self.run)):
                raise _turned_down(reason, _kept_grounds(self.run))
            return evaluate(nll)

        return scored


def resolved(job: Job, wishes: Wishes, budget: Budget) -> Config:
    """The configuration of a new run, written into its folder beside the feedback that it learns from and the trusted conversations.

    Raises UserError and TurnedDown, before anything is written, where there is too little of either."""
    data, check = (tuple(map(absolute, wishes.value(f"use.{name}"))) for name in ("data", "check"))
    lost: list[Rejected] = []
    accounts = Accounts(lost.append)
    asked = feedback.exchanges(check, "--check", accounts)
    trusted = list({feedback.question_of(chat): chat for chat in feedback.in_order(asked)}.values())
    if len(trusted) < TRUSTED:
        raise UserError(f"--check has {len(trusted)} different questions: at least {TRUSTED} are needed to decide by")
    found = feedback.read(data, trusted, accounts)
    left_out = f"; left out: {feedback.told(found.left_out)}" if found.left_out else ""
    say(f"{len(found.chats):,} answers to learn from, {len(trusted):,} trusted ones to decide by{left_out}")
    accounts.out = len(found.chats) + len(trusted)
    accounts.rejected = accounts.into - accounts.quarantined - accounts.out
    say(in_words(accounts.balance()))
    if len(found.chats) < FEWEST:
        few = "one is" if len(found.chats) == 1 else f"{len(found.chats)} are"
        raise TurnedDown(f"turned down: only {few} left to learn from, and fewer than {FEWEST} teach no kind of answer{left_out}")
    kept = (Path(str(job.run)).resolve() / "state" / "use").absolute()
    kept.mkdir(parents=True, exist_ok=True)
    parts = {"feedback": found.chats, "chosen": trusted[::2], "check": trusted[1::2]}
    write_atomic(job.run.state / f"{sft.GIVEN}.json", json.dumps(accounts.balance()))
    sft.keep_quarantine(job.run, lost)
    for name, part in parts.items():
        feedback.keep(_file(kept, name), part)
    named = {
        "data": {"paths": (str(_file(kept, "feedback")),)},
        "chats": {"val": (str(_file(kept, "chosen")),)},
        "use": {"data": data, "check": check},
    }
    return sft.resolved(job, Wishes.of({"adapter": {}}, wishes, named), budget)


def _file(folder: Path, name: str, kind: str = "jsonl") -> Path:
    return folder / f"{name}.{kind}"


def _kept_grounds(run: RunFolder) -> dict[str, Bounded]:
    """What the first evaluation found."""
    kept = json.loads(_file(run.state / "use", "base", "json").read_text())
    return {name: Bounded(**value) for name, value in kept["grounds"].items()}


def _kept_base(run: RunFolder) -> Measured:
    kept = json.loads(_file(run.state / "use", "base", "json").read_text())
    return Measured(**{name: np.array(values) for name, values in kept["base"].items()})


def go(job: Job, config: Config, samples: int) -> dict:
    """Train (or go on) and decide; -> the summary. Raises TurnedDown where nothing is kept, besides what `learn` raises."""
    try:
        return learn(job, config, samples, data=data, settle=decide)
    except TurnedDown as refusal:
        job.run.adapter_file.unlink(missing_ok=True)
        summary = {"run": str(job.run.path), "committed": False, "base": config.start.weights_sha256}
        if counts := sft.counts_of(job.run):
            summary["documents"] = counts
            say(in_words(balanced(counts)))
        summary |= refusal.summary | {"budget": format_budget(config.budget), "seconds": job.clock.seconds()}
        write_atomic(job.run.state / "summary.json", json.dumps(to_json(summary), indent=1))
        refusal.summary = to_json(summary)
        raise


def data(job: Job, config: Config) -> UseData:
    """What the run learns from and is judged by, as it was when the run was begun."""
    basis = sft.data(job, config)
    folder, size = job.run.state / "use", config.train.eval_bytes
    check, learnt = (list(chats([str(_file(folder, name))])) for name in ("check", "feedback"))
    check, learnt = _some(check, int(CHECK_SHARE * size)), _some(learnt, int(FEEDBACK_SHARE * size))
    old = basis.old if not config.chats.keep else _old_text(job, config, int(OLD_SHARE * size))
    units = [_windows(basis.tokenizer, text, config.train.seq_len) for text in old]
    units = [unit for unit in units if len(unit)]
    if not units:
        raise UserError(f"{config.start.run} writes no text by itself: name some that must not be forgotten, --keep OLD")
    if len(units) < WINDOWS_FROM:
        units = [_only(unit, number) for unit in units for number in range(len(unit))]
    own = _own_answers(job, config, basis.tokenizer, check)
    return UseData(**vars(basis), run=job.run, check=check, learnt=learnt, old_units=units, own=own)


def _some(found: Sequence[Chat], size: int) -> list[Chat]:
    """The first conversations, about `size` bytes of them, at least TRUSTED // 2."""
    taken, total = [], 0
    for chat in found:
        if len(taken) >= TRUSTED // 2 and total + len(chat.raw) > size:
            break
        taken.append(chat)
        total += len(chat.raw)
    return taken


def _old_text(job: Job, config: Config, size: int) -> list[str]:
    file = _file(job.run.state / "use", "old")
    if not file.exists():
        chosen = select(texts(config.chats.keep, "--keep"), max(1, size))
        write_atomic(file, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in chosen))
    return [line["text"] for line in read_lines(file)]


def _windows(tokenizer: Tokenizer, text: str, context: int) -> Pieces:
    """A document as `evals.bpb` reads it: windows of `context` inputs, all of whose tokens are scored."""
    ids = tokenizer.encode(text)
    tokens = [tokenizer.first_id, *ids]
    parts = [tokens[start : start + context + 1] for start in range(0, len(ids), context)]
    return Pieces.of([Sequenced(part, [False] + [True] * (len(part) - 1)) for part in parts])


def _only(pieces: Pieces, number: int) -> Pieces:
    ids, trained = pieces[number]
    return Pieces(ids, trained, np.array([0, len(ids)], np.int64))


def _own_answers(job: Job, config: Config, tokenizer: Tokenizer, check: Sequence[Chat]) -> Pieces:
    """What the base answers at temperature 1 to trusted questions: its loss there is its entropy, and what training adds to that is how
    far the model has moved from the base on the new task (Shenfeld and others, arXiv 2509.04259). Kept in the run."""
    file = _file(job.run.state / "use", "own")
    template = ChatTemplate(template_text(job.run))
    if not file.exists():
        lasts = job.lasts(config.budget)
        ends = time.monotonic() + (OWN_S if lasts is None else sft.OLD_SHARE * lasts)
        prompts = [template.encode(tokenizer, chat.messages[:-1], chat.tools) for chat in check[:OWN]]
        prompts = [prompt for prompt in prompts if len(prompt) + OWN_TOKENS <= config.model.max_position_embeddings]
        lines: list[str] = []
        with job.meter.stage("sample"), Engine(config.start.run, speculate=False) as engine:
            for start in range(0, len(prompts), 8):
                if start and time.monotonic() > ends:
                    break
                job.signals.check()
                some = prompts[start : start + 8]
                settings = [{"max_tokens": OWN_TOKENS, "temperature": 1.0, "seed": start + place} for place in range(len(some))]
                for prompt, text in zip(some, generate_texts(engine, zip(some, settings)), strict=True):
                    lines.append(json.dumps({"prompt": prompt, "answer": tokenizer.encode(text)}) + "\n")
        write_atomic(file, "".join(lines))
    rows = [(row["prompt"], row["answer"]) for row in read_lines(file) if row["answer"]]
    return Pieces.of([Sequenced([*prompt, *answer], [False] * len(prompt) + [True] * len(answer)) for prompt, answer in rows])


# the decision


@torch.no_grad()
def decide(job: Job, config: Config, model: Transformer, data: UseData, result: TrainResult, nll: NllFn) -> TrainResult:
    """Keep the update, a smaller one, or none; -> the result with the scores of what is kept. Raises TurnedDown."""
    live = learned(model)
    full = {name: tensor.clone() for name, tensor in live.items() if "lora_B" in name}
    judge, lasts, limit = _Judge(data, config, nll, job.signals.should_stop), job.lasts(config.budget), config.use.old_limit

    def scale(size: float) -> None:
        job.signals.check()
        for name, tensor in full.items():
            live[name].copy_(size * tensor)

    base, began = _kept_base(job.run), time.monotonic()
    after = judge.measured()
    took = time.monotonic() - began
    grounds = _kept_grounds(job.run) | _grounds(base, after, judge.sizes)
    for name, value in grounds.items():
        say(f"  {name}: {value.value:+.4f} ({value.low:+.4f} to {value.high:+.4f})")
    if reason := _bad(grounds):
        raise _turned_down(reason, grounds)
    for size in SCALES:
        if size < SCALES[0]:
            if lasts is not None and job.clock.seconds() + took > lasts:
                job.cut_short(f"the budget was used up before the update × {size:g} was tried")
                break
            scale(size)
            after = after._replace(old=judge.old())
        old = gate.old_change(base, after, gate.RISK / len(SCALES))
        say(f"  update × {size:g}: old text {old.value:+.3%}, at most {old.high:+.3%}")
        if not old.high <= limit:  # whatever is no number is bad
            continue
        if size < SCALES[0]:
            after = judge.measured()
            grounds |= _grounds(base, after, judge.sizes)
            if reason := _bad(grounds):
                raise _turned_down(f"at the size that old text allows, × {size:g}, {reason}", grounds)
            result = replace(result, evaluation=data.scorer(config, job.signals.should_stop)(nll))
        write_tensors(job.run.adapter_file, live)
        data.found.update({"update": size, "grounds": _as_json(grounds)})
        say(f"committed: update × {size:g}; back again: sparing rollback {job.run} --out RUN")
        return result
    raise _turned_down(f"old text would lose more than {limit:.2%}: {old.value:+.3%}, at most {old.high:+.3%}", grounds)


def _grounds(base: Measured, after: Measured, sizes: Sizes) -> dict[str, Bounded]:
    found = {
        "trusted_change": gate.new_change(base, after, sizes),
        "belonging_change": gate.belonging_change(base, after, sizes),
        "old_change": gate.old_change(base, after),
    }
    return found | ({"kl": gate.moved(base, after, sizes)} if len(base.own) else {})


def _apart(grounds: dict[str, Bounded]) -> str | None:
    """Whether what is to be learnt does not belong to its questions: why; None: it does."""
    learnt, trusted = grounds["feedback_belongs"], grounds["trusted_belongs"]
    if learnt.high >= BELONGS * trusted.value:
        return None
    return (
        f"its answers do not belong to their questions: behind their own they are {learnt.value:.3f} nats a token likelier than behind "
        f"another's, trusted ones {trusted.value:.3f}"
    )


def _bad(grounds: dict[str, Bounded]) -> str | None:
    """Why what was learnt does no good; None: nothing speaks against it."""
    trusted, new, belonging = (grounds[name] for name in ("trusted_belongs", "trusted_change", "belonging_change"))
    if not new.high < 0:  # whatever is no number is bad
        return f"trusted answers do not improve: {new.value:+.4f} nats a token (from {new.low:+.4f} to {new.high:+.4f})"
    if not belonging.high >= -LOOSER * max(0.0, trusted.value):
        return f"trusted answers belong less to their questions than before: {trusted.value:.3f} nats a token, {belonging.value:+.3f}"
    return None


def _turned_down(reason: str, grounds: dict[str, Bounded]) -> TurnedDown:
    refusal = TurnedDown(f"turned down: {reason}; the run that it began with is as it was")
    refusal.summary = {"turned_down": reason, "grounds": _as_json(grounds)}
    return refusal


def _as_json(grounds: dict[str, Bounded]) -> dict[str, dict[str, float]]:
    return {name: value._asdict() for name, value in grounds.items()}


class _Judge:
    """Measures the weights as they are at each call."""

    def __init__(self, data: UseData, config: Config, nll: NllFn, should_stop: Callable[[], bool]):
        self._nll, self._options = nll, {"batch_tokens": EVAL_TOKENS, "should_stop": should_stop}
        self._cutting = Cutting(ChatTemplate(template_text(data.run)), data.tokenizer, config.train.seq_len)
        self._data = data
        self._right, self._crossed = self._pairs(data.check)
        self._old = Pieces.of([Sequenced(*map(list, unit[number])) for unit in data.old_units for number in range(len(unit))])
        self._unit = np.repeat(np.arange(len(data.old_units)), [len(unit) for unit in data.old_units])
        old = np.bincount(self._unit, _trained(self._old), len(data.old_units))
        self.sizes = Sizes(_trained(self._right), old, _trained(data.own))

    def measured(self) -> Measured:
        return Measured(self._nats(self._right), self._nats(self._crossed), self.old(), self._nats(self._data.own))

    def old(self) -> np.ndarray:
        """(D,) nats of old documents."""
        return np.bincount(self._unit, self._nats(self._old), len(self.sizes.old))

    def feedback(self) -> gate.Bounded:
        """How closely what is learnt belongs to its questions, for the weights as they are."""
        right, crossed = self._pairs(self._data.learnt)
        return gate.mean_of(self._nats(crossed) - self._nats(right), _trained(right))

    def _nats(self, pieces: Pieces) -> np.ndarray:
        return piece_nats(self._nll, pieces, **self._options)

    def _pairs(self, found: list[Chat]) -> tuple[Pieces, Pieces]:
        """Answers behind their questions and behind others', those that fit into a row behind both, cut to the same length."""
        pairs = [(self._one(chat), self._one(other)) for chat, other in zip(found, feedback.crossed(found), strict=True)]
        right, wrong = [], []
        for one, other in pairs:
            if one is not None and other is not None:
                count = min(sum(one.trained), sum(other.trained))
                right.append(_first_trained(one, count))
                wrong.append(_first_trained(other, count))
        if not right:
            raise UserError(f"no trusted answer fits into {self._cutting.length} tokens behind its question: --train.seq-len")
        return Pieces.of(right), Pieces.of(wrong)

    def _one(self, chat: Chat) -> Sequenced | None:
        pieces = self._cutting(chat)
        return pieces[-1] if pieces else None


def _first_trained(piece: Sequenced, count: int) -> Sequenced:
    """A piece of which the first `count` trained tokens stay trained."""
    so_far = np.cumsum(piece.trained)
    return Sequenced(piece.ids, (np.array(piece.trained) & (so_far <= count)).tolist())


def _trained(pieces: Pieces) -> np.ndarray:
    """(P,) float64: trained tokens of each piece."""
    return np.array([pieces[number][1].sum() for number in range(len(pieces))], np.float64)
