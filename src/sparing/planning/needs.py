"""What a command line takes on so many cores, before it runs: seconds, memory, GPUs. A queue of jobs is packed by it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from sparing.account.prices import home_rent
from sparing.base.config import AdapterConfig, Budget, Config, UserError
from sparing.base.config_file import Wishes, nested, read_config, read_recipe
from sparing.base.hardware import Machine, share
from sparing.base.run import RunFolder
from sparing.budget.flops import parameters, train_flops
from sparing.budget.memory import PROCESS_BYTES, SPREAD, serving_memory, training_memory, weight_bytes
from sparing.budget.predict import (
    CALIBRATION,
    END_S,
    SAMPLE_BYTES_PER_S,
    START_S,
    TOKENISER_S,
    TooShort,
    check,
    in_seconds,
    tokens_and_time,
)
from sparing.budget.units import parse_budget, parse_extension
from sparing.data.files import find_files
from sparing.data.hub import HUB
from sparing.data.progress import Bars
from sparing.data.scan import scan
from sparing.planning.places import Given, Place, here, resolve_run, with_vocabulary
from sparing.planning.start import with_start

SOME_BYTES = 1e8
"""Of texts that are not here yet."""
SOME_S, SOME_MEMORY = 60.0, 1e9
"""For what nothing predicts."""
HOST_BYTES = 3e9
"""Memory of the host that a process with a GPU takes."""
MICRO_TOKENS = 4096
"""Of a forward pass, for a run that begins with another one and is not resolved yet."""
BYTES_PER_TOKEN = 4.0
SCORING = 3.0
"""Scoring a token takes a third of training on it."""
CURATED_BYTES_PER_S, WORKER_BYTES = 1e6, 3e8
"""Of text that a process of `data` goes through; the memory of one."""
TEXTS = ("data", "val", "keep", "for_", "cold", "check", "apart", "against")
"""Options that name files of text, which have to be there."""
LEARNING = ("train", "sft", "distill", "dpo", "grpo", "grow", "adapt", "reason", "resume")
WHOLE_MACHINE = ("bench",)
ONE_CORE = ("receipt", "report", "compare", "plan", "merge", "export", "import", "fetch", "retire", "slice", "pack", "rollback")


@dataclass(frozen=True)
class Command:
    """A command line, parsed."""

    words: tuple[str, ...]
    verb: str
    """Of `launch` the verb behind it."""
    values: Mapping[str, Any]
    """The verb's own options, by the names of their fields."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a recipe, by dotted name."""
    ranks: int = 0
    """Processes that `launch` starts; 0: it is not launched."""


class Need(NamedTuple):
    """What a command takes on some number of cores."""

    seconds: float
    memory: float
    """Bytes."""


@dataclass(frozen=True)
class Needs:
    """What a command takes."""

    by_cores: Mapping[int, Need]
    gpus: int
    source: str
    """Where the numbers are from, in words."""
    config: Config | None = None
    """Of the run that it makes, as far as it is known."""


def needs(command: Command, machine: Machine, made: Mapping[str, Needs]) -> Needs:
    """What `command` takes on each number of cores of `machine` that it could be given: powers of two, and all.

    made: the needs of commands that run before, by the absolute path of what they make, which need not be there yet. Raises UserError for
    what cannot work: a model too large for the machine, a run or texts that are not there."""
    for name in TEXTS:
        _bytes(command.values.get(name) or (), made)
    on_gpu = command.verb in (*LEARNING, "eval", "generate") and machine.gpus and command.overrides.get("train.device") != "cpu"
    gpus = max(1, command.ranks) if on_gpu else 0
    found, rest = {}, None
    for cores in _counts(command, machine, gpus):
        place = _place(machine, cores, gpus, max(1, command.ranks))
        need, *rest = _one(command, place, made)
        if all(need.seconds <= fewer.seconds for fewer in found.values()):  # a small model may be slower on more cores
            found[cores] = need._replace(memory=gpus * HOST_BYTES) if gpus else need
    return Needs(found, gpus, *rest)


def _counts(command: Command, machine: Machine, gpus: int) -> list[int]:
    """Numbers of cores that a command could be given."""
    whole, ranks = machine.cores_physical, max(1, command.ranks)
    if command.verb in ONE_CORE:
        return [1]
    if command.verb in WHOLE_MACHINE:
        return [whole]
    if gpus:
        return [max(ranks, whole * gpus // len(machine.gpus))]
    most = min(whole, command.values.get("workers") or whole)  # of the verb `data`
    counts = {ranks * 2**power for power in range(most.bit_length()) if ranks * 2**power <= most}
    return sorted(counts | {most - most % ranks or ranks})


def _place(machine: Machine, cores: int, gpus: int, ranks: int) -> Place:
    """What the process sees, or each of its ranks. A machine that was not measured has default rates."""
    part = share(machine, max(1, cores // ranks), gpus and 1)
    part = replace(part, memory_bytes=part.memory_bytes // ranks) if ranks > 1 else part
    return replace(here(home_rent(), machine=part), ranks=ranks)


def _one(command: Command, place: Place, made: Mapping[str, Needs]) -> tuple[Need, str, Config | None]:
    """(what it takes, where that is from, the configuration of the run that it makes)."""
    if command.verb == "train":
        return _training(command, place, made)
    if command.verb in LEARNING:
        return _learning(command, place, made)
    if command.verb in ("eval", "generate"):
        return _reading(command, place, made)
    if command.verb.startswith("data "):
        return _curating(command, place, made)
    return Need(SOME_S, SOME_MEMORY), f"nothing predicts `{command.verb}`: taken to be {SOME_S:.0f} s and {SOME_MEMORY / 1e9:.0f} GB", None


def _training(command: Command, place: Place, made: Mapping[str, Needs]) -> tuple[Need, str, Config | None]:
    """As `sparing plan` predicts it."""
    values = command.values
    recipe = read_recipe(values["recipe"])
    budget = parse_budget(values["budget"] or recipe.budget)
    own = {"data.text_key": values["text_key"], "data.paths": tuple(values["data"]) or None, "data.sample": tuple(values["for_"]) or None}
    wishes = Wishes.of(recipe.wishes, nested({**command.overrides, **{name: value for name, value in own.items() if value is not None}}))
    parent = values["from_"] or wishes.value("start.run")
    if parent and (run := _made(parent, made)) is not None:
        wishes = Wishes.of(wishes, {"model": asdict(run.config.model)} if run.config else {})
        wishes.pop("start", None)
    elif parent:
        wishes = with_start(Wishes.of(wishes, {"start": {"run": parent}}))
    paths = wishes.value("data.paths", ())
    absent = any(_made(path, made) is not None or str(path).startswith(HUB) for path in paths)
    if absent:
        corpus = Given(SOME_BYTES)
    else:
        with Bars() as bars:
            corpus = scan(wishes.config().data, progress=bars)
    run, _ = resolve_run(with_vocabulary(wishes), budget, corpus, place)
    if run.memory_limit and run.memory().total > run.memory_limit:
        with suppress(TooShort):
            check(run)  # which says what would fit
    seconds = run.budget_s or tokens_and_time(run)[1].value
    memory = run.memory().total
    if place.machine.gpus or memory <= place.memory_limit:  # what fits is not refused for its spread
        memory = min((1 + SPREAD) * memory, place.memory_limit)
    rest = "; its texts are not here yet" if absent else ""
    return Need(seconds, place.ranks * memory), f"{'its budget' if run.budget_s else 'predicted'}; memory predicted{rest}", run.config


def _learning(command: Command, place: Place, made: Mapping[str, Needs]) -> tuple[Need, str, Config | None]:
    """Of a run that begins with another one."""
    values, verb = command.values, command.verb
    config = _config(values["run"], made, verb == "distill")
    said = values["budget"]
    budget = config.budget if verb == "resume" and not said and config else None
    budget = budget or (parse_extension(said) if verb == "resume" and said else parse_budget(said) if said else None)
    lasts = in_seconds(budget, place.rates) if budget else None
    if config is None:
        source = "its budget" if lasts else f"taken to be {SOME_S:.0f} s"
        source += f"; taken to need {2 * SOME_MEMORY / 1e9:.0f} GB: its model is not here yet"
        return Need(lasts or SOME_S, 2 * SOME_MEMORY), source, None
    if verb != "resume":
        config = _begun(config, values.get("method"), place)
    memory = training_memory(config, True).total
    if verb in ("grpo", "reason") or values.get("on_policy"):
        memory += serving_memory(config.model, config.train.seq_len)
    if (teacher := values.get("teacher")) and "://" not in teacher and (other := _config(teacher, made)):
        memory += weight_bytes(other.model)
    seconds = lasts or _trains(config, budget, place)
    source = f"{'its budget' if lasts else 'rule of thumb'}; memory by a rule of thumb"
    # A rule of thumb is no reason to refuse: what it finds too large runs alone.
    return Need(seconds, min(place.ranks * (1 + SPREAD) * memory, place.ranks * place.memory_limit)), source, config


def _begun(config: Config, method: str | None, place: Place) -> Config:
    """The configuration of a run that begins with one of `config`, before it is resolved."""
    rows = max(1, min(config.train.batch_size, MICRO_TOKENS // config.train.seq_len))
    device = "cuda" if place.machine.gpus else "cpu"
    rest = {"micro_batch_size": rows, "replicas": min(rows, place.machine.cores_physical), "device": device}
    adapter = (config.adapter or AdapterConfig()) if method == "lora" else None
    return replace(config, train=replace(config.train, **rest), adapter=adapter, esft=None)


def _trains(config: Config, budget: Budget | None, place: Place) -> float:
    """Seconds that a budget of tokens or operations takes; without one, those of nothing known."""
    if budget is None:
        return SOME_S
    per_token = train_flops(config.model, config.train.seq_len, adapter=config.adapter)
    tokens = budget.amount / (1.0 if budget.unit == "tok" else per_token)
    return START_S + TOKENISER_S + CALIBRATION[1] + END_S + tokens / place.tokens_per_second(config)


def _reading(command: Command, place: Place, made: Mapping[str, Needs]) -> tuple[Need, str, Config | None]:
    """Scores a model, or lets it write."""
    values, config = command.values, _config(command.values["run"], made)
    if config is None:
        return Need(SOME_S, 2 * SOME_MEMORY), f"taken to be {SOME_S:.0f} s and 2 GB: its model is not here yet", None
    memory = PROCESS_BYTES["cpu"] + weight_bytes(config.model) + serving_memory(config.model, config.train.seq_len)
    if command.verb == "generate":
        seconds = START_S + values["max_tokens"] * 4 * parameters(config.model).active / SAMPLE_BYTES_PER_S
    elif values["tasks"]:
        return Need(SOME_S, memory), f"nothing predicts tasks: taken to be {SOME_S:.0f} s", None
    else:
        size = _bytes(values["data"], made)
        config = replace(config, adapter=None, esft=None)
        seconds = START_S + size / BYTES_PER_TOKEN / (SCORING * place.tokens_per_second(config))
    return Need(seconds, memory), "rule of thumb", None


def _curating(command: Command, place: Place, made: Mapping[str, Needs]) -> tuple[Need, str, Config | None]:
    cores = place.machine.cores_physical
    memory = SOME_MEMORY / 2 + cores * WORKER_BYTES
    if command.verb == "data synth":
        lasts = in_seconds(budget, place.rates) if (said := command.values["budget"]) and (budget := parse_budget(said)) else None
        return Need(lasts or SOME_S, memory), "its budget" if lasts else f"nothing predicts `data synth`: taken to be {SOME_S:.0f} s", None
    seconds = START_S + _bytes(command.values["paths"], made) / (cores * CURATED_BYTES_PER_S)
    return Need(seconds, memory), "rule of thumb", None


def _bytes(paths: Sequence[str], made: Mapping[str, Needs]) -> float:
    """Of the files behind `paths`. Raises UserError where there are none."""
    here_now = [path for path in paths if _made(path, made) is None and not path.startswith(HUB)]
    return sum(file.bytes for file in find_files(here_now)) if here_now else SOME_BYTES


def _config(run: str, made: Mapping[str, Needs], recipe: bool = False) -> Config | None:
    """The configuration of a run, or (recipe) a recipe's with defaults; None: it is not made yet, and nothing is known of it. Raises
    UserError where no run is there, and none will be."""
    if (maker := _made(run, made)) is not None:
        return maker.config
    if recipe and not os.path.isdir(run):
        with suppress(UserError):
            return read_recipe(run).wishes.config()
    return read_config(RunFolder.open(run).config_file)


def _made(path: str, made: Mapping[str, Needs]) -> Needs | None:
    """The needs of the command that makes `path`, or a folder above it; None: no command of the queue does."""
    whole = os.path.abspath(path)
    return next((maker for folder, maker in made.items() if whole == folder or whole.startswith(folder + os.sep)), None)
