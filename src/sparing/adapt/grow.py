"""Growing: a domain gets an expert in each mixture, and nothing else of the model changes.

Before the first step, each new router row is fitted by least squares to tell the domain's tokens from old text's, and from those of other
domains where their text is named, on the states that the router reads. Its selection bias is set so that no more than a share `growth.eps`
of other old tokens wakes the expert, in each layer. Then the experts alone learn, with that routing. At the end, where the loss of old text
that was not looked at is more than WORSE above what it was, the bias becomes stricter; where that does not help, or the domain's own loss
is no better, the growth is turned down.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sparing.account.receipt import read_state
from sparing.adapt import esft
from sparing.adapt.grown import ASLEEP, OLD, PARTS, WAKES, Grown, Joined, Pack, grown_model, own_names
from sparing.adapt.sft import FEWEST, SCORED, own_texts, tokens_of
from sparing.base.config import Budget, CannotGoOn, Config, UserError
from sparing.base.config_file import Wishes
from sparing.base.config_limits import DOMAIN
from sparing.base.files import DamagedError, read_lines, write_atomic
from sparing.base.layers import mixtures
from sparing.base.messages import say
from sparing.base.run import RunFolder, fill, weights_sha256, write_tensors
from sparing.data.files import absolute
from sparing.data.loader import IGNORED
from sparing.data.rows import permutation
from sparing.data.sources import documents
from sparing.data.sources import texts as texts_of
from sparing.data.tokenizer import Tokenizer
from sparing.evals.bpb import NllFn, bpb
from sparing.evals.select import select
from sparing.job.begin import Job, derive, look_at, try_out
from sparing.job.begin import keep as keep_config
from sparing.job.corpus import EVAL_TOKENS, TrainingData, text
from sparing.job.texts import facts_of, with_absolute_paths
from sparing.kernels import native
from sparing.kernels.products import fitting
from sparing.model.experts import MoE, Router
from sparing.model.transformer import MTPBlock, Transformer
from sparing.planning.start import with_start
from sparing.train.log import TrainResult
from sparing.train.trainer import Feed

WORSE = 1e-3
"""The old text's loss may rise by this share."""
STRICTER = (1.0, 0.25, 0.0625, 0.0)
"""What `growth.eps` is multiplied by, one after the other, where it rose by more; 0: no old token that was looked at wakes an expert. And
after these: half-way from there to the margin of half of the domain's tokens."""
STEEP = 4.0
"""The router's logit is about this for the domain's tokens, and minus this for old ones: where sigmoids still tell numbers apart."""
RIDGES = (1e-3, 1e-2, 1e-1)
"""Ridges of the least squares, as shares of the mean square of a state; each layer takes the one with which most of the domain wakes."""
OPTIM = {
    "matrix": "adamw", "lr": 3e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "warmup": 0.03, "decay": 0.97,
    "final_lr": 0.0,
}  # fmt: skip
OPTIM_REASONS = {
    "optim.matrix": "each expert begins at zero output and moves by its own measure",
    "optim.lr": "of experts beside a model that stays (docs/adapting.md)",
    "optim.decay": "from the warm-up to the end, to zero",
}
STAYS = ("bias_update_rate", "sequence_balance", "mtp_weight")
FITTED, FITTED_TOKENS = 0.06, (2000, 32_768)
"""Share of the tokens that the budget trains on which the routers are fitted to, of each kind; at least and at most so many."""
OWN_TOKENS = 8192
"""That the model writes by itself where no old text is named."""
BYTES_PER_TOKEN = 4.0
GUARD, USES = 4, ("routing", "guard")
"""Every fourth part of the old text is only read by the guard."""
APART = "apart"
"""The use of other domains' text."""
NUDGE = 1e-6
"""A threshold is so far above the margin that it comes from: sums may round otherwise another time."""
ROWS = 8
"""Windows that the model reads at a time where routers are fitted: each time its weights are cast to the type that it computes in."""
HEAVY = 20.0
"""Old tokens of which one that begins a text counts for: all others lean on its state, and it must wake nothing."""
LEAST_WOKEN = 0.02
"""A domain whose tokens wake its expert less often, in every layer, is not worth the training."""
WAKES_TOKENS = 2048
"""Of each kind of text, for the map of what wakes what."""
FOUND = "growth"
"""state/growth.json: thresholds by layer and share of eps, and what reading a token took."""


@dataclass(frozen=True)
class DomainData(TrainingData):
    """A domain's text to learn from and to be scored on, and old text: some to tell the domain from, some to guard."""

    keeps_best: ClassVar[bool] = True
    old: list[str]
    guarded: list[str]
    apart: list[str]

    def reserve_s(self, job: Job, config: Config) -> float:
        """What the map of what wakes what takes, and an evaluation or two more."""
        tokens = 2 * WAKES_TOKENS + 3 * sum(map(len, self.guarded)) / BYTES_PER_TOKEN
        return tokens * float((read_state(job.run, FOUND, dict) or {}).get("seconds_per_token", 0.0))

    def scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        """evaluate(nll) -> the loss and bits per byte of the domain's held-out text, and as old_loss and old_bpb those of guarded text."""
        new, old = super().scorer(config, should_stop), self.old_scorer(config, should_stop)
        return lambda nll: new(nll) | old(nll)

    def old_scorer(self, config: Config, should_stop: Callable[[], bool]) -> Callable[[NllFn], dict]:
        context = config.train.eval_context or config.train.seq_len
        options = {"batch": max(1, EVAL_TOKENS // context), "should_stop": should_stop}

        def evaluate(nll: NllFn) -> dict:
            found = bpb(nll, self.tokenizer, self.guarded, context, **options)
            return {f"old_{key}": found[key] for key in ("loss", "bpb", "bytes", "tokens")}

        return evaluate

    def score(self, evaluation: dict) -> dict:
        return super().score(evaluation) | {"old": {key: evaluation.get(f"old_{key}") for key in ("loss", "bpb", "bytes")}}


class Beside:
    """The start: a run's weights with a new expert in each layer, which begins as a part of the feed-forward with a zero output."""

    def model(self, config: Config) -> Transformer:
        """Raises UserError where the run is gone, has changed, or is damaged."""
        grown = Grown.open(config.start.run)
        if weights_sha256(grown.run) != config.start.weights_sha256:
            raise UserError(f"start.run {grown.run}: its weights have changed since this run was begun")
        model = Transformer(config.model)
        packs = [*grown.packs, _fresh(grown, config)]
        try:
            fill(model.state_dict(), Joined(grown.root, config.growth, config.model, packs).items(), grown.run)
        except DamagedError as error:
            raise UserError(f"start.run {grown.run} has no usable weights: {error}") from None
        return model


def _fresh(grown: Grown, config: Config) -> Pack:
    """A domain's experts before they learn, asleep: gate and up of every n-th neuron of the feed-forward, or of a mixture's expert 0."""
    tensors = {}
    for name, shape in own_names(config.model).items():
        at, part = name.partition(".mlp.")[::2]
        if part == "experts.gate_up_proj" and grown.growth.dense:
            step = config.model.intermediate_size // config.model.moe_intermediate_size
            halves = [grown.root[f"{at}.mlp.{half}_proj.weight"].float()[::step] for half in ("gate", "up")]
            tensors[name] = torch.cat(halves)[None]
        elif part == "experts.gate_up_proj":
            tensors[name] = grown.root[name][:1].float()
        else:
            tensors[name] = torch.full(shape, ASLEEP if part == PARTS[1] else 0.0)
    return Pack(config.growth.domain, tensors)


def resolved(job: Job, wishes: Wishes, budget: Budget) -> Config:
    """The configuration of a new run that grows, written into its folder. wishes: with growth.domain, start.run and data.paths.

    Raises UserError, before anything is written, for a run that cannot grow and for texts from which nothing can be learnt."""
    own = with_absolute_paths(wishes)
    for name in ("keep", "apart"):
        if paths := own.value(f"growth.{name}"):
            own = Wishes.of(own, {"growth": {name: tuple(map(absolute, paths))}})
            for path in own.value(f"growth.{name}"):
                if next(documents([path]), None) is None:
                    raise UserError(f"--{name} {path}: there is no text in it")
    wishes = _with_growth(own)
    try_out(job, wishes, budget)
    with job.meter.stage("scan"):
        facts = facts_of(wishes.config().data, None, job.signals.should_stop)
    if facts.quarantined:
        say(f"{facts.quarantined} documents cannot be used ({', '.join(facts.reasons)}): see quarantine.jsonl in the run folder")
    place = look_at(job, wishes, budget)
    settings, reasons = _derived(own, tokens_of(job, wishes, budget, place))
    config, more = derive(job, Wishes.of(settings, wishes), budget, facts, place)
    keep_config(job, config, reasons | more, facts, facts, place, f"{facts.documents:,} documents, {facts.bytes / 1e6:.1f} MB")
    return config


def _with_growth(own: Wishes) -> Wishes:
    """`own` with all that the run to grow settles: the model with one more domain, what learns of it, what stays."""
    domain = own.value("growth.domain")
    if not DOMAIN.fullmatch(domain):
        raise UserError(f"--domain {domain!r}: a name has letters, digits and . + - _, at most 64")
    if domain == OLD:
        raise UserError(f"--domain {OLD} stands for what the model could before: choose another name")
    grown = Grown.open(own.value("start.run"))
    names = [pack.domain for pack in grown.packs]
    if domain in names:
        raise UserError(f"--domain {domain}: {grown.run} has it already; `sparing retire` takes it out")
    for name in STAYS:
        if own.value(f"train.{name}", 0.0):
            raise UserError(f"train.{name}: routers and modules that draft stay as they are when a domain is grown; leave it out")
    if stray := own.get("growth", {}).keys() - {"domain", "keep", "apart", "eps", "tokens", "width"}:
        raise UserError(f"growth.{min(stray)} is not to be chosen; growth.eps, growth.tokens and growth.width are")
    model = grown_model(grown.model, len(names) + 1, own.value("growth.width") or grown.width)
    if names and model != replace(grown.config.model, n_routed_experts=model.n_routed_experts):
        raise UserError(f"growth.width {own.value('growth.width')}: the experts of {grown.run} are {grown.width} wide")
    names = tuple(sorted([*names, domain]))
    number = model.n_routed_experts - len(names) + names.index(domain)
    learns = tuple(f"{layer.index}: {number}" for layer in mixtures(model) if not layer.mtp)
    settings = {
        "model": asdict(model),
        "growth": {name: getattr(grown.growth, name) for name in ("root_sha256", "stored", "dense")} | {"domains": names},
        "esft": {"experts": learns, "share": 1.0 / model.num_experts_per_tok},
        "train": dict.fromkeys(STAYS, 0.0),
    }
    return Wishes.of({"optim": OPTIM}, with_start(own), settings)


def _derived(own: Wishes, tokens: float) -> tuple[dict, dict[str, str]]:
    """(settings that the user's own wishes leave open, the reason for each by dotted name). tokens: that the budget trains on."""
    scored = max(FEWEST, SCORED * tokens)
    settings = {
        "growth": {"tokens": int(min(max(FITTED * tokens, FITTED_TOKENS[0]), FITTED_TOKENS[1]))},
        "train": {"eval_bytes": int(BYTES_PER_TOKEN * scored), "short_seq_len": None},
    }
    reasons = OPTIM_REASONS | {
        "growth.tokens": f"{FITTED:.0%} of the training, {FITTED_TOKENS[0]:,} to {FITTED_TOKENS[1]:,} of each kind",
        "train.eval_bytes": f"about {scored:,.0f} tokens of held-out text, and as many of old text",
    }
    reasons |= {f"train.{name}": "routers and modules that draft stay as they are" for name in STAYS}
    return settings, {name: reason for name, reason in reasons.items() if not own.sets(name)}


def data(job: Job, config: Config) -> DomainData:
    """The domain's tokenised text, and old text."""
    found = text(job, config)
    return DomainData(found.feed, found.tokenizer, found.held_out, *_other_text(job, config, found.tokenizer))


def _other_text(job: Job, config: Config, tokenizer: Tokenizer) -> tuple[list[str], list[str], list[str]]:
    """(text to tell the domain from, text to guard) of what the model could already, and other domains' text; kept in the run."""
    file, growth = job.run.state / "old.jsonl", config.growth
    if not file.exists():
        if growth.keep:
            wanted = int(BYTES_PER_TOKEN * 1.5 * growth.tokens) + config.train.eval_bytes
            texts = select(texts_of(growth.keep, "--keep"), wanted)
        else:
            with job.meter.stage("sample"):
                texts = own_texts(job, config, tokenizer, min(growth.tokens, OWN_TOKENS))
        parts = _parts(texts, int(BYTES_PER_TOKEN * config.train.seq_len))
        if len(parts) < len(USES):
            raise UserError(f"too little old text in {', '.join(growth.keep[:3])}" if growth.keep else f"{config.start.run} writes no text")
        lines = [{"text": part, "for": USES[number % GUARD == GUARD - 1]} for number, part in enumerate(parts)]
        size = int(BYTES_PER_TOKEN * growth.tokens) // max(1, len(growth.apart))
        for path in growth.apart:  # each has an equal share, however long it is
            lines += [{"text": part, "for": APART} for part in select(texts_of([path], "--apart"), size)]
        write_atomic(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    lines = read_lines(file)
    first, last, apart = ([line["text"] for line in lines if line["for"] == use] for use in (*USES, APART))
    return first, select(last, config.train.eval_bytes), apart


def _parts(texts: list[str], size: int) -> list[str]:
    """Texts cut before words into parts of about `size` characters, or smaller ones where there would be fewer than two times GUARD."""
    size = max(16, min(size, sum(map(len, texts)) // (2 * GUARD)))
    parts = []
    for one in texts:
        while one.strip():
            at = one.find(" ", size) if len(one) > size else -1
            parts.append(one if at < 0 else one[:at])
            one = "" if at < 0 else one[at:]
    return parts


# routing


class Window(NamedTuple):
    """Tokens that a model reads at once, (T,), or several rows of them, (B, T)."""

    tokens: Tensor
    """int64."""
    documents: Tensor | None
    """Pieces with different numbers do not see each other."""
    counts: Tensor
    """bool: not padding, and not the first of its piece, on whose state all others lean."""
    first: Tensor
    """bool: the first of its piece."""


def windows_of(tokenizer: Tokenizer, texts: Iterable[str], context: int) -> Iterator[Window]:
    """Texts as an evaluation reads them (`evals.bpb`)."""
    for one in texts:
        for tokens in torch.tensor([tokenizer.first_id, *tokenizer.encode(one)]).split(context):
            first = torch.arange(len(tokens)) == 0
            yield Window(tokens, None, ~first, first)


def _mixed(windows: Iterable[Window], limit: int) -> list[Window]:
    """Windows in an order of their own, of about `limit` tokens."""
    every, chosen = list(windows), []
    for number in permutation(len(every)):
        if limit <= 0:
            break
        chosen.append(every[number])
        limit -= len(every[number].tokens)
    return chosen


def _rows(feed: Feed, limit: int) -> Iterator[Window]:
    """The first rows of training, about `limit` tokens."""
    step = 0
    while True:
        batch = feed.batch(step)
        for tokens, targets, pieces in zip(batch.tokens, batch.targets, batch.documents, strict=True):
            if limit <= 0:
                return
            first = torch.ones(len(tokens), dtype=torch.bool)
            first[1:] = pieces[1:] != pieces[:-1]
            there = targets[:, 0] != IGNORED
            yield Window(tokens, pieces, there & ~first, there & first)
            limit -= int(there.sum())
        step += 1


def _rows_of(windows: Iterable[Window], rows: int) -> Iterator[Window]:
    """So many windows at a time, the shorter ones padded at their ends."""
    left = iter(windows)
    while group := list(islice(left, rows)):
        columns = zip(*group, strict=True)
        yield Window(*(None if column[0] is None else pad_sequence(column, batch_first=True) for column in columns))


def mixtures_of(model: Transformer) -> dict[int, MoE]:
    """The decoder's layers with experts."""
    decoder = (block for block in model.model.layers if not isinstance(block, MTPBlock))
    return {number: block.mlp for number, block in enumerate(decoder) if isinstance(block.mlp, MoE)}


@torch.no_grad()
def _read(model: Transformer, windows: Iterable[Window], look: Callable[[int, Tensor, Window], None], job: Job) -> int:
    """Let `look(layer, states (N, D) float32, window)` see what each router reads of a window of N = B * T tokens; -> tokens read."""
    current: list[Window] = []
    hooks = [
        layer.gate.register_forward_pre_hook(lambda _module, inputs, number=number: look(number, inputs[0].float(), current[0]))
        for number, layer in mixtures_of(model).items()
    ]
    training, read = model.training, 0
    kernels = fitting(2, None, model.device.type, str(model.compute_dtype).removeprefix("torch."))[0]
    model.eval()
    try:
        for window in _rows_of(windows, ROWS):
            job.signals.check()
            current[:] = [window]
            with native.path(kernels):
                model.hidden(window.tokens.to(model.device), None if window.documents is None else window.documents.to(model.device))
            read += window.tokens.numel()
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return read


class Fit(NamedTuple):
    """One layer's new router row."""

    row_D: Tensor
    thresholds: list[float]
    """By STRICTER, and one more: what the margin of a token must exceed so that the expert is chosen."""
    woken: float
    """Share of the domain's tokens whose margin does, at the first of them."""


def rows_of(moments_DD: Tensor, new_D: Tensor, old_D: Tensor) -> Tensor:
    """(R, D): a row for each of RIDGES, whose product is about STEEP for a domain's states and -STEEP for old ones.

    moments: the mean of x xT over both kinds; new and old: the mean states. Least squares, without a constant: routers have none."""
    scale = float(moments_DD.diagonal().mean())
    eye = torch.eye(len(new_D), dtype=moments_DD.dtype)
    rows = torch.stack([torch.linalg.solve(moments_DD + ridge * scale * eye, (new_D - old_D) / 2) for ridge in RIDGES])
    reach = torch.maximum((rows @ new_D).abs(), (rows @ old_D).abs()).clamp_(min=1e-9)
    return STEEP * rows / reach[:, None]


def threshold(old_N: Tensor, first_M: Tensor, eps: float) -> float:
    """The least margin that no more than the share `eps` of old tokens exceeds, and none that begins a text."""
    ordered = old_N.sort(descending=True).values
    least = float(ordered[min(int(eps * len(ordered)), len(ordered) - 1)])
    return max([least, *first_M.tolist()]) + NUDGE


def fit(
    model: Transformer, number: int, new: list[list[Window]], old: list[list[Window]], apart: list[Window], eps: float, job: Job
) -> dict[int, Fit]:
    """Router rows for expert `number` of each layer. new, old: windows of the domain and of old text, some to fit and others to set biases
    by. apart: windows of other domains, which have half of old text's weight, to fit only. Margins are of the new expert's score over the
    weakest choice without it."""
    layers = mixtures_of(model)
    width = model.config.hidden_size
    kinds = {"new": new[0], "old": old[0]} | ({APART: apart} if apart else {})
    moments = {kind: {layer: torch.zeros(width, width) for layer in layers} for kind in kinds}
    means = {kind: {layer: torch.zeros(width) for layer in layers} for kind in kinds}
    counts = dict.fromkeys(kinds, 0.0)

    def sums(kind: str) -> Callable[[int, Tensor, Window], None]:
        def look(layer: int, x_ND: Tensor, window: Window) -> None:
            x, weights = x_ND.cpu(), window.counts.flatten().float()
            if kind != "new":
                weights += HEAVY * window.first.flatten()
            moments[kind][layer].addmm_(x.T, x * weights[:, None])
            means[kind][layer] += weights @ x
            counts[kind] += float(weights.sum()) if layer == next(iter(layers)) else 0.0

        return look

    for kind, windows in kinds.items():
        _read(model, windows, sums(kind), job)
    if not all(counts.values()):
        raise UserError("grow: there is too little text to tell the domain from what the model could before")
    share, rows = counts["new"] / (counts["new"] + counts["old"]), {}
    for layer in layers:
        mean, moment = ({kind: of[layer].double() / counts[kind] for kind, of in found.items()} for found in (means, moments))
        for of in (mean, moment):
            of["old"] = (of["old"] + of.get(APART, of["old"])) / 2
        rows[layer] = rows_of(share * moment["new"] + (1 - share) * moment["old"], mean["new"], mean["old"]).float()
    margins: dict[str, dict[int, list[Tensor]]] = {kind: {layer: [] for layer in layers} for kind in ("new", "old", "first")}

    def compare(kind: str) -> Callable[[int, Tensor, Window], None]:
        def look(layer: int, x_ND: Tensor, window: Window) -> None:
            router: Router = layers[layer].gate
            choice = router.scores(x_ND) + router.e_score_correction_bias
            choice[:, number] = ASLEEP
            weakest = choice.topk(router.c.num_experts_per_tok, -1).values[:, -1:]
            margin = ((x_ND @ rows[layer].T.to(x_ND.device)).sigmoid() - weakest).cpu()
            margins[kind][layer].append(margin[window.counts.flatten()])
            if kind == "old":
                margins["first"][layer].append(margin[window.first.flatten()])

        return look

    for kind, windows in (("new", new[1]), ("old", old[1])):
        _read(model, windows, compare(kind), job)
    found = {}
    for layer in layers:
        new_NR, old_NR, first_MR = (torch.cat(margins[kind][layer]) for kind in ("new", "old", "first"))
        if not len(new_NR) or not len(old_NR):
            raise UserError("grow: there is too little text to tell the domain from what the model could before")
        choices = []
        for candidate, row in enumerate(rows[layer]):
            limits = [threshold(old_NR[:, candidate], first_MR[:, candidate], share * eps) for share in STRICTER]
            limits.append(max(limits[-1], (limits[-1] + float(new_NR[:, candidate].median())) / 2))
            choices.append(Fit(row, limits, float((new_NR[:, candidate] > limits[0]).float().mean())))
        found[layer] = max(choices, key=lambda choice: choice.woken)
    return found


def limit(job: Job, config: Config, model: Transformer, data: DomainData) -> Config:
    """Let the domain's experts alone learn. Where the run has no checkpoint yet, fit the rows of the routers first."""
    if not any(job.run.state.glob("step-*")):
        _route(job, config, model, data)
    return esft.limit(job, config, model, data)


def _route(job: Job, config: Config, model: Transformer, data: DomainData) -> None:
    growth, context = config.growth, config.train.seq_len
    began = time.monotonic()
    model.compute_dtype = getattr(torch, config.train.dtype)
    old = _mixed(windows_of(data.tokenizer, data.old, context), growth.tokens)
    new = list(_rows(data.feed, growth.tokens))
    apart = _mixed(windows_of(data.tokenizer, data.apart, context), growth.tokens // 2)
    number = _number(config)
    found = fit(model, number, [new[::2], new[1::2]], [old[::2], old[1::2]], apart, growth.eps, job)
    for layer, fitted in found.items():
        router: Router = mixtures_of(model)[layer].gate
        router.weight.data[number] = fitted.row_D
        router.e_score_correction_bias[number] = -fitted.thresholds[0]
    took = (time.monotonic() - began) / max(1, sum(len(window.tokens) for window in (*old, *new, *apart)))
    note = {"seconds_per_token": took, "thresholds": {str(layer): fitted.thresholds for layer, fitted in found.items()}}
    write_atomic(job.run.state / f"{FOUND}.json", json.dumps(note, indent=1))
    shares = [fitted.woken for fitted in found.values()]
    say(
        f"{growth.domain}: {sum(shares) / len(shares):.1%} of its tokens wake its expert ({min(shares):.1%} to {max(shares):.1%} "
        f"by layer), and at most {growth.eps:.2%} of old text's"
    )
    if max(shares) < LEAST_WOKEN:
        raise TurnedDown(f"{growth.domain} cannot be told from old text: no layer's expert would see {LEAST_WOKEN:.0%} of its tokens")


def _number(config: Config) -> int:
    """Of the learning domain's experts."""
    growth = config.growth
    return config.model.n_routed_experts - len(growth.domains) + growth.domains.index(growth.domain)


# the end


class TurnedDown(CannotGoOn):
    """A growth that would harm what the model could before, or gives nothing for it. summary: what is known of it."""

    summary: dict | None = None


def settle(job: Job, config: Config, model: Transformer, data: DomainData, result: TrainResult, nll: NllFn) -> TrainResult:
    """Make the routing stricter until old text's loss is no more than WORSE above what it was, write the weights and what wakes what.

    Raises TurnedDown where that does not help, and where the domain's own loss is no lower than before."""
    after, stop = result.evaluation, job.signals.should_stop
    found, number = read_state(job.run, FOUND, dict) or {}, _number(config)
    biases = {str(layer): moe.gate.e_score_correction_bias for layer, moe in mixtures_of(model).items()}
    if not config.growth.dense:  # where the expert that does nothing yet had taken another one's place
        learnt = {layer: float(bias[number]) for layer, bias in biases.items()}
        _set(biases, number, dict.fromkeys(biases, ASLEEP))
        result = replace(result, before=data.scorer(config, stop)(nll))
        _set(biases, number, learnt)
    before = result.before

    def rise() -> float:
        return after["old_loss"] / before["old_loss"] - 1

    step = 0
    while not rise() <= WORSE:  # whatever is no number is bad
        step += 1
        if step > len(STRICTER):
            worse = f"old text's loss would rise by {rise():.2%}, however strict the routing"
            raise TurnedDown(f"{config.growth.domain} was turned down: {worse}")
        say(f"old text's loss would rise by {rise():.2%}: the routing becomes stricter, {step} of {len(STRICTER)}")
        _set(biases, number, {layer: -thresholds[step] for layer, thresholds in found["thresholds"].items()})
        after = after | data.old_scorer(config, stop)(nll)
    if step:
        after = data.scorer(config, stop)(nll)
        write_tensors(job.run.weights_file, model.state_dict())
    if not after["loss"] < before["loss"]:
        raise TurnedDown(
            f"{config.growth.domain} was turned down: its held-out loss is {after['loss']:.4f} after {before['loss']:.4f}; "
            "a longer budget or another learning rate may help"
        )
    _note_wakes(job, config, model, data)
    return replace(result, evaluation=after)


def _set(biases: dict[str, Tensor], number: int, values: dict[str, float]) -> None:
    """One expert's selection bias in each layer."""
    for layer, value in values.items():
        biases[layer][number] = value


def _note_wakes(job: Job, config: Config, model: Transformer, data: DomainData) -> None:
    """Write down what share of each text's tokens wakes each expert, beside what is known of the domains that were there before."""
    growth, context = config.growth, config.train.seq_len
    found_before = (read_state(RunFolder(config.start.run), WAKES, dict) or {}) if growth.domains[1:] else {}
    old = {text: shares for text, shares in found_before.items() if text in growth.domains}
    model.compute_dtype = getattr(torch, config.train.dtype)
    for name, texts in ((OLD, data.guarded), (growth.domain, data.held_out)):
        sample = (window.tokens.numpy() for window in _mixed(windows_of(data.tokenizer, texts, context), WAKES_TOKENS))
        found = esft.shares(model, sample)
        old[name] = {str(layer): woken(config, share.token * config.model.num_experts_per_tok) for layer, share in found.items()}
    write_atomic(job.run.state / f"{WAKES}.json", json.dumps(old, indent=1))


def woken(config: Config, share_E: np.ndarray) -> dict[str, float]:
    """Expert -> the share of tokens that wake it: domains' experts by their names, a mixture's own by number, without the one that does
    nothing."""
    names, own = config.growth.domains, len(share_E) - len(config.growth.domains)
    of_root = {} if config.growth.dense else {str(number): round(float(share_E[number]), 6) for number in range(own)}
    return of_root | {name: round(float(share_E[own + place]), 6) for place, name in enumerate(names)}


WAY = {"start": Beside(), "data": data, "limit": limit, "settle": settle}
"""How `job.learn` grows, from the beginning and when it goes on."""
