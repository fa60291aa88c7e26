"""The command line: parse, call one function of `api`, print. Nothing heavy is imported before a verb is chosen.

Exit status: 0 done, 2 the user's mistake (one line on standard error), 1 our fault (a traceback), 130 interrupted,
3 the run could not go on for a reason that is nobody's slip (one line).
"""

from __future__ import annotations

import time

_IMPORTED = time.monotonic()  # before all else: a budget counts from the start of the process

# ruff: noqa: E402
import contextlib
import errno
import json
import os
import shlex
import signal
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from sparing import __version__
from sparing.arguments import Call, parse, print_help
from sparing.base.preempt import Preempt
from sparing.budget.units import parse_budget, parse_extension
from sparing.config import CannotGoOn, UserError
from sparing.config_file import nearest, read_wishes, set_dotted
from sparing.output import show, to_json
from sparing.verbs import Bench, Compare, Eval, Plan, Receipt, Report, Serve

INTERRUPTED = 130

if TYPE_CHECKING:
    import tyro  # `arguments.parse` imports it for the chosen verb; until then the annotations below stay text

HELP = f"""Sparing {__version__}: say what you can spend, get the best language model that it buys.

  sparing plan     [RECIPE] --data PATH... --budget 20m                  what it would cost and reach
  sparing train    [RECIPE] --data PATH... --budget 20m --out RUN        train a model inside a budget
  sparing resume   RUN [--budget +20m]                                   go on after an interruption, or extend a finished run
  sparing eval     RUN --data PATH... --tasks FILE...                    bits per byte of text, scores of questions
  sparing generate RUN --prompt TEXT                                     let the model write
  sparing serve    RUN [--port 8000]                                     OpenAI's interface and a chat page
  sparing receipt  RUN | --all                                           what it cost, beside what was predicted
  sparing report   RUN        sparing compare RUN RUN...                 the same and all curves as one HTML page
  sparing export   RUN --format hf|gguf --out PATH                       for Hugging Face transformers, for llama.cpp
  sparing import   FOLDER --out RUN                                      the other way round
  sparing bench    train|precision|infer [FIGURE]                        this code against its peers, in one run

`sparing VERB --help` explains a verb. A budget is a number with a unit: 90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh.
"""


@dataclass
class Train:
    """Train a model inside a budget. What neither a recipe nor an option sets is derived from budget, data and machine."""

    takes: ClassVar[str] = "recipe"
    recipe: tyro.conf.Positional[str | None] = None
    """A TOML file of wishes; options on the command line win over it."""
    data: list[str] = field(default_factory=list)
    """Files, folders, globs: text, Markdown, source code, JSONL (.gz, .zst), Parquet. Default: Python's own standard library."""
    text_key: str | None = None
    """JSONL and Parquet: the field that holds the text."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh. It covers everything: tokenising, training, evaluation, saving."""
    out: str | None = None
    """The run folder to make."""
    seed: int | None = None
    samples: int = 3
    """Completions to show at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        wishes = read_wishes(self.recipe) if self.recipe else {}
        for name, value in call.overrides.items():
            set_dotted(wishes, name, value)
        if self.text_key is not None:
            set_dotted(wishes, "data.text_key", self.text_key)
        if self.data:
            set_dotted(wishes, "data.paths", tuple(self.data))
        if self.seed is not None:
            set_dotted(wishes, "train.seed", self.seed)
        budget = wishes.pop("budget", None)
        if isinstance(budget, dict):
            if set(budget) != {"amount", "unit"}:
                raise UserError(f'{self.recipe}: a [budget] section needs amount and unit; or write budget = "20m"')
            budget = f"{budget['amount']!r}{budget['unit']}"
        budget = self.budget or budget
        call.need(budget=budget, out=self.out)
        if self.samples < 0:
            raise UserError(f"--samples {self.samples}: must be 0 or more")
        parse_budget(budget)  # a slip is told before torch is loaded
        data, seed = wishes.get("data", {}).get("paths", ()), wishes.get("train", {}).get("seed")
        return call.api.train(list(data), budget, self.out, wishes, seed, call.started, self.samples)


@dataclass
class Resume:
    """Go on with an interrupted run, or extend a finished one."""

    run: tyro.conf.Positional[str | None] = None
    budget: str | None = None
    """+20m: how much to add to a finished run."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run)
        if self.budget is not None:
            parse_extension(self.budget)
        return call.api.resume(self.run, self.budget, call.started)


@dataclass
class Generate:
    """Let a run's model continue a prompt."""

    run: tyro.conf.Positional[str | None] = None
    prompt: str | None = None
    """Text to continue; - reads it from standard input."""
    max_tokens: int = 200
    temperature: float = 0.8
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Sample from this many likeliest tokens; 0: from all."""
    seed: int | None = None
    """The same seed writes the same text."""
    quantize: str = "none"
    """Weights to write with: none, int8, int4, auto, as `serve` has them."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        call.need(RUN=self.run, prompt=self.prompt)
        if self.prompt == "-":
            self.prompt = sys.stdin.buffer.read().decode(errors="surrogateescape")
        if any("\ud800" <= char <= "\udfff" for char in self.prompt):
            raise UserError("the prompt is not UTF-8 text")
        call.choice("--quantize", self.quantize, ("auto", "none", "int8", "int4"))
        options = (self.max_tokens, self.temperature, self.top_p, self.top_k, self.seed)
        weights = "float32" if self.quantize == "none" else self.quantize
        if self.json:
            return call.api.generate(self.run, self.prompt, *options, started=call.started, weights=weights)
        # The prompt appears with the first piece: a mistake leaves standard output empty.
        shown = iter([self.prompt])
        stream = lambda piece: print(next(shown, "") + piece, end="", flush=True)  # noqa: E731
        call.api.generate(self.run, self.prompt, *options, stream, call.started, weights)
        print(next(shown, ""))
        return None


@dataclass
class Export:
    """Write a run's model for other programs."""

    run: tyro.conf.Positional[str | None] = None
    format: str = "hf"
    """hf: config.json and safetensors, as transformers loads them; gguf: one file for llama.cpp."""
    out: str | None = None
    """The folder (hf) or file (gguf) to make."""
    dtype: str = "float32"
    """hf: float32, bfloat16, or float8: 128x128 blocks of e4m3 with a scale each, as DeepSeek-V3 is published."""
    type: str = "f32"
    """gguf: f32, f16, bf16, q8_0 or q4_0."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.choice("--format", self.format, ("hf", "gguf"))
        call.choice("--dtype", self.dtype, ("float32", "bfloat16", "float8"))
        call.choice("--type", self.type, ("f32", "f16", "bf16", "q8_0", "q4_0"))
        call.need(RUN=self.run, out=self.out)
        return call.api.export(self.run, self.format, self.out, self.dtype, self.type)


@dataclass
class Import:
    """Make a run folder of a Hugging Face folder (deepseek_v3: config.json and safetensors)."""

    folder: tyro.conf.Positional[str | None] = None
    out: str | None = None
    """The run folder to make."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(FOLDER=self.folder, out=self.out)
        return call.api.import_(self.folder, self.out)


VERBS = {
    "plan": Plan, "train": Train, "resume": Resume, "eval": Eval, "generate": Generate, "receipt": Receipt, "report": Report,
    "compare": Compare, "export": Export, "import": Import, "serve": Serve, "bench": Bench,
}  # fmt: skip


def process_start() -> float:
    """`time.monotonic()` of the moment in which this process started, the interpreter's own start included.

    psutil's `create_time` is up to a second off: it adds to the time of the boot, which Linux gives in whole seconds.
    """
    try:
        with open("/proc/self/stat", "rb") as file:
            ticks = int(file.read().rsplit(b")", 1)[1].split()[19])  # field 22 of proc(5), counted behind the command's name
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        start = time.monotonic() - age
        return start if 0 <= _IMPORTED - start < 60 else _IMPORTED
    except (OSError, ValueError, AttributeError, IndexError):
        return _IMPORTED


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit status."""
    started = process_start() if argv is None else time.monotonic()
    status = _run(sys.argv[1:] if argv is None else argv, started)
    if status == INTERRUPTED and argv is None:
        sys.stderr.flush()
        os._exit(status)  # the interpreter would wait for threads whose products have not come back
    return status


def _run(argv: list[str], started: float) -> int:
    verb, arguments = None, None
    try:
        if argv and argv[0] in ("--help", "-h", "help"):
            print(HELP, end="")
            return 0
        if argv and argv[0] == "--version":
            print(f"sparing {__version__}")
            return 0
        if not argv or argv[0] not in VERBS:
            hint = f"unknown verb {argv[0]!r}; nearest: {nearest(argv[0], VERBS)}; all" if argv else "no verb given; choose"
            raise UserError(f"{hint}: {', '.join(VERBS)}")
        verb = argv[0]
        if {"--help", "-h"} & set(argv[1:]):
            print_help(verb, VERBS[verb])
            return 0
        arguments, overrides = parse(verb, VERBS[verb], argv[1:])
        # With --json, standard output belongs to the result: what anything prints on the way goes to standard error.
        quiet = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
        with Preempt(lambda: _way_on(verb, arguments, argv)) as signals, signals.interruptible(), quiet:
            result = arguments(Call(verb, started, overrides))
        if arguments.json:
            print(json.dumps(to_json(result), ensure_ascii=False))
        elif result is not None:
            show(result)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _complain(str(error), 2)
    except CannotGoOn as error:
        return _complain(str(error), 3)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # we are leaving: a second one must not change the exit status
        return _complain(f"interrupted; go on with: {_way_on(verb, arguments, argv)}", INTERRUPTED)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        return _complain(f"{error.filename or 'output'}: {error.strerror}", 2)


def _way_on(verb: str | None, arguments: Any, argv: list[str]) -> str:
    run = getattr(arguments, "out" if verb == "train" else "run", None)
    if verb in ("train", "resume") and run and os.path.exists(os.path.join(run, "config.toml")):
        return shlex.join(["sparing", "resume", run])
    return shlex.join(["sparing", *argv])


def _complain(message: str, status: int) -> int:
    print(f"sparing: {' '.join(message.split())}", file=sys.stderr)
    return status
