"""Low-rank adapters of Hugging Face's PEFT out and in: `export_peft` writes a folder that PEFT loads, `import_peft` reads one.

Our factors have PEFT's shapes and names (`model.linear.Adaptable`), with three differences. Rows of B that belong to rotated dimensions
are in our order of pairs. The two updates of a layer's experts are `...experts.gate_up_proj_lora_A` and `...experts.down_proj_lora_A`;
PEFT nests one wrapper in the other, so the first is `...experts.base_layer.lora_A` and the second `...experts.lora_A`. And all our updates
have one rank and one scale: smaller ranks are filled up with zeros, other scales are multiplied into B.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparing.base.config import AdapterConfig, ModelConfig, UserError
from sparing.base.files import DamagedError, new_folder
from sparing.base.layers import is_matrix, mixtures, shapes
from sparing.base.run import StoredTensors, factor_name, write_folder
from sparing.interop.families import FAMILIES, family_of
from sparing.interop.hf_config import Fields, read_json
from sparing.interop.hf_tensors import LAYER, Rotary, published_tensors

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BEGINS = "base_model.model."
FUSED = ("gate_up_proj", "down_proj")
"""A layer's experts, in the order in which PEFT wraps them."""
FIXED = {
    "bias": "none", "use_dora": False, "lora_bias": False, "fan_in_fan_out": False, "use_qalora": False, "modules_to_save": None,
    "layer_replication": None, "trainable_token_indices": None, "alora_invocation_tokens": None, "use_bdlora": None, "arrow_config": None,
    "megatron_config": None, "velora_config": None, "kasa_config": None, "monteclora_config": None,
}  # fmt: skip
"""Settings of adapter_config.json that must have this value or none: any other is not a plain low-rank update."""
CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that begin from a changed base: the factors belong to that, not to the published weights."""


def export_peft(
    config: ModelConfig, adapter: AdapterConfig, factors: Mapping[str, Tensor], base: str, out: str | Path, card: str = "",
    chat_template: str | None = None,
) -> None:  # fmt: skip
    """Write a folder that `PeftModel.from_pretrained` loads over the base's export (`--format hf`).

    factors: an adapter run's, by our names. base: its name in adapter_config.json. card: README.md. chat_template: in
    whose form it was trained. Raises UserError: `out` is there and not empty, no transformers type computes this model."""
    out = new_folder(out, "--out")
    rotary, tensors = _rotary(config), {}
    for weight in updated(config):
        for part in "AB":
            tensor = factors[factor_name(weight, part)].float()
            if part == "B" and weight in rotary:
                tensor = rotary[weight].permute(tensor, halves=True)
            tensors[BEGINS + _theirs(weight, part)] = tensor.contiguous()
    # transformers 5 fuses experts, and PEFT takes a module named gate_proj for a part of them, so those of mixtures' dense and shared
    # feed-forwards are named as parameters instead.
    linears = {name.rsplit(".", 2)[-2] for name in updated(config) if name.endswith(".weight")}
    parameters: set[str] = set()
    if mixtures(config):
        feed_forward = {"gate_proj", "up_proj", "down_proj"} & linears
        linears, parameters = (
            linears - feed_forward,
            {f"{name}.weight" for name in feed_forward} | {f"mlp.experts.{name}" for name in FUSED},
        )
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True, "r": adapter.rank,
        "lora_alpha": adapter.alpha, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False, "fan_in_fan_out": False,
        "target_modules": sorted(linears), "target_parameters": sorted(parameters) or None,
    }  # fmt: skip
    files = {CONFIG: json.dumps(settings, indent=2) + "\n", TENSORS: tensors}
    texts = {"README.md": card, "chat_template.jinja": chat_template}
    write_folder(out, files | {name: text for name, text in texts.items() if text})


@dataclass
class Imported:
    """What was in a PEFT folder."""

    adapter: AdapterConfig
    factors: dict[str, Tensor]
    """By our names, float32."""
    base: str
    """What adapter_config.json calls its base; "": nothing."""
    notes: list[str]
    """For the user."""


@dataclass
class _Update:
    """B A of one weight, times `scale`."""

    down: Tensor
    """(rank, in), or (E, rank, in)."""
    up: Tensor
    """(out, rank), or (E, out, rank)."""
    scale: float


def import_peft(folder: str | Path, config: ModelConfig) -> Imported:
    """Read an adapter for a base of the shape `config`. Raises UserError for what is not a plain low-rank update of its linears."""
    folder = Path(folder)
    fields = Fields(read_json(folder / CONFIG), folder / CONFIG)
    scale_of = _scales(fields)
    found, published = _read(folder), updated(config)
    rotary, updates = _rotary(config), {}
    for weight, (down, up, rank) in _assigned(found, published, folder).items():
        if weight in rotary:
            up = rotary[weight].permute(up, halves=False)
        updates[weight] = _Update(down, up, scale_of(weight.removesuffix(".weight"), rank))
    if not updates:
        raise UserError(f"{folder}: has no low-rank update of any linear of this base")
    rank, scale = max(u.down.shape[-2] for u in updates.values()), Counter(u.scale for u in updates.values()).most_common(1)[0][0]
    factors, generator = {}, torch.Generator().manual_seed(0)
    for weight, shape in published.items():
        experts, (out, columns) = math.prod(shape[:-2]), shape[-2:]
        # What has no update begins as in training: A random, B zero. Zeros in both would never learn.
        down, up = (
            torch.empty(experts, rank, columns).uniform_(-(columns**-0.5), columns**-0.5, generator=generator),
            torch.zeros(experts, out, rank),
        )
        if (update := updates.get(weight)) is not None:
            own = update.down.shape[-2]
            down[:, own:] = 0.0
            down[:, :own], up[..., :own] = update.down, update.up * (update.scale / scale)
        factors[factor_name(weight, "A")] = down.flatten(0, 1)
        factors[factor_name(weight, "B")] = up.permute(1, 2, 0).flatten(1).contiguous()
    notes = [] if len(updates) == len(published) else [f"it updates {len(updates)} of {len(published)} weights; the others begin with none"]
    return Imported(AdapterConfig(rank, rank * scale, "float32"), factors, fields.get("base_model_name_or_path", str, ""), notes)


def updated(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights that a run of ours updates, by name: those of `model.low_rank.adaptable`, in the decoder's layers."""
    inside = {
        name: shape for name, shape in shapes(config).items() if (match := LAYER.fullmatch(name)) and int(match[1]) < config.num_layers
    }
    return {name: shape for name, shape in inside.items() if is_matrix(name, len(shape))}


def _rotary(config: ModelConfig) -> dict[str, Rotary]:
    """Rows of B that the published order has elsewhere, by weight."""
    published = published_tensors(config, FAMILIES[family_of(config)].halves)
    return {one.ours: one.rotary for one in published if one.rotary}


def _theirs(weight: str, part: str) -> str:
    """PEFT's name of a factor, without `base_model.model.`."""
    stem, _, last = weight.rpartition(".")
    return f"{stem}{'.base_layer' if last == FUSED[0] else ''}.lora_{part}.weight"


def _scales(fields: Fields):
    """-> scale of a weight's update, by its name and rank. Raises UserError for settings that are not a plain low-rank update."""
    raw = fields.raw
    if raw.get("peft_type") != "LORA":
        raise fields.fail(f"peft_type is {raw.get('peft_type')!r}, supported: 'LORA'")
    for key, value in FIXED.items():
        if raw.get(key):
            fields.only(key, value)
    begun = raw.get("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(CHANGES_THE_BASE):
        raise fields.fail(f"init_lora_weights is {begun!r}, which changes the base: convert the adapter to plain LoRA with PEFT first")
    alpha, ranked = fields.get("lora_alpha", float), fields.get("use_rslora", bool, False)
    if alpha <= 0:
        raise fields.fail(f"lora_alpha is {alpha:g}, expected more than 0")
    patterns = {}
    for pattern, value in fields.get("alpha_pattern", dict, {}).items():
        try:
            patterns[re.compile(rf"(.*\.)?({pattern})$")] = float(value)
            if not 0 < float(value) < math.inf:
                raise ValueError
        except (re.error, TypeError, ValueError):
            raise fields.fail(f"alpha_pattern {pattern!r}: {value!r} cannot be used") from None

    def scale(weight: str, rank: int) -> float:
        own = next((value for pattern, value in patterns.items() if pattern.match(weight)), alpha)
        return own / (math.sqrt(rank) if ranked else rank)

    return scale


def _read(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{module: {"A": tensor, "B": tensor}} of adapter_model.safetensors, modules by their names in the base."""
    if not (folder / TENSORS).exists():
        pickled = (folder / "adapter_model.bin").exists()
        raise UserError(
            f"{folder}: there is no {TENSORS}" + (", and adapter_model.bin is a pickle, which is not loaded" if pickled else "")
        )
    try:
        tensors = dict(StoredTensors(folder / TENSORS))
    except DamagedError as error:
        raise UserError(str(error)) from None
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_(A|B)(?:\.default)?\.weight", name)
        if match is None:
            raise UserError(f"{folder}: tensor {name} is no factor of a plain low-rank update")
        if tensor.ndim != 2 or not tensor.is_floating_point():
            raise UserError(f"{folder}: tensor {name} is {list(tensor.shape)} of {tensor.dtype}, expected two dimensions of floats")
        if not tensor.numel() or not tensor.isfinite().all():
            raise UserError(f"{folder}: tensor {name} " + ("has NaN or infinity among its values" if tensor.numel() else "is empty"))
        found[match[1]][match[2]] = tensor.float()
    for module, parts in found.items():
        if parts.keys() != {"A", "B"}:
            raise UserError(f"{folder}: {module} has lora_{min(parts)} alone")
    return dict(found)


def _assigned(found: dict, published: dict, folder: Path) -> dict[str, tuple[Tensor, Tensor, int]]:
    """{our weight: (A, B, the rank that its scale is of)}; those of experts are (E, rank, in) and (E, out, rank). Raises UserError for what
    has no place or another shape."""
    assigned: dict[str, tuple[Tensor, Tensor, int]] = {}
    single: dict[str, dict[tuple[int, str], tuple[Tensor, Tensor]]] = defaultdict(dict)

    def fits(weight: str, down: Tensor, up: Tensor) -> bool:
        *_, out, columns = published[weight]
        experts = math.prod(published[weight][:-2])
        return down.shape[1] == columns and up.shape[0] == out and down.shape[0] == up.shape[1] and down.shape[0] % experts == 0

    for module, parts in found.items():
        down, up = parts["A"], parts["B"]
        stem = re.sub(r"(\.base_layer)+$", "", module)
        one = re.fullmatch(r"(.+\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj", module)
        if one:
            single[one[1]][int(one[2]), one[3]] = down, up
            continue
        choices = [f"{stem}.{name}" for name in FUSED] if stem.endswith(".mlp.experts") else [f"{stem}.weight"]
        choices = [name for name in choices if name in published]
        if not choices:
            raise UserError(f"{folder}: it updates {stem}, which is none of the linears of this base that can have an update")
        weight = next((name for name in choices if fits(name, down, up) and name not in assigned), None)
        if weight is None:
            wanted = " or ".join(str(list(published[name])) for name in choices)
            raise UserError(
                f"{folder}: factors of {stem} are {list(down.shape)} and {list(up.shape)}, the base has {wanted}: another base?"
            )
        if len(published[weight]) == 3:
            experts = published[weight][0]
            down, up = down.unflatten(0, (experts, -1)), up.unflatten(1, (-1, experts)).permute(2, 0, 1)
        assigned[weight] = down, up, down.shape[-2]
    for stem, parts in single.items():
        assigned |= _fused(stem, parts, published, folder)
    return assigned


def _fused(stem: str, parts: dict, published: dict, folder: Path) -> dict[str, tuple[Tensor, Tensor, int]]:
    """Updates of single experts, as transformers 4 had them, as two of all experts: the ranks of gate and up add up."""
    names = [f"{stem}.{name}" for name in FUSED]
    if names[0] not in published:
        raise UserError(f"{folder}: it updates {stem}, which this base does not have")
    (experts, double, hidden), (_, _, width) = (published[name] for name in names)
    rank, made = max(len(down) for down, _ in parts.values()), {}
    down_all, up_all = torch.zeros(experts, 2 * rank, hidden), torch.zeros(experts, double, 2 * rank)
    narrow_down, narrow_up = torch.zeros(experts, rank, width), torch.zeros(experts, hidden, rank)
    for (e, kind), (down, up) in parts.items():
        out, columns = (hidden, width) if kind == "down" else (width, hidden)
        if e >= experts or down.shape != (len(down), columns) or up.shape != (out, len(down)) or len(down) != rank:
            raise UserError(f"{folder}: factors of {stem}.{e}.{kind}_proj are {list(down.shape)} and {list(up.shape)}: another base?")
        if kind == "down":
            narrow_down[e], narrow_up[e] = down, up
        else:
            at = 0 if kind == "gate" else 1
            down_all[e, at * rank : (at + 1) * rank], up_all[e, at * width : (at + 1) * width, at * rank : (at + 1) * rank] = down, up
    if any(kind != "down" for _, kind in parts):
        made[names[0]] = down_all, up_all, rank
    if any(kind == "down" for _, kind in parts):
        made[names[1]] = narrow_down, narrow_up, rank
    return made
