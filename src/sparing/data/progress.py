"""Progress of the data stage on standard error: a bar on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import sys

NAMES = {"scan": "reading", "tokenizer": "training the tokenizer", "tokenise": "tokenising"}


class Bars:
    """Callable as `progress(stage, done, total)` in bytes; a context manager that leaves the terminal tidy."""

    def __init__(self):
        self._tasks: dict[str, int] = {}
        self._bars = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description:>22}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bars = Progress(*columns, console=Console(stderr=True), transient=True)

    def __enter__(self) -> Bars:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_exc) -> None:
        if self._bars:
            self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(NAMES[stage], total=total) if self._bars else 0
            if not self._bars:
                print(f"{NAMES[stage]}: {total / 1e6:,.1f} MB", file=sys.stderr, flush=True)
        if self._bars:
            self._bars.update(self._tasks[stage], completed=done, total=total)
