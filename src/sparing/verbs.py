"""The verbs that measure, count and serve: plan, eval, serve, receipt, report, compare, bench. Belongs to cli.py, which has the others."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from sparing.budget.units import parse_budget
from sparing.config import UserError
from sparing.config_file import set_dotted
from sparing.output import show_plan

if TYPE_CHECKING:
    import tyro  # `arguments.parse` imports it for the chosen verb; until then the annotations below stay text

    from sparing.arguments import Call


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
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        from sparing.account.meter import Meter
        from sparing.planning.places import this_machine
        from sparing.planning.plan import plan  # not through api: torch would take longer to load than planning

        wishes: dict = {}
        for name, value in call.overrides.items():
            set_dotted(wishes, name, value)
        if self.budget is not None:
            parse_budget(self.budget)
        with Meter("plan", this_machine(), first="plan", started=call.started):  # measuring a new machine takes its time too
            result = plan(
                self.recipe, self.data, self.budget, self.target_bpb, self.fits, self.machine, self.compare, wishes, self.rent, self.country
            )
        if self.json:
            return result
        show_plan(result)
        return None


@dataclass
class Eval:
    """What a run knows: bits per byte of documents (--data; each is scored once, in windows of --context tokens), and tasks (--tasks)."""

    run: tyro.conf.Positional[str | None] = None
    data: list[str] = field(default_factory=list)
    """Files, folders, globs."""
    context: int | None = None
    """Window in tokens; default: the length that the run was trained with."""
    tasks: list[str] = field(default_factory=list)
    """Through lm-eval: JSON or JSONL files of questions, choices and answer; its own YAML files; names that it knows (it downloads)."""
    limit: int | None = None
    """Items of each task; default: all."""
    quantize: str = "none"
    """Weights that the tasks are done with: none, int8, int4, auto, as `serve` has them."""
    json: bool = False

    def __call__(self, call: Call) -> dict:
        call.need(RUN=self.run, **({} if self.tasks else {"data": self.data}))
        call.choice("--quantize", self.quantize, ("auto", "none", "int8", "int4"))
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}: must be 1 or more")
        if not self.tasks and (self.limit or self.quantize != "none"):
            raise UserError("--limit and --quantize are for --tasks: bits per byte are those of all the text, in float32")
        weights = "float32" if self.quantize == "none" else self.quantize
        return call.api.evaluate(self.run, self.data, self.context, call.started, self.tasks, self.limit, weights)


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
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        call.need(RUN=self.run)
        call.choice("--quantize", self.quantize, ("auto", "none", "int8", "int4"))
        call.choice("--device", self.device, ("auto", "cpu", "cuda"))
        call.choice("--speculate", self.speculate, ("auto", "on", "off"))
        from sparing.serve.settings import LOCAL

        if not 0 <= self.port <= 65535:
            raise UserError(f"--port {self.port}: must be from 0 to 65535")
        limits = {"answer-s": self.answer_s, "drain-s": self.drain_s, "queue": self.queue, "threads": self.threads, "batch": self.batch}
        for name, value in (limits | {"cache-mb": self.cache_mb, "expert-mb": self.expert_mb}).items():
            if value is not None and not 0 < value < float("inf"):
                raise UserError(f"--{name} {value}: must be more than 0")
        if self.host not in LOCAL and not (self.api_key_file or self.without_key):
            raise UserError(f"--host {self.host} lets others on the network in: give --api-key-file FILE, or say --without-key")
        from sparing.serve.server import start

        start(self, call.started)
        return None


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
    """Measure this code against its peers in one run. Further options belong to the figure: --rounds 3, --limit 10m (of the whole figure);
    a wrong one lists them."""

    takes: ClassVar[str] = "anything"
    name: tyro.conf.Positional[str | None] = None
    """train, precision or infer"""
    figure: tyro.conf.Positional[str | None] = None
    """Which figure; default: throughput, speed, generate."""
    json: bool = False

    def __call__(self, call: Call) -> dict | None:
        call.need(NAME=self.name)
        call.choice("bench", self.name, ("train", "precision", "infer"))
        from importlib import import_module

        from sparing.account.meter import metered

        figure = self.figure or {"train": "throughput", "precision": "speed", "infer": "generate"}[self.name]
        with metered("bench", first=f"{self.name} {figure}"):
            result = import_module(f"sparing.bench.{self.name}").run(figure, json=self.json, **call.overrides)
        return result if self.json else None  # the figure has drawn its table
