"""Checks configurations: ranges of single fields, sizes of a model that contradict each other, settings that exclude each other."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from sparing.base.config import Config, ModelConfig, UserError
from sparing.base.layers import mixtures

_ONE, _SHARE, _BELOW_ONE = (1, math.inf), (0, 1), (0, math.nextafter(1, 0))
_MLA = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_EXPERTS = ("num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
_LAYERS = 100_000
"""More layers are a slip, or a file that means harm: each is an object in memory."""
RANGES: dict[str, dict[str, tuple[float, float]]] = {
    "ModelConfig": {
        **dict.fromkeys(("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "q_lora_rank"), _ONE),
        **dict.fromkeys(("intermediate_size", "max_position_embeddings", *_MLA, *_EXPERTS), _ONE),
        **dict.fromkeys(("num_dense_layers", "n_routed_experts", "n_shared_experts", "rms_norm_eps"), (0, math.inf)),
        "num_layers": (1, _LAYERS),
        "mtp_depth": (0, _LAYERS),
        **dict.fromkeys(("rope_theta", "routed_scaling_factor"), (1e-9, math.inf)),
        "partial_rotary_factor": (1e-9, 1),
        "linear_rope_factor": _ONE,
    },
    "YarnConfig": dict.fromkeys(("factor", "original_max_position_embeddings"), _ONE)
    | dict.fromkeys(("beta_fast", "beta_slow"), (1e-9, math.inf)),
    "Llama3RopeConfig": dict.fromkeys(("factor", "original_max_position_embeddings"), _ONE)
    | dict.fromkeys(("low_freq_factor", "high_freq_factor"), (1e-9, math.inf)),
    "OptimConfig": {
        **dict.fromkeys(("lr", "lr_embed", "lr_head", "lr_router", "lr_norm", "eps", "weight_decay", "clip"), (0, math.inf)),
        **dict.fromkeys(("momentum", "beta1", "beta2"), _BELOW_ONE),
        **dict.fromkeys(("warmup", "decay", "final_lr"), _SHARE),
        "ns_steps": _ONE,
    },
    "TrainConfig": {
        **dict.fromkeys(("seq_len", "short_seq_len", "batch_size", "micro_batch_size", "threads", "replicas"), _ONE),
        **dict.fromkeys(("eval_bytes", "eval_context"), _ONE),
        **dict.fromkeys(("mtp_weight", "bias_update_rate", "sequence_balance", "evals", "checkpoint_interval_s"), (0, math.inf)),
        "short_until": _SHARE,
        "seed": (-(2**63), 2**64 - 1),
    },
    "DataConfig": {"holdout_fraction": (1e-9, 0.5), "max_tokens": _ONE, "workers": _ONE},
    "AdapterConfig": {"rank": _ONE, "alpha": (1e-9, math.inf)},
    "EsftConfig": {"share": (1e-9, 1), "tokens": _ONE},
    "GrowthConfig": {"eps": (0, 0.1), "tokens": _ONE, "width": _ONE},
    "DistillConfig": {"samples": (1, 255), "truth": _SHARE, "tokens": _ONE, "teacher_share": _SHARE, "prompt": _ONE},
    "DraftsConfig": {"samples": (1, 255), "words": _ONE},
    "DpoConfig": {"beta": (1e-9, math.inf), "label_smoothing": (0, 0.5)},
    "GrpoConfig": {
        **dict.fromkeys(("problems", "max_tokens", "updates", "scored"), _ONE),
        "samples": (2, 1024),
        **dict.fromkeys(("epsilon_low", "epsilon_high"), (0, math.inf)),
        "truncate": (1, math.inf),
    },
    "ParallelConfig": dict.fromkeys(("experts", "stages"), _ONE),
    "UseConfig": {"old_limit": (1e-9, math.inf)},
    "ReasonConfig": {"samples": (1, 1024), "kept": _ONE},
    "TokensConfig": {"bos": (0, math.inf)},
    "PrecisionConfig": {"error_budget": (1e-9, math.inf), "measure_every": (0, math.inf)},
}
"""By class and field: (least, most)."""


def in_range(kind: type, key: str, value: Any, where: str) -> Any:
    """`value`, a number or anything else. Raises UserError outside of the field's range."""
    least, most = RANGES.get(kind.__name__, {}).get(key, (-math.inf, math.inf))
    if isinstance(value, int | float) and not least <= value <= most:
        highest = "less than 1" if (least, most) == _BELOW_ONE else f"at most {_plain(most)}"
        said = highest if value > most else "more than 0" if 0 < least < 1 else f"at least {_plain(least)}"
        raise UserError(f"{where} must be {said}, not {value}")
    return value


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def contradiction(c: ModelConfig, called: Callable[[str], str] = lambda name: name) -> str | None:
    """What no model can have, in words; None: nothing. called: a field's name where the sizes come from."""
    needed = ["vocab_size", "hidden_size", "num_layers", "intermediate_size", "num_heads", "max_position_embeddings"]
    needed += _MLA if c.attention == "mla" else ["num_kv_heads", "head_dim"]
    experts = bool(mixtures(c))
    needed += ["n_routed_experts", *_EXPERTS] if experts else []
    for name in needed:
        if getattr(c, name) < 1:
            dense = f"; {called('num_dense_layers')} {c.num_layers} is a model without" if name == "n_routed_experts" else ""
            return f"{called(name)} is {getattr(c, name)}, expected at least 1{dense}"
    rotated = "qk_rope_head_dim" if c.attention == "mla" else "head_dim"
    if getattr(c, rotated) % 2:
        return f"{called(rotated)} is {getattr(c, rotated)}, expected an even number (rotary pairs)"
    turned = int(c.head_dim * c.partial_rotary_factor)
    if c.attention == "gqa" and turned % 2:
        return f"{called('partial_rotary_factor')} rotates {turned} of a head's {c.head_dim} numbers, expected an even one (rotary pairs)"
    if c.attention == "mla" and (c.attention_bias or c.head_norm or c.partial_rotary_factor != 1.0):
        name = "attention_bias" if c.attention_bias else "head_norm" if c.head_norm else "partial_rotary_factor"
        return f"{called(name)} {getattr(c, name)} needs {called('attention')} gqa: latent attention (mla) has none"
    scalings = [name for name, on in (("yarn", c.yarn), ("llama3", c.llama3), ("linear_rope_factor", c.linear_rope_factor != 1.0)) if on]
    if len(scalings) > 1:
        return f"{' and '.join(map(called, scalings))} both stretch the rotary embedding: choose one"
    if c.llama3 and c.llama3.low_freq_factor >= c.llama3.high_freq_factor:
        low, high = c.llama3.low_freq_factor, c.llama3.high_freq_factor
        return f"low_freq_factor ({low}) must be less than high_freq_factor ({high})"
    if c.attention == "gqa" and c.num_heads % c.num_kv_heads:
        return f"{called('num_heads')} ({c.num_heads}) is not a multiple of {called('num_kv_heads')} ({c.num_kv_heads})"
    if not experts:
        return None
    if c.n_routed_experts % c.n_group or c.topk_group > c.n_group:
        return f"{c.n_routed_experts} experts in {c.n_group} groups of which {c.topk_group} are used: not possible"
    open_to_a_token = c.n_routed_experts // c.n_group * c.topk_group
    if c.num_experts_per_tok > open_to_a_token:
        return f"{called('num_experts_per_tok')} ({c.num_experts_per_tok}) is more than the {open_to_a_token} experts of the groups in use"
    return None


def chosen_experts(c: Config) -> dict[int, tuple[int, ...]]:
    """Layer -> its experts that learn, as `esft.experts` says; empty: they are not chosen yet. Raises UserError for what it cannot say."""
    found: dict[int, tuple[int, ...]] = {}
    having = {layer.index for layer in mixtures(c.model) if not layer.mtp}
    for text in c.esft.experts if c.esft else ():
        if not re.fullmatch(r"\d+:( \d+)+", text):
            raise UserError(f'esft.experts: {text!r} is no layer with its experts, such as "{min(having, default=1)}: 0 2"')
        layer, *experts = (int(number) for number in re.findall(r"\d+", text))
        if layer not in having or layer in found:
            there = "is there twice" if layer in found else f"has no experts; those with are {min(having)} to {max(having)}"
            raise UserError(f"esft.experts: layer {layer} {there}")
        if len(set(experts)) < len(experts) or max(experts) >= c.model.n_routed_experts:
            raise UserError(f"esft.experts: {text!r} must name different experts of 0 to {c.model.n_routed_experts - 1}")
        found[layer] = tuple(sorted(experts))
    return found


def _check_esft(c: Config) -> None:
    if c.adapter is not None:
        raise UserError("esft and adapter are different methods: leave one of the sections out")
    if not any(not layer.mtp for layer in mixtures(c.model)):
        raise UserError("--method esft trains experts of a mixture, and this model has none; nearest: --method lora, or full")
    if c.precision.weights != "float32":
        raise UserError(f"precision.weights = {c.precision.weights}: esft keeps float32, in which what is frozen stays as it is")
    chosen_experts(c)


DOMAIN = re.compile(r"[^\W_][\w.+-]{0,63}")
"""A domain's name."""


def _check_growth(c: Config) -> None:
    g = c.growth
    for name in g.domains:
        if not DOMAIN.fullmatch(name):
            raise UserError(f"growth.domains: {name!r} is no name: letters, digits and . + - _, at most 64")
    if not g.domains or list(g.domains) != sorted(set(g.domains)):
        raise UserError("growth.domains must be different names in ascending order")
    if g.domain and g.domain not in g.domains:
        raise UserError(f"growth.domain {g.domain} is none of growth.domains: {', '.join(g.domains)}")
    if not mixtures(c.model) or c.model.n_routed_experts <= len(g.domains):
        raise UserError(f"growth.domains: {len(g.domains)} domains, and only {c.model.n_routed_experts} routed experts in all")


def checked(c: Config) -> Config:
    """`c` itself. Raises UserError for sizes that contradict each other and for settings that exclude each other."""
    if wrong := contradiction(c.model, lambda name: f"model.{name}"):
        raise UserError(wrong)
    if c.train.seq_len > c.model.max_position_embeddings:
        raise UserError(f"train.seq_len {c.train.seq_len} is more than model.max_position_embeddings {c.model.max_position_embeddings}")
    if c.train.short_seq_len and c.train.seq_len % c.train.short_seq_len:
        raise UserError(f"train.seq_len {c.train.seq_len} is not a multiple of train.short_seq_len {c.train.short_seq_len}")
    p, t = c.parallel, c.train
    divided = "shard = weights" if p.shard == "weights" else "experts" if p.experts > 1 else "stages" if p.stages > 1 else None
    somewhere = divided == "stages" and c.adapter is not None  # each of the layers has factors that learn
    if divided and not somewhere and any(part is not None for part in (c.adapter, c.esft, c.growth, c.drafts)):
        raise UserError(f"parallel.{divided} divides weights that learn, and here most stay: choose shard = optimizer alone")
    if divided and c.distill is not None and c.distill.on_policy:
        raise UserError(f"parallel.{divided}: a student that writes its own texts needs all weights; choose shard = optimizer alone")
    if p.experts > 1 and p.shard == "nothing":
        raise UserError("parallel.experts: who has a part of the experts alone updates it: choose shard = optimizer, or weights")
    if p.stages > 1 and p.shard not in (None, "optimizer"):
        raise UserError(f"parallel.stages {p.stages} goes with shard = optimizer, not {p.shard}: who alone has a layer updates it")
    if p.stages > 1 and c.precision.linear != "none":
        raise UserError(f"precision.linear = {c.precision.linear}: a pipeline's ranks don't compare errors; nearest: none, or stages = 1")
    if p.stages > 1 and t.compile:
        raise UserError("train.compile = true compiles the model as a whole: leave it out, or parallel.stages = 1")
    if p.stages > 1 and (t.replicas or 1) > 1:
        raise UserError(f"parallel.stages {p.stages} divides no rows among threads: leave out train.replicas = {t.replicas}")
    if c.adapter is not None and c.precision.weights != "float32":
        raise UserError(f"precision.weights = {c.precision.weights} is for weights that learn: choose adapter.base for frozen ones")
    if c.esft is not None:
        _check_esft(c)
    if c.growth is not None:
        _check_growth(c)
    if c.parallel.shard == "weights" and c.precision.weights != "float32":  # FSDP2 puts layers of one type together; norms are float32
        raise UserError(f"precision.weights = {c.precision.weights}: weights that are cut into pieces are float32; or shard = optimizer")
    if c.train.compile and c.precision.linear not in ("none", "auto"):
        raise UserError(f"train.compile = true compiles no 8-bit products: leave it out, or precision.linear = {c.precision.linear}")
    if c.train.compile and c.precision.activations != "full":
        raise UserError(f"train.compile = true packs no activations: leave it out, or precision.activations = {c.precision.activations}")
    if c.train.compile and (c.train.replicas or 1) > 1:
        raise UserError(f"train.compile = true divides no rows among threads: leave it out, or train.replicas = {c.train.replicas}")
    return c
