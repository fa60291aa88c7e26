"""What the figures of `sparing bench precision` share: storage in few bits, and whether 8-bit arithmetic is fast here."""

from __future__ import annotations

from dataclasses import replace

from sparing.base.config import PrecisionConfig
from sparing.kernels.formats import this_machine, warning
from sparing.precision.eight_bit import fastest_kind, speed_note

SMALL = PrecisionConfig(weights="bfloat16", moments="int8", activations="int8")


def few_bits(linear: str, dtype: str) -> PrecisionConfig:
    """Storage in few bits, with products in `linear`. Where training computes in float32, activations stay as they are."""
    return replace(SMALL, linear=linear, activations=SMALL.activations if dtype == "bfloat16" else "full")


def fast_kind(device: str) -> str | None:
    """The 8-bit format that makes training faster here, if any. On a CPU its compiled products need training in bfloat16."""
    return fastest_kind(device) if this_machine().training_dtype(device) == "bfloat16" else None


def slow_kind(kind: str, device: str) -> str | None:
    """A warning for users who ask for 8-bit products that are not fast here; None where they are."""
    if kind == "none" or kind == fast_kind(device):
        return None
    return (warning(kind, this_machine()) if device == "cpu" else None) or speed_note(kind, device)
