"""Plans for many devices: a model, a layout and stages, as a preset states them, through `budget.cluster`."""

from __future__ import annotations

import dataclasses
from typing import Any

from sparing.account.prices import Rates, device, rates_for
from sparing.base.config import ModelConfig, UserError
from sparing.base.config_file import check_section, nearest
from sparing.base.hardware import Machine
from sparing.base.layers import layers
from sparing.budget.cluster import EFFICIENCY, MICRO_TOKENS, Layout, device_hours, held_parameters
from sparing.budget.estimate import Estimate, around, exactly
from sparing.budget.flops import kv_cache_bytes, parameters, train_flops
from sparing.budget.memory import saved_per_token
from sparing.budget.plan import as_json

SPREAD = 0.25
"""Half-width of stated hours: what the published runs that were not fitted stay within (docs/planning.md)."""
SOURCE = f"kernel figures of the H800, efficiency {EFFICIENCY} fitted on DeepSeek-V3 (budget/cluster.py)"
FIELDS = {"tokens", "usd_per_hour", "hours", "hours_of", "layout", "stage"}
STAGE_FIELDS = {"name", "tokens", "extra", "seq_len", "batch_size"}


@dataclasses.dataclass(frozen=True)
class Stage:
    name: str
    tokens: float
    hours: Estimate


def layout_of(section: dict, where: str) -> Layout:
    """Raises UserError for a field or value that a layout does not have."""
    return Layout(**check_section(section, Layout, where))


def stages(c: ModelConfig, seq_len: int, batch: int, section: dict, layout: Layout, efficiency: float = EFFICIENCY) -> list[Stage]:
    """Pre-training (less the stages carved out of it), the named stages, and hours that are given."""
    for row in section.get("stage", []):
        for field in row.keys() - STAGE_FIELDS:
            raise UserError(f"[[plan.stage]]: unknown key {field}; nearest: {nearest(field, STAGE_FIELDS)}")
    carved = sum(row["tokens"] for row in section.get("stage", []) if not row.get("extra"))
    rows = [{"name": "pre-training", "tokens": section["tokens"] - carved}, *section.get("stage", [])]
    found = []
    for row in rows:
        hours = device_hours(c, row["tokens"], row.get("seq_len", seq_len), row.get("batch_size", batch), layout, efficiency)
        found.append(Stage(row["name"], row["tokens"], around(hours, SPREAD, SOURCE)))
    if "hours" in section:
        found.append(Stage(section.get("hours_of", "other"), 0.0, exactly(section["hours"], "an input of the preset")))
    return found


def memory_of(c: ModelConfig, seq_len: int, layout: Layout) -> dict[str, float]:
    """Bytes on one device: 16-bit weights, float32 gradients, its part of masters and moments (ZeRO-1), micro-batches under way."""
    held = sum(held_parameters(c, layout))
    ranks = layout.devices / (layout.pipeline * layout.tensor)
    experts, others = held_parameters(c, layout)
    copies = max(1.0, layout.devices / (layout.pipeline * max(layout.expert, layout.tensor)))
    in_flight = layout.pipeline + 1 if layout.schedule == "dualpipe" else layout.pipeline
    size = 1 if layout.format == "fp8" else 2
    if layout.recompute == "full":
        kept = 2.0 * c.hidden_size * len(layers(c))
    else:
        kept = sum(saved_per_token(layer, seq_len, size, "cuda") for layer in layers(c))
        if layout.recompute == "up":  # MLA's queries, keys and values are made again
            heads = [layer.attention for layer in layers(c) if layer.attention.kind == "mla"]
            kept -= size * sum(a.heads * 2 * (a.key + a.value / 2) for a in heads)
    return {
        "weights": 2.0 * held,
        "gradients": 4.0 * held,
        "optimizer": 12.0 * (experts / copies + others / ranks),
        "activations": in_flight * MICRO_TOKENS * kept / layout.pipeline / layout.tensor,
    }


def plan_stages(c: ModelConfig, seq_len: int, batch: int, section: dict, country: str | None = None) -> dict[str, Any]:
    """The keys of `plan --json` for a run over many devices, and `stages`.

    Raises UserError for what the preset lacks, and where it does not fit the devices.
    """
    for field in section.keys() - FIELDS:
        raise UserError(f"[plan]: unknown key {field}; nearest: {nearest(field, FIELDS)}")
    for field in ("tokens", "layout"):
        if field not in section:
            raise UserError(f"[plan] lacks {field}")
    layout = layout_of(section["layout"], "[plan.layout]: ")
    layout.check()
    counts, rates = parameters(c), _rates(layout, section, country)
    memory = memory_of(c, seq_len, layout)
    total, limit = sum(memory.values()), device(layout.machine).memory_bytes
    # The estimate is rough: only what is clearly too much is refused.
    if total / (1 + SPREAD) > limit:
        more = layout.devices * 2 ** max(1, round(total / limit) - 1)
        raise UserError(f"{total / 1e9:.0f} GB on a device of {limit / 1e9:.0f} GB; nearest: twice the pipeline stages on {more} devices")
    rows = stages(c, seq_len, batch, section, layout)
    hours = Estimate(*(sum(getattr(row.hours, bound) for row in rows) for bound in ("value", "low", "high")), SOURCE)
    tokens = sum(row.tokens for row in rows)
    time_s = hours.times(3600 / layout.devices)
    watts = around(rates.watts_busy, 0.2, f"estimated: {rates.sources['watts']}")
    energy = Estimate(*(getattr(hours, b) * getattr(watts, b) / 1000 * rates.pue for b in ("value", "low", "high")), watts.source)
    cost = Estimate(
        *(getattr(hours, b) * rates.usd_per_hour + getattr(energy, b) * rates.usd_per_kwh for b in ("value", "low", "high")),
        rates.sources["usd_per_hour"],
    )
    counted = "counted from the configuration"
    unknown = {"value": None, "low": None, "high": None, "source": "no law of ours reaches models of this size"}
    numbers = as_json(
        {
            "parameters": {name: exactly(getattr(counts, name), counted) for name in ("total", "active", "mtp")},
            "kv_cache_bytes_per_token": exactly(kv_cache_bytes(c), counted),
            "flops": exactly(tokens * train_flops(c, seq_len), "counted, times tokens"),
            "tokens": exactly(tokens, "the preset"),
            "memory_bytes": {
                **{part: around(value, SPREAD, "a device's share") for part, value in memory.items()},
                "total": around(total, SPREAD, "a device's share"),
            },
            "time_s": time_s,
            "device_hours": hours,
            "energy_kwh": energy,
            "co2e_g": energy.times(rates.gco2e_per_kwh, rates.sources["gco2e_per_kwh"]),
            "cost_usd": cost,
        }
    )
    shown = {row.name: {"tokens": row.tokens, "device_hours": row.hours.to_dict()} for row in rows}
    return {**numbers, "bpb": unknown, "machine": f"{layout.devices} x {layout.machine}", "stages": shown}


def _rates(layout: Layout, section: dict, country: str | None) -> Rates:
    anywhere = Machine("", "", 1, 1, 0, True)
    rates = rates_for(anywhere, layout.machine, country, "on_demand")
    if "usd_per_hour" in section:
        sources = {**rates.sources, "usd_per_hour": "the preset"}
        return dataclasses.replace(rates, usd_per_hour=section["usd_per_hour"], sources=sources)
    return rates
