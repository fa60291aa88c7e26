"""A Hugging Face config.json in and out: `from_hf` makes a `ModelConfig` of one, `to_hf` writes one.

The keys are those of DeepSeek's published config.json, which transformers 4 and 5 both read. `families` says which model types there are.
"""

from __future__ import annotations

import difflib
import json
import math
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as fields_of
from pathlib import Path

from sparing.base.config import Llama3RopeConfig, ModelConfig, TokensConfig, UserError, YarnConfig
from sparing.base.config_limits import contradiction, in_range
from sparing.base.files import read_text
from sparing.base.layers import layers
from sparing.interop.families import FAMILIES, OPTIONAL, OTHER_SPELLINGS, Family, family_of
from sparing.model.rope import yarn_mscale

LATENT_NORM_EPS = 1e-6
"""transformers gives the norms of MLA's latents this epsilon whatever `rms_norm_eps` says."""


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises UserError if it is missing, not JSON or not an object."""
    if not path.exists():
        raise UserError(f"{path.parent}: there is no {path.name}, so this is not a Hugging Face model folder")
    text = read_text(path)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error})") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """Checked access to a JSON object; each complaint is one line that names file and key."""

    def __init__(self, raw: dict, where: Path):
        self.raw, self.where = raw, where

    def fail(self, message: str) -> UserError:
        return UserError(f"{self.where}: {message}")

    def unsupported(self, message: str) -> UserError:
        """Something that our model does not compute."""
        return self.fail(f"{message} (model types that are read: {', '.join(FAMILIES)})")

    def get(self, key: str, kind: type, *default):
        """A value of the type; `default` where it is absent or null (without one, absence is an error)."""
        value = self.raw.get(key)
        if value is None:
            value = self.raw.get(OTHER_SPELLINGS.get(key, key))
        if value is None:
            if default:
                return default[0]
            near = difflib.get_close_matches(key, self.raw, n=1)
            raise self.fail(f"{key} is missing" + (f" (nearest present: {near[0]})" if near else ""))
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind or (kind is int and value < 0) or (kind is float and not math.isfinite(value)):
            raise self.fail(f"{key} is {value!r}, expected {'a whole number >= 0' if kind is int else kind.__name__}")
        return value

    def only(self, key: str, allowed: object) -> None:
        """Refuse any other value; absent or null is fine."""
        value = self.raw.get(key)
        if value is not None and value != allowed:
            raise self.unsupported(f"{key} is {value!r}, supported: {allowed!r}")


@dataclass(frozen=True)
class TensorFormat:
    """How a checkpoint's tensors are to be read, besides the model's shape."""

    halves: bool = False
    """Rotary dimensions are paired (i, i + d/2) and not (2i, 2i + 1)."""
    block: tuple[int, int] = (128, 128)
    """Rows and columns that share one FP8 factor."""


def to_hf(config: ModelConfig, dtype: str, tokens: TokensConfig) -> tuple[dict, list[str]]:
    """-> (config.json, notes for the user).

    dtype: float32, bfloat16 or float8. tokens: what begins and ends a text. Raises UserError where no model type of transformers computes
    this model.
    """
    kind = family_of(config)
    family, notes = FAMILIES[kind], []
    raw: dict = {
        "architectures": [family.architecture],
        "model_type": kind,
        **{theirs: getattr(config, ours) for ours, (theirs, *_) in family.keys.items()},
        **family.fixed,
        **_rope_to_hf(config),
        "attention_dropout": 0.0,
        "initializer_range": 0.006 if config.init == "deepseek" else 0.02,
        "use_cache": True,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos[0] if tokens.eos else None,
        "torch_dtype": "bfloat16" if dtype == "float8" else dtype,
    }
    if config.attention == "mla":
        raw["num_key_value_heads"] = config.num_heads
        if abs(config.rms_norm_eps - LATENT_NORM_EPS) > 1e-12:
            notes.append(f"transformers uses an epsilon of {LATENT_NORM_EPS} in the latents' norms; this model's is {config.rms_norm_eps}")
    dense = sum(not layer.mixture for layer in layers(config))
    if "num_dense_layers" in family.keys:
        # An all-dense model's MTP modules are dense too, and they are layers num_layers, num_layers + 1, ...
        raw |= {"first_k_dense_replace": dense if "mtp_depth" in family.keys else min(dense, config.num_layers), "ep_size": 1}
    elif family.experts:
        raw["mlp_only_layers"] = list(range(min(dense, config.num_layers)))
    if kind == "deepseek_v2":
        raw["topk_method"] = "greedy" if config.n_group == 1 else "group_limited_greedy"
    if family.window == "switch":
        raw["use_sliding_window"] = False
    if config.mtp_depth and "mtp_depth" not in family.keys:
        notes.append(f"{kind} has no multi-token prediction: the {config.mtp_depth} MTP module(s) are left out, the logits do not change")
    if dtype == "float8":
        raw["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
        }
    return raw, notes


def from_hf(raw: dict, where: Path) -> tuple[ModelConfig, TensorFormat]:
    """config.json -> (our config, how to read its tensors). Raises UserError for what our model cannot compute; `where` is for messages."""
    fields = Fields(raw, where)
    named = raw.get("model_type")
    family = FAMILIES.get(named) if isinstance(named, str) else None
    if family is None:
        raise fields.fail(f"model_type is {raw.get('model_type')!r}, supported: {', '.join(FAMILIES)}")
    for key, value in family.fixed.items():
        fields.only(key, value)
    values = family.ours | {ours: fields.get(*key) for ours, key in family.keys.items()}
    heads = values["num_heads"]
    derived = {"num_kv_heads": heads, "head_dim": values["hidden_size"] // max(heads, 1)}
    if family.attention == "mla":
        fields.only("num_key_value_heads", heads)
        values["num_kv_heads"] = heads
    values |= {ours: value for ours, value in derived.items() if ours in values and values[ours] is None}
    _check_window(fields, family, values["max_position_embeddings"])
    values["num_dense_layers"] = min(_dense_layers(fields, family, values), values["num_layers"])
    if raw["model_type"] == "deepseek_v2":
        method = fields.get("topk_method", str, "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            raise fields.unsupported(f"topk_method is {method!r}, supported: 'greedy', 'group_limited_greedy'")
        values |= {"n_group": 1, "topk_group": 1} if method == "greedy" else {}
    config = _rope_from_hf(fields, family, ModelConfig(**values, attention=family.attention))
    theirs = {ours: key[0] for ours, key in family.keys.items()}
    for part in (config, config.yarn, config.llama3):
        for field in fields_of(part) if part else ():
            in_range(type(part), field.name, getattr(part, field.name), f"{where}: {theirs.get(field.name, field.name)}")
    if wrong := contradiction(config, lambda name: theirs.get(name, name)):
        raise fields.fail(wrong)
    halves = not fields.get("rope_interleave", bool, True) if raw["model_type"] == "deepseek_v3" else family.halves
    return config, TensorFormat(halves, _fp8_block(fields))


def _dense_layers(fields: Fields, family: Family, values: dict) -> int:
    """Leading layers without experts."""
    if not family.experts:
        return values["num_layers"]
    if "num_dense_layers" in values:
        return values["num_dense_layers"]
    dense = fields.get("mlp_only_layers", list, [])
    if dense != list(range(len(dense))):
        raise fields.unsupported(f"mlp_only_layers is {dense!r}, supported: leading layers such as [0, 1]")
    return len(dense)


def _check_window(fields: Fields, family: Family, context: int) -> None:
    """Refuse attention to the last `sliding_window` tokens only, unless a whole context fits into the window."""
    raw = fields.raw
    if family.window == "no" or (family.window == "switch" and not fields.get("use_sliding_window", bool, False)):
        window = None
    else:
        window = raw.get("sliding_window", 4096)  # transformers' own default; null is none
    if window is not None and (type(window) is not int or window < context):
        switch = "" if family.window == "yes" else " with use_sliding_window true"
        raise fields.unsupported(f"sliding_window is {window!r}{switch}, supported: none, or max_position_embeddings ({context}) and more")
    kinds = fields.get("layer_types", list, [])
    if other := [kind for kind in kinds if kind != "full_attention" and not (window and kind == "sliding_attention")]:
        raise fields.unsupported(f"layer_types has {other[0]!r}, supported: 'full_attention'")


def _fp8_block(fields: Fields) -> tuple[int, int]:
    quantisation = fields.raw.get("quantization_config")
    if quantisation is None:
        return TensorFormat.block
    if not isinstance(quantisation, dict) or quantisation.get("quant_method") != "fp8":
        method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
        raise fields.fail(f"quantization_config has the method {method!r}, supported: 'fp8' (block-scaled)")
    block = quantisation.get("weight_block_size") or list(TensorFormat.block)
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise fields.fail(f"weight_block_size is {block!r}, expected two whole numbers such as [128, 128]")
    return block[0], block[1]


# The rotary embedding: `rope_theta` with `rope_scaling` (DeepSeek's files, transformers 4), or transformers 5's `rope_parameters`, which
# holds both. Every version reads the former, so that is what is written.


def _rope_to_hf(config: ModelConfig) -> dict:
    yarn = config.yarn
    if config.llama3:
        return {"rope_theta": config.rope_theta, "rope_scaling": {"rope_type": "llama3", **asdict(config.llama3)}}
    if config.linear_rope_factor != 1.0:
        scaling = {"type": "linear", "rope_type": "linear", "factor": config.linear_rope_factor}
        return {"rope_theta": config.rope_theta, "rope_scaling": scaling}
    if yarn is None:
        return {"rope_theta": config.rope_theta, "rope_scaling": None}
    scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_max_position_embeddings,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    if config.attention == "mla":
        scaling |= {"mscale": yarn.mscale, "mscale_all_dim": yarn.mscale_all_dim}
    else:
        # Outside DeepSeek's attention nothing multiplies the softmax scale, so both temperatures go into the one factor on cos and sin.
        scaling["attention_factor"] = yarn_temperature(yarn)
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def _rope_from_hf(fields: Fields, family: Family, config: ModelConfig) -> ModelConfig:
    """The config with its rotary embedding's fields set. Raises UserError for other kinds of scaling."""
    raw = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.fail("the rotary parameters are not an object")
    rope = Fields(raw, fields.where)
    if "partial_rotary_factor" in family.keys:
        share = rope.get("partial_rotary_factor", float, config.partial_rotary_factor)
        if not 0 < share <= 1:
            raise fields.fail(f"partial_rotary_factor is {share}, expected a share of a head, more than 0 and at most 1")
        config = replace(config, partial_rotary_factor=share)
    else:
        for place in (rope,) if family.attention == "mla" else (fields, rope):
            place.only("partial_rotary_factor", OPTIONAL["partial_rotary_factor"])
    config = replace(config, rope_theta=rope.get("rope_theta", float, fields.get("rope_theta", float, 10000.0)))
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return config
    if kind == "linear":
        return replace(config, linear_rope_factor=rope.get("factor", float))
    if kind == "llama3":
        original = rope.get("original_max_position_embeddings", int, config.max_position_embeddings)
        waves = (rope.get("low_freq_factor", float), rope.get("high_freq_factor", float))
        return replace(config, llama3=Llama3RopeConfig(rope.get("factor", float), *waves, original))
    if kind != "yarn":
        raise fields.unsupported(f"the rotary embedding is of type {kind!r}, supported: 'default', 'linear', 'llama3', 'yarn'")
    rope.only("truncate", True)
    original = rope.get("original_max_position_embeddings", int, config.max_position_embeddings)
    yarn = YarnConfig(
        factor=rope.get("factor", float, config.max_position_embeddings / max(original, 1)),
        original_max_position_embeddings=original,
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        mscale=rope.get("mscale", float, 0.0),
        mscale_all_dim=rope.get("mscale_all_dim", float, 0.0),
    )
    for key in ("mscale", "mscale_all_dim"):
        if rope.get(key, float, 0.0) < 0:
            raise fields.fail(f"{key} is {raw[key]}, expected 0 or more")
    factor = rope.get("attention_factor", float, _on_cos_sin(yarn))
    if factor <= 0:
        raise fields.fail(f"attention_factor is {factor}, expected more than 0")
    if config.attention == "gqa":
        m = (factor - 1.0) / (0.1 * math.log(yarn.factor)) if yarn.factor > 1.0 else 0.0
        m = m or 1e-9  # a factor of 1; an mscale of 0 would mean that none is given, which is another temperature
        yarn = replace(yarn, mscale=m, mscale_all_dim=m)
        if abs(yarn_temperature(yarn) - factor) > 1e-6:
            raise fields.unsupported(f"attention_factor {factor} cannot be expressed by YaRN's mscale")
    elif abs(factor - _on_cos_sin(yarn)) > 1e-6:
        raise fields.fail(f"attention_factor is {factor}, supported: {_on_cos_sin(yarn)}, which follows from mscale and mscale_all_dim")
    return replace(config, yarn=yarn)


def _on_cos_sin(yarn: YarnConfig) -> float:
    """What transformers multiplies cos and sin by where `attention_factor` is absent."""
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def yarn_temperature(yarn: YarnConfig) -> float:
    """Square root of what YaRN multiplies attention logits by where the whole head is rotated."""
    return _on_cos_sin(yarn) * (yarn_mscale(yarn.factor, yarn.mscale_all_dim) if yarn.mscale_all_dim else 1.0)
