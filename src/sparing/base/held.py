"""What frozen weights are held in while low-rank factors learn beside them (`adapter.base`), weight by weight.

Without torch: plans read it."""

from __future__ import annotations

from math import prod

from sparing.base.layers import EMBED, HEAD, is_matrix

PANEL, GROUP = 16, 32
"""Rows and columns of a block of int4 (`base.int4_groups`)."""
BLOCK_BYTES = PANEL * GROUP // 2 + 2 * PANEL
FINE = tuple(f"{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj"))
"""Small beside the rest of a layer, and what rounding them costs is not: int8 in int4, as the engine packs them."""


def held_as(name: str, shape: tuple[int, ...], base: str) -> str:
    """float32, bfloat16, int8 or int4: what a weight is held in. Norms, biases and routers are float32. In int4
    embedding, head and the inputs of attention are int8, and so is what does not have whole groups in a row."""
    if not is_matrix(name, len(shape)):
        return "float32"
    if base == "int4" and (name in (EMBED, HEAD) or name.endswith(FINE) or shape[-1] % GROUP):
        return "int8"
    return base


def held_bytes_of(shape: tuple[int, ...], kind: str) -> int:
    """Of a weight (..., rows, columns) held so, scales included."""
    if kind == "int4":
        return prod(shape[:-2]) * -(-shape[-2] // PANEL) * (shape[-1] // GROUP) * BLOCK_BYTES
    if kind == "int8":
        return prod(shape) + 4 * prod(shape[:-1])
    return prod(shape) * {"float32": 4, "bfloat16": 2}[kind]
