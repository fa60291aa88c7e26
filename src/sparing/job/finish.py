"""Ends a training job: writes completions, the model card and the summary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress

import torch

from sparing.account.history import ancestors_of, bill
from sparing.base.config import Config
from sparing.base.config_limits import chosen_experts
from sparing.base.files import to_json, write_atomic
from sparing.base.layers import mixtures
from sparing.base.messages import say
from sparing.base.origin import Origin, credits, origin_of
from sparing.base.run import RunFolder
from sparing.budget.flops import kv_cache_bytes, parameters
from sparing.budget.units import format_budget
from sparing.data.accounts import balanced, in_words
from sparing.infer.generate import Model
from sparing.job.begin import Job
from sparing.job.corpus import Prompt, TrainingData
from sparing.job.texts import corpora
from sparing.model.transformer import Transformer
from sparing.train.log import TrainResult

SAMPLE_TOKENS = 64
WARNING = "It continues text. It was not taught to follow instructions, and what it says may be false."
ANSWERS = "It was taught to answer, by conversations in the form of its chat_template.jinja. What it says may be false."


class _BudgetSpent(Exception):
    """Ends a completion."""


def finish(job: Job, config: Config, model: Transformer, data: TrainingData, result: TrainResult, samples: int) -> dict:
    """Write completions of `samples` held-out beginnings, MODEL_CARD.md and state/summary.json; -> the summary. Completions end with the
    budget."""
    run, counts = job.run, parameters(config.model)
    model.eval()
    # As `load` gives it. In bfloat16 on a CPU every length of the text so far would cost half a megabyte of oneDNN's code (LAB.md).
    model.compute_dtype = torch.float32
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
        "samples": _completions(job, config, Model(run, config, model, data.tokenizer), data.prompts(samples)),
    }
    if config.start is not None or config.distill is not None:
        summary |= _beside_its_start(run, config, model, data, result)
    texts = corpora(run)
    if texts and "counts" in texts[-1]:
        summary["documents"] = texts[-1]["counts"]
    if config.data.sample and "sample_bpb" in result.evaluation:
        before = data.score(result.before)["sample"] if config.start else None
        summary["sample"] = {"before": before, "after": data.score(result.evaluation)["sample"]}
    summary |= data.more(job, config)
    read = [_of_corpus(entry) for entry in texts] or [_named(config.data.paths)]
    write_atomic(run.model_card_file, _model_card(config, summary, origin_of(run), read))
    summary |= {"seconds": job.clock.seconds()} | bill(job.meter.earlier() + job.meter.rows())
    write_atomic(run.state / "summary.json", json.dumps(to_json(summary), indent=1))
    cost = f"${summary['cost_usd']:.3g}, {1000 * summary['energy_kwh']:.3g} Wh ({summary['energy_how']}), {summary['co2e_g']:.3g} gCO2e"
    if "documents" in summary:
        say(f"\n{in_words(balanced(summary['documents']))}")
    say(f"\nspent: {summary['seconds']:,.0f} s, {cost}; sparing receipt {run} has the details")
    kept = "weights/" if config.adapter is None else f"adapter/ beside the weights of {config.start.run}"
    say(f"{run}: the recipe with its reasons is config.toml, the model {kept}, every step metrics.jsonl, a summary MODEL_CARD.md")
    use = f'sparing generate {run} --prompt "..."' if config.chats is None else f"sparing chat {run}"
    say(f"next: {use}   sparing eval {run} --data PATH   sparing export {run} --format hf --out FOLDER")
    return summary


def _beside_its_start(run: RunFolder, config: Config, model: Transformer, data: TrainingData, result: TrainResult) -> dict:
    """What the summary of a run that starts from another one, or has a teacher, has more: scores before and after, how much it learnt with,
    its origin."""
    return {
        "before": data.score(result.before) if config.start else None,
        "after": data.score(result.evaluation),
        "trained_tokens": data.trained_tokens(result),
        "trainable_parameters": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "base": config.start.weights_sha256 if config.start else None,
        "ancestors": [{"name": row.name, "relation": row.relation, "generation": row.generation} for row in ancestors_of(run)],
        **({"experts": chosen_experts(config)} if config.esft else {}),
    }


def _completions(job: Job, config: Config, model: Model, prompts: list[Prompt]) -> list[dict[str, str]]:
    lasts, texts = job.lasts(config.budget), []

    def spent() -> bool:
        return lasts is not None and job.clock.seconds() > lasts

    for prompt in prompts:
        if spent():
            break
        pieces = []

        def show(piece: str, pieces: list[str] = pieces) -> None:
            pieces.append(piece)
            if spent():
                raise _BudgetSpent

        with suppress(_BudgetSpent):
            model.generate(prompt.ids, SAMPLE_TOKENS, temperature=0.7, seed=config.train.seed, stream=show)
        texts.append({"prompt": prompt.text, "text": "".join(pieces)})
    if spent():
        job.cut_short(f"the budget was used up while completions were written: {len(texts)} of {len(prompts)}, the last one cut")
    return texts


def _named(paths: Sequence[str]) -> str:
    return ", ".join(paths) or "the Python standard library's source"


def _of_corpus(entry: dict) -> str:
    """What `job.texts.bind` notes of a corpus, in words."""
    return _named(entry["paths"]) + (f" (of it, what is most like {', '.join(entry['for'])})" if entry.get("for") else "")


def _solved(score: dict | None) -> str:
    new = (score or {}).get("new") or {}
    known = new.get("pass_at_1") is not None
    return f"pass@1 {new['pass_at_1']:.3f}, pass@{new['k']} {new['pass_at_k']:.3f}" if known else "not scored"


def _model_card(config: Config, summary: dict, origin: Origin | None, texts: list[str]) -> str:
    """MODEL_CARD.md as model hubs read it. summary: what `train` returns. origin: of the model that it began with. texts: each corpus that
    it was trained on in turn, in words."""
    m, bits = config.model, summary["bpb"]
    kind = f"mixture of {m.n_routed_experts} experts, {m.num_experts_per_tok} a token" if mixtures(m) else "dense"
    ancestry = "\n" + "\n".join(credits(origin)) if origin else ""
    chosen = f"\n- Experts that learnt, of each layer: {'; '.join(config.esft.experts)}" if config.esft else ""
    if config.esft and not (config.esft.shared or config.esft.rest):
        chosen += "; nothing else was changed"
    if config.distill:
        where = "at texts of its own" if config.distill.on_policy else f"by {config.distill.samples} draws a token"
        chosen += f"\n- Learnt from the distribution of {config.distill.teacher}, {where}"
    if config.drafts:
        chosen += "\n- A module that drafts was learnt; nothing else was changed"
    context = f"context {config.train.eval_context or config.train.seq_len} tokens"
    score = "not evaluated" if bits is None else f"{bits:.4f} bits per byte ({context})"
    held_out = f"{'text' if config.chats is None else 'answers'}{' of what was chosen' if 'sample' in summary else ''}: {score}"
    if "sample" in summary:
        held_out += f"; {summary['sample']['after']['bpb']:.4f} on {', '.join(config.data.sample)}"
    if config.grpo:
        before, after = (_solved(summary[when]) for when in ("before", "after"))
        held_out = f"problems of {config.grpo.task}: {after}; before: {before}"
    return f"""# Model card

A {kind} language model of {summary["parameters"]:,} parameters ({summary["active_parameters"]:,} active), trained with Sparing.

- Data: {", then ".join(texts)}; {summary["tokens"]:,} tokens in {summary["steps"]:,} steps{chosen}
- Held-out {held_out}
- Vocabulary {m.vocab_size:,}, {m.num_layers} layers of width {m.hidden_size}, {kv_cache_bytes(m):,} bytes of cache per token (16 bit)
- Budget {summary["budget"]}; the whole recipe is in config.toml{ancestry}

{WARNING if config.chats is None else ANSWERS}
"""
