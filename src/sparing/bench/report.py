"""What every figure hands back: rows of one schema, and the same as a table for people."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from sparing.base.hardware import machine as this_machine

ROW_KEYS = ("name", "ours", "peer", "peer_name", "ratio", "unit", "runs", "machine")


def paths_of(value: str | Sequence[str]) -> list[str]:
    """The command line hands over one path as text; callers from Python may give several."""
    return [value] if isinstance(value, str) else [str(path) for path in value]


def row(
    name: str, ours: float | None, unit: str, peer: float | None = None, peer_name: str | None = None, runs: int = 1, **more: object
) -> dict:
    """One line of `bench … --json`: our value beside the peer's or the aim's, `ratio` = ours / peer; `more` may stand beside them.

    Of `more`: `formats`: the number format of each side and of the peak; `cut_short`: what the limit in time left out.
    """
    ratio = ours / peer if ours is not None and peer else None
    values = (name, ours, peer, peer_name, ratio, unit, runs, machine())
    return dict(zip(ROW_KEYS, values, strict=True)) | more


@cache
def machine() -> str:
    """This machine in a few words: processor, cores that may be used, GPUs, torch."""
    import torch

    found = this_machine()
    gpus = "".join(f", {gpu.name}" for gpu in found.gpus)
    return f"{found.cpu}, {found.cores_physical} cores{gpus}, torch {torch.__version__}"


def print_table(title: str, rows: list[dict]) -> None:
    """The rows as a table on standard error (standard output belongs to --json)."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, caption=rows[0]["machine"] if rows else None)
    for column in ("name", "ours", "peer", "ratio", "unit", "runs", "peer is", "formats"):
        table.add_column(column, justify="left" if column in ("name", "unit", "peer is", "formats") else "right")
    for line in rows:
        numbers = [_short(line[key]) for key in ("ours", "peer", "ratio")]
        formats = ", ".join(f"{side} {format}" for side, format in line.get("formats", {}).items())
        table.add_row(line["name"], *numbers, line["unit"], str(line["runs"]), line["peer_name"] or "", formats)
    Console(stderr=True).print(table)


def _short(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 1 else f"{value:.2f}"


def say(text: str) -> None:
    """A line of progress on standard error."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style="dim")
