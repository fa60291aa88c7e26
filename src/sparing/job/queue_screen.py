"""How a queue of jobs tells what it does: lines, a table on a terminal, the summary at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sparing.base.config import Budget
from sparing.base.messages import say
from sparing.budget.units import format_budget

RULE = "--- "
"""Begins the line in a log that says when and how its job was started."""


def lines(summary: dict[str, Any]) -> list[str]:
    """A summary for people."""
    rows = []
    for row in summary["jobs"]:
        met = {None: "", True: "in time", False: "LATE"}[row["deadline_met"]]
        took = (clock(row["start"]), clock(row["end"]), f"{row['core_s']:.0f}") if row["start"] is not None else ("", "", "")
        rows.append((row["name"], row["status"], *took, str(row["preemptions"] or ""), met))
    found = table(("job", "status", "start", "end", "core s", "stopped", "deadline"), rows)
    share = f"; cores {summary['busy']:.1%} busy until the last job started" if summary["busy"] is not None else ""
    return [*found, f"{summary['done']} of {len(rows)} jobs are done, {summary['failed']} failed{share}"]


class Screen:
    """Tells what happens: lines, and on a terminal below them a table of all jobs."""

    def __enter__(self) -> Screen:
        self.live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self.live.start()
        return self

    def __exit__(self, *_exc) -> None:
        if self.live:
            self.live.stop()

    def tell(self, line: str) -> None:
        line = f"{datetime.now():%H:%M:%S} {line}"
        if self.live:
            self.live.console.print(line, markup=False, highlight=False)
        else:
            say(line)

    def show(self, progress: Callable[[], list[tuple[str, ...]]]) -> None:
        if not self.live:
            return
        from rich.table import Table
        from rich.text import Text

        table = Table("job", "state", "cores", "ran", "left", "last said", box=None)
        for row in progress():
            table.add_row(*(Text(cell, no_wrap=True, overflow="ellipsis") for cell in row))
        self.live.update(table, refresh=True)


def last_line(log: Path) -> str:
    """What a log says last, but for our own line above each start."""
    try:
        with open(log, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    said = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip() and not line.startswith(RULE)]
    return "".join(char if char.isprintable() else " " for char in said[-1])[:200] if said else ""


def clock(seconds: float) -> str:
    """`1h5m`, to the second; from an hour on to the minute."""
    whole = max(0, round(seconds))
    return format_budget(Budget(whole - whole % 60 if whole >= 3600 else whole, "s"))


def ranges(numbers: Sequence[int]) -> str:
    """`0-2, 5`."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[at]) for row in (head, *rows)) for at in range(len(head))]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
