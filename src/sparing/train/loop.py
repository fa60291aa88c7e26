"""The training loop. `_step` is one whole optimizer step, in the order in which it happens; `train` is what goes on around it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from sparing.account.meter import NoMeter
from sparing.base.preempt import Interrupted, Preempt
from sparing.budget.flops import train_flops
from sparing.config import Config, UserError
from sparing.data.stop import Stopped
from sparing.kernels import pool
from sparing.model.router import routers, update_biases
from sparing.precision.policy import Policy
from sparing.run import RunFolder
from sparing.train.checkpoint import Checkpoints, TrainState
from sparing.train.clock import Clock
from sparing.train.guard import MAX_ROLLBACKS, Guard
from sparing.train.log import Log, TrainResult
from sparing.train.optim import Optimizer, keep_as
from sparing.train.pace import Pace, PlanLog, fixed_steps
from sparing.train.replicas import Replicas
from sparing.train.schedule import decay_start, lr_scale, momentum

IGNORED = -100


class Batches(Protocol):
    """What the loop needs of a loader: any batch at any time, a pure function of its number (`sparing.data.loader.Loader`)."""

    def batch(self, step: int, rank: int = 0, world: int = 1): ...


class Diverged(UserError):
    """Batch after batch is bad, and going back did not help."""


def train(
    run: RunFolder,
    config: Config,
    model: nn.Module,
    loader: Batches,
    *,
    evaluate: Callable[[Callable[[Tensor, Tensor], Tensor]], dict] | None = None,
    started: float,
    flops_per_token: float,
    peak_flops: float | None = None,
    limit: Callable[[float], float] | None = None,
    step_seconds: float | None = None,
    reserve_s: float = 0.0,
    preempt: Preempt | None = None,
    meter: NoMeter | None = None,
    on_progress: Callable[[dict], None] | None = None,
) -> TrainResult:
    """Train (or go on training) `run` until its budget is used.

    model: initialised from the seed; where the run has a checkpoint, that is loaded over it. evaluate: scores `nll(tokens, targets)`, see
    `evals.bpb.NllFn`; -> {"bpb": ..., ...}. started: `time.monotonic()` when the verb began. flops_per_token: forward and backward of one
    trained token. peak_flops: of this machine, for MFU. limit: for budgets in money or energy: seconds used -> seconds they last, asked
    before every step. step_seconds: a first guess of a step's time. reserve_s: what the caller does afterwards. meter: told what each
    step did. Raises Interrupted on a signal (state saved), DiskFullError, and Diverged.
    """
    with run.lock(), preempt or Preempt(f"sparing resume {run}") as signals:
        trainer = _Trainer(run, config, model, loader, evaluate, started, flops_per_token, peak_flops, signals, on_progress)
        trainer.meter, trainer.limit = meter or trainer.meter, limit
        try:
            trainer.begin(step_seconds, reserve_s)
            return trainer.go()
        except (Interrupted, Stopped):  # Stopped: an evaluation that asks `should_stop` itself
            trainer.interrupted()
            raise Interrupted(signals.message) from None
        finally:
            trainer.log.close()


class _Trainer:
    def __init__(self, run, config, model, loader, evaluate, started, flops_per_token, peak_flops, signals, on_progress):
        self.run, self.config, self.model, self.loader, self.evaluate = run, config, model, loader, evaluate
        self.signals, self.on_progress = signals, on_progress
        t = config.train
        if t.threads:
            torch.set_num_threads(t.threads)
        torch.manual_seed(t.seed)  # nothing in a step is random; this keeps it so for whatever asks torch for a number
        model.compute_dtype = getattr(torch, t.dtype)
        keep_as(model, config)
        model.set_recompute(t.recompute)
        model.train()
        self.device = next(model.parameters()).device
        self.loss_fn = torch.compile(model.loss, dynamic=False) if t.compile else model.loss
        self.policy = Policy.of(model, config)
        self.replicas = Replicas(model, t.replicas or 1)
        self.optimizer = Optimizer(model, config.optim, model.compute_dtype, config.precision, t.seed)
        self.guard = Guard()
        self.clock = Clock(run, started)
        tokens = t.batch_size * t.seq_len
        self.log = Log(run, t.log, tokens_per_step=tokens, flops_per_token=flops_per_token, peak_flops=peak_flops)
        self.checkpoints = Checkpoints(run, model, self.optimizer, config, self.log.progress.say)
        self.meter, self.limit = NoMeter(), None
        self.work = tokens * train_flops(config.model, t.seq_len, t.recompute)  # of a step; recomputing is work, though not in MFU
        self.state: TrainState | None = None
        self.pace: Pace | None = None

    def _step(self, total: int) -> dict | None:
        """One whole optimizer step. Returns its metrics, or None when the batch was bad and the weights are as before."""
        state, optim, t = self.state, self.config.optim, self.config.train
        compiling = t.compile and not self.log.steps  # an exception inside the compiler would get lost in its callbacks
        self.policy.begin(state.step)
        with nullcontext() if compiling else self.signals.interruptible():  # nothing changes yet that a checkpoint would hold
            batch = self.loader.batch(state.cursor)
            if t.short_seq_len and state.step < t.short_until * total:
                batch = batch.cut(t.short_seq_len)
            denominator = max(1, int((batch.targets[..., 0] != IGNORED).sum()))
            tokens, targets = batch.tokens.to(self.device), batch.targets.to(self.device)
            documents = batch.documents.to(self.device) if t.document_mask else None
            micro = (t.micro_batch_size or t.batch_size) * t.seq_len // tokens.shape[1]
            options = {"denominator": denominator, "mtp_weight": t.mtp_weight, "sequence_balance": t.sequence_balance}
            starts = range(0, len(tokens), micro)
            parts: list[Tensor] = []
            for start in starts:
                rows = slice(start, start + micro)
                mine = None if documents is None else documents[rows]
                share = len(tokens[rows]) / len(tokens)
                parts.append(self.replicas.backward(tokens[rows], targets[rows], mine, share, self.loss_fn, **options))
            norm = self.optimizer.grad_norm()
            loss, mtp_loss, balance, grad_norm = torch.cat([torch.stack(parts).sum(0), norm.reshape(1)]).tolist()
        self.log.moves(state.step + 1, self.policy.end())
        bad = self.guard.verdict(loss, grad_norm, warm=state.step >= optim.warmup * total)
        if bad:
            self._skip(bad)
            return None
        self.guard.accept(loss)
        with self.signals.finishing("finishing the step and saving"):
            self.optimizer.clip(grad_norm)
            scale = lr_scale(state.step, total, optim)
            self.optimizer.step(scale, momentum(state.step, total, optim))
            if self.log.loads_due(state.step + 1, total):
                self.log.loads(state.step + 1, [router.tokens_per_expert.int().tolist() for router in routers(self.model)])
            violations = update_biases(self.model, t.bias_update_rate)
            state.step, state.cursor, state.tokens = state.step + 1, state.cursor + 1, state.tokens + tokens.numel()
        values = {"step": state.step, "tokens": state.tokens, "loss": loss, "lr": optim.lr * scale, "grad_norm": grad_norm}
        values |= self.policy.values()
        if self.config.model.mtp_depth:
            values["mtp_loss"] = mtp_loss
        if violations:
            values |= {"max_violation": sum(violations) / len(violations), "balance_loss": balance}
        return values

    def go(self) -> TrainResult:
        """Step after step, with what comes between steps: plan, evaluation, checkpoints."""
        state, pace = self.state, self.pace
        saved, stable = time.monotonic(), state.step <= decay_start(pace.total, self.config.optim)
        while state.step < (total := pace.advance(state.step, self.clock.seconds(), self._limit())):
            self.signals.check()
            if self.evaluate and pace.eval_due(state.step):  # asked before a step, so that a resumed run makes up for a missed one
                self._evaluate()
            decaying = state.step >= decay_start(total, self.config.optim)
            if (stable and decaying) or pace.checkpoint_due(state.step, time.monotonic() - saved):
                self._save(keep_as_pre_decay=stable and decaying)
                saved = time.monotonic()
            stable = not decaying
            before = time.monotonic()
            values = self._step(total)
            self.meter.add(self.log.tokens_per_step, self.work)
            if values is not None:
                self._show(self.log.step(values | self.meter.now(), time.monotonic() - before, self.clock.seconds()))
                pace.step_took(time.monotonic() - before)  # with what telling about it takes
        return self._finish()

    def _limit(self) -> float | None:
        """Seconds that a budget in money or energy lasts, as things are now; None for other budgets."""
        return self.limit(self.clock.seconds()) if self.limit else None

    def begin(self, step_seconds: float | None, reserve_s: float) -> None:
        """Load the newest checkpoint (or save step 0), drop the metrics of steps to be done again, make the plan."""
        config, t = self.config, self.config.train
        loaded = self.checkpoints.load_newest()
        self.state = loaded or TrainState()
        self._forget_batch()  # whoever measured the model before may have left gradients and counts
        if loaded:
            self.clock.at_least(loaded.seconds)
            self.guard.load(loaded.guard)
            self.policy.load(loaded.precision)
            self.log.progress.say(f"going on from step {loaded.step:,}")
        self.clock.record()  # before the lines that it was read from are dropped
        self.log.keep_until(self.state.step)
        if loaded is None:
            self._save()
        tokens, flops, peak = t.batch_size * t.seq_len, self.log.flops_per_token, self.log.peak_flops
        budget, fixed = config.budget, None
        budget_s = budget.amount if budget.unit == "s" else self._limit()
        if budget_s is None:
            if budget.unit not in ("tok", "flop"):
                raise UserError(f"budget in {budget.unit}: how long that lasts here is not known; give one in s, tok or flop")
            fixed = fixed_steps(budget.amount, budget.unit, tokens, flops)
        if step_seconds is None:  # measurements replace it after a few steps
            step_seconds = tokens * flops / (0.3 * peak) if peak else 1.0
        self.pace = Pace(
            PlanLog(self.run.state / "plan.jsonl"),
            step=self.state.step,
            seconds=self.clock.seconds(),
            budget_s=budget_s,
            fixed=fixed,
            name=budget.amount if self.limit else None,
            say=self.log.progress.say,
            step_seconds=step_seconds,
            reserve_s=reserve_s,
            evals=t.evals if self.evaluate else None,
            interval_s=t.checkpoint_interval_s,
        )
        self.pace.evals_done = len(self.log.metrics.evals())

    def _finish(self) -> TrainResult:
        """Save first: a kill during the last evaluation then costs only the evaluation."""
        self._save()
        evaluation = self.log.evaluated(self.state.step) or (self._evaluate() if self.evaluate else {})
        self.clock.record()
        if self.log.last:
            self._show(self.log.last, now=True)
        losses = list(self.guard.losses) or [math.nan]
        speed = self.log.tokens_per_s
        return TrainResult(
            steps=self.state.step,
            tokens=self.state.tokens,
            loss=sum(losses) / len(losses),
            evaluation=evaluation,
            seconds=self.clock.seconds(),
            tokens_per_s=speed,
            mfu=self.log.mfu(speed) if speed else None,
            skipped=len(self.state.skipped),
        )

    def _show(self, line: dict, *, now: bool = False) -> None:
        pace = self.pace
        left = (pace.total - self.state.step) * pace.step_s if pace.budget_s is None else pace.budget_s - self.clock.seconds()
        shown = self.log.show(line, total=pace.total, step_s=pace.step_s if pace.measured > 2 else None, seconds_left=left, now=now)
        if self.on_progress:
            self.on_progress(shown)

    def _evaluate(self) -> dict:
        before = time.monotonic()
        pool.trim()  # the last step's tensors; a sample loads the model a second time
        self.replicas.train(False)
        try:
            with self.meter.stage("evaluate"), self.signals.interruptible():
                result = self.evaluate(self.replicas.nll)
        finally:
            self.replicas.train(True)
        self.pace.eval_took(took := time.monotonic() - before)
        line = {"step": self.state.step, "tokens": self.state.tokens, "seconds": self.clock.seconds(), "took_s": took}
        self.log.evaluation(line, result)
        return result

    def _save(self, *, keep_as_pre_decay: bool = False) -> None:
        before = time.monotonic()
        state = self.state
        state.seconds, state.guard, state.precision = self.clock.seconds(), self.guard.state(), self.policy.state()
        self.log.metrics.sync()  # a checkpoint must not be ahead of the metrics
        with self.meter.stage("save"), self.signals.finishing("saving a checkpoint"):
            self.checkpoints.save(state, keep_as_pre_decay=keep_as_pre_decay)
        if self.pace:
            self.pace.save_took(time.monotonic() - before)

    def _skip(self, why: str) -> None:
        """Drop a bad batch; after several in a row, go back to a checkpoint and on with fresh batches."""
        state, log = self.state, self.log
        self._forget_batch()
        log.metrics.add({"step": state.step, "skipped_batch": state.cursor, "why": why, "seconds": self.clock.seconds()})
        log.progress.say(f"step {state.step + 1}: {why}: batch {state.cursor} is skipped, the weights stay as they were")
        state.skipped.append(state.cursor)
        state.cursor += 1
        if not self.guard.reject():
            return
        rollbacks, cursor, skipped = self.guard.rollbacks + 1, state.cursor, state.skipped
        back = self.checkpoints.load_newest(before=state.step) if rollbacks <= MAX_ROLLBACKS else None
        if back is None:
            gentler = f"--optim.lr {self.config.optim.lr / 2:g}"
            raise Diverged(f"training diverged at step {state.step + 1} ({why}): try lower learning rates, e.g. {gentler}")
        log.progress.say(f"batch after batch is bad: back to step {back.step:,}, on with fresh batches")
        self.guard.load(back.guard | {"rollbacks": rollbacks, "bad_in_a_row": 0})
        state.__dict__.update(back.__dict__ | {"cursor": cursor, "skipped": skipped})
        log.keep_until(state.step)
        self._save()

    def _forget_batch(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        for router in routers(self.model):
            router.tokens_per_expert.zero_()

    def interrupted(self) -> None:
        """Leave a checkpoint of the last finished step; what an interrupted step has begun is in no tensor that is saved."""
        if self.state:
            self._save()
