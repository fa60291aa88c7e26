"""Results of verbs, for people and for programs. Belongs to cli.py."""

from __future__ import annotations

import math
from typing import Any


def to_json(value: Any) -> Any:
    """What JSON can say: not-a-number and infinity become null."""
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else to_json(value.item()) if hasattr(value, "item") else str(value)


def show(result: dict) -> None:
    """A result for people: one line a value, completions and tables last."""
    for key, value in result.items():
        if not isinstance(value, dict | list):
            print(f"{key:>16}  {f'{value:.6g}' if isinstance(value, float) else value}")
    for row in result.get("rows", []):
        print("  ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in row.items()))
    for sample in result.get("samples", []):
        print(f"\n--- {sample['prompt']!r} goes on:\n{sample['prompt']}{sample['text']}")
