"""From wishes to a finished run folder: what `train` and `resume` have in common. Every stage can be killed and done again."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace

import torch

from sparing.account.card import model_card
from sparing.account.history import bill
from sparing.account.limit import Limit
from sparing.account.meter import Meter
from sparing.base.hardware import Machine
from sparing.base.preempt import Interrupted, Preempt
from sparing.budget.flops import kv_cache_bytes, parameters, train_flops
from sparing.budget.plan import in_seconds
from sparing.budget.scaling import Point, add_point, effective_bytes
from sparing.budget.units import format_budget
from sparing.config import Budget, Config, DataConfig, UserError
from sparing.config_file import write_config
from sparing.data.loader import Loader
from sparing.data.prepare import prepare
from sparing.data.progress import Bars
from sparing.data.scan import scan
from sparing.data.stop import Stopped
from sparing.data.store import TokenStore
from sparing.evals.bpb import NllFn, bpb
from sparing.infer.loaded import Model
from sparing.kernels import decode
from sparing.kernels.formats import this_machine, warning
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.planning.places import with_vocabulary
from sparing.planning.plan import foresee
from sparing.precision.linear import speed_note
from sparing.resolve import resolve
from sparing.run import RunFolder, write_atomic
from sparing.train.calibrate import choose, choose_products
from sparing.train.clock import Clock
from sparing.train.loop import TrainResult
from sparing.train.loop import train as train_loop
from sparing.train.optim import keep_as
from sparing.train.peak import peak_flops, peak_seconds

CALIBRATION_SHARE = 0.02
"""Of a time budget, for choosing micro-batch, threads and compiler."""
CALIBRATION_S = 10.0
"""The same where the budget is not a time."""
SAMPLE_TOKENS = 64
FEWEST_STEPS = 100
"""A run of fewer tells the loss law nothing: it is all warm-up and decay."""
EVAL_TOKENS = 8192
"""Tokens of a forward pass in evaluations."""


def metered(verb: str, run: RunFolder | None = None, first: str = "setup", started: float | None = None) -> Meter:
    """A meter on this machine, to be entered. Raises UserError for a price file that cannot be used."""
    return Meter(verb, this_machine(), run, first=first, started=started, say=say)


def say(text: str) -> None:
    """To the user, beside standard output."""
    print(text, file=sys.stderr, flush=True)


def cut_shorts(run: RunFolder) -> Callable[[str], None]:
    """Tells the user what a limit in seconds left unmeasured, and keeps it for the receipt."""

    def tell(message: str) -> None:
        say(message)
        file = run.state / "cut_short.json"
        before = json.loads(file.read_text()) if file.exists() else []
        write_atomic(file, json.dumps([*before, message]))

    return tell


@contextmanager
def signals_of(run: RunFolder) -> Iterator[Preempt]:
    with Preempt(f"sparing resume {run}") as signals:
        try:
            yield signals
        except Stopped:
            raise Interrupted(signals.message) from None


def resolved(wishes: dict, budget: Budget, machine: Machine, signals: Preempt, run: RunFolder, meter: Meter) -> Config:
    """The configuration of a new run, written into its folder and shown with its reasons."""
    data_config = DataConfig(**wishes.get("data", {}))
    with meter.stage("scan"), Bars() as bars:
        facts = scan(data_config, progress=bars, should_stop=lambda: signals.requested)
    if facts.quarantined:
        say(f"{facts.quarantined} documents cannot be used ({', '.join(facts.reasons)}): see quarantine.jsonl in the run folder")
    device = wishes.get("train", {}).get("device") or ("cuda" if machine.gpus else "cpu")
    lasts = in_seconds(budget, meter.tariff.rates)
    with meter.stage("calibrate"), signals.interruptible():
        peak = peak_flops(
            machine, device if machine.gpus else "cpu", wishes.get("train", {}).get("dtype"), peak_seconds(lasts), cut_shorts(run)
        )
    wishes = with_vocabulary(wishes)
    result = resolve(wishes, budget if lasts is None else Budget(lasts, "s"), machine, facts, peak)
    if budget.unit in ("usd", "kwh"):
        reasons = {**result.reasons, "budget.amount": f"lasts about {lasts:,.0f} s at the prices and the power of this machine"}
        result = replace(result, config=replace(result.config, budget=budget), reasons=reasons)
    say(f"{facts.documents:,} documents, {facts.bytes / 1e6:.1f} MB; budget {format_budget(budget)}; peak {peak / 1e9:,.0f} GFLOP/s")
    for name, reason in result.reasons.items():
        section, field = name.split(".")
        say(f"  {name} = {getattr(getattr(result.config, section), field)}  # {reason}")
    write_atomic(run.state / "reasons.json", json.dumps(result.reasons))
    write_atomic(run.config_file, write_config(result.config, result.reasons))
    try:
        write_atomic(run.state / "prediction.json", json.dumps(foresee(result.config, facts, machine, lasts), indent=1))
    except UserError as error:  # a forecast that cannot be made is no reason not to train
        say(f"no prediction: {error}")
    return result.config


def _learn(run: RunFolder, config: Config, result: TrainResult) -> None:
    """One more point for the law of this kind of corpus."""
    try:
        before = json.loads((run.state / "prediction.json").read_text())
        kind, unique = str(before["kind"]), float(before["train_bytes"])
        read = result.tokens * result.evaluation["bytes"] / result.evaluation["tokens"]
        bits = float(result.evaluation["bpb"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return
    if result.steps >= FEWEST_STEPS:
        counts = parameters(config.model)
        add_point(kind, Point(counts.active, counts.total, effective_bytes(read, unique), bits, run.path.name))


def reasons_of(run: RunFolder) -> dict[str, str]:
    try:
        return json.loads((run.state / "reasons.json").read_text())
    except (OSError, ValueError):
        return {}


def go_on(run: RunFolder, config: Config, meter: Meter, samples: int, signals: Preempt) -> dict:
    """Everything from the written configuration on; each part is skipped or repeated as the run folder's state asks."""
    machine, started = meter.machine, meter.started
    clock = Clock(run, started)
    with meter.stage("tokenise"), Bars() as bars:
        store = prepare(config.data, config.model.vocab_size, progress=bars, should_stop=lambda: signals.requested)
    for name in ("tokenizer.json", "quarantine.jsonl"):
        if not (run.path / name).exists():
            shutil.copyfile(store.path / name, run.path / f".{name}.tmp")
            (run.path / f".{name}.tmp").replace(run.path / name)
    clock.record()
    signals.check()
    t = config.train
    device = torch.device(t.device or ("cuda" if machine.gpus else "cpu"))
    if device.type == "cpu" and (slow := warning(t.dtype, machine)):
        say(f"train.dtype {slow}")
    if config.precision.linear not in ("none", "auto"):
        say(f"precision.linear: {speed_note(config.precision.linear, device.type)}")
    with signals.interruptible():
        model = Transformer(config.model)
        init_weights(model, t.seed)
        keep_as(model, config)  # here already, for what is measured
        model.to(device)
        loader = Loader(store, t.seq_len, t.batch_size, config.model.mtp_depth, t.seed)
        with meter.stage("calibrate"):
            lasts = in_seconds(config.budget, meter.tariff.rates)
            peak = peak_flops(machine, device.type, t.dtype, peak_seconds(lasts))
            config = _calibrated(run, config, model, loader, meter, signals, peak)
    flops = train_flops(config.model, t.seq_len)
    held_out = list(store.held_out())
    context = config.train.seq_len

    def evaluate(nll: NllFn) -> dict:
        return bpb(
            nll, store.tokenizer, held_out, context, batch=max(1, EVAL_TOKENS // context), max_bytes=config.train.eval_bytes,
            should_stop=lambda: signals.requested,
        )  # fmt: skip

    if samples:
        decode.library()  # is compiled at its first use: seconds, which would be missing at the end
    reserve = 0.5 + samples * SAMPLE_TOKENS * 0.004
    with meter.stage("train"):
        result = train_loop(
            run,
            config,
            model,
            loader,
            evaluate=evaluate,
            started=started,
            flops_per_token=flops,
            peak_flops=peak,
            limit=Limit(config.budget, meter) if config.budget.unit in ("usd", "kwh") else None,
            reserve_s=reserve,
            preempt=signals,
            meter=meter,
        )
    _learn(run, config, result)
    with meter.stage("sample"), signals.interruptible():
        return _finished(run, config, model, store, result, meter, samples)


def _calibrated(run: RunFolder, config: Config, model: Transformer, loader: Loader, meter: Meter, signals: Preempt, peak: float) -> Config:
    """Choose what is left open by measuring, and write it down before it takes effect."""
    t = config.train
    open_ = None in (t.micro_batch_size, t.compile, t.replicas) or (t.threads is None and t.device != "cuda")
    auto = config.precision.linear == "auto"
    if not open_ and not auto:
        return config
    lasts = in_seconds(config.budget, meter.tariff.rates)
    seconds = CALIBRATION_S if lasts is None else CALIBRATION_SHARE * lasts
    reasons, cut_short, started = {}, cut_shorts(run), time.monotonic()
    if open_:
        told = {"check": signals.check, "say": say, "cut_short": cut_short}
        train_config, reasons = choose(model, config, meter.machine, loader.batch(0), seconds, peak, **told)
        config = replace(config, train=train_config)
    if auto:
        left = seconds - (time.monotonic() - started)
        precision, reasons["precision.linear"] = choose_products(model, config, loader.batch(0), left, cut_short)
        config = replace(config, precision=precision)
    reasons = reasons_of(run) | reasons
    write_atomic(run.state / "reasons.json", json.dumps(reasons))
    write_atomic(run.config_file, write_config(config, reasons))
    return config


class _BudgetSpent(Exception):
    """Ends a completion."""


def _finished(
    run: RunFolder, config: Config, model: Transformer, store: TokenStore, result: TrainResult, meter: Meter, samples: int
) -> dict:
    """Completions, the model card, the summary."""
    counts = parameters(config.model)
    model.eval()
    # As `load` gives it. In bfloat16 on a CPU every length of the text so far would cost half a megabyte of oneDNN's code (LAB.md).
    model.compute_dtype = torch.float32
    loaded = Model(run, config, model, store.tokenizer)
    lasts = in_seconds(config.budget, meter.tariff.rates)
    clock, texts = Clock(run, meter.started), []
    documents = list(store.held_out())[:samples]
    for document in documents:
        if lasts is not None and clock.seconds() > lasts:
            break
        prompt, pieces = _prompt(document), []

        def show(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            if lasts is not None and clock.seconds() > lasts:
                raise _BudgetSpent

        with suppress(_BudgetSpent):
            loaded.generate(prompt, SAMPLE_TOKENS, temperature=0.7, seed=config.train.seed, stream=show)
        texts.append({"prompt": prompt, "text": "".join(pieces)})
    if lasts is not None and clock.seconds() > lasts:
        cut_shorts(run)(f"the budget was used up while completions were written: {len(texts)} of {len(documents)}, the last one cut")
    summary = {
        "run": str(run.path),
        "bpb": result.evaluation.get("bpb"),
        "loss": result.loss,
        "eval_loss": result.evaluation.get("loss"),
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens_per_s,
        "mfu": result.mfu,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "skipped": result.skipped,
        "seconds": 0.0,
        "budget": format_budget(config.budget),
        "samples": texts,
    }
    write_atomic(run.model_card_file, model_card(config, summary, kv_cache_bytes(config.model)))
    summary |= {"seconds": Clock(run, meter.started).seconds()} | bill(run, meter)
    write_atomic(run.state / "summary.json", json.dumps(summary, indent=1))
    cost = f"${summary['cost_usd']:.3g}, {1000 * summary['energy_kwh']:.3g} Wh ({summary['energy_how']}), {summary['co2e_g']:.3g} gCO2e"
    say(f"\nspent: {summary['seconds']:,.0f} s, {cost}; sparing receipt {run} has the details")
    say(f"{run}: the recipe with its reasons is config.toml, the model weights/, every step metrics.jsonl, a summary MODEL_CARD.md")
    say(f'next: sparing generate {run} --prompt "..."   sparing eval {run} --data PATH   sparing export {run} --format hf --out FOLDER')
    return summary


def _prompt(document: str) -> str:
    """The beginning of a document: up to its third line or 120 characters, not ending inside a word."""
    start = "\n".join(document.splitlines()[:3])[:120]
    return start if len(start) < 120 or " " not in start else start.rsplit(" ", 1)[0]


def nll_of(model: Transformer) -> NllFn:
    """The model as `bpb` wants it."""
    device = model.model.norm.weight.device
    return lambda tokens, targets: model.nll(tokens.to(device), targets.to(device))
