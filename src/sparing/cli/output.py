"""Prints results of verbs, for people and for programs."""

from __future__ import annotations

import json
import sys
from typing import Any, TextIO

from sparing.base.files import to_json


def print_json(value: Any, out: TextIO | None = None) -> None:
    """One line, by default on standard output; characters that its encoding lacks are escaped as JSON escapes them."""
    out = out or sys.stdout
    text = json.dumps(to_json(value), ensure_ascii=False)
    try:
        text.encode(out.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(to_json(value))
    print(text, file=out, flush=True)


def show(result: dict) -> None:
    """A result for people: one line a value, completions and tables last."""
    for key, value in result.items():
        if not isinstance(value, dict | list):
            print(f"{key:>16}  {f'{value:.6g}' if isinstance(value, float) else value}")
    for row in result.get("rows", []):
        print("  ".join(f"{key} {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in row.items()))
    for sample in result.get("samples", []):
        print(f"\n--- {sample['prompt']!r} goes on:\n{sample['prompt']}{sample['text']}")


def show_plan(result: dict) -> None:
    """A prediction for people: one line a number with its interval, then alternatives and the recipe."""
    print(f"on {result['machine']}" + (f", budget {result['budget']}" if "budget" in result else ""))
    for name, number in _flat(result):
        if number["value"] is None:
            print(f"{name:>32}  unknown: {number['source']}")
            continue
        span = "" if number["low"] == number["high"] else f"  ({number['low']:.4g} to {number['high']:.4g})"
        print(f"{name:>32}  {number['value']:.6g}{span}  [{number['source']}]")
    for name, stage in result.get("stages", {}).items():
        took = f"{stage['time_s']['value']:,.4g} s" if "time_s" in stage else f"{stage['device_hours']['value']:,.0f} device-hours"
        print(f"{name:>32}  {took}")
    for row in result.get("alternatives", []):
        if "problem" in row:
            print(f"{row['name']:>32}  {row['problem']}")
        else:
            numbers = f"bpb {row['bpb']['value']:.3f}  ${row['cost_usd']['value']:.3g}  {row['time_s']['value']:.4g} s"
            more = f"{row['energy_kwh']['value']:.3g} kWh  {row['memory_bytes']['value'] / 1e9:.2f} GB"
            print(f"{row['name']:>32}  {numbers}  {more}" + (f"  ({row['note']})" if "note" in row else ""))
    if "buy" in result:
        print(f"\nbuy: {result['buy']}: {result['why']}")
    if "recipe" in result:
        print(f"\n{result['recipe']}", end="")


def _flat(numbers: dict, prefix: str = ""):
    """(dotted name, number) of every {"value", "low", "high", "source"} in the nest."""
    for key, value in numbers.items():
        if isinstance(value, dict) and set(value) == {"value", "low", "high", "source"}:
            yield prefix + key, value
        elif isinstance(value, dict) and key in ("parameters", "memory_bytes"):
            yield from _flat(value, f"{prefix}{key}.")
