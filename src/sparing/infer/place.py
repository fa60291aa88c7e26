"""Where a model runs, and in which numbers its weights are kept there."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sparing.base.config import ModelConfig, UserError
from sparing.infer.compiled import fastest, fits, seconds_of
from sparing.kernels.formats import this_machine, warning
from sparing.model.transformer import Transformer

FORMATS = ("auto", "float32", "bfloat16", "int8", "int4")
DEVICES = ("auto", "cpu", "cuda")


class Place(NamedTuple):
    device: str
    weights: str
    plain: str | None
    """Why plain PyTorch computes; None: the compiled step does."""


def slower(weights: str, plain: str | None, device: str) -> str | None:
    """A line for whoever chose a format that this processor is slower at than at float32; None where it isn't."""
    if plain:
        return f"weights {line}" if device == "cpu" and (line := warning(weights, this_machine())) else None
    times = seconds_of(weights) / seconds_of("float32")
    return f"weights {weights}: decoding is {times:.1f} times slower than in float32 here (measured)" if times > 1.2 else None


def settle(c: ModelConfig, device: str, weights: str, network: Transformer | None = None) -> Place:
    """By what there is where it says "auto": a GPU before the processor, there the fastest format that costs no quality worth mentioning.
    network: a model in memory stays where and as it is. Raises UserError for what cannot run here."""
    if network is not None:
        return Place(network.head_weight.device.type, str(network.compute_dtype).removeprefix("torch."), "the model is in memory")
    for name, value, choices in (("weights", weights, FORMATS), ("device", device, DEVICES)):
        if value not in choices:
            raise UserError(f"{name} {value}: choose from {', '.join(choices)}")
    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise UserError("device cuda: PyTorch finds no GPU here; choose cpu")
    device = "cuda" if gpu and device == "auto" and weights in ("auto", "float32", "bfloat16") else device.replace("auto", "cpu")
    plain = "on a GPU" if device == "cuda" else fits(c)
    if weights == "auto":
        weights = fastest() if not plain else "bfloat16" if device == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    if plain and weights not in ("float32", "bfloat16"):
        raise UserError(f"weights {weights}: this model runs in float32 and bfloat16 here ({plain})")
    return Place(device, weights, plain)
