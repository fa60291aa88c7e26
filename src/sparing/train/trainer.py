"""The trainer: whatever learns is `Trainer(model, feed, objective, world)`. `step` is one whole optimizer step, in the order in which it
happens; `fit` is what goes on around the steps of a run.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sparing.account.meter import NoMeter
from sparing.base.config import CannotGoOn, Config, UserError
from sparing.base.config_limits import checked
from sparing.base.hardware import cores
from sparing.base.preempt import Interrupted, Preempt
from sparing.base.rank import RankLost
from sparing.base.run import RunFolder
from sparing.budget.flops import forward_flops, train_flops
from sparing.budget.ranks import chunk_spans, fitting_parts, fitting_stages
from sparing.data.loader import Batch
from sparing.data.progress import Stopped
from sparing.kernels import native
from sparing.kernels.products import fitting
from sparing.model.experts import routers, update_biases
from sparing.model.init import give_memory
from sparing.model.transformer import Transformer
from sparing.parallel.expert import divide_experts
from sparing.parallel.owners import Owners, Replicated
from sparing.parallel.pipeline import Pipeline, divide_layers
from sparing.parallel.schedules import microbatches_of
from sparing.parallel.sharded import Sharded
from sparing.precision.policy import Move, Policy
from sparing.train.checkpoint import Checkpoints, TrainState
from sparing.train.guard import MAX_ROLLBACKS, Guard
from sparing.train.log import Log, TrainResult
from sparing.train.objective import Objective, weight_of
from sparing.train.optim import Optimizer, decay_start, keep_as, learning_of, lr_scale, momentum
from sparing.train.pace import Clock, Pace, PlanLog, fixed_steps
from sparing.train.replicas import Replicas
from sparing.train.world import ALONE, World

Evaluate = Callable[[Callable[[Tensor, Tensor], Tensor]], dict]
"""Scores `nll(tokens, targets)` (see `evals.bpb.NllFn`) -> {"bpb": ..., ...}."""


class Feed(Protocol):
    """Batches by number: a pure function of the step, so that any machine can make any batch at any time."""

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch: ...


@dataclass
class Session:
    """What a verb lends the trainer for one run: where it is kept, its clock and meter, who may stop it."""

    run: RunFolder
    clock: Clock
    signals: Preempt
    meter: NoMeter = field(default_factory=NoMeter)
    peak_flops: float | None = None
    """Of this machine, per second, for MFU and the first guess of a step's time."""
    limit: Callable[[float], float] | None = None
    """For budgets in money or energy: seconds used -> seconds that they last; asked before every step."""
    reserve_s: float = 0.0
    """What the verb does after training."""
    on_progress: Callable[[dict], None] | None = None
    keeps_best: bool = False
    """The weights with the lowest held-out loss are what is kept at the end, not the last ones."""
    spent_flops: float = 0.0
    """Of a budget in operations, before the first step."""
    failures_per_hour: float = 0.0
    """How often the run was killed until now."""


class Diverged(CannotGoOn):
    """Batch after batch is bad, and going back did not help."""


class Trainer:
    """Teaches `model` what `objective` asks, batch by batch of `feed`."""

    def __init__(
        self, model: Transformer, feed: Feed, objective: Objective, world: World = ALONE, *, config: Config,
        device: torch.device | None = None, tensors: Iterable[tuple[str, Tensor]] | None = None,
    ):  # fmt: skip
        """Makes the model ready to learn as `config` says: number formats, recomputation, replicas, optimizer. Reads and writes nothing.
        config: of all ranks together, the batch size above all. device: where a model on the meta device is to learn: of that, only what
        this rank keeps gets memory. tensors: whole ones of the model's state dict, of which this rank's parts are copied one by one; None:
        a checkpoint will be loaded, or the model has its values.

        Raises UserError for settings that exclude each other, DamagedError where `tensors` are not the model's."""
        t = checked(config).train
        if t.threads:
            torch.set_num_threads(t.threads)
        torch.manual_seed(t.seed)  # nothing in a step is random; this keeps it so for whatever asks torch for a number
        self.model, self.feed, self.objective, self.world, self.config = model, feed, objective, world, config
        model.compute_dtype = getattr(torch, t.dtype)
        keep_as(model, config)
        model.set_recompute(t.recompute)
        model.train()
        self.device = torch.device(device or model.device)
        self.policy = Policy.of(model, config, self.device)
        self.moves: list[Move] = []
        """Linears that the last step's errors moved to another precision."""
        self.loads: list[Tensor] = []
        """Tokens that each expert of each mixture was given in the last step."""
        self.read = 0.0
        """Tokens of the last batch, of all ranks."""
        self.waited_s = 0.0
        """For the last batch: what sampling one takes, of feeds that sample."""
        self.kernels = t.kernels or fitting(t.replicas or 1, t.threads, self.device.type, t.dtype, config.model)[0]
        shard, pieces, layers = config.parallel.shard if world.size > 1 else "nothing", None, None
        stages = fitting_stages(config, world.size)
        alike, names = world.size // stages, set(model.state_dict())
        if stages > 1:
            spans, schedule = chunk_spans(config, stages), config.parallel.schedule
            saved = model.state_dict() if config.adapter is None else learning_of(model)
            layers = divide_layers(model, saved, spans, schedule, stages, world.rank, world.size, self.device)
        parts = fitting_parts(config.parallel.experts, alike, config.model.n_routed_experts) if shard != "nothing" else 1
        if parts > 1:
            pieces = divide_experts(model, parts, world.rank, world.size, alike)
        if shard != "weights" and model.device.type != self.device.type:
            give_memory(model, self.device)
        learning = learning_of(model)
        if shard == "weights":
            self.owners = Sharded(model, learning, world, pieces, self.device)
        else:
            divided = shard == "optimizer" or layers
            self.owners = Owners(learning, world, pieces, layers) if divided else Replicated(learning, world)
        if tensors is not None:
            state = model.state_dict()
            self.owners.fill(state, ((name, whole) for name, whole in tensors if name in state or name not in names), "the first weights")
        self.rows = (layers.pipeline, alike, layers.group) if layers else (world.rank, world.size, None)
        """Which part of a batch's rows is this rank's, of how many; the process group of the ranks that have all of them together."""
        self.exchanges = pieces is not None or shard == "weights"
        threads = 1 if self.exchanges else t.replicas or 1  # what ranks exchange during the passes goes in one order
        if layers:
            self.replicas = Pipeline(model, objective, layers, self.kernels)
        else:
            self.replicas = Replicas(model, objective, threads, bool(t.compile), self.kernels)
        self.optimizer = Optimizer(model, config.optim, model.compute_dtype, config.precision, t.seed, self.owners.mine)
        self.tokens_per_step = t.batch_size * t.seq_len
        self.flops_per_token = train_flops(config.model, t.seq_len, False, config.adapter, config.esft, config.drafts)
        if config.dpo is not None or config.grpo is not None:  # the start reads each token too, or writes it
            self.flops_per_token += forward_flops(config.model, t.seq_len, mtp=False)

    # one step

    def gradients(self, batch: Batch, step: int = 1) -> dict[str, float]:
        """Forward and backward passes over `batch`, this rank's rows, micro-batch by micro-batch; -> all ranks' parts of the objective, and
        grad_norm. step: steps done, which decides whether the errors of 8-bit products are measured."""
        t = self.config.train
        if self.policy.sites:
            self.policy.begin(step)
        here = len(batch)
        of_all = torch.tensor([weight_of(batch), here, batch.tokens.numel()], dtype=torch.float64, device=self.device)
        self.world.sum([of_all], self.rows[2])
        weight, rows, self.read = of_all.tolist()
        batch = batch.to(self.device) if t.document_mask else replace(batch, documents=None).to(self.device)
        micro = (t.micro_batch_size or t.batch_size) * t.seq_len // batch.tokens.shape[1]
        parts = self.replicas.gradients(batch, micro, weight, here / rows, self._passes())
        counts = [router.tokens_per_expert for router in routers(self.model)]
        self.world.sum([parts, *counts])
        self.owners.reduce_gradients()
        with native.path(self.kernels):
            values = torch.cat([parts, self.owners.norm(self.optimizer.grad_norm())]).tolist()
        self.moves = self.policy.end() if self.policy.sites else []
        return dict(zip((*self.objective.parts, "grad_norm"), values, strict=True))

    def _passes(self) -> int | None:
        """How many micro-batches a step has, where ranks exchange weights, tokens or hidden states during the passes and so must have as
        many; else None.

        As many as the largest part of the rows is to be cut into, but no more than the smallest part has rows."""
        t, parts = self.config.train, self.rows[1]
        smallest, largest = t.batch_size // parts, -(-t.batch_size // parts)
        if parts < self.world.size:
            wished = -(-smallest // t.micro_batch_size) if t.micro_batch_size else None
            return microbatches_of(self.config.parallel.schedule, self.world.size // parts, smallest, wished)
        if not self.exchanges:
            return None
        return min(smallest, -(-largest // (t.micro_batch_size or t.batch_size)))

    def update(self, grad_norm: float, lr_scale: float, momentum: float) -> list[float]:
        """Clip, update weights and routers' biases; -> each mixture's largest relative excess of tokens. lr_scale: of every peak."""
        with native.path(self.kernels):
            self.optimizer.clip(grad_norm)
            self.optimizer.step(lr_scale, momentum)
        self.owners.broadcast_weights()
        self.loads = [router.tokens_per_expert.clone() for router in routers(self.model)]
        return update_biases(self.model, self.config.train.bias_update_rate)

    def step(self, total: int) -> tuple[dict, str | None]:
        """One whole optimizer step of a run of `total`. -> (its metrics, None), or ({}, why) where a bad batch changed nothing."""
        state, optim, t = self.state, self.config.optim, self.config.train
        # A signal may end the passes: nothing changes yet that a checkpoint would hold. But an exception inside the compiler would get lost
        # in its callbacks, and one rank must not leave the others waiting.
        compiling, signals = t.compile and not self.log.steps, self.signals
        alone = nullcontext() if compiling else signals.interruptible()
        with alone if self.world.size == 1 else signals.finishing("finishing the step"):
            began = time.monotonic()
            batch = self.feed.batch(state.cursor, *self.rows[:2])
            self.waited_s = time.monotonic() - began
            if t.short_seq_len and state.step < t.short_until * total:
                batch = batch.cut(t.short_seq_len)
            losses = self.gradients(batch, state.step)
        bad = self.guard.verdict(losses["loss"], losses["grad_norm"], warm=state.step >= optim.warmup * total)
        if any(self.world.agree([float(bad is not None)])):
            return {}, bad or "a bad batch on another rank"
        self.guard.accept(losses["loss"])
        scale = lr_scale(state.step, total, optim)
        with self.signals.finishing("finishing the step and saving"):
            violations = self.update(losses["grad_norm"], scale, momentum(state.step, total, optim))
            state.step, state.cursor = state.step + 1, state.cursor + 1
            state.tokens += int(self.read)
        values = {"step": state.step, "tokens": state.tokens, "loss": losses.pop("loss"), "lr": optim.lr * scale}
        values |= {"grad_norm": losses.pop("grad_norm")} | (self.policy.values() if self.policy.sites else {}) | losses
        if violations:
            values["max_violation"] = sum(violations) / len(violations)
        return values, None

    # a run

    def fit(self, session: Session, evaluate: Evaluate | None = None) -> TrainResult:
        """Train (or go on training) the session's run until its budget is used.

        Where the run has a checkpoint, that is loaded over the model. Raises Interrupted on a signal (the state is saved),
        DiskFullError and Diverged. With several ranks each has a session; what `evaluate` calls must not stop on one of them alone.
        """
        self.session, self.evaluate = session, evaluate
        self.run, self.signals, self.clock, self.meter = session.run, session.signals, session.clock, session.meter
        t = self.config.train
        speed = {"tokens_per_step": self.tokens_per_step, "flops_per_token": self.flops_per_token, "peak_flops": session.peak_flops}
        self.writes, self.cores = self.world.rank == 0, cores()
        self.log = Log(self.run, t.log, writes=self.writes, **speed)
        self.guard = Guard()
        self.checkpoints = Checkpoints(self.run, self.model, self.optimizer, self.config, self.log.progress.say, self.kernels, self.owners)
        # Recomputing is work, though not in MFU.
        c = self.config
        self.work = self.tokens_per_step * train_flops(c.model, t.seq_len, t.recompute, c.adapter, c.esft, c.drafts)
        self.state: TrainState | None = None
        self.pace: Pace | None = None
        gc.collect()
        gc.freeze()  # the objects of all imported modules, which collections would visit again and again: 5 % of a small step (LAB.md)
        try:
            self._begin()
            return self._go()
        except (Interrupted, Stopped):  # Stopped: an evaluation that asks `should_stop` itself
            if self.state:  # what an interrupted step has begun is in no tensor that is saved
                self._save()
                self.world.leaving(self.signals.requested)
            raise Interrupted(self.signals.message) from None
        except RankLost:  # where every rank has everything: while they added up, and no weight has changed since the last whole step
            if self.state and self.pace and self.owners.mine is None:
                self._save()
            raise
        finally:
            gc.unfreeze()
            self.log.close()

    def _go(self) -> TrainResult:
        """Step after step, with what comes between steps: plan, evaluation, checkpoints."""
        state, pace = self.state, self.pace
        saved, stable = time.monotonic(), state.step <= decay_start(pace.total, self.config.optim)
        while state.step < (total := self._decided(pace.advance(state.step, self.clock.seconds(), self._limit()))):
            stop, writing = self.world.agree([float(self.signals.requested), float(self.checkpoints.busy)])
            if stop:
                raise Interrupted(self.signals.message)
            if self.checkpoints.pending and not writing:
                self._settle()
            # Asked before a step, so that a resumed run makes up for a missed one.
            if self.evaluate and self._decided(pace.eval_due(state.step) or self._before_all()):
                self._evaluate()
            decaying = state.step >= decay_start(total, self.config.optim)
            if self._decided((stable and decaying) or pace.checkpoint_due(state.step, time.monotonic() - saved)):
                self._save(keep_as_pre_decay=stable and decaying, wait=False)
                saved = time.monotonic()
            stable = not decaying
            before, busy, step, read = time.monotonic(), time.process_time(), state.step + 1, state.tokens
            values, bad = self.step(total)
            tokens = state.tokens - read or self.tokens_per_step  # of answers that a model samples a step does not say before how many
            self.log.moves(step, self.moves)
            if bad:
                self._skip(bad)
            elif self.log.loads_due(step, total):
                self.log.loads(step, [load.int().tolist() for load in self.loads])
            if self.writes:  # of all ranks
                self.meter.add(tokens, self.work * tokens / self.tokens_per_step)
            if not bad:
                took = max(1e-9, time.monotonic() - before)
                values |= self.meter.now() | {"input_wait": self.waited_s / took}
                if self.device.type == "cpu":
                    values["idle"] = max(0.0, 1 - (time.process_time() - busy) / (took * self.cores))
                self._show(self.log.step(values, took, self.clock.seconds(), tokens))
                pace.step_took(time.monotonic() - before)  # with what telling about it takes
        return self._finish()

    def _before_all(self) -> bool:
        """Whether the weights that a run starts from are still to be scored, before its first step."""
        return self.config.start is not None and self.state.step == 0 and self.log.evaluated(0) is None

    def _decided(self, value: float) -> int:
        """Rank 0's value."""
        return int(self.world.agree([value if self.writes else 0])[0])

    def _limit(self) -> float | None:
        """Seconds that a budget in money or energy lasts, as things are now; None for other budgets."""
        limit = self.session.limit
        return limit(self.clock.seconds()) if limit else None

    def _begin(self) -> None:
        """Load the newest checkpoint (or save step 0), drop the metrics of steps to be done again, make the plan."""
        config, t = self.config, self.config.train
        loaded = self._load_newest()
        self.state = loaded or TrainState()
        self._forget_batch()  # whoever measured the model before may have left gradients and counts
        if loaded:
            self.clock.at_least(loaded.seconds)
            self.guard.load(loaded.guard)
            self.policy.load(loaded.precision)
            self.log.progress.say(f"going on from step {loaded.step:,}")
        if self.writes:
            self.clock.record()  # before the lines that it was read from are dropped
        self.log.keep_until(self.state.step)
        if loaded is None:
            self._save()
        tokens, flops, peak = self.tokens_per_step, self.flops_per_token, self.session.peak_flops
        budget, fixed = config.budget, None
        budget_s = budget.amount if budget.unit == "s" else self._limit()
        if budget_s is None:
            if budget.unit not in ("tok", "flop"):
                raise UserError(f"budget in {budget.unit}: how long that lasts here is not known; give one in s, tok or flop")
            spent = self.session.spent_flops if budget.unit == "flop" else 0.0
            fixed = fixed_steps(max(0.0, budget.amount - spent), budget.unit, tokens, flops)
        self.pace = Pace(
            PlanLog(self.run.state / "plan.jsonl" if self.writes else None),
            step=self.state.step,
            seconds=self.clock.seconds(),
            budget_s=budget_s,
            fixed=fixed,
            name=budget.amount if self.session.limit else None,
            say=self.log.progress.say,
            step_seconds=tokens * flops / (0.3 * peak) if peak else 1.0,  # measurements replace it after a few steps
            reserve_s=self.session.reserve_s,
            evals=t.evals if self.evaluate else None,
            interval_s=t.checkpoint_interval_s,
            failures_per_hour=self.session.failures_per_hour,
        )
        self.pace.evals_done = sum(line["step"] > 0 for line in self.log.metrics.evals())

    def _finish(self) -> TrainResult:
        """Save first: a kill during the last evaluation then costs only the evaluation."""
        self._save()
        if self.evaluate and not self._decided(self.log.evaluated(self.state.step) is not None):
            self._evaluate()
        kept = self._keep_best()
        if self.writes:
            self.clock.record()
        if self.log.last:
            self._show(self.log.last, now=True)
        losses = list(self.guard.losses) or [math.nan]
        speed = self.log.tokens_per_s
        return TrainResult(
            steps=self.state.step,
            tokens=self.state.tokens,
            loss=sum(losses) / len(losses),
            evaluation=self.log.evaluated(kept) or {},
            before=self.log.evaluated(0) or {},
            seconds=self.clock.seconds(),
            tokens_per_s=speed,
            mfu=self.log.mfu(speed) if speed else None,
            skipped=len(self.state.skipped),
        )

    def _show(self, line: dict, *, now: bool = False) -> None:
        pace = self.pace
        left = (pace.total - self.state.step) * pace.step_s if pace.budget_s is None else pace.budget_s - self.clock.seconds()
        shown = self.log.show(line, total=pace.total, step_s=pace.step_s if pace.measured > 2 else None, seconds_left=left, now=now)
        if self.session.on_progress:
            self.session.on_progress(shown)

    def _evaluate(self) -> dict:
        before = time.monotonic()
        native.trim()  # the last step's tensors; a sample loads the model a second time
        self.replicas.train(False)
        try:
            alone = self.world.size == 1
            with self.meter.stage("evaluate"), self.signals.interruptible() if alone else nullcontext():
                result = self.evaluate(self.nll)
        finally:
            self.replicas.train(True)
        self.pace.eval_took(took := time.monotonic() - before, planned=self.state.step > 0)
        line = {"step": self.state.step, "tokens": self.state.tokens, "seconds": self.clock.seconds(), "took_s": took}
        self.log.evaluation(line, result)
        if self.session.keeps_best and 0 < self.state.step < self.pace.total:
            self._note_best(result)
        return result

    def nll(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """`Transformer.nll` of (B, T), the same on all ranks, which call it together; each has a part of the rows. -> (B, T) nats.

        Raises Stopped on all of them where one was told to stop."""
        part, parts, group = self.rows
        if self.world.size > 1 and any(self.world.agree([float(self.signals.requested)])):
            raise Stopped
        if parts == 1:
            return self.replicas.nll(tokens, targets)
        mine = list(range(part, len(tokens), parts))
        found = self.replicas.nll(tokens[mine or [0]], targets[mine or [0]])  # what ranks exchange needs all of them
        whole = found.new_zeros(targets.shape)
        whole[mine] = found[: len(mine)]
        self.world.sum([whole], group)
        return whole

    def _note_best(self, result: dict) -> None:
        """Keep these weights aside if no others scored better."""
        losses = [line["eval_loss"] for line in self.log.metrics.evals() if 0 < line["step"] < self.state.step]
        if self._decided(result["loss"] < min(losses, default=math.inf)) and (self.writes or self.owners.mine is not None):
            before = time.monotonic()
            with self.meter.stage("save"), self.signals.finishing("saving the best weights"):
                self.checkpoints.keep_best(self.state.step, result["loss"])
            self.pace.save_took(time.monotonic() - before)

    def _keep_best(self) -> int:
        """Make the weights with the lowest held-out loss the run's; -> their step, by default the last."""
        last = self.log.evaluated(self.state.step)
        if not (self.session.keeps_best and last):
            return self.state.step
        best = self.checkpoints.best()
        if self._decided(best is None or last["loss"] <= best["loss"]):
            return self.state.step
        self.checkpoints.use_best()
        step, loss = best["step"], best["loss"]
        found = f"the held-out loss was lowest after step {step:,}: {loss:.4f}, at the end {last['loss']:.4f}"
        self.log.progress.say(f"{found}; those weights stay")
        return step

    def _save(self, *, keep_as_pre_decay: bool = False, wait: bool = True) -> None:
        """Save a checkpoint. wait: until it is whole."""
        if not self.writes and self.owners.mine is None:
            return
        self._settle()
        state = self.state
        state.seconds, state.guard, state.precision = self.clock.seconds(), self.guard.state(), self.policy.state()
        if self.writes:
            self.log.metrics.sync()  # a checkpoint must not be ahead of the metrics
        with self.meter.stage("save"), self.signals.finishing("saving a checkpoint"):
            self.checkpoints.save(state, keep_as_pre_decay=keep_as_pre_decay, copied=not wait)
        if wait:
            self._settle()

    def _settle(self) -> None:
        """Let the last checkpoint count, when it is written."""
        if not self.checkpoints.pending:
            return
        with self.meter.stage("save"), self.signals.finishing("saving a checkpoint"):
            took = self.checkpoints.settle()
        if self.pace:
            self.pace.save_took(took)

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
        self._settle()
        rollbacks, cursor, skipped = self.guard.rollbacks + 1, state.cursor, state.skipped
        back = self._load_newest(before=state.step) if rollbacks <= MAX_ROLLBACKS else None
        if back is None:
            gentler = f"--optim.lr {self.config.optim.lr / 2:g}"
            raise Diverged(f"training diverged at step {state.step + 1} ({why}): try lower learning rates, e.g. {gentler}")
        log.progress.say(f"batch after batch is bad: back to step {back.step:,}, on with fresh batches")
        self.guard.load(back.guard | {"rollbacks": rollbacks, "bad_in_a_row": 0})
        state.__dict__.update(back.__dict__ | {"cursor": cursor, "skipped": skipped})
        log.keep_until(state.step)
        self._save()

    def _load_newest(self, before: int | None = None) -> TrainState | None:
        """`Checkpoints.load_newest`, rank 0 first, which sets damaged ones aside; it goes on, and saves, when all have loaded."""
        loaded = self.checkpoints.load_newest(before) if self.writes else None
        self.world.agree([0.0])
        loaded = loaded if self.writes else self.checkpoints.load_newest(before)
        self.world.agree([0.0])
        if loaded and self.writes and self.session.keeps_best:
            self.checkpoints.forget_best_after(loaded.step)
        return loaded

    def _forget_batch(self) -> None:
        for parameter in self.model.parameters():
            parameter.grad = None
        for router in routers(self.model):
            router.tokens_per_expert.zero_()
