"""Results of a figure: rows of one schema, a table of them, and the folder that keeps results of long runs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path

from sparing.base.files import output_folder, write_atomic
from sparing.base.hardware import machine as this_machine

ROW_KEYS = ("name", "ours", "peer", "peer_name", "ratio", "unit", "runs", "machine")


def paths_of(value: str | Sequence[str]) -> list[str]:
    """The command line gives one path as text; callers from Python may give several."""
    return [value] if isinstance(value, str) else [str(path) for path in value]


def row(
    name: str, ours: float | None, unit: str, peer: float | None = None, peer_name: str | None = None, runs: int = 1, **more: object
) -> dict:
    """One line of `bench ... --json`: our value beside the peer's or the required one. `ratio` is ours / peer.

    more: further keys. `formats` is the number format of each side and of the peak, `cut_short` what the time limit left out.
    """
    ratio = ours / peer if ours is not None and peer else None
    values = (name, ours, peer, peer_name, ratio, unit, runs, machine())
    return dict(zip(ROW_KEYS, values, strict=True)) | more


@cache
def machine() -> str:
    """This machine in a few words: processor, usable cores, GPUs, torch."""
    import torch

    m = this_machine()
    gpus = "".join(f", {gpu.name}" for gpu in m.gpus)
    return f"{m.cpu}, {m.cores_physical} cores{gpus}, torch {torch.__version__}"


@contextmanager
def results_folder(out: str | None) -> Iterator[Path]:
    """The folder `out`, made where it is not there; without one, a temporary folder."""
    temporary = tempfile.TemporaryDirectory(prefix="sparing-bench-")
    with temporary if out is None else nullcontext(output_folder(str(out), "--out")) as path:
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        yield folder


def stored_result(file: Path, measure: Callable[[], dict]) -> dict:
    """The result that `file` holds. Where there is no such file, `measure` is called and its result is written there."""
    if not file.exists():
        write_atomic(file, json.dumps(measure(), indent=1))
    return json.loads(file.read_text())


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
