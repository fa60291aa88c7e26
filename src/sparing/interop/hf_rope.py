"""Rotary parameters of config.json both ways: `rope_theta` with `rope_scaling` (DeepSeek's files, transformers 4) and transformers 5's
`rope_parameters`, which holds both. Written is the former, which every version reads.
"""

from __future__ import annotations

import math
from dataclasses import replace

from sparing.base.config import ModelConfig, YarnConfig
from sparing.interop.hf_fields import Fields
from sparing.model.rope import yarn_mscale


def rope_to_hf(config: ModelConfig) -> dict:
    """-> the keys `rope_theta` and `rope_scaling` of config.json."""
    yarn = config.yarn
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
        scaling["attention_factor"] = _temperature(yarn)
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling}


def rope_from_hf(fields: Fields, config: ModelConfig) -> ModelConfig:
    """The config with `rope_theta` and `yarn` set; UserError for other kinds of scaling."""
    raw = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(raw, dict):
        raise fields.fail("the rotary parameters are not an object")
    rope = Fields(raw, fields.where)
    config = replace(config, rope_theta=rope.get("rope_theta", float, fields.get("rope_theta", float, 10000.0)))
    rope.only("partial_rotary_factor", 1.0)
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return config
    if kind != "yarn":
        raise fields.fail(f"the rotary embedding is of type {kind!r}, supported: 'default', 'yarn'")
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
    factor = rope.get("attention_factor", float, _on_cos_sin(yarn))
    if config.attention == "gqa":
        m = (factor - 1.0) / (0.1 * math.log(yarn.factor)) if yarn.factor > 1.0 else 0.0
        yarn = replace(yarn, mscale=m, mscale_all_dim=m)
        if abs(_temperature(yarn) - factor) > 1e-6:
            raise fields.fail(f"attention_factor {factor} cannot be expressed by YaRN's mscale")
    elif abs(factor - _on_cos_sin(yarn)) > 1e-6:
        raise fields.fail(f"attention_factor is {factor}, supported: {_on_cos_sin(yarn)}, which follows from mscale and mscale_all_dim")
    return replace(config, yarn=yarn)


def _on_cos_sin(yarn: YarnConfig) -> float:
    """What transformers multiplies cos and sin by where `attention_factor` is absent."""
    if yarn.mscale and yarn.mscale_all_dim:
        return yarn_mscale(yarn.factor, yarn.mscale) / yarn_mscale(yarn.factor, yarn.mscale_all_dim)
    return yarn_mscale(yarn.factor, 1.0)


def _temperature(yarn: YarnConfig) -> float:
    """Square root of what YaRN multiplies attention logits by where the whole head is rotated."""
    return _on_cos_sin(yarn) * (yarn_mscale(yarn.factor, yarn.mscale_all_dim) if yarn.mscale_all_dim else 1.0)
