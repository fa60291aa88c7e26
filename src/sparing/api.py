"""The library: one function for each verb that makes or reads a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sparing.account.meter import Meter, metered
from sparing.account.paper import compare as compare
from sparing.account.paper import receipt as receipt
from sparing.account.paper import report as report
from sparing.adapt import sft as adapt_sft
from sparing.base.config import Budget, Config, UserError
from sparing.base.config_file import Wishes, nested, read_config, write_config
from sparing.base.files import link_or_copy, write_atomic
from sparing.base.hardware import cores
from sparing.base.messages import say
from sparing.base.run import RunFolder, fill, read_tensors, write_tensors
from sparing.budget.flops import forward_flops, parameters
from sparing.budget.units import format_budget, parse_budget, parse_extension
from sparing.data.answers import Cutting
from sparing.data.chat import ChatTemplate, template_text
from sparing.data.chats import chats, looks_like_chats
from sparing.data.sources import Tally, documents
from sparing.evals.answers import bytes_of_tokens, score_answers
from sparing.evals.bpb import NllFn, bpb
from sparing.evals.sixteen_bits import CheaperNll
from sparing.infer.engine import Engine
from sparing.infer.generate import complete, generate_texts, load, score_tokens
from sparing.infer.request import Sampling
from sparing.interop.gguf import export_gguf
from sparing.interop.hf_tokenizer import read_tokens
from sparing.interop.huggingface import export_hf, import_hf
from sparing.job.begin import begin, reasons_of, resolved
from sparing.job.corpus import EVAL_TOKENS, text
from sparing.job.learn import learn
from sparing.job.texts import bind, corpora, texts_to_go_on_with
from sparing.kernels.formats import fast
from sparing.kernels.products import fitting
from sparing.model.transformer import Transformer
from sparing.planning.plan import plan as plan
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
) -> dict:
    """Train a model inside a budget into the new run folder `out`.

    data: files, folders, globs; none: those of `wishes`, else those of `start`, else Python's own standard library.
    budget: "20m", "50Mtok", "3e17flop".
    wishes: nested dict of `Config` fields that are not to be derived, {"model": {"num_layers": 8}}. started: `time.monotonic()` at which
    the budget began. start: a run (or an imported model) to go on from instead of noise; its model and tokenizer stay.
    -> run, bpb, loss, tokens, steps, seconds, parameters, samples, ...  Raises UserError; Interrupted on a signal (the run can be resumed).
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    arguments = {"data.paths": tuple(data) or None, "train.seed": seed, "start.run": start}
    wishes = Wishes.of(wishes, nested({name: value for name, value in arguments.items() if value is not None}))
    run = RunFolder.create(out)
    with begin("train", run, started) as job:
        return learn(job, resolved(job, wishes, amount), samples)


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
    method: "lora" (low-rank updates beside frozen weights) or "full". val: conversations to score on; none: 5 % of the others, by a hash of
    the first question. keep: text whose loss is watched; none: what the run writes by itself. wishes, started: as for `train`.
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
    if method == "full" and wishes.get("adapter") is not None:
        raise UserError("adapter: low-rank updates are what --method lora learns; leave it out with full")
    if method == "lora":
        wishes = Wishes.of({"adapter": {}}, wishes)
    folder = RunFolder.create(out)
    with begin("sft", folder, started) as job:
        return learn(job, adapt_sft.resolved(job, wishes, amount), samples, data=adapt_sft.data)


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
    with begin("resume", folder, started, ready=partial(_make_ready, folder, budget, data, text_key)) as job:
        config = read_config(folder.config_file)
        return learn(job, config, samples, data=text if config.chats is None else adapt_sft.data)


def _make_ready(run: RunFolder, budget: str | None, paths: Sequence[str], text_key: str | None) -> None:
    """Refuse what cannot go on; write down other texts, and a larger budget. The caller holds the lock."""
    config = read_config(run.config_file)
    summary = run.state / "summary.json"
    if budget is None and summary.exists():
        raise UserError(f"{run} is finished; to train it further: sparing resume {run} --budget +{format_budget(config.budget)}")
    if run.weights_file.exists() and not any(run.state.glob("step-*")):
        raise UserError(f"{run} was imported: there is no training in it to go on with")
    more = None if budget is None else parse_extension(budget)
    if more is not None and not summary.exists():
        raise UserError(f"{run} is not finished: `sparing resume {run}` first, then extend it")
    if more is not None and more.unit != config.budget.unit:
        raise UserError(f"{run} has a budget in {config.budget.unit}: extend it in the same unit, not in {more.unit}")
    if text_key is not None and not paths:
        raise UserError("--text-key goes with --data: the run's own texts keep theirs")
    total = config.budget if more is None else Budget(config.budget.amount + more.amount, more.unit)
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
    """{"bpb", "loss", "bytes", "tokens", "documents", "context", "rejected", "reasons", "dtype"} of a run on documents: "dtype" is what
    the text was computed in, bfloat16 where that is faster here and changes the score by less than 0.1 %. Of conversations, which are
    recognised by their first row: {"bpb" (of the answers), "answer_loss", "answer_tokens", "examples", ...}. With `tasks`,
    {"weights", "rows"}: the scores of each (`evals.harness.run_tasks`), by the engine with these weights. Raises UserError."""
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
    context = context or model.config.train.seq_len
    cutting = Cutting(ChatTemplate(template_text(model.run)), model.tokenizer, context)
    pieces = cutting.pieces(chats(data, rejected))
    if not len(pieces):
        raise UserError(
            f"{', '.join(data)}: no answer to score: {rejected if rejected.total else cutting.refusal or 'none in the context'}"
        )
    lengths = bytes_of_tokens(model.tokenizer)
    nll, dtype = _scorers(model.network, lengths[pieces.tokens].sum() >= COMPARED_FROM)
    found = score_answers(nll, pieces, lengths, batch_tokens=max(cores() * context, EVAL_TOKENS))
    counts = cutting.counts
    if rejected.reasons or counts["refused"]:
        refused = f"; {counts['refused']} × {cutting.refusal}" if counts["refused"] else ""
        say(f"{counts['chats']} conversations were scored, {rejected.total + counts['refused']} could not be used: {rejected}{refused}")
    meter.add(len(pieces.tokens), len(pieces.tokens) * forward_flops(model.config.model, context, mtp=False))
    return {
        "bpb": found["bpb"], "answer_loss": found["loss"], "answer_tokens": found["tokens"], "examples": counts["chats"],
        "bytes": found["bytes"], "context": context, "truncated": counts["truncated"], "rejected": rejected.total + counts["refused"],
        "reasons": dict(rejected.reasons), "dtype": dtype(),
    }  # fmt: skip


def _bpb(run: str, data: Sequence[str], context: int | None, text_key: str, meter: Meter) -> dict:
    model = load(run)
    context = context or model.config.train.seq_len
    rejected, size = Tally(), 0
    for document in documents(data, text_key, rejected):
        size += len(document.text)
        if size >= COMPARED_FROM:
            break
    if not size:
        raise UserError(f"{', '.join(data)}: no usable text: {rejected if rejected.total else 'no files'} (--text-key is {text_key!r})")
    rejected = Tally()
    texts = (document.text for document in documents(data, text_key, rejected))
    nll, dtype = _scorers(model.network, size >= COMPARED_FROM)
    result = bpb(nll, model.tokenizer, texts, context, batch=max(cores(), EVAL_TOKENS // context))
    if rejected.reasons:
        say(f"{result['documents']} documents were scored, {rejected.total} could not be used: {rejected}")
    meter.add(result["tokens"], result["tokens"] * forward_flops(model.config.model, context, mtp=False))
    return result | {"rejected": rejected.total, "reasons": dict(rejected.reasons), "dtype": dtype()}


def _scorers(network: Transformer, compare: bool) -> tuple[NllFn, Callable[[], str]]:
    """-> (scores text on all cores; afterwards: the number format that it chose)."""
    count = cores()

    def nll(model: Transformer, dtype: str) -> NllFn:
        model.compute_dtype = getattr(torch, dtype)
        replicas = Replicas(model, None, count, kernels=fitting(count, count, "cpu", dtype)[0])
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


# to and from other programs


def export(run: str, format: str = "hf", out: str = "", dtype: str = "float32", type: str = "f32") -> dict:
    """Write a folder that transformers loads (hf, with matrices of `dtype`), or a file for llama.cpp (gguf, of `type`)."""
    if format not in ("hf", "gguf"):
        raise UserError(f"--format {format}: choose hf or gguf")
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    tokenizer = folder.tokenizer_file if folder.tokenizer_file.exists() else None
    if not folder.weights_file.exists():
        raise UserError(f"{run} has no weights yet")
    chat = template_text(folder)
    if format == "gguf":
        notes = export_gguf(config.model, folder.weights_file, tokenizer, out, type, chat, folder.path.resolve().name, config.tokens)
    else:
        notes = export_hf(config.model, read_tensors(folder.weights_file), tokenizer, out, dtype, chat, tokens=config.tokens)
    for note in notes:
        say(note)
    return {"out": out, "format": format, "dtype": dtype if format == "hf" else type, "notes": notes}


def import_(folder: str, out: str) -> dict:
    """Make a run folder of a Hugging Face folder; tensors are read one by one."""
    model_config, tensors, notes = import_hf(folder)
    tokens, more = read_tokens(Path(folder), model_config)
    notes = [*notes, *more]
    chat = template_text(RunFolder(folder))
    ChatTemplate(chat)  # a broken one is told before anything is written
    run = RunFolder.create(out)
    with run.lock():
        network = Transformer(model_config)
        state = network.state_dict()
        fill(state, tensors, folder)
        write_tensors(run.weights_file, state)
        tokenizer = Path(folder) / "tokenizer.json"
        if tokenizer.exists():
            link_or_copy(tokenizer, run.tokenizer_file)
        if chat is not None:
            write_atomic(run.path / "chat_template.jinja", chat)
        base = Config()
        rows = replace(base.train, seq_len=min(4096, model_config.max_position_embeddings))
        config = replace(base, model=model_config, train=rows, tokens=tokens)
        write_atomic(run.config_file, write_config(config))
    for note in notes:
        say(note)
    counts = parameters(model_config)
    return {"out": out, "parameters": counts.total, "active_parameters": counts.active, "notes": notes}
