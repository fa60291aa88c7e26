"""Reports a run's progress: a line for people, metrics.jsonl for programs, TensorBoard or W&B if asked for."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING

from sparing.base.config import UserError
from sparing.base.files import disk_errors, read_lines, to_json, write_atomic
from sparing.base.run import RunFolder
from sparing.precision.eight_bit import LEVELS

if TYPE_CHECKING:
    from collections.abc import Callable

PLAIN_EVERY_S = 10.0
TOLD = 0.01
"""Share of a step that waits for input, from which the progress line says so."""
LOADS = 150
"""Times in a run that the experts' loads are written down."""
SHOWN_MOVES = 4
"""Of the precision policy, at a time."""


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    steps: int
    tokens: int
    loss: float
    """Mean main-token loss of the last steps (at most 64), nats."""
    evaluation: dict = field(default_factory=dict)
    """What `evaluate` returned for the weights that were kept; empty without one."""
    before: dict = field(default_factory=dict)
    """The same before the first step, of a run that starts from another one."""
    seconds: float = 0.0
    """Of the budget, used by the whole run so far."""
    tokens_per_s: float = 0.0
    """Over the training steps of this process."""
    mfu: float | None = None
    skipped: int = 0
    """Batches that were not learnt from (loss spikes, NaN)."""


class Metrics:
    """metrics.jsonl: one object a step, and one an evaluation. `keep_until(step)`, called before the first `add`, drops what a resumed
    run will do again. Where `writes` is False the lines are in memory only."""

    def __init__(self, run: RunFolder, kind: str, writes: bool = True):
        self.path, self.writes = run.metrics_file, writes
        self.lines = read_lines(self.path)
        self._file = None
        self._sink = open_sink(kind, run) if writes else None

    def keep_until(self, step: int) -> None:
        """Keep the lines of the first `step` steps (a step appears once), and open the file for more."""
        self.close_file()
        self.lines = [line for line in self.lines if line.get("step", 0) <= step]
        if not self.writes:
            return
        write_atomic(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._file = open(self.path, "a", encoding="utf-8")

    def add(self, line: dict) -> None:
        """Append one object: in the kernel's hands at once, so a killed process loses nothing. Not-a-number becomes null."""
        line = to_json(line)
        self.lines.append(line)
        if not self._file:
            return
        with disk_errors(self.path):
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        if self._sink:
            self._sink({key: value for key, value in line.items() if isinstance(value, int | float) and key != "step"}, line["step"])

    def evals(self) -> list[dict]:
        return [line for line in self.lines if "eval_bpb" in line]

    def sync(self) -> None:
        """Everything added is on the disk. For whoever writes."""
        with disk_errors(self.path):
            os.fsync(self._file.fileno())

    def close_file(self) -> None:
        if self._file:
            self._file.close()
            self._file = None

    def close(self) -> None:
        self.close_file()
        if self._sink:
            self._sink(None, 0)


SINKS = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases"}


def check_log(kind: str) -> None:
    """Raises UserError where the package behind `train.log` is not installed."""
    if kind in SINKS and find_spec(kind) is None:
        raise UserError(f"train.log = {kind} needs {SINKS[kind]}: `pip install {kind}`, or train.log = none")


def open_sink(kind: str, run: RunFolder) -> Callable[[dict | None, int], None] | None:
    """A function (values, step) that sends scalars to TensorBoard or W&B; values None: finish. Raises UserError when not installed."""
    check_log(kind)
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(run.path / "tensorboard"))

        def to_tensorboard(values: dict | None, step: int) -> None:
            if values is None:
                writer.close()
            for key, value in (values or {}).items():
                writer.add_scalar(key, value, step)

        return to_tensorboard
    if kind == "wandb":
        import wandb

        name = run.path.resolve().name
        session = wandb.init(project="sparing", name=name, id=f"sparing-{name}", resume="allow", dir=str(run.path))
        return lambda values, step: session.finish() if values is None else session.log(values, step=step)
    return None


class Log:
    """All that is told about one run: metrics, progress line, sinks. Speeds are in trained tokens per second."""

    def __init__(
        self, run: RunFolder, kind: str, *, tokens_per_step: int, flops_per_token: float, peak_flops: float | None, writes: bool = True
    ):
        """writes: False for ranks that leave files and messages to rank 0."""
        self.metrics, self.progress = Metrics(run, kind, writes), Progress(silent=not writes)
        self.writes, self.loads_file = writes, run.state / "loads.jsonl"
        self.tokens_per_step, self.flops_per_token, self.peak_flops = tokens_per_step, flops_per_token, peak_flops
        self.steps, self.tokens, self.training_s = 0, 0, 0.0
        self.last: dict = {}
        self.bpb: float | None = None

    def mfu(self, tokens_per_s: float) -> float | None:
        return tokens_per_s * self.flops_per_token / self.peak_flops if self.peak_flops else None

    @property
    def tokens_per_s(self) -> float:
        """Mean over this process's steps, evaluations and saving left out."""
        return self.tokens / self.training_s if self.steps else 0.0

    def keep_until(self, step: int) -> None:
        self.metrics.keep_until(step)
        kept = [line for line in read_lines(self.loads_file) if line.get("step", 0) <= step]
        if self.writes and self.loads_file.exists():
            write_atomic(self.loads_file, "".join(json.dumps(line) + "\n" for line in kept))
        self.bpb = next((line["eval_bpb"] for line in reversed(self.metrics.evals())), None)

    def step(self, values: dict, took: float, seconds: float, tokens: int) -> dict:
        """Write a step's metrics; returns the line."""
        self.steps, self.tokens, self.training_s = self.steps + 1, self.tokens + tokens, self.training_s + took
        speed = tokens / took
        line = values | {"tokens_per_s": speed, "seconds": seconds}
        if self.peak_flops:
            line["mfu"] = self.mfu(speed)
        self.metrics.add(line)
        return line

    def moves(self, step: int, moves: list) -> None:
        """Linears that the precision policy moved (`precision.policy.Move`) in a step, counted from 1."""
        for move in moves:
            self.metrics.add({"step": step, "precision": vars(move) | {"before": LEVELS[move.before], "after": LEVELS[move.after]}})
        for move in moves[:SHOWN_MOVES]:
            self.progress.say(f"step {step}: {move}")
        if len(moves) > SHOWN_MOVES:
            self.progress.say(f"step {step}: ... and {len(moves) - SHOWN_MOVES} more moves, in metrics.jsonl")

    def loads_due(self, step: int, total: int) -> bool:
        """Are the experts' loads of this step (counted from 1) to be written down? About `LOADS` times a run."""
        return step % max(1, total // LOADS) == 0

    def loads(self, step: int, by_layer: list[list[int]]) -> None:
        """Append to state/loads.jsonl how many tokens each expert of each layer was given in this step."""
        if not by_layer or not self.writes:  # a dense model
            return
        with disk_errors(self.loads_file), open(self.loads_file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loads": by_layer}) + "\n")

    def show(self, line: dict, *, total: int, step_s: float | None, seconds_left: float | None, now: bool = False) -> dict:
        """Show a line with the speed of the last steps (step_s: their mean time, if known), which is steadier than one step's."""
        speed = self.tokens / self.steps / step_s if step_s else line["tokens_per_s"]
        shown = line | {"total": total, "tokens_per_s": speed, "mfu": self.mfu(speed), "bpb": self.bpb, "seconds_left": seconds_left}
        self.progress.show(shown, now=now)
        self.last = line
        return shown

    def evaluation(self, line: dict, result: dict) -> None:
        self.metrics.add(line | {f"eval_{key}": value for key, value in result.items()})
        self.bpb = result.get("bpb", self.bpb)

    def evaluated(self, step: int) -> dict | None:
        """The evaluation after `step` steps, if it is in the metrics."""
        lines = [line for line in self.metrics.evals() if line["step"] == step]
        return {key.removeprefix("eval_"): value for key, value in lines[-1].items() if key.startswith("eval_")} if lines else None

    def close(self) -> None:
        self.progress.close()
        self.metrics.close()


class Progress:
    """One line on standard error: redrawn in place on a terminal, printed now and then elsewhere (logs, pipes)."""

    def __init__(self, every_s: float = PLAIN_EVERY_S, silent: bool = False):
        self.every_s, self.silent = every_s, silent
        self._last = 0.0
        self._live = None
        if sys.stderr.isatty() and not silent:
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=False)
            self._live.start()

    def show(self, values: dict, *, now: bool = False) -> None:
        """values: step total loss tokens_per_s, and bpb mfu idle input_wait max_violation seconds_left where known."""
        wait = 0.25 if self._live else self.every_s
        if self.silent or (not now and time.monotonic() - self._last < wait):
            return
        self._last = time.monotonic()
        line = render(values)
        if self._live:
            self._live.update(line, refresh=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line that stays."""
        if self.silent:
            return
        if self._live:
            self._live.console.print(message, markup=False, highlight=False)
        else:
            print(message, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


def render(values: dict) -> str:
    """The progress line of `Progress.show`."""
    parts = [f"step {values['step']:,}/{values['total']:,}", f"loss {values['loss']:.3f}"]
    if values.get("pass_at_1") is not None:
        parts[1:] = [
            f"pass@1 {values['pass_at_1']:.3f}", f"pass@k {values['pass_at_k']:.3f}", f"length {values['length']:.0f}",
            f"no signal {values['no_signal']:.0%}", f"mismatch {values['mismatch']:.3f}",
        ]  # fmt: skip
    if values.get("bpb") is not None:
        parts.append(f"held-out bpb {values['bpb']:.3f}")
    parts.append(f"{values['tokens_per_s']:,.0f} tokens/s")
    if values.get("mfu") is not None:
        parts.append(f"MFU {100 * values['mfu']:.0f} %")
    if values.get("idle") is not None:
        parts.append(f"idle {100 * values['idle']:.0f} %")
    if values.get("input_wait", 0) >= TOLD and values.get("pass_at_1") is None:
        parts.append(f"waits for input {100 * values['input_wait']:.0f} %")
    if values.get("max_violation") is not None:
        parts.append(f"MaxVio {values['max_violation']:.2f}")
    if values.get("seconds_left") is not None:
        minutes, seconds = divmod(max(0, round(values["seconds_left"])), 60)
        parts.append(f"{minutes // 60}h{minutes % 60:02d}m left" if minutes >= 60 else f"{minutes}m{seconds:02d}s left")
    return "  ".join(parts)
