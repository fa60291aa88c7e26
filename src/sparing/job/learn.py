"""Trains a run from its configuration: tokenises, makes the model, calibrates, trains. What is done already is not done again."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from sparing.account.limit import Limit
from sparing.account.receipt import read_state
from sparing.base.config import Config, UserError
from sparing.base.files import DamagedError, write_atomic
from sparing.base.messages import say
from sparing.base.run import RunFolder, fill, read_tensors, run_tensors
from sparing.budget.estimate import Estimate
from sparing.budget.flops import parameters
from sparing.budget.gain import GainPoint, add_gain
from sparing.budget.memory import gives_back, training_memory
from sparing.budget.predict import SAMPLE_BYTES_PER_S, after_gain
from sparing.budget.scaling import Point, add_point, effective_bytes
from sparing.evals.bpb import NllFn
from sparing.job.begin import Job
from sparing.job.corpus import TrainingData, text
from sparing.job.finish import SAMPLE_TOKENS, finish
from sparing.job.start import Start, keep_origin, start_of
from sparing.job.texts import corpora
from sparing.kernels import decode, native
from sparing.kernels.formats import warning
from sparing.kernels.products import fitting
from sparing.model.low_rank import learned
from sparing.model.transformer import Transformer
from sparing.parallel.ranks import Ranks
from sparing.planning.start import reasons_of
from sparing.precision.eight_bit import speed_note
from sparing.train.calibrate import choose, choose_products
from sparing.train.log import TrainResult
from sparing.train.objective import NextToken, Objective
from sparing.train.optim import keep_as
from sparing.train.peak import peak_flops, peak_seconds
from sparing.train.trainer import Evaluate, Feed, Session, Trainer
from sparing.train.world import ALONE

CALIBRATION_SHARE = 0.02
"""Of a time budget, for choosing micro-batch, threads and compiler."""
CALIBRATION_S = 10.0
"""The same where the budget is not a time."""
SAMPLE_S = 0.004
"""Least seconds of a token of a sample text; of a large model it takes as long as reading the weights."""
WHOLE_SHARE = 0.8
"""Of a rank's memory, for the whole model and its gradients where ranks divide it but it is measured undivided."""
FEWEST_STEPS = 100
"""A run of fewer tells the loss law nothing: it is all warm-up and decay."""


def learn(
    job: Job,
    config: Config,
    samples: int,
    start: Start | None = None,
    data: Callable[[Job, Config], TrainingData] = text,
    objective: Objective | None = None,
    limit: Callable[[Job, Config, Transformer, TrainingData], Config] | None = None,
    settle: Callable[[Job, Config, Transformer, TrainingData, TrainResult, NllFn], TrainResult] | None = None,
) -> dict:
    """Train (or go on training) the job's run; -> the summary.

    samples: completions to write at the end. start: default what `config.start` names. data: makes (or opens) what the run learns from.
    objective: default `NextToken`. limit: decides what of the model learns, and writes it down; where the run has a checkpoint, the
    weights are not there yet. settle: looks at the trained model, and may change it and its scores, or refuse it. Raises Interrupted on a
    signal (the run can be resumed), UserError, Diverged.
    """
    run, signals, machine = job.run, job.signals, job.machine
    if job.leads:
        keep_origin(run, config)
    with job.meter.stage("tokenise"):
        material = data(job, config)
    if job.leads:
        job.clock.record()
    signals.check()
    t = config.train
    device = torch.device(t.device or ("cuda" if machine.gpus else "cpu"))
    if device.type == "cpu" and (slow := warning(t.dtype, machine)):
        say(f"train.dtype {slow}")
    if config.precision.linear not in ("none", "auto"):
        say(f"precision.linear: {speed_note(config.precision.linear, device.type)}")
    if device.type == "cpu" and gives_back(config.precision):
        native.give_back()
    elif device.type == "cpu":
        native.open_pool()
    with signals.interruptible():
        begun = any(run.state.glob("step-*"))  # the checkpoint will be loaded over whatever the weights (or an adapter's factors) are
        unfilled = begun and config.adapter is None
        divided = start is None and _divided(config, job.size)
        if divided:
            model = start_of(config).unfilled(config)
        else:
            model = Transformer(config.model) if unfilled else (start or start_of(config)).model(config)
            keep_as(model, config)  # here already, for what is measured
            model.to(device)
        if limit is not None:
            with job.meter.stage("calibrate"):
                config = limit(job, config, model, material)
        with job.meter.stage("calibrate"):
            peak = peak_flops(machine, device.type, t.dtype, peak_seconds(job.lasts(config.budget)))
            config = _calibrated(job, config, model, material.feed, peak, device)
    dtype = getattr(torch, t.dtype)
    if config.train.kernels and not native.can(config.train.kernels, dtype):
        instead = next(kernels for kernels in ("vectors", "compiled", "plain") if native.can(kernels, dtype))
        say(f"train.kernels = {config.train.kernels} cannot run here: {instead} ones do, slower and with other last bits")
    job.ready()
    if samples:
        decode.library()  # is compiled at its first use: seconds, which would be missing at the end
    session = Session(
        run,
        job.clock,
        signals,
        job.meter,
        peak_flops=peak,
        limit=Limit(config.budget, job.meter) if config.budget.unit in ("usd", "kwh") else None,
        reserve_s=0.5
        + material.reserve_s(job, config)
        + samples * SAMPLE_TOKENS * max(SAMPLE_S, 4 * parameters(config.model).active / SAMPLE_BYTES_PER_S),
        keeps_best=material.keeps_best,
        spent_flops=material.spent_flops(),
        failures_per_hour=_failures_per_hour(job),
    )
    with job.meter.stage("train"):
        tensors = None
        if divided and not unfilled:
            tensors = _from_rank_0(job.ranks, start_of(config).tensors(config))
        elif job.ranks is not None and not begun:  # what made the weights may round otherwise on another machine
            job.ranks.broadcast([tensor.data for tensor in model.state_dict().values()], 0)
        world, parts = job.ranks or ALONE, {"device": device, "tensors": tensors} if divided else {}
        try:
            trainer = Trainer(model, material.feed, objective or NextToken.of(config), world, config=config, **parts)
        except DamagedError as error:
            raise UserError(f"start.run {config.start.run} has no usable weights: {error}") from None
        alone = job.size == 1  # ranks agree on it (`Trainer.nll`)
        evaluate = material.scorer(config, signals.should_stop if alone else lambda: False)
        result = trainer.fit(session, evaluate if config.start is None else _telling(job, evaluate))
    if not job.leads:
        return {}
    if divided:  # it would ask ranks that are gone
        if samples and not _fits_whole(job, config, device):
            say("no completions are written: the whole model does not fit this rank")
            samples = 0
        if not settle:
            del trainer, model
            gc.collect()  # modules and their hooks know each other
        model = _trained(run, config).to(device) if samples or settle else start_of(config).unfilled(config)
    if settle is not None:
        trainer.replicas.train(False)
        with job.meter.stage("evaluate"), signals.interruptible():
            result = settle(job, config, model, material, result, trainer.replicas.nll)
    if data is text and len(corpora(run)) <= 1 and not config.data.sample:  # the laws are of runs that read one corpus, all of it
        _add_point(job, config, result)
    with job.meter.stage("sample"), signals.interruptible():
        return finish(job, config, model, material, result, samples)


def _divided(config: Config, ranks: int) -> bool:
    """Whether a rank has a part of the weights alone, and makes no more of them. What answers during training needs all of them."""
    p = config.parallel
    return ranks > 1 and (p.shard == "weights" or p.experts > 1 or p.stages > 1) and config.grpo is None


def _fits_whole(job: Job, config: Config, device: torch.device) -> bool:
    """Whether a rank's memory has room for the whole model and its gradients."""
    memory = training_memory(config)
    return memory.weights + memory.gradients < WHOLE_SHARE * (job.machine.gpus[0] if device.type == "cuda" else job.machine).memory_bytes


def _from_rank_0(ranks: Ranks, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Rank 0's tensors, one at a time, on all ranks: what makes them may round otherwise on another machine."""
    for name, tensor in tensors:
        ranks.broadcast([tensor], 0)
        yield name, tensor


def _trained(run: RunFolder, config: Config) -> Transformer:
    """The whole model with the run's newest weights."""
    if config.adapter is None:
        model = Transformer(config.model)
        fill(model.state_dict(), run_tensors(run), run.weights_file)
    else:
        model = start_of(config).model(config)
        fill(learned(model), read_tensors(run.adapter_file), run.adapter_file)
    return model


def _failures_per_hour(job: Job) -> float:
    """How often training this run has ended without its own doing."""
    rows = [row for row in job.meter.earlier() if row.stage == "train" and row.wall_s]
    hours = sum(row.wall_s for row in rows) / 3600
    return sum(row.status in ("killed", "failed") for row in rows) / hours if hours else 0.0


def _calibrated(job: Job, config: Config, model: Transformer, feed: Feed, peak: float, device: torch.device) -> Config:
    """Choose what is left open by measuring, and write it down before it takes effect. model: on the meta device, where ranks divide it;
    then a whole one is measured, if there is memory for that, and given up again."""
    t = config.train
    open_ = None in (t.micro_batch_size, t.compile, t.replicas) or (t.threads is None and t.device != "cuda")
    auto = config.precision.linear == "auto"
    if not open_ and not auto and t.kernels:
        return config
    lasts = job.lasts(config.budget)
    seconds = CALIBRATION_S if lasts is None else CALIBRATION_SHARE * lasts
    reasons, started = {}, time.monotonic()
    if model.device.type != device.type and (open_ or auto) and _fits_whole(job, config, device):
        model = start_of(config).model(config)
        keep_as(model, config)
        model.to(device)
    batch = feed.batch(0, 0, max(1, job.size // config.parallel.stages))  # what a rank computes
    mine = replace(config, train=replace(t, batch_size=len(batch)))
    if open_:
        ways_out = {"check": job.signals.check, "say": say, "cut_short": job.cut_short}
        chosen, reasons = choose(model, mine, job.machine, batch, seconds, peak, **ways_out)
        mine = replace(mine, train=chosen)
        config = replace(config, train=replace(chosen, batch_size=t.batch_size))
    if auto:
        left = seconds - (time.monotonic() - started)
        precision, reasons["precision.linear"] = choose_products(model, mine, batch, left, job.cut_short)
        config = replace(config, precision=precision)
    if config.train.kernels is None:
        kernels, reasons["train.kernels"] = fitting(t.replicas or 1, t.threads, device.type, t.dtype, config.model)
        config = replace(config, train=replace(config.train, kernels=kernels))
    for name, reason in reasons.items():
        section, field = name.split(".")
        say(f"  {name} = {getattr(getattr(config, section), field)}  # {reason}")
    job.write(config, reasons_of(job.run) | reasons)
    return config


def _telling(job: Job, evaluate: Evaluate) -> Evaluate:
    """`evaluate`; its first result, of the model that the run starts from, completes the run's prediction, which is then told."""

    def scored(nll: NllFn) -> dict:
        result = evaluate(nll)
        prediction = read_state(job.run, "prediction", dict) or {}
        if prediction.get("gain") and (prediction.get("bpb") or {}).get("value") is None:
            bpb = after_gain(result["bpb"], Estimate(**prediction["gain"]))
            write_atomic(job.run.state / "prediction.json", json.dumps(prediction | {"bpb": bpb.to_dict()}, indent=1))
            text = f"{result['bytes'] / 1e3:.0f} kB of held-out text"
            say(f"before the first step: {result['bpb']:.4f} bits per byte on {text}; expected at the end: {bpb.value:.4f}")
        return result

    return scored


def _add_point(job: Job, config: Config, result: TrainResult) -> None:
    """One more point for the law of this kind of corpus, or for that of what a model gains on it."""
    try:
        forecast = json.loads((job.run.state / "prediction.json").read_text())
        kind, unique = str(forecast["kind"]), float(forecast["train_bytes"])
        read = effective_bytes(result.tokens * result.evaluation["bytes"] / result.evaluation["tokens"], unique)
        bits, what, counts = float(result.evaluation["bpb"]), job.run.path.name, parameters(config.model)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return
    if config.start is None and result.steps >= FEWEST_STEPS:
        add_point(kind, Point(counts.active, counts.total, read, bits, what))
    elif config.start is not None and config.adapter is None and not read_state(RunFolder(config.start.run), "summary", dict):
        add_gain(kind, GainPoint(counts.total, read, result.before["bpb"], bits, what))  # of a model that others trained
