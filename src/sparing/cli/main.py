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
import os
import re
import shlex
import signal
import sys
from typing import Any

from sparing import __version__
from sparing.base.config import CannotGoOn, UserError
from sparing.base.files import is_text
from sparing.base.messages import say
from sparing.base.preempt import Preempt
from sparing.base.rank import RankLost, launched, leave, started_anew, this_rank
from sparing.cli.arguments import HELP_FLAGS, Call, choose, parse, print_help
from sparing.cli.launch_verb import SHARED
from sparing.cli.output import print_json, show
from sparing.cli.streams import discard, make_safe
from sparing.cli.verbs import VERBS

INTERRUPTED = 130
LEARNING = ("train", "sft", "distill", "dpo", "grpo", "grow", "adapt", "reason")
"""Verbs that make a run which `resume` goes on with."""
PATH_ERRORS = (
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
)  # fmt: skip
"""Errors of the system that say enough about a path in one line."""

HELP = f"""Sparing {__version__}: say what you can spend, get the best language model that it buys.

  sparing plan     [RECIPE] --data PATH... --budget 20m                  what it would cost and reach
  sparing train    [RECIPE] --data PATH... --budget 20m --out RUN        train a model inside a budget
  sparing sft      RUN --data CHATS... --budget 20m --out RUN2           teach a run, or an imported model, to answer
  sparing distill  RUN --teacher RUN --data PATH... --budget 20m --out RUN2   learn from a larger model, or from its own text
  sparing dpo      RUN --data PAIRS... --budget 20m --out RUN2           let it prefer the better of two answers
  sparing grpo     RUN --task FILE|NAME --budget 20m --out RUN2          let it learn from what its own answers are worth
  sparing reason   RUN --task FILE|NAME --budget 40m --out RUN2          all stages of R1's recipe on one task
  sparing adapt    RUN --data FILE --check TRUSTED --budget 20m --out RUN2 learn from answers that people accepted, if it does good
  sparing rollback RUN2 --out RUN                                        the run before that, byte for byte
  sparing resume   RUN [--budget +20m] [--data PATH...]                  go on after an interruption, or extend a finished run
  sparing eval     RUN --data PATH... --tasks FILE...                    bits per byte of text, scores of questions
  sparing generate RUN --prompt TEXT                                     let the model write
  sparing chat     RUN                                                   talk with it
  sparing serve    RUN [--port 8000]                                     OpenAI's interface and a chat page
  sparing receipt  RUN | --all                                           what it cost, beside what was predicted
  sparing report   RUN        sparing compare RUN RUN...                 the same and all curves as one HTML page
  sparing merge    RUN --out RUN2                                        an adapter and its base as one model
  sparing grow     RUN --domain D --data PATH... --budget 20m --out RUN2 experts for a new domain beside the old model, which stays
  sparing retire   RUN --domain D --out RUN2                             without that domain again
  sparing slice    RUN --domain D --out RUN2                             with that domain alone
  sparing pack     RUN --domain D --out PACK                             what was grown; sparing merge RUN PACK... joins it
  sparing export   RUN --format hf|gguf|peft --out PATH                  for Hugging Face transformers, for llama.cpp, for PEFT
  sparing import   FOLDER | FILE.gguf | OWNER/NAME --out RUN             the other way round
  sparing fetch    smollm2-135m --out RUN                                a small open model to begin with
  sparing launch -n 4 VERB ...                                           train, sft, ... as several processes, on one machine or many
  sparing launch --slurm FILE | --spot FILE --gpu H100:8 VERB ...        the same as a job of Slurm's, or of SkyPilot's on spot machines
  sparing launch --queue FILE                                            jobs of a TOML file, packed on this machine by what they will take
  sparing data stats  PATH... --out FOLDER                               what curate would do with a corpus
  sparing data curate PATH... --out FOLDER [--rules TOML]                judge documents by rules, take duplicates out
  sparing data dedup  PATH... --out FOLDER                               take duplicates out
  sparing data select PATH... --for SAMPLE --budget 2Mtok --out FOLDER   keep what is most like a sample
  sparing data synth  KIND... --count N --out FILE                       exercises that a program can judge, for grpo and sft
  sparing data synth  rewrite|questions|exercises PATH... --teacher URL|RUN --out FOLDER   texts that a teacher writes, checked
  sparing bench    train|precision|infer|data [FIGURE]                   this code against its peers, in one run

`sparing VERB --help` explains a verb. A budget is a number with a unit: 90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh.
"""


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
    if argv is None:
        make_safe()
    status = _run(sys.argv[1:] if argv is None else argv, started)
    if argv is None and launched():
        status, interrupted = leave(status), status == INTERRUPTED
    else:
        interrupted = status == INTERRUPTED
    if interrupted and argv is None:
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
        verb, words = choose(argv, VERBS)
        for word in argv:
            if not is_text(word):
                raise UserError(f"{verb}: {os.fsencode(word).decode(errors='backslashreplace')} is not UTF-8 text; rename what it names")
        if HELP_FLAGS & set(words):
            print_help(verb, VERBS)
            return 0
        arguments, overrides = parse(verb, VERBS[verb], words)
        # With --json, standard output belongs to the result: what anything prints on the way goes to standard error.
        quiet = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
        call = Call(verb, started, overrides, sys.stdout, VERBS)
        with contextlib.ExitStack() as around:
            if not getattr(arguments, "owns_signals", False):
                around.enter_context(around.enter_context(Preempt(lambda: _way_on(verb, arguments, argv))).interruptible())
            around.enter_context(quiet)
            result = _among(verb, arguments, call) if launched() else arguments(call)
        if arguments.json and result is not None:
            print_json(result)
        elif result is not None:
            show(result)
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _complain(str(error), 2)
    except CannotGoOn as error:
        return _complain(str(error), 3)
    except RankLost as error:
        return _complain(str(error), 1)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)  # we are leaving: a second one must not change the exit status
        return _complain(f"interrupted; go on with: {_way_on(verb, arguments, argv)}", INTERRUPTED)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        discard(sys.stdout)
        return 0
    except OSError as error:
        if error.errno not in PATH_ERRORS:
            raise
        if error.filename is None:
            discard(sys.stdout)
        return _complain(f"{error.filename or 'standard output'}: {error.strerror}", 2)


def _among(verb: str, arguments: Any, call: Call) -> Any:
    """What a rank does: the first one what was asked for, or goes on with it where it was begun; the others follow it."""
    if verb not in SHARED:
        raise UserError(f"{verb} is not divided among ranks; verbs that are: {', '.join(SHARED)}")
    run = arguments.run if verb == "resume" else arguments.out
    call.need(**{"RUN" if verb == "resume" else "out": run})
    if this_rank().number:
        return call.api.follow(run, call.started)
    if started_anew():
        say(f"a rank was lost: all are started anew ({started_anew()} of at most {os.environ['TORCHELASTIC_MAX_RESTARTS']} times)")
    if verb != "resume" and os.path.exists(os.path.join(run, "config.toml")):
        return call.api.resume(run, started=call.started, samples=arguments.samples)
    return arguments(call)


def _way_on(verb: str | None, arguments: Any, argv: list[str]) -> str:
    run = getattr(arguments, "out" if verb in LEARNING else "run", None)
    begun = verb in (*LEARNING, "resume") and run and os.path.exists(os.path.join(run, "config.toml"))
    if verb == "resume" and begun:
        extension_not_begun = os.path.exists(os.path.join(run, "state", "summary.json"))
        begun = not extension_not_begun and not (arguments.data and not arguments.budget)  # to name texts twice does no harm
    if begun:
        return shlex.join(["sparing", "resume", run])
    return shlex.join(["sparing", *argv])


def _complain(message: str, status: int) -> int:
    line = re.sub(r"\s*[\r\n]+\s*", " ", message.strip())
    if status != INTERRUPTED or this_rank().number == 0:
        print(f"sparing: {line}", file=sys.stderr)
    return status
