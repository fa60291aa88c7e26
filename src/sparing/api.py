"""Each verb as one function: joins planning, data, calibration, training, evaluation and sampling."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from sparing.account.hardware import Machine
from sparing.account.hardware import machine as this_machine
from sparing.budget.flops import kv_cache_bytes, parameters, train_flops
from sparing.budget.units import format_budget, parse_budget, parse_extension
from sparing.config import Budget, Config, UserError
from sparing.config_file import read_config, write_config
from sparing.data.loader import Loader
from sparing.data.prepare import prepare
from sparing.data.progress import Bars
from sparing.data.scan import scan
from sparing.data.sources import documents
from sparing.data.stop import Stopped
from sparing.data.store import TokenStore
from sparing.data.tokenizer import Tokenizer
from sparing.evals.bpb import bpb
from sparing.infer.generate import generate as sample_tokens
from sparing.interop.huggingface import export_hf, import_hf
from sparing.model.init import init_weights
from sparing.model.transformer import Transformer
from sparing.resolve import resolve
from sparing.run import DamagedError, RunFolder, link_or_copy, read_tensors, write_atomic, write_tensors
from sparing.train.calibrate import choose, peak_flops
from sparing.train.clock import Clock
from sparing.train.extend import rewind
from sparing.train.loop import TrainResult
from sparing.train.loop import train as train_loop
from sparing.train.preempt import Interrupted, Preempt

CALIBRATION_SHARE = 0.02
"""Of a time budget, for choosing micro-batch, threads and compiler."""
CALIBRATION_S = 10.0
"""The same where the budget is not a time."""
SAMPLE_TOKENS = 64
EVAL_TOKENS = 8192
"""Tokens of a forward pass in evaluations."""


def say(text: str) -> None:
    """To the user, beside standard output."""
    print(text, file=sys.stderr, flush=True)


# train and resume


def train(
    data: list[str], budget: str, out: str, wishes: dict | None = None, seed: int | None = None, started: float | None = None, samples: int = 3
) -> dict:
    """Train a model inside a budget into the new run folder `out`.

    data: files, folders, globs; none: Python's own standard library. budget: "20m", "50Mtok", "3e17flop". wishes: nested dict of `Config`
    fields that are not to be derived, {"model": {"num_layers": 8}}. started: `time.monotonic()` at which the budget began.
    -> run, bpb, loss, tokens, steps, seconds, parameters, samples, ...  Raises UserError; Interrupted on a signal (the run can be resumed).
    """
    started = time.monotonic() if started is None else started
    amount = parse_budget(budget)
    wishes = _merged(wishes, {"data": {"paths": tuple(data)}} if data else {}, {} if seed is None else {"train": {"seed": seed}})
    run = RunFolder.create(out)
    with run.lock(), _signals(run) as signals:
        machine = this_machine()
        config = _resolved(wishes, amount, machine, signals, run)
        return _go_on(run, config, machine, started, samples, signals)


def resume(run: str, budget: str | None = None, started: float | None = None, samples: int = 3) -> dict:
    """Go on with an interrupted run; with `budget` ("+20m"), extend a finished one from its checkpoint before the decay."""
    started = time.monotonic() if started is None else started
    folder = RunFolder.open(run)
    with folder.lock(), _signals(folder) as signals:
        config = read_config(folder.config_file)
        summary = folder.state / "summary.json"
        if budget is None and summary.exists():
            raise UserError(f"{run} is finished; to train it further: sparing resume {run} --budget +{format_budget(config.budget)}")
        if budget is not None:
            config = _extended(folder, config, budget, summary)
        return _go_on(folder, config, this_machine(), started, samples, signals)


def _extended(run: RunFolder, config: Config, budget: str, summary: Path) -> Config:
    more = parse_extension(budget)
    if not summary.exists():
        raise UserError(f"{run} is not finished: `sparing resume {run}` first, then extend it")
    if more.unit != config.budget.unit:
        raise UserError(f"{run} has a budget in {config.budget.unit}: extend it in the same unit, not in {more.unit}")
    total = Budget(config.budget.amount + more.amount, more.unit)
    config = replace(config, budget=total, data=replace(config.data, max_tokens=config.data.max_tokens))
    clock = Clock(run, time.monotonic())
    clock.record()
    step = rewind(run)
    write_atomic(run.config_file, write_config(config, _reasons(run)))
    summary.unlink()
    say(f"extending to {format_budget(total)}, from step {step:,}, before the decay")
    return config


@contextmanager
def _signals(run: RunFolder) -> Iterator[Preempt]:
    with Preempt(f"sparing resume {run}") as signals:
        try:
            yield signals
        except Stopped:
            raise Interrupted(signals.message) from None


def _resolved(wishes: dict, budget: Budget, machine: Machine, signals: Preempt, run: RunFolder) -> Config:
    """The configuration of a new run, written into its folder and shown with its reasons."""
    data_config = read_wishes_data(wishes)
    with Bars() as bars:
        facts = scan(data_config, progress=bars, should_stop=lambda: signals.requested)
    if facts.quarantined:
        say(f"{facts.quarantined} documents cannot be used ({', '.join(facts.reasons)}): see quarantine.jsonl in the run folder")
    device = wishes.get("train", {}).get("device") or ("cuda" if machine.gpus else "cpu")
    with signals.interruptible():
        peak = peak_flops(machine, device if device == "cpu" or machine.gpus else "cpu")
    if data_config.tokenizer:
        size = -(-Tokenizer.load(data_config.tokenizer).vocab_size // 64) * 64
        if wishes.get("model", {}).get("vocab_size", size) < size - 63:
            raise UserError(f"model.vocab_size {wishes['model']['vocab_size']}: the tokenizer {data_config.tokenizer} needs at least {size}")
        wishes = _merged({"model": {"vocab_size": size}}, wishes)
    resolved = resolve(wishes, budget, machine, facts, peak)
    say(f"{facts.documents:,} documents, {facts.bytes / 1e6:.1f} MB; budget {format_budget(budget)}; peak {peak / 1e9:,.0f} GFLOP/s")
    for name, reason in resolved.reasons.items():
        section, field = name.split(".")
        say(f"  {name} = {getattr(getattr(resolved.config, section), field)}  # {reason}")
    write_atomic(run.state / "reasons.json", json.dumps(resolved.reasons))
    write_atomic(run.config_file, write_config(resolved.config, resolved.reasons))
    return resolved.config


def read_wishes_data(wishes: dict):
    """The `DataConfig` that wishes ask for."""
    from sparing.config import DataConfig

    return DataConfig(**wishes.get("data", {}))


def _reasons(run: RunFolder) -> dict[str, str]:
    try:
        return json.loads((run.state / "reasons.json").read_text())
    except (OSError, ValueError):
        return {}


def _go_on(run: RunFolder, config: Config, machine: Machine, started: float, samples: int, signals: Preempt) -> dict:
    """Everything from the written configuration on; each part is skipped or repeated as the run folder's state asks."""
    clock = Clock(run, started)
    with Bars() as bars:
        store = prepare(config.data, config.model.vocab_size, progress=bars, should_stop=lambda: signals.requested)
    for name in ("tokenizer.json", "quarantine.jsonl"):
        if not (run.path / name).exists():
            shutil.copyfile(store.path / name, run.path / f".{name}.tmp")
            (run.path / f".{name}.tmp").replace(run.path / name)
    clock.record()
    signals.check()
    t = config.train
    device = torch.device(t.device or ("cuda" if machine.gpus else "cpu"))
    with signals.interruptible():
        model = Transformer(config.model)
        init_weights(model, t.seed)
        model.to(device)
        loader = Loader(store, t.seq_len, t.batch_size, config.model.mtp_depth, t.seed)
        peak = peak_flops(machine, device.type, torch.bfloat16 if t.dtype == "bfloat16" else torch.float32)
        config = _calibrated(run, config, model, loader, machine, signals)
    flops = train_flops(config.model, t.seq_len)
    held_out = list(store.held_out())
    context = config.train.seq_len

    def evaluate(model: Transformer) -> dict:
        return bpb(
            _nll(model), store.tokenizer, held_out, context, batch=max(1, EVAL_TOKENS // context), max_bytes=config.train.eval_bytes,
            should_stop=lambda: signals.requested,
        )  # fmt: skip

    reserve = 0.5 + samples * SAMPLE_TOKENS * 0.004
    result = train_loop(
        run, config, model, loader, evaluate=evaluate, started=started, flops_per_token=flops, peak_flops=peak, reserve_s=reserve, preempt=signals
    )
    with signals.interruptible():
        return _finished(run, config, model, store, result, started, samples)


def _calibrated(run: RunFolder, config: Config, model: Transformer, loader: Loader, machine: Machine, signals: Preempt) -> Config:
    """Choose what is left open by measuring, and write it down before it takes effect."""
    t = config.train
    if t.micro_batch_size is not None and t.compile is not None and (t.threads is not None or t.device == "cuda"):
        return config
    seconds = CALIBRATION_SHARE * config.budget.amount if config.budget.unit == "s" else CALIBRATION_S
    train_config, reasons = choose(model, config, machine, loader.batch(0), seconds, check=signals.check, say=say)
    config = replace(config, train=train_config)
    reasons = _reasons(run) | reasons
    write_atomic(run.state / "reasons.json", json.dumps(reasons))
    write_atomic(run.config_file, write_config(config, reasons))
    return config


def _finished(run: RunFolder, config: Config, model: Transformer, store: TokenStore, result: TrainResult, started: float, samples: int) -> dict:
    """Completions, the model card, the summary."""
    counts = parameters(config.model)
    model.eval()
    loaded = Model(run, config, model, store.tokenizer)
    texts = []
    for document in list(store.held_out())[:samples]:
        prompt = _prompt(document)
        texts.append({"prompt": prompt, "text": loaded.generate(prompt, SAMPLE_TOKENS, temperature=0.7, seed=config.train.seed)})
    summary = {
        "run": str(run.path),
        "bpb": result.evaluation.get("bpb"),
        "loss": result.loss,
        "eval_loss": result.evaluation.get("loss"),
        "steps": result.steps,
        "tokens": result.tokens,
        "tokens_per_s": result.tokens_per_s,
        "mfu": result.mfu,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "skipped": result.skipped,
        "seconds": 0.0,
        "budget": format_budget(config.budget),
        "samples": texts,
    }
    write_atomic(run.model_card_file, _model_card(config, summary))
    summary["seconds"] = Clock(run, started).seconds()
    write_atomic(run.state / "summary.json", json.dumps(summary, indent=1))
    return summary


def _prompt(document: str) -> str:
    """The beginning of a document: up to its third line or 120 characters, not ending inside a word."""
    start = "\n".join(document.splitlines()[:3])[:120]
    return start if len(start) < 120 or " " not in start else start.rsplit(" ", 1)[0]


def _model_card(config: Config, summary: dict) -> str:
    m, bits = config.model, summary["bpb"]
    kind = "dense" if m.num_dense_layers >= m.num_layers else f"mixture of {m.n_routed_experts} experts, {m.num_experts_per_tok} a token"
    score = "not evaluated" if bits is None else f"{bits:.4f} bits per byte"
    return f"""# Model card

A {kind} language model of {summary["parameters"]:,} parameters ({summary["active_parameters"]:,} active), trained with Sparing.

- Data: {", ".join(config.data.paths) or "the Python standard library's source"}; {summary["tokens"]:,} tokens in {summary["steps"]:,} steps
- Held-out text: {score} (context {config.train.seq_len} tokens)
- Vocabulary {m.vocab_size:,}, {m.num_layers} layers of width {m.hidden_size}, {kv_cache_bytes(m):,} bytes of cache per token (16 bit)
- Budget {summary["budget"]}; the whole recipe is in config.toml

It continues text. It was not taught to follow instructions, and what it says may be false.
"""


def _merged(*parts: dict | None) -> dict:
    """Nested dicts, the later winning."""
    result: dict = {}
    for part in parts:
        for key, value in (part or {}).items():
            result[key] = _merged(result.get(key, {}), value) if isinstance(value, dict) else value
    return result


# a trained model


class Model:
    """A run's model: `generate`, `logits`, `tokenizer`."""

    def __init__(self, run: RunFolder, config: Config, network: Transformer, tokenizer: Tokenizer | None):
        self.run, self.config, self.network, self._tokenizer = run, config, network, tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises UserError where the run has none (an import without one)."""
        if self._tokenizer is None:
            raise UserError(f"{self.run} has no tokenizer.json: it computes logits, but cannot read or write text")
        return self._tokenizer

    @torch.no_grad()
    def logits(self, tokens) -> Tensor:
        """(B, T) integers -> (B, T, vocab) float32."""
        ids = torch.as_tensor(tokens)
        if ids.dim() != 2 or ids.dtype.is_floating_point:
            raise UserError(f"logits takes (B, T) integers, not {tuple(ids.shape)} {ids.dtype}")
        return self.network(ids.long())

    def generate(
        self,
        prompt: str,
        max_tokens: int = 200,
        temperature: float = 0.8,
        top_p: float = 1.0,
        top_k: int = 0,
        seed: int | None = None,
        stream: Callable[[str], None] | None = None,
    ) -> str:
        """The text that the model writes after `prompt`; `stream` gets it piece by piece, whole characters only."""
        tokenizer = self.tokenizer
        ids = [tokenizer.eot_id, *tokenizer.encode(prompt)]
        made: list[int] = []
        shown = ""
        context = self.config.model.max_position_embeddings
        with torch.no_grad():
            for token in sample_tokens(self.network, ids, max_tokens, temperature, top_p, top_k, seed, tokenizer.eot_id, context):
                made.append(token)
                if stream:
                    text = tokenizer.decode(made, skip_special_tokens=True)
                    if not text.endswith("\ufffd"):
                        stream(text[len(shown) :])
                        shown = text
        text = tokenizer.decode(made, skip_special_tokens=True)
        if stream and len(text) > len(shown):
            stream(text[len(shown) :])
        return text


def load(run: str | Path) -> Model:
    """Open a run folder's newest weights, float32, on the CPU. Raises UserError when there are none."""
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    network = Transformer(config.model)
    state = network.state_dict()
    try:
        for name, tensor in read_tensors(folder.weights_file):
            if name not in state or state[name].shape != tensor.shape:
                raise UserError(f"{folder.weights_file}: {name} does not belong to the model of config.toml")
            state.pop(name).copy_(tensor)
    except DamagedError as error:
        raise UserError(f"{run} has no usable weights: {error}") from None
    if state:
        raise UserError(f"{folder.weights_file}: {next(iter(state))} is missing")
    network.eval()
    tokenizer = Tokenizer.load(folder.tokenizer_file) if folder.tokenizer_file.exists() else None
    return Model(folder, config, network, tokenizer)


def _nll(model: Transformer):
    device = model.model.norm.weight.device
    return lambda tokens, targets: model.nll(tokens.to(device), targets.to(device))


def evaluate(run: str, data: list[str], context: int | None = None) -> dict:
    """{"bpb", "loss", "bytes", "tokens", "documents", "context"} of a run on documents."""
    model = load(run)
    tokenizer = model.tokenizer
    context = context or model.config.train.seq_len
    if not any(True for _ in documents(data, model.config.data.text_key)):
        raise UserError(f"{', '.join(data)}: no usable text")
    texts = (document.text for document in documents(data, model.config.data.text_key))
    return bpb(_nll(model.network), tokenizer, texts, context, batch=max(1, EVAL_TOKENS // context))


def generate(
    run: str,
    prompt: str,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int | None = None,
    stream: Callable[[str], None] | None = None,
) -> dict:
    """{"prompt", "text", "tokens", "seconds"}."""
    model = load(run)
    start = time.monotonic()
    text = model.generate(prompt, max_tokens, temperature, top_p, top_k, seed, stream)
    return {"prompt": prompt, "text": text, "tokens": len(model.tokenizer.encode(text)), "seconds": time.monotonic() - start}


# to and from other programs


def export(run: str, format: str = "hf", out: str = "", dtype: str = "float32") -> dict:
    """Write a folder that transformers loads."""
    if format != "hf":
        raise UserError(f"--format {format}: choose hf")
    folder = RunFolder.open(run)
    config = read_config(folder.config_file)
    tokenizer = folder.tokenizer_file if folder.tokenizer_file.exists() else None
    if not folder.weights_file.exists():
        raise UserError(f"{run} has no weights yet")
    notes = export_hf(config.model, read_tensors(folder.weights_file), tokenizer, out, dtype)
    for note in notes:
        say(note)
    return {"out": out, "format": format, "dtype": dtype, "notes": notes}


def import_(folder: str, out: str) -> dict:
    """Make a run folder of a Hugging Face folder; tensors are read one by one."""
    model_config, tensors, notes = import_hf(folder)
    run = RunFolder.create(out)
    with run.lock():
        network = Transformer(model_config)
        state = network.state_dict()
        for name, tensor in tensors:
            state[name].copy_(tensor)
        write_tensors(run.weights_file, state)
        tokenizer = Path(folder) / "tokenizer.json"
        if tokenizer.exists():
            link_or_copy(tokenizer, run.tokenizer_file)
        else:
            notes = [*notes, "no tokenizer.json: logits work, verbs that read or write text do not"]
        base = Config()
        config = replace(base, model=model_config, train=replace(base.train, seq_len=min(4096, model_config.max_position_embeddings)))
        write_atomic(run.config_file, write_config(config))
    for note in notes:
        say(note)
    counts = parameters(model_config)
    return {"out": out, "parameters": counts.total, "active_parameters": counts.active, "notes": notes}
