"""Supervised fine-tuning: a run learns to answer, by conversations, inside a budget.

The start is the run itself, or low-rank updates beside it; the feed, packed conversations; the objective, the next token where it is an
answer's. What is read of the conversations is prepared before the run has a configuration, so what cannot be learnt from leaves nothing
behind, and is kept in the run, so that a resumed one reads the same.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from sparing.account.receipt import read_state
from sparing.adapt import esft
from sparing.base.config import Budget, Config, UserError
from sparing.base.config_file import Wishes
from sparing.base.files import DamagedError, read_lines, write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder, verify_folder, write_folder
from sparing.budget.flops import train_flops
from sparing.data.answers import Cutting, Pieces
from sparing.data.chat import ChatTemplate, taught, template_text
from sparing.data.chats import Chat, ChatFacts, chats, order
from sparing.data.files import find_files
from sparing.data.packed import Packed
from sparing.data.sources import Rejected
from sparing.data.sources import texts as texts_of
from sparing.data.tokenizer import Tokenizer
from sparing.evals.answers import bytes_of_tokens, score_answers
from sparing.evals.bpb import NllFn, bpb
from sparing.evals.select import select
from sparing.infer.engine import Engine
from sparing.infer.generate import generate_texts
from sparing.job.begin import Job, derive, keep, look_at, try_out
from sparing.job.corpus import EVAL_TOKENS, Prompt, TrainingData
from sparing.job.texts import corpora, facts_of, with_absolute_paths
from sparing.kernels import native
from sparing.planning.places import Given, Place
from sparing.planning.start import with_start
from sparing.resolve import MARGIN, TRAINING_SHARE
from sparing.train.log import TrainResult

METHODS = ("lora", "full", "esft")
GIVEN = "given"
"""State of a run whose conversations were made of what the user gave: `data.accounts`' of that."""
HELD_OUT = 0.05
"""Share of the conversations that are scored and not learnt from."""
FULL_OPTIM = {
    "matrix": "adamw", "lr": 1e-4, "lr_embed": 1e-4, "lr_head": 1e-4, "lr_router": 1e-4, "lr_norm": 1e-4, "beta1": 0.9, "beta2": 0.999,
    "eps": 1e-8, "weight_decay": 0.0, "warmup": 0.03, "decay": 0.97, "final_lr": 0.0,
}  # fmt: skip
"""How all weights learn: a trained model is near its optimum, where Muon's steps of one size for every matrix would lead away from it."""
FULL_PRECISION = {"weights": "bfloat16", "moments": "int8"}
"""What all weights learn in where products are bfloat16 ones of our own: 0.6 of float32's peak, as fast, held-out answers' loss 1.2678
for 1.2689 after 118,784 tokens (SmolLM2 on MedQuAD, docs/adapting.md)."""
LENGTHS = (256, 512, 1024, 2048)
LOST = 0.02
"""Share of the answers' tokens that may be cut off for shorter rows."""
BATCH_TOKENS = (2048, 16384)
STEPS = 100
"""A batch is as large as leaves about this many steps, within BATCH_TOKENS."""
FEW_STEPS, LEAST_ROWS = 32, 2
"""Rows are no longer than leaves so many steps of so many rows: fewer steps are all warm-up, and a core takes a row."""
EPOCHS = 4.0
"""More seldom help (Muennighoff and others, arXiv 2305.16264, of pre-training; answers are learnt by heart sooner)."""
SCORED, FEWEST = 0.033, 2000
"""One evaluation reads this share of the tokens that the budget trains on, at least FEWEST; half as much old text comes on top."""
OLD = (512, 4096)
"""Fewest and most tokens of the base's own texts."""
OLD_SHARE, OLD_S = 0.03, 20.0
"""Of a time budget, for writing them; and seconds, where the budget is no time."""
PARTS = ("train", "held_out")
ANY = Given(1.0)
"""Stands for the conversations where `resolve` need not know how many there are: how much of them is used is derived here."""


@dataclass(frozen=True)
class ChatData(TrainingData):
    """Packed conversations to learn from, whole ones to score, and old text to watch."""

    keeps_best: ClassVar[bool] = True
    scored: Pieces
    old: list[str]

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """evaluate(nll) -> the loss and bits per byte of held-out answers, and as old_loss and old_bpb those of the old text."""
        context, lengths = config.train.seq_len, bytes_of_tokens(self.tokenizer)
        options = {"batch": max(1, EVAL_TOKENS // context), "should_stop": should_stop}

        def evaluate(nll: NllFn) -> dict:
            result = score_answers(nll, self.scored, lengths, batch_tokens=EVAL_TOKENS, should_stop=should_stop) | {"context": context}
            if self.old:
                old = bpb(nll, self.tokenizer, self.old, context, **options)
                result |= {f"old_{key}": old[key] for key in ("loss", "bpb", "bytes", "tokens")}
            return result

        return evaluate

    def prompts(self, count: int) -> list[Prompt]:
        """Questions that are held out, as the server would ask them."""
        made = []
        for number in range(min(count, len(self.scored))):
            ids, trained = self.scored[number]
            asked = ids[: int(np.argmax(trained))].tolist()
            made.append(Prompt(self.tokenizer.decode(asked), asked))
        return made

    def score(self, evaluation: dict) -> dict:
        old = {"old": {key: evaluation.get(f"old_{key}") for key in ("loss", "bpb", "bytes")}} if self.old else {}
        return super().score(evaluation) | old

    def more(self, job: Job, config: Config) -> dict:
        asked, counts = read_state(job.run, "asked", dict), counts_of(job.run)
        return ({} if asked is None else {"teacher": asked}) | ({} if counts is None else {"documents": counts})

    def trained_tokens(self, result: TrainResult) -> int:
        return self.feed.trained_tokens(result.steps + result.skipped)


def resolved(
    job: Job, wishes: Wishes, budget: Budget, cutting: type[Cutting] = Cutting,
    also: Callable[[Wishes, float], tuple[dict, dict[str, str]]] | None = None,
) -> Config:  # fmt: skip
    """The configuration of a new run that learns to answer, written into its folder beside the prepared conversations.

    cutting: makes pieces of them. also: (wishes, tokens that the budget trains on) -> what else is derived, as `esft.derived`. Raises
    UserError, before anything is written, for conversations or a template from which nothing can be learnt.
    """
    own = with_absolute_paths(wishes)
    wishes = with_start(own)
    if not own.sets("data.holdout_fraction"):
        wishes = Wishes.of(wishes, {"data": {"holdout_fraction": HELD_OUT}})
    if not own.sets("train.seq_len"):  # the row length of the base says nothing about conversations
        wishes = Wishes.of(wishes, {"train": {"seq_len": min(LENGTHS[1], wishes.config().model.max_position_embeddings)}})
    if wishes.value("chats.keep"):
        find_files(wishes.value("chats.keep"))
    try_out(job, wishes, budget)
    base = RunFolder(wishes.value("start.run"))
    tokenizer = Tokenizer.load(base.tokenizer_file, wishes.config().tokens)
    template = _template_of(base, tokenizer)
    with job.meter.stage("scan"):
        wished = wishes.config()
        facts = facts_of(wished.data, wished.chats, job.signals.should_stop)
        forms = ", ".join(f"{count:,} {kind}" for kind, count in facts.kinds.items())
        say(f"{facts.documents:,} conversations ({forms}), {facts.held_out_documents:,} held out ({facts.split.reason})")
        if facts.quarantined:
            say(f"{facts.quarantined:,} rows cannot be used: {facts.reasons}")
        sample = _Sample(facts, ChatTemplate(template), tokenizer, wished.model.max_position_embeddings, cutting)
    place = look_at(job, wishes, budget)
    also = esft.derived if wishes.get("esft") is not None else also
    settings, reasons = _derived(own, wishes, facts, sample, tokens_of(job, wishes, budget, place), also)
    if wishes.get("adapter") is None and also is None and _few_bits_pay(job, wishes):
        settings = Wishes.of(settings, {"precision": FULL_PRECISION})
        why = "measured: the same losses as in float32, as fast, in 0.6 of the memory (docs/adapting.md)"
        reasons |= {name: why for name in ("precision.weights", "precision.moments") if not own.sets(name)}
    config, more = derive(job, Wishes.of(wishes, settings, own), budget, ANY, place)
    with job.meter.stage("tokenise"):
        _prepare(job, config, facts, sample, template, facts.content)
        if config.chats.keep:
            old_text(job, config, tokenizer)
    corpus = Given(facts.train_bytes)
    keep(job, config, reasons | more, facts, corpus, place, f"{facts.bytes / 1e6:.1f} MB of conversations")
    return config


def data(job: Job, config: Config) -> ChatData:
    """Batches and scores of the run's conversations."""
    pieces, tokenizer = prepared(job, config)
    t = config.train
    feed = Packed(pieces["train"], t.seq_len, t.batch_size, config.model.mtp_depth, t.seed, tokenizer.eot_id)
    return ChatData(feed, tokenizer, [], pieces["held_out"], old_text(job, config, tokenizer))


def prepared(job: Job, config: Config, cutting: type[Cutting] = Cutting) -> tuple[dict[str, Pieces], Tokenizer]:
    """The prepared conversations of a run by PARTS, prepared anew where they are missing or of other files by now, and its tokenizer."""
    run, base = job.run, RunFolder(config.start.run)
    if not run.tokenizer_file.exists():
        write_atomic(run.tokenizer_file, Path(config.data.tokenizer).read_text(encoding="utf-8"))
    tokenizer = Tokenizer.load(run.tokenizer_file, config.tokens)
    template = template_text(run)
    if template is None:
        template = _template_of(base, tokenizer)
        write_atomic(run.path / "chat_template.jinja", template)
    content = corpora(run)[-1]["fingerprint"]
    try:
        pieces = _open(run, _key(config, template, content))
    except DamagedError:
        facts = facts_of(config.data, config.chats, job.signals.should_stop)
        sample = _Sample(facts, ChatTemplate(template), tokenizer, config.model.max_position_embeddings, cutting)
        _prepare(job, config, facts, sample, template, content)
        pieces = _open(run, _key(config, template, content))
    return pieces, tokenizer


def _template_of(base: RunFolder, tokenizer: Tokenizer) -> str:
    text = template_text(base)
    return taught(tokenizer) if text is None else text


class _Sample:
    """What the first conversations in the order of sampling say of all: lengths of pieces, tokens per byte."""

    def __init__(self, facts: ChatFacts, template: ChatTemplate, tokenizer: Tokenizer, longest: int, kind: type[Cutting]):
        """Raises UserError where the template refuses every one of them."""
        self._kind = kind
        cutting = kind(template, tokenizer, longest)
        self.pieces = cutting.pieces(facts.sample)
        self._answers = self.pieces.trained_tokens + cutting.counts["lost"]
        if not len(self.pieces):
            raise UserError(f"nothing can be learnt from these conversations: {cutting.refusal or 'no answer within the context'}")
        self.tokens_per_byte = len(self.pieces.tokens) / sum(len(chat.raw) for chat in facts.sample)
        self.trained_share = self.pieces.trained_tokens / len(self.pieces.tokens)
        self._template, self._tokenizer = template, tokenizer

    def cutting(self, length: int) -> Cutting:
        return self._kind(self._template, self._tokenizer, length)

    def lost(self, length: int) -> float:
        """Share of the answers' tokens behind the first `length` of their pieces, what no context holds included."""
        inputs = self.cutting(length).length
        kept = sum(int(self.pieces[number][1][: inputs + 1].sum()) for number in range(len(self.pieces)))
        return 1 - kept / self._answers


def tokens_of(job: Job, wishes: Wishes, budget: Budget, place: Place) -> float:
    """About how many tokens the budget trains on."""
    config = derive(job, wishes, budget, ANY, place).config
    lasts = job.lasts(budget)
    if lasts is not None:
        return TRAINING_SHARE * max(0.1, lasts - job.clock.seconds()) * place.tokens_per_second(config)
    return budget.amount if budget.unit == "tok" else budget.amount / train_flops(config.model, config.train.seq_len)


def _few_bits_pay(job: Job, wishes: Wishes) -> bool:
    """Whether this is what FULL_PRECISION was measured on: a CPU that trains in bfloat16, by compiled kernels."""
    device = wishes.value("train.device") or ("cuda" if job.machine.gpus else "cpu")
    dtype = wishes.value("train.dtype") or job.machine.training_dtype(device)
    return device == "cpu" and dtype == "bfloat16" and wishes.value("train.kernels") != "plain" and native.can("vectors")


def _derived(
    own: Wishes, wishes: Wishes, facts: ChatFacts, sample: _Sample, tokens: float,
    also: Callable[[Wishes, float], tuple[dict, dict[str, str]]] | None,
) -> tuple[dict, dict[str, str]]:  # fmt: skip
    """(settings that the user's own wishes leave open, the reason for each by dotted name). tokens: that the budget trains on."""
    longest = wishes.config().model.max_position_embeddings
    longest = min(longest, max(LENGTHS[1], int(tokens / FEW_STEPS / LEAST_ROWS)))
    lengths = [length for length in LENGTHS if length <= longest] or [longest]
    length = own.value("train.seq_len") or next((length for length in lengths if sample.lost(length) <= LOST), lengths[-1])
    all_tokens = facts.train_bytes * sample.tokens_per_byte
    rows = 2 ** round(np.log2(max(LEAST_ROWS, min(max(tokens / STEPS, BATCH_TOKENS[0]), BATCH_TOKENS[1]) / length)))
    scored = int(min(max(SCORED * tokens, FEWEST), tokens))
    settings: dict = {
        "train": {"seq_len": length, "batch_size": rows, "short_seq_len": None, "eval_bytes": max(1, int(scored / sample.tokens_per_byte))},
    }
    reasons = {
        "train.seq_len": f"rows that hold {1 - sample.lost(length):.1%} of the answers, and leave {FEW_STEPS} steps",
        "train.batch_size": f"{rows * length:,} tokens: about {tokens / rows / length:,.0f} steps",
        "train.eval_bytes": f"about {scored:,} tokens of held-out conversations: scoring may take a small share of the budget",
    }
    if wishes.get("adapter") is None:
        settings["optim"] = FULL_OPTIM
        reasons |= {
            "optim.matrix": "AdamW moves every weight by its own measure; Muon's steps are for models that begin with noise",
            "optim.lr": "a tenth of what low-rank updates learn with (docs/adapting.md)",
            "optim.decay": "from the warm-up to the end, to zero",
        }
    if also is not None:
        more, why = also(wishes, tokens)
        settings, reasons = Wishes.of(settings, more), reasons | why
    epochs = tokens / all_tokens
    if all_tokens > MARGIN * tokens:
        settings["data"] = {"max_tokens": int(MARGIN * tokens)}
        reasons["data.max_tokens"] = f"{MARGIN} times the {tokens / 1e3:,.0f} k tokens that the budget can train on"
    elif epochs > EPOCHS and not own.sets("data.max_tokens"):
        say(
            f"the budget reads these conversations about {epochs:,.0f} times, where more than {EPOCHS:.0f} seldom help: "
            "the weights with the lowest held-out loss are kept, and a smaller budget would do"
        )
    return settings, {name: reason for name, reason in reasons.items() if not own.sets(name)}


# what is kept in the run


def _key(config: Config, template: str, content: str) -> str:
    """Changes with everything that shapes the prepared conversations."""
    t, d = config.train, config.data
    parts = (content, template, t.seq_len, t.eval_bytes, d.max_tokens, d.holdout_fraction, config.tokens)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _prepare(job: Job, config: Config, facts: ChatFacts, sample: _Sample, template: str, content: str) -> None:
    """Tokenise what the budget can use into state/chats, and say what came of it. Raises UserError where nothing can be learnt."""
    t, wished = config.train, config.data.max_tokens
    bound = None if wished is None else facts.bound(wished / max(1.0, facts.train_bytes * sample.tokens_per_byte))
    learns, scores, held_out = sample.cutting(t.seq_len), sample.cutting(t.seq_len), []
    lost: list[Rejected] = []

    def chosen():
        for chat in chats(find_files(config.data.paths), lost.append, lambda _: job.signals.check()):
            if facts.split.holds_out(chat.first_hash):
                held_out.append((order(chat), chat))
            elif bound is None or order(chat) < bound:
                yield chat

    train = learns.pieces(chosen())
    if not len(train):
        raise UserError(f"nothing can be learnt from {', '.join(config.data.paths[:3])}: {_fate(learns) or 'no answers'}")
    if config.chats and config.chats.val:
        held_out = [(order(chat), chat) for chat in chats(find_files(config.chats.val), lost.append)]
    scored = scores.pieces(_first(held_out, t.eval_bytes))
    if not len(scored):
        raise UserError(f"nothing to score on among {len(held_out):,} held-out conversations: {_fate(scores) or 'no answers'}")
    fate = _fate(learns)
    say(
        f"learning from {len(train):,} pieces of {learns.counts['chats']:,} conversations: {len(train.tokens):,} tokens, of which "
        f"{train.trained_tokens:,} are answers and are trained" + (f"; {fate}" if fate else "")
    )
    say(f"an evaluation reads {len(scored):,} held-out pieces: {len(scored.tokens):,} tokens, {scored.trained_tokens:,} of answers")
    counts = {"key": _key(config, template, content), "train": dict(learns.counts), "held_out": dict(scores.counts)}
    tensors = {f"{name}.safetensors": pieces.tensors() for name, pieces in zip(PARTS, (train, scored), strict=True)}
    if read_state(job.run, GIVEN, dict) is None:
        keep_quarantine(job.run, lost)
    write_folder(job.run.state / "chats", {**tensors, "counts.json": json.dumps(counts, indent=1)})


def counts_of(run: RunFolder) -> dict[str, int] | None:
    """`data.accounts`' of the conversations that the run learns from; None: not known."""
    texts, made = corpora(run), run.state / "chats" / "counts.json"
    counts = (len(texts) == 1 and read_state(run, GIVEN, dict)) or (texts[-1].get("counts") if texts else None)
    if not counts or not made.exists():
        return None
    prepared = json.loads(made.read_text())  # what the template refuses, or no context holds, could be read and is not used
    refused = sum(prepared[part].get(why, 0) for part in PARTS for why in ("refused", "unused"))
    return counts | {"out": counts["out"] - refused, "rejected": counts["rejected"] + refused}


def keep_quarantine(run: RunFolder, lost: Sequence[Rejected]) -> None:
    """List what could not be used in quarantine.jsonl of the run."""
    write_atomic(run.path / "quarantine.jsonl", "".join(rejected.as_json() + "\n" for rejected in lost))


def _first(held_out: list[tuple[int, Chat]], size: int) -> list[Chat]:
    """The first conversations in the order of sampling, about `size` bytes of them, at least one."""
    taken, total = [], 0
    for _, chat in sorted(held_out, key=lambda entry: entry[0]):
        if taken and total + len(chat.raw) > size:
            break
        taken.append(chat)
        total += len(chat.raw)
    return taken


def _fate(cutting: Cutting) -> str:
    """What was lost on the way, in words; empty where nothing was."""
    counts = cutting.counts
    parts = []
    if counts["truncated"]:
        share = counts["lost"] / max(1, counts["lost"] + counts["trained"])
        parts.append(f"{counts['truncated']:,} longer than {cutting.length} tokens were cut (which lost {share:.1%} of the answers)")
    if counts["empty"]:
        parts.append(f"{counts['empty']:,} whose answer begins behind that are left out")
    if counts["refused"]:
        parts.append(f"{counts['refused']:,} are refused ({cutting.refusal})")
    return "; ".join(parts)


def _open(run: RunFolder, key: str) -> dict[str, Pieces]:
    """The prepared conversations. Raises DamagedError where there are none, or others."""
    folder = run.state / "chats"
    verify_folder(folder)
    if json.loads((folder / "counts.json").read_text())["key"] != key:
        raise DamagedError(f"{folder} is of other conversations")
    return {name: Pieces.load(folder / f"{name}.safetensors") for name in PARTS}


def old_text(job: Job, config: Config, tokenizer: Tokenizer) -> list[str]:
    """Text that the base could already: the beginnings of the user's, or what the base writes by itself; kept in the run."""
    file = job.run.state / "old.jsonl"
    if file.exists():
        return [line["text"] for line in read_lines(file)]
    if config.chats.keep:
        texts = select(texts_of(config.chats.keep, "--keep"), max(1, config.train.eval_bytes // 2))
        if not texts:
            raise UserError(f"--keep: no usable text in {', '.join(config.chats.keep[:3])}")
    else:
        with job.meter.stage("sample"):
            wanted = min(max(config.train.eval_bytes // 8, OLD[0]), OLD[1])
            texts = own_texts(job, config, tokenizer, wanted)
    write_atomic(file, "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return texts


def own_texts(job: Job, config: Config, tokenizer: Tokenizer, wanted: int) -> list[str]:
    """What the base writes at temperature 1 behind the token that begins a text: so its loss there is its own entropy, and what training
    adds to it is how far the model has moved from the base (Shenfeld and others, arXiv 2509.04259). wanted: tokens."""
    lasts = job.lasts(config.budget)
    ends = time.monotonic() + (OLD_S if lasts is None else OLD_SHARE * lasts)
    length = min(128, config.train.seq_len - 1)
    texts, written = [], 0
    with Engine(config.start.run, speculate=False) as engine:
        while not texts or (written < wanted and time.monotonic() < ends):
            job.signals.check()
            settings = [{"max_tokens": length, "temperature": 1.0, "seed": len(texts) + place} for place in range(8)]
            found = list(generate_texts(engine, (([tokenizer.first_id], setting) for setting in settings)))
            texts += found
            written += sum(len(tokenizer.encode(text)) for text in found) + len(found)
    texts = [text for text in texts if text.strip()]
    say(f"to see what is forgotten, {len(texts)} texts that {config.start.run} writes by itself are scored too, {written:,} tokens")
    return texts
