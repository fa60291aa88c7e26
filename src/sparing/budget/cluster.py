"""Predicts training on many devices from published kernel figures: pipeline bubbles, expert all-to-all, tensor parallelism, ZeRO-1.

Times are device-seconds of one token unless said otherwise: what one device would need if it did all of the token's work. Assumed: stages
of a pipeline are balanced, every micro-batch has 4,096 tokens (longer sequences are divided), nothing fails. Bubbles: DeepSeek-V3 (arXiv
2412.19437) table 2; interleaving: arXiv 2104.04473 §2.2. `docs/planning.md` says what comes out for published runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from sparing.account.prices import Device, Rates, device, kernels, rates_for
from sparing.base.config import ModelConfig, UserError
from sparing.base.config_file import check_section, nearest
from sparing.base.hardware import Machine
from sparing.base.layers import layers, mixtures
from sparing.budget.estimate import Estimate, around, exactly
from sparing.budget.flops import forward_products, parameters, train_flops
from sparing.budget.memory import saved_per_token
from sparing.budget.predict import as_json, counted, spent

MICRO_TOKENS = 4096
REFERENCE = "h800"
COMPUTING_SMS = 112 / 132
"""Share of the device that computes while an overlapped all-to-all takes the rest (V3 §3.2.2: 20 of 132 SMs)."""
EFFICIENCY = 0.839
"""What this model says of V3's pre-training / what it took (2.664 M H800-hours). The only fitted number here."""
SPREAD = 0.25
"""Half-width of stated hours: what the published runs that were not fitted stay within (docs/planning.md)."""
WATTS_SPREAD = 0.2
SOURCE = f"kernel figures of the H800, efficiency {EFFICIENCY} fitted on DeepSeek-V3 (budget/cluster.py)"
FIELDS = {"tokens", "usd_per_hour", "hours", "hours_of", "layout", "stage"}
STAGE_FIELDS = {"name", "tokens", "extra", "seq_len", "batch_size"}


@dataclass(frozen=True)
class Layout:
    """How a run is spread over devices."""

    machine: str = "h800"
    devices: int = 2048
    pipeline: int = 1
    tensor: int = 1
    expert: int = 1
    """Devices that share a layer's experts."""
    virtual: int = 1
    """Pipeline stages a device (interleaved 1F1B)."""
    schedule: Literal["1f1b", "zb", "dualpipe"] = "1f1b"
    """dualpipe also hides the all-to-all behind computation."""
    format: Literal["bf16", "fp8"] = "bf16"
    attention: Literal["old", "new"] = "new"
    """old: FlashAttention-2 kernels."""
    recompute: Literal["none", "up", "full"] = "none"
    """up: MLA's up-projections; full: the whole layer."""

    def check(self) -> None:
        """Raises UserError where the divisions do not come out even."""
        group = self.pipeline * self.tensor
        if self.devices % group or self.devices < self.expert * self.pipeline:
            near = max(group, round(self.devices / group) * group, self.expert * self.pipeline)
            raise UserError(f"{self.devices} devices cannot hold {self.pipeline} stages x {max(self.tensor, self.expert)}; nearest: {near}")


@dataclass(frozen=True)
class LayerTime:
    """Device-seconds of one token in the whole model, by pass."""

    forward: float
    backward: float
    """Weight gradients included."""
    weights: float
    """The weight gradients alone: what a zero-bubble schedule can put off."""
    exposed: float
    """Communication that nothing hides; in forward and backward already."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step."""

    work: float
    bubble: float
    optimizer: float
    tokens: float

    @property
    def total(self) -> float:
        return self.work + self.bubble + self.optimizer


def _widths(c: ModelConfig) -> float:
    """Numbers of a token's activations in all layers: residual and norms, heads, expert rows."""
    total = 0.0
    for layer in layers(c):
        a, f = layer.attention, layer.feed_forward
        rows = f.chosen + f.shared if layer.mixture else 1
        total += 4 * c.hidden_size + (a.heads + a.kv_heads) * (a.key + a.value) + rows * (2 * c.hidden_size + 3 * f.width)
    return total


def all_to_all(c: ModelConfig, layout: Layout, rates: dict[str, float], scale: float) -> float:
    """Seconds of dispatch and combine of one token in one layer, forward and backward.

    A token goes once to every node (inside one node: to every device) that holds one of its experts, group-limited to `topk_group`.
    The backward pass dispatches the combine's gradient and combines the dispatch's: the same volume. Combine is 16 bit.
    These are the published kernels. Ours send a row to each chosen expert (`budget.ranks.exchanged`).
    """
    if layout.expert == 1 or not mixtures(c):
        return 0.0
    inside = layout.expert <= 8
    places = layout.expert if inside else layout.expert / 8
    copies = min(places, c.num_experts_per_tok, places * c.topk_group / c.n_group if c.n_group > 1 else places)
    first, second = ("node_dispatch", "node_combine") if inside else ("dispatch", "combine")
    sent = c.hidden_size * (1 if layout.format == "fp8" else 2)
    return 2 * copies * (sent / rates[first] + 2 * c.hidden_size / rates[second]) / scale


def layer_time(c: ModelConfig, seq_len: int, layout: Layout) -> LayerTime:
    """A token's work, from kernel figures of the H800 scaled to the layout's device."""
    on, reference, rates = device(layout.machine), device(REFERENCE), kernels(REFERENCE)
    if not on.peak[layout.format]:
        raise UserError(f"{layout.machine} has no {layout.format} products; nearest: bf16")
    hidden = layout.schedule == "dualpipe" and layout.expert > 1
    speed = on.peak[layout.format] / reference.peak[layout.format] * (COMPUTING_SMS if hidden else 1.0)
    speed16 = on.peak["bf16"] / reference.peak["bf16"] * (COMPUTING_SMS if hidden else 1.0)
    f, old = layout.format, "old_" if layout.attention == "old" else ""
    common, routed, scores, head = forward_products(c, seq_len)
    other = _widths(c) * rates[f"bytes_per_number_{f}"] / on.bandwidth

    linear = common / (rates[f"gemm_{f}"] * speed) + routed / (rates[f"grouped_{f}"] * speed)
    heads = head / (rates["gemm_bf16"] * speed16)
    scored = scores / (rates[f"{old}attention_forward"] * speed16)
    forward = linear + heads + scored + other / 3
    gradient = (common + routed) / (rates["wgrad_fp8"] * speed) if f == "fp8" else linear
    # The backward pass of attention repeats the scores: five products for the forward pass's two.
    backward = linear + gradient + 2 * heads + 2.5 * scores / (rates[f"{old}attention_backward"] * speed16) + 2 * other / 3
    if layout.recompute == "full":
        backward += forward - heads
    elif layout.recompute == "up":
        backward += 2.0 * sum(layer.attention.expansions for layer in layers(c)) / (rates[f"gemm_{f}"] * speed)

    exchange = len(mixtures(c)) * all_to_all(c, layout, rates, _wires(on, reference, layout.expert))
    if hidden:
        exposed = max(0.0, exchange - forward - backward)
    else:  # the shared experts' products run meanwhile (DeepSeek-V2 §3.1.3)
        shared = 2.0 * sum(layer.feed_forward.shared * layer.feed_forward.expert for layer in mixtures(c))
        exposed = max(0.0, exchange - 3 * shared / (rates[f"gemm_{f}"] * speed))
    # Tensor and sequence parallelism: two gathers and two scatters a layer and pass, and one gather more for the weight gradients.
    volume = c.hidden_size * 2 * (layout.tensor - 1) / layout.tensor
    exposed += len(layers(c)) * layout.tensor * 9 * volume / (rates["link_share"] * on.link) if layout.tensor > 1 else 0.0
    return LayerTime(forward + exposed / 3, backward + 2 * exposed / 3, gradient + heads, exposed)


def _wires(on: Device, reference: Device, expert: int) -> float:
    return on.link / reference.link if expert <= 8 else on.network / reference.network


def bubble_time(layout: Layout, forward: float, backward: float, weights: float) -> float:
    """Idle seconds of a device in a step; forward, backward (weights included), weights: of one stage's micro-batch.

    1F1B: (PP-1)(F+B); interleaved: the same over `virtual`; zero bubble: (PP-1)(F+B-2W); DualPipe: (PP/2-1)(F&B+B-3W).
    """
    if layout.schedule == "dualpipe":
        return max(0.0, (layout.pipeline / 2 - 1) * (forward + 2 * backward - 3 * weights))
    if layout.schedule == "zb":
        return max(0.0, (layout.pipeline - 1) * (forward + backward - 2 * weights))
    return (layout.pipeline - 1) * (forward + backward) / layout.virtual


def held_parameters(c: ModelConfig, layout: Layout) -> tuple[float, float]:
    """Weights that one device holds: (experts, all others)."""
    counts = parameters(c)
    experts = sum(layer.feed_forward.routed for layer in mixtures(c))
    others = counts.total + counts.mtp - experts
    return experts / (layout.pipeline * max(layout.expert, layout.tensor)), others / (layout.pipeline * layout.tensor)


def step_time(c: ModelConfig, seq_len: int, batch_sequences: float, layout: Layout) -> StepTime:
    """One optimizer step of `batch_sequences` sequences, over all devices."""
    layout.check()
    on, t = device(layout.machine), layer_time(c, seq_len, layout)
    ranks = layout.devices / (layout.pipeline * layout.tensor)
    tokens = batch_sequences * seq_len
    micro = tokens / ranks / MICRO_TOKENS
    if micro < 1:
        least = ranks * MICRO_TOKENS / seq_len
        raise UserError(
            f"{batch_sequences:g} sequences of {seq_len} are no micro-batch for each of {ranks:g} ranks; nearest batch: {least:g}"
        )
    stage = MICRO_TOKENS / (layout.pipeline * layout.tensor)
    bubble = bubble_time(layout, t.forward * stage, t.backward * stage, t.weights * stage)
    experts, others = held_parameters(c, layout)
    # ZeRO-1: float32 gradients are scattered among the ranks, 16-bit weights gathered; its own part of the moments is read and written.
    wire = kernels(REFERENCE)["link_share"] * on.network
    optimizer = (experts * (layout.devices > layout.expert * layout.pipeline) + others * (ranks > 1)) * 6 / wire
    optimizer += (experts * layout.expert * layout.pipeline / layout.devices + others / ranks) * 24 / on.bandwidth
    return StepTime(tokens / layout.devices * (t.forward + t.backward), bubble, optimizer, tokens)


def device_hours(c: ModelConfig, tokens: float, seq_len: int, batch_sequences: float, layout: Layout, efficiency: float = 1.0) -> float:
    """Hours of one device times devices for `tokens`; efficiency 1: nothing fitted."""
    step = step_time(c, seq_len, batch_sequences, layout)
    return tokens / step.tokens * step.total * layout.devices / 3600 / efficiency


# the plan of a published run: a model, a layout and its stages, as a preset states them


def layout_of(section: dict, where: str) -> Layout:
    """Raises UserError for a field or value that a layout does not have."""
    return Layout(**check_section(section, Layout, where))


def stages(c: ModelConfig, seq_len: int, batch: int, section: dict, layout: Layout) -> list[tuple[str, float, Estimate]]:
    """(name, tokens, device hours): pre-training (less the stages carved out of it), the named stages, and hours that are given."""
    for row in section.get("stage", []):
        for field in row.keys() - STAGE_FIELDS:
            raise UserError(f"[[plan.stage]]: unknown key {field}; nearest: {nearest(field, STAGE_FIELDS)}")
    carved = sum(row["tokens"] for row in section.get("stage", []) if not row.get("extra"))
    rows = [{"name": "pre-training", "tokens": section["tokens"] - carved}, *section.get("stage", [])]
    result = []
    for row in rows:
        hours = device_hours(c, row["tokens"], row.get("seq_len", seq_len), row.get("batch_size", batch), layout, EFFICIENCY)
        result.append((row["name"], row["tokens"], around(hours, SPREAD, SOURCE)))
    if "hours" in section:
        result.append((section.get("hours_of", "other"), 0.0, exactly(section["hours"], "an input of the preset")))
    return result


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
    rates = _rates(layout, section, country)
    memory = memory_of(c, seq_len, layout)
    total, limit = sum(memory.values()), device(layout.machine).memory_bytes
    # The estimate is rough: only what is clearly too much is refused.
    if total / (1 + SPREAD) > limit:
        more = layout.devices * 2 ** max(1, round(total / limit) - 1)
        raise UserError(f"{total / 1e9:.0f} GB on a device of {limit / 1e9:.0f} GB; nearest: twice the pipeline stages on {more} devices")
    rows = stages(c, seq_len, batch, section, layout)
    hours = Estimate(*(sum(getattr(each, bound) for _, _, each in rows) for bound in ("value", "low", "high")), SOURCE)
    tokens = sum(tokens for _, tokens, _ in rows)
    time_s = hours.times(3600 / layout.devices)
    unknown = {"value": None, "low": None, "high": None, "source": "no law of ours reaches models of this size"}
    numbers = as_json(
        {
            **counted(c),
            "flops": exactly(tokens * train_flops(c, seq_len), "counted, times tokens"),
            "tokens": exactly(tokens, "the preset"),
            "memory_bytes": {
                **{part: around(value, SPREAD, "a device's share") for part, value in memory.items()},
                "total": around(total, SPREAD, "a device's share"),
            },
            "time_s": time_s,
            "device_hours": hours,
            **spent(hours, rates, WATTS_SPREAD, rates.sources["usd_per_hour"]),
        }
    )
    shown = {name: {"tokens": tokens, "device_hours": hours.to_dict()} for name, tokens, hours in rows}
    return {**numbers, "bpb": unknown, "machine": f"{layout.devices} x {layout.machine}", "stages": shown}


def _rates(layout: Layout, section: dict, country: str | None) -> Rates:
    anywhere = Machine("", "", 1, 1, 0, True)
    rates = rates_for(anywhere, layout.machine, country, "on_demand")
    if "usd_per_hour" in section:
        sources = {**rates.sources, "usd_per_hour": "the preset"}
        return replace(rates, usd_per_hour=section["usd_per_hour"], sources=sources)
    return rates
